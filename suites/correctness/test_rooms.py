"""Claim: a line stands in the room that it belongs to, and every file keeps the form that readers rely on.

Born of SGLang's speculative folder, where eight `*_v2.py` stand beside what they replace and imports go in circles, and
of SGLang #36708: tests that nobody ever collected.
"""

import ast
import importlib
import inspect
import pkgutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from torch import Tensor

import reference
from harness import shapes

pytestmark = pytest.mark.correctness

ROOT = Path(__file__).parents[2]
ROOMS = ("reference", "optimized", "harness", "reports", "suites")

# what a room may import besides itself and the standard library
MAY_IMPORT = {
    "reference": {"torch"},
    "optimized": {"torch", "triton", "reference"},
    "harness": {"torch", "safetensors", "hypothesis", "scipy", "pynvml"},
    "reports": {"pandas", "matplotlib", "jinja2", "markupsafe", "numpy", "scipy", "harness"},
}
# and what one file of it may import as well: (file, why)
DOORS = {
    "harness/witness.py": {"transformers"},  # the outside implementation
    "harness/checkpoints.py": {"huggingface_hub"},  # fetches a Hub id, imported when one is asked for
    "harness/runner.py": {"pytest"},  # carries a claim into another process
    "reports/store.py": {"fsspec"},  # opens the URL of a record, imported when one is asked for
    "reports/history.py": {"ruptures"},  # finds change points, imported when they are asked for
}
KERNELS = "optimized.ops.kernels"
TRITON_FORM = "optimized/ops/launch.py"
# the form in four files: what every target asks, what mixtures of experts and latent attention do, and what they share
TRITON_FILES = {TRITON_FORM, *(f"optimized/ops/{name}.py" for name in ("launch_mixture", "launch_latent", "launches"))}

LONGEST_FILE, LONGEST_BODY = 400, 40
# what is longer, and why it is not cut
LONG_FILES = {
    "suites/correctness/test_ops.py": "one claim an op beside the witness of that op, in the order of the table",
}
LONG_FUNCTIONS = {
    "attend_latent_kernel": "a kernel is one function: what it inlines from others cannot hold its running sums",
    "attend_chunk_kernel": "a kernel is one function: what it inlines from others cannot hold its running sums",
    "rope_kernel": "a kernel is one function: query, key and value share the angle that it loads",
}


def files(*rooms: str) -> list[Path]:
    return sorted(file for room in rooms for file in (ROOT / room).rglob("*.py"))


def name_of(file: Path) -> str:
    return file.relative_to(ROOT).as_posix()


EVERY = [*files(*ROOMS), ROOT / "conftest.py"]
MODULES = {name_of(f).removesuffix(".py").removesuffix("/__init__").replace("/", "."): f for f in files(*ROOMS)}
TREES = {file: ast.parse(file.read_text(encoding="utf-8")) for file in EVERY}


def imports(nodes: Iterator[ast.AST]) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Each imported module with the names taken from it."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from ((alias.name, ()) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield "." * node.level + (node.module or ""), tuple(alias.name for alias in node.names)


def at_import(tree: ast.AST) -> Iterator[ast.AST]:
    """The nodes that run when the module is imported: not those inside functions."""
    for node in ast.iter_child_nodes(tree):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield node
            yield from at_import(node)


def functions(tree: ast.AST) -> list[ast.FunctionDef]:
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]


def body_lines(function: ast.FunctionDef) -> int:
    """Lines of a function without its signature and docstring."""
    body = function.body[1:] if ast.get_docstring(function) else function.body
    return (body[-1].end_lineno or 0) - body[0].lineno + 1 if body else 0


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_a_room_imports_only_what_its_arrows_allow(room: str) -> None:
    allowed = MAY_IMPORT[room] | {room} | sys.stdlib_module_names

    for file in files(room):
        found = {module.split(".")[0] for module, _ in imports(ast.walk(TREES[file]))}
        assert sorted(found - allowed - DOORS.get(name_of(file), set())) == [], name_of(file)


def test_the_optimized_room_takes_nothing_but_configs_from_the_reference() -> None:
    taken = {
        f"{name_of(file)}: {module} {name}"
        for file in files("optimized")
        for module, names in imports(ast.walk(TREES[file]))
        if module.split(".")[0] == "reference"
        for name in names or (module,)
        if not name.endswith("Config")
    }

    assert sorted(taken) == []


def test_reports_read_records_and_load_no_tensor_library() -> None:
    taken = {m for file in files("reports") for m, _ in imports(ast.walk(TREES[file])) if m.startswith("harness")}
    reached = closure(MODULES["harness.record"])

    assert taken <= {"harness.record"}
    assert not {"torch", "numpy", "transformers"} & {module.split(".")[0] for module in reached}


def closure(file: Path) -> set[str]:
    """Every module that importing this file imports, through the files of the project."""
    found: set[str] = set()
    waiting = [file]
    while waiting:
        new = {module for module, _ in imports(at_import(TREES[waiting.pop()]))} - found
        found |= new
        waiting += [MODULES[module] for module in new if module in MODULES]
    return found


def jitted(file: Path) -> bool:
    decorators = [d for function in functions(TREES[file]) for d in function.decorator_list]
    return any(ast.unparse(decorator).startswith("triton.jit") for decorator in decorators)


def test_kernels_are_imported_by_the_triton_form_alone() -> None:
    kernels = {module for module, file in MODULES.items() if jitted(file)}
    readers = {
        name_of(file)
        for file in EVERY
        for module, names in imports(ast.walk(TREES[file]))
        if module in kernels or any(f"{module}.{name}" in kernels for name in names)
    }

    assert kernels
    assert all(module.startswith(KERNELS) for module in kernels)
    assert {reader for reader in readers if MODULES_BY_FILE[reader] not in kernels} == TRITON_FILES


