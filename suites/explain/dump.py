"""The dump: what an implementation made of a text, in one file that anybody can write.

    tokens         [B, T]        int64, what the target read
    positions      [B, T]        int64; 0..T-1 when absent
    hidden.{c}     [B, T, H]     the residual stream at capture point c, before the final norm; any of 0..L
    final          [B, T, H]     after the target's final norm
    target_logits  [B, T, V]
    aux            [B, T, A, X]  the states that the draft was handed, in that order
    fused          [B, T, H]     what the first draft step reads as `hidden`
    logits.{k}     [B, T, Vd]    draft step k = 1..K, teacher-forced: column t reads x_{t+k} and proposes x_{t+k+1}
    feedback.{k}   [B, T, H]     what draft step k hands to step k + 1
    map            [Vd]          int64, the target id that each draft id means

A safetensors file; only `tokens` must be there. NaN marks what was not computed, and is not compared: the columns
t + k >= T, whose token nobody knows, and whatever an engine cannot show. Metadata: `format` (below), `dtype` of the
arithmetic (the coarsest of the file when absent), `by` whom it was made, and anything else.
"""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from harness.compare import UNIT_ROUNDOFF
from harness.headers import CheckpointError

FORMAT = "draftproof-dump/1"
NAME = re.compile(r"hidden\.(\d+)|final|target_logits|aux|fused|map|(?:logits|feedback)\.([1-9]\d*)")
RANKS = {"aux": 4}
"""dimensions of a tensor where they are not three"""
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in UNIT_ROUNDOFF}


class DumpError(CheckpointError):
    """A file that is no dump, or does not fit the checkpoint that it is held to."""


@dataclass(frozen=True)
class Dump:
    """One text and what was computed on the way."""

    tokens: Tensor
    """[B, T]"""
    tensors: Mapping[str, Tensor]
    positions: Tensor | None = None
    """[B, T]"""
    dtype: torch.dtype = torch.float32
    """of the arithmetic"""
    by: str = ""
    notes: Mapping[str, str] = field(default_factory=dict)

    def numbered(self, kind: str) -> dict[int, Tensor]:
        """The tensors `kind.N` by their number, in order."""
        found = {int(name.split(".")[1]): name for name in self.tensors if name.startswith(f"{kind}.")}
        return {number: self.tensors[found[number]] for number in sorted(found)}

    @property
    def num_steps(self) -> int:
        """Draft steps that are told of."""
        return max([0, *self.numbered("logits"), *self.numbered("feedback")])


def write_dump(path: str | os.PathLike[str], dump: Dump) -> Path:
    """Write a dump; errors: DumpError for names and shapes that the format does not have."""
    file = Path(path)
    _check(file, dump.tokens, dump.tensors)
    tensors = {"tokens": dump.tokens, **({} if dump.positions is None else {"positions": dump.positions})}
    tensors |= dump.tensors
    facts = {**dump.notes, "format": FORMAT, "dtype": str(dump.dtype).removeprefix("torch."), "by": dump.by}
    file.parent.mkdir(parents=True, exist_ok=True)
    # cloned: two names may mean one tensor, which safetensors refuses
    apart = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()
    }
    save_file(apart, file, metadata=facts)
    return file


def read_dump(path: str | os.PathLike[str]) -> Dump:
    """Read a dump; errors: DumpError that names the file, the tensor and what is expected."""
    file = Path(path)
    try:
        with safe_open(file, framework="pt") as opened:
            facts = dict(opened.metadata() or {})
            tensors = {name: opened.get_tensor(name) for name in list(opened.keys())}
    except (SafetensorError, OSError) as error:
        raise DumpError(
            f"{file}: cannot be read as safetensors ({error}); write it with safetensors' save_file"
        ) from error
    if facts.get("format") != FORMAT:
        raise DumpError(f"{file}: metadata 'format' is {facts.get('format')!r}; {FORMAT!r} is expected")
    if "tokens" not in tensors:
        raise DumpError(f"{file}: tensor 'tokens' is missing; a dump says what was read")
    tokens, positions = tensors.pop("tokens"), tensors.pop("positions", None)
    _check(file, tokens, tensors)
    if positions is not None and (positions.is_floating_point() or positions.shape != tokens.shape):
        raise DumpError(
            f"{file}: tensor 'positions' is {_told(positions)}; whole numbers {list(tokens.shape)} are expected"
        )
    name = facts.pop("dtype", "")
    if name and name not in DTYPES:
        raise DumpError(f"{file}: metadata 'dtype' is {name!r}; known are {', '.join(DTYPES)}")
    floats = (tensor.dtype for tensor in tensors.values() if tensor.is_floating_point())
    coarsest = max(floats, key=UNIT_ROUNDOFF.__getitem__, default=torch.float32)
    notes = {key: value for key, value in facts.items() if key not in ("format", "by")}
    where = None if positions is None else positions.long()
    return Dump(tokens.long(), tensors, where, DTYPES.get(name, coarsest), facts.get("by", ""), notes)


def _check(file: Path, tokens: Tensor, tensors: Mapping[str, Tensor]) -> None:
    if tokens.dim() != 2 or tokens.is_floating_point() or tokens.dtype == torch.bool or not tokens.numel():
        raise DumpError(f"{file}: tensor 'tokens' is {_told(tokens)}; ids [B, T] are expected")
    for name, tensor in tensors.items():
        if not NAME.fullmatch(name):
            raise DumpError(
                f"{file}: tensor {name!r} is not known; a dump holds hidden.C, final, target_logits, aux, fused, "
                "logits.K, feedback.K and map"
            )
        if name == "map":
            if tensor.dtype != torch.int64 or tensor.dim() != 1:
                raise DumpError(f"{file}: tensor 'map' is {_told(tensor)}; int64 ids [Vd] are expected")
            continue
        rank = RANKS.get(name, 3)
        if tensor.dtype not in UNIT_ROUNDOFF or tensor.dim() != rank or tensor.shape[:2] != tokens.shape:
            wanted = [*tokens.shape, *["A"] * (rank - 3), "width"]
            raise DumpError(f"{file}: tensor {name!r} is {_told(tensor)}; floats {wanted} are expected")


def _told(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
