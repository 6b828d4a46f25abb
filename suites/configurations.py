"""Every configuration in which a kernel is launched: by the published sizes in both row buckets, and by what a target's
pass does not show: trees, images, shards, biases, sampling and the moves of a cycle.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from optimized.ops.launch import Triton
from optimized.ops.sight import Sight
from optimized.ops.tiles import BUCKETS, Choice, tile
from suites.commands.memory import published
from suites.launches import Launch, Watch, launches

SIZES = ("Llama-3.1-8B", "Qwen3-30B-A3B", "DeepSeek-V2-Lite", "DeepSeek-V3", "gemma-4-E2B", "gemma-4-31B")
"""one of each kind of kernel; the rest are other widths"""


def configurations(every: bool) -> dict[str, Launch]:
    """By a name that tells the kernel and who launches it first.

    every  of all published sizes and buckets; otherwise one of each kernel: the first of a few sizes
    """
    found: dict[Launch, str] = {}

    def note(who: str, launched: Iterable[Launch]) -> None:
        for launch in launched:
            if launch.module:
                found.setdefault(launch, f"{launch.kernel} {who}")

    for rows in BUCKETS if every else BUCKETS[:1]:
        for what, call in OTHERS.items():
            with Watch() as watch:
                call(Triton(rows))
            note(f"{what}, {rows} rows", watch.launches)
        # Kimi's layers are DeepSeek V3's
        for size, pair, keys in sorted(published(), key=lambda row: SIZES.index(row[0]) if row[0] in SIZES else 99):
            if pair.name != "kimi_k25" and (every or size in SIZES):
                pass_ = launches(pair, keys, rows)
                layers = [launch for layer in pass_.layers for launch in layer.launches]
                note(f"{size}, {rows} rows", [*layers, *pass_.around, *pass_.head])
    names = named(found)
    return names if every else {name: launch for name, launch in names.items() if name in _firsts(names)}


def _firsts(names: dict[str, Launch]) -> set[str]:
    return set({launch.kernel: name for name, launch in reversed(names.items())}.values())


def named(found: dict[Launch, str]) -> dict[str, Launch]:
    """The other way round; several layers of one size are numbered."""
    names: dict[str, Launch] = {}
    for launch, name in found.items():
        number = sum(other.partition(" #")[0] == name for other in names)
        names[f"{name} #{number + 1}" if number else name] = launch
    return names


def rows(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Numbers that are nowhere."""
    return torch.empty(shape, dtype=dtype, device="meta")


def ids(*shape: int) -> Tensor:
    """Tokens, positions, slots."""
    return rows(*shape, dtype=torch.int64)


def _sight(num_nodes: int) -> Sight:
    return Sight(2048, ids(1), [ids(1, num_nodes)] * 3, num_nodes)


def _attend(ops: Triton, **how: Any) -> None:
    cache = rows(1, 2048, 8, 128)
    ops.attend(rows(1, 8, 32, 128), cache, cache, ids(1, 8), 0.1, **how)


def _latents_of_a_tree(ops: Triton) -> None:
    latent, turned = rows(1, 8, 16, 512), rows(1, 8, 16, 64)
    ops.attend_latent(latent, turned, rows(1, 2048, 576), ids(1, 8), 0.1, rows(16, 512, 128), _sight(8))


def _early(ops: Triton) -> None:
    """Products whose programs start before the kernel ahead has ended."""
    out, num_in, gates = 6144, 4096, 14_336
    choices = {(2, n, num_in, ops.bucket): Choice(tile(n, num_in, ops.bucket, 2), early=True) for n in (out, gates)} | {
        (1, out, num_in, ops.bucket): Choice(tile(out, num_in, ops.bucket, 1), early=True)
    }
    early, x = Triton(ops.bucket, choices=choices), rows(4, num_in)
    early.linear(x, rows(out, num_in))
    early.gate_up_act(x, rows(2 * gates, num_in))
    _float8(early)


def _float8(ops: Triton) -> None:
    scales = rows(48, 32, dtype=torch.float32)
    ops.linear_scaled(rows(4, 4096), rows(6144, 4096, dtype=torch.float8_e4m3fn), scales, (128, 128))


OTHERS: dict[str, Callable[[Triton], Any]] = {
    "tree": lambda ops: _attend(ops, num_slots=_sight(8)),
    "tree of a window": lambda ops: _attend(ops, window=512, num_slots=_sight(8)),
    "images": lambda ops: _attend(ops, window=1024, ends=ids(1, 8)),
    "tree of latents": _latents_of_a_tree,
    "shard of a table": lambda ops: ops.embed(ids(4), rows(64_128, 4096), 64_128, 64.0),
    "bias": lambda ops: ops.linear(rows(4, 4096), rows(6144, 4096), rows(6144)),
    "bias of gates": lambda ops: ops.gate_up_act(rows(4, 4096), rows(28_672, 4096), rows(28_672), "gelu_tanh"),
    "scaled head": lambda ops: ops.head_argmax(rows(4, 4096), rows(32_000, 4096), 32_000, 0.25),
    "share of experts": lambda ops: ops.experts(
        rows(4, 2048), ids(4, 8), rows(4, 8), rows(64, 1536, 2048), rows(64, 2048, 768), "gelu_tanh", 64
    ),
    "early": _early,
    "float8": _float8,
    "rows of a head": lambda ops: ops.score_rows(rows(4, 1024), rows(262_144, 1024), ids(4, 4096)),
    "cap": lambda ops: ops.softcap(rows(4, 262_144), 30.0),
    "logits": lambda ops: ops.argmax(rows(4, 128_256)),
    "acceptance": lambda ops: ops.accept_greedy(ids(4, 5), ids(4, 6)),
    "feedback": lambda ops: ops.gather_rows(rows(4, 6, 4096), ids(4)),
    "path": lambda ops: ops.compact(rows(4, 2048, 1024), ids(4), ids(4, 6)),
}