MODULES_BY_FILE = {name_of(file): module for module, file in MODULES.items()}


def test_the_triton_form_is_imported_when_it_is_chosen_and_not_before() -> None:
    form = MODULES_BY_FILE[TRITON_FORM]
    early = {
        name_of(file)
        for file in files("reference", "optimized", "harness", "reports")
        for module, names in imports(at_import(TREES[file]))
        if form == module or form in {f"{module}.{name}" for name in names}
    }

    assert early == set()


def test_package_faces_are_empty() -> None:
    assert [name_of(f) for f in files(*ROOMS) if f.name == "__init__.py" and f.read_text().strip()] == []


def test_every_folder_of_code_is_a_package() -> None:
    bare = {name_of(f.parent) for f in files(*ROOMS) if not (f.parent / "__init__.py").exists()}

    # a folder of stored tensors with the script that made them
    assert bare <= {"suites/golden"}


def test_no_import_goes_in_a_circle() -> None:
    graph = {
        module: {
            found
            for source, names in imports(at_import(TREES[file]))
            for found in (source, *(f"{source}.{name}" for name in names))
            if found in MODULES and found != module
        }
        for module, file in MODULES.items()
    }
    # a module that no longer needs anything that is left is no part of a circle
    while free := [module for module, needed in graph.items() if not needed & graph.keys()]:
        graph = {module: needed for module, needed in graph.items() if module not in free}

    assert sorted(graph) == []


def test_imports_are_absolute() -> None:
    relative = [name_of(f) for f in EVERY if any(m.startswith(".") for m, _ in imports(ast.walk(TREES[f])))]

    assert relative == []


def test_files_and_functions_are_short_enough_to_read() -> None:
    lines = {name_of(file): len(file.read_text().splitlines()) for file in EVERY}
    bodies = {f"{name_of(file)}: {f.name}": body_lines(f) for file in EVERY for f in functions(TREES[file])}
    long_files = {name: n for name, n in lines.items() if n > LONGEST_FILE}
    long_bodies = {name: n for name, n in bodies.items() if n > LONGEST_BODY}

    assert {name: n for name, n in long_files.items() if name not in LONG_FILES} == {}
    assert {name: n for name, n in long_bodies.items() if name.split(": ")[1] not in LONG_FUNCTIONS} == {}


def test_nothing_is_left_to_do_and_all_of_it_is_ascii() -> None:
    # in two pieces, so that this file does not hold what it looks for
    markers = tuple(first + last for first, last in (("TO", "DO"), ("FIX", "ME"), ("X", "XX"), ("HA", "CK")))
    texts = {name_of(file): file.read_text(encoding="utf-8") for file in EVERY}

    assert [name for name, text in texts.items() if any(marker in text for marker in markers)] == []
    assert [name for name, text in texts.items() if not text.isascii()] == []


def test_every_file_says_what_it_is() -> None:
    silent = [name_of(f) for f in EVERY if f.name != "__init__.py" and not ast.get_docstring(TREES[f])]

    assert silent == []


@pytest.mark.parametrize("file", sorted((ROOT / "suites/correctness").glob("test_*.py")), ids=lambda file: file.stem)
def test_a_correctness_file_states_its_claim_and_where_it_comes_from(file: Path) -> None:
    text = ast.get_docstring(TREES[file]) or ""

    assert text.startswith("Claim: ")
    assert "Born of " in text
    marks = [node for node in TREES[file].body if isinstance(node, ast.Assign)]
    assert any("pytestmark" in ast.unparse(mark) and "correctness" in ast.unparse(mark) for mark in marks)


def test_every_test_is_collected() -> None:
    misplaced = [
        f"{name_of(file)}: {function.name}"
        for file in EVERY
        for function in functions(TREES[file])
        if function.name.startswith("test_") and not file.name.startswith("test_")
    ]
    outside = [
        name_of(f) for f in EVERY if f.name.startswith("test_") and f.parent.name not in ("correctness", "selftest")
    ]

    assert misplaced == []
    assert outside == []


def reference_functions() -> Iterator[Callable[..., object]]:
    """Public functions and methods that the reference defines."""
    for info in pkgutil.walk_packages(reference.__path__, "reference."):
        module = importlib.import_module(info.name)
        owners = [module, *(c for c in vars(module).values() if inspect.isclass(c) and c.__module__ == info.name)]
        for owner in owners:
            for name, value in vars(owner).items():
                if inspect.isfunction(value) and value.__module__ == info.name and not name.startswith("_"):
                    yield value


def test_every_reference_function_that_takes_tensors_declares_their_shapes() -> None:
    takers = [
        function
        for function in reference_functions()
        if any(p.annotation in (Tensor, Tensor | None) for p in inspect.signature(function).parameters.values())
    ]
    bare = [f.__qualname__ for f in takers if not getattr(shapes.declared(f), "arguments", ())]

    assert len(takers) > 20
    assert bare == []


def test_every_parameter_and_result_is_annotated() -> None:
    bare = []
    for file in files("reference", "optimized", "harness", "reports"):
        for function in functions(TREES[file]):
            arguments = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
            untyped = [a.arg for a in arguments if a.annotation is None and a.arg not in ("self", "cls")]
            decorators = " ".join(ast.unparse(decorator) for decorator in function.decorator_list)
            # a kernel's arguments are typed by the launch
            if (untyped or function.returns is None) and "triton.jit" not in decorators:
                bare.append(f"{name_of(file)}: {function.name}")

    assert bare == []
