"""A script of plain torch that shows the right numbers: what an upstream bug report needs beside a case.

The equations are the reference's own: of its pages only what one model reaches is written out, without docstrings and
without a line of this project to import. The script reads a case (`suites/explain/cases.py`) and prints how far a dump
is from what it computes: the dump of another implementation, or the expected one, where it is nought.
"""

import ast
import importlib
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from harness.pairs import Pair

DRAFTS = ("eagle3", "eagle3_mla", "peagle", "dflash")
"""drafts that run on what a dump holds; others run inside their target"""
READS = ("from_hf", "read_config")
"""methods that read a file of config, which a script has read already"""
TARGET_RUN = """
def run(model, case, dump):
    out = model(dump["tokens"], dump.get("positions"), tuple(range(model_layers(model) + 1)))
    states = {f"hidden.{c}": out.aux[:, :, c] for c in range(out.aux.shape[2])}
    return {**states, "final": out.hidden, "target_logits": out.logits}


def model_layers(model):
    return len(getattr(model, "language_model", model).layers)
"""
DRAFT_RUN = """
def run(model, case, dump):
    told, dtype = {**load_file(case / "expected.safetensors"), **dump}, next(model.parameters()).dtype
    logits, final, aux = (told.get(name, told["final"]).to(dtype) for name in ("target_logits", "final", "aux"))
    fused = model.read(TargetOutput(logits, final, aux))
    steps = max(int(name.split(".")[1]) for name in told if name.startswith("logits."))
    logits = model.unroll(told["tokens"], told["fused"].to(dtype), steps)
    return {"fused": fused, **{f"logits.{k + 1}": logits[k] for k in range(steps)}}
"""
MAIN = """
def renamed(name):
    for theirs, ours in CHECKPOINT_NAMES:
        if name.startswith(theirs):
            name = ours + name[len(theirs):]
    return name


def weights(folder):
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def load(case):
    with torch.device("meta"):
        model = MODEL(CONFIG)
    found = {renamed(name): tensor for name, tensor in weights(case / PART).items()}
    for name in ("embed_tokens.weight", "lm_head.weight") if PART == "draft" else ():
        shared = {n: t for n, t in weights(case / "target").items() if n.endswith(name)}
        found.setdefault(name, next(iter(shared.values()), None))
    if hasattr(model, "d2t") and "d2t" not in found:
        found["d2t"] = torch.zeros(model.d2t.shape, dtype=torch.int64)
    wanted = dict([*model.named_parameters(), *model.named_buffers()])
    found = {name: tensor for name, tensor in found.items() if name in wanted and tensor is not None}
    model.load_state_dict(found, strict=False, assign=True)
    model.tie()
    return model.eval().requires_grad_(False)


if __name__ == "__main__":
    case, ours = Path(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else None
    dump = load_file(ours or case / "expected.safetensors")
    for name, want in run(load(case), case, dump).items():
        if name in dump:
            known = ~(want.isnan() | dump[name].isnan())
            apart, size = (dump[name].double() - want.double())[known].abs().max(), want[known].double().square().mean()
            print(f"{name:16s} largest difference / rms: {float(apart / size.sqrt()):.1e}")
"""


def script(pair: Pair, config: Any, note: str) -> str:
    """The script of one target or draft as it is configured; `note` says what it shows."""
    part, page = pair.kind, pair.page.__name__
    configs = {(type(c).__module__, type(c).__name__) for c in _configs(config)}
    code, outside = written([*sorted(configs), (page, pair.model), ("reference.outputs", "TargetOutput")])
    outside |= {"import sys", "import torch", "from pathlib import Path", "from safetensors.torch import load_file"}
    names = f"PART, MODEL = {part!r}, {pair.model}\nCONFIG = {config!r}\n"
    names += f"CHECKPOINT_NAMES = {getattr(config, 'names', pair.page.CHECKPOINT_NAMES)!r}\n"
    run = TARGET_RUN if part == "target" else DRAFT_RUN
    usage = "Usage: python THIS.py CASE [OURS.safetensors]; needs torch and safetensors."
    head = f'"""{note}\n\n{usage}\n"""\n\n'.replace("\\", "/")
    return head + "\n".join(sorted(outside)) + "\n\n" + code + "\n\n" + names + run + MAIN


def _configs(config: Any) -> Iterator[Any]:
    """A config and those inside it."""
    yield config
    for field in fields(config):
        if is_dataclass(getattr(config, field.name)):
            yield from _configs(getattr(config, field.name))


def written(roots: list[tuple[str, str]]) -> tuple[str, set[str]]:
    """Everything of the reference that these names reach: (its code, imports from outside the project).

    errors: ValueError where two pages mean different things by one name
    """
    pages, seen, outside = _Pages(), {}, set()
    waiting = list(roots)
    while waiting:
        module, name = pages.home(*waiting.pop())
        if not module.startswith("reference"):
            outside.add(f"import {module}" if not name else f"from {module} import {name}")
        elif (module, name) not in seen:
            seen[module, name] = node = pages.nodes(module)[name]
            waiting += [(module, used) for used in _used(node) if pages.knows(module, used)]
            waiting += pages.through_modules(module, node)
    names = [name for _, name in seen]
    if double := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"two pages of the reference mean different things by {double[0]!r}")
    ordered = sorted(seen, key=lambda key: pages.rank(*key))
    return "\n\n".join(dict.fromkeys(pages.bare(module, seen[module, name]) for module, name in ordered)), outside


class _Pages:
    """Modules of the reference and what each name in them means."""

    def __init__(self) -> None:
        self.found: dict[str, dict[str, ast.stmt]] = {}
        self.imports: dict[str, dict[str, tuple[str, str]]] = {}

    def nodes(self, module: str) -> dict[str, ast.stmt]:
        """Top-level definitions of a module, without what reads configs."""
        if module not in self.found:
            self.found[module], self.imports[module] = {}, {}
            for node in ast.parse(Path(str(importlib.import_module(module).__file__)).read_text("utf-8")).body:
                self._file(module, node)
        return self.found[module]

    def _file(self, module: str, node: ast.stmt) -> None:
        if isinstance(node, ast.ClassDef):
            node.body = [part for part in node.body if getattr(part, "name", "") not in READS]
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            self.found[module][node.name] = node
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                self.found[module] |= {part.id: node for part in ast.walk(target) if isinstance(part, ast.Name)}
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                said = f"{alias.name} as {alias.asname}" if alias.asname else alias.name
                self.imports[module][alias.asname or alias.name] = (str(node.module), said)
        elif isinstance(node, ast.Import):
            self.imports[module] |= {alias.asname or alias.name: (alias.name, "") for alias in node.names}

    def knows(self, module: str, name: str) -> bool:
        return name in self.nodes(module) or (name in self.imports[module] and not self.is_page(module, name))

    def is_page(self, module: str, name: str) -> bool:
        """Whether a name is a module of the reference itself."""
        return name in self.imports[module] and _is_module(self.page(module, name))

    def page(self, module: str, name: str) -> str:
        home, said = self.imports[module][name]
        return f"{home}.{said.split(' as ')[0]}" if said else home

    def through_modules(self, module: str, node: ast.AST) -> list[tuple[str, str]]:
        """What a definition takes as `page.name`."""
        parts: list[Any] = list(ast.walk(node))
        found = [part for part in parts if self._is_through(module, part)]
        return [(self.page(module, part.value.id), part.attr) for part in found]

    def _is_through(self, module: str, part: Any) -> bool:
        named = isinstance(part, ast.Attribute) and isinstance(part.value, ast.Name)
        return named and part.value.id in self.imports[module] and self.is_page(module, part.value.id)

    def home(self, module: str, name: str) -> tuple[str, str]:
        """The module that defines a name, followed through imports."""
        while module.startswith("reference") and name not in self.nodes(module):
            module, name = self.imports[module][name]
        return module, name

    def rank(self, module: str, name: str = "") -> tuple[int, int]:
        """A place behind everything that a definition needs when it is read."""
        self.nodes(module)
        needed = {self.page(module, n) if self.is_page(module, n) else m for n, (m, _) in self.imports[module].items()}
        depth = 1 + max([self.rank(m)[0] for m in needed if m.startswith("reference")], default=0)
        return depth, self.nodes(module)[name].lineno if name else 0

    def bare(self, module: str, node: ast.AST) -> str:
        """The code of a definition without docstrings, other pages' names as names of its own."""
        pages = self

        class Plain(ast.NodeTransformer):
            def visit_Attribute(self, part: ast.Attribute) -> ast.AST:
                self.generic_visit(part)
                return ast.Name(part.attr, part.ctx) if pages._is_through(module, part) else part

        copy = Plain().visit(ast.parse(ast.unparse(node)))
        for part in ast.walk(copy):
            if isinstance(part, ast.FunctionDef | ast.ClassDef):
                part.body = [line for line in part.body if not _is_text(line)] or [ast.Pass()]
        return ast.unparse(copy)


@cache
def _is_module(name: str) -> bool:
    try:
        return name.startswith("reference") and find_spec(name) is not None
    except ModuleNotFoundError:
        return False


def _used(node: ast.AST) -> set[str]:
    return {part.id for part in ast.walk(node) if isinstance(part, ast.Name)}


def _is_text(line: ast.stmt) -> bool:
    return isinstance(line, ast.Expr) and isinstance(line.value, ast.Constant) and isinstance(line.value.value, str)
