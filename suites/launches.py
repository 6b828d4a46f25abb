"""What a target launches: every kernel of every layer at the sizes that are published, on a machine without a GPU.

A twin built on torch's meta device calls its operations as it does on a GPU, and instead of running, a launch is
written down: which kernel, with which constants, on which types. So the count is that of the code that runs, at real
widths, and the compile gate knows which configurations there are. What is no kernel of ours and no view (a cast, a sum)
is a launch too.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.jit import KernelInterface

from harness.pairs import Pair
from optimized.ops.launch import Triton
from optimized.parallel import SingleRank
from optimized.shell import Shell
from suites.shells import towers_of

# they reserve memory and compute nothing
RESERVES = frozenset(("empty", "empty_like", "empty_strided", "new_empty"))


class Launch(NamedTuple):
    """One launch of a kernel; of an operation of the library the name alone."""

    kernel: str
    module: str = ""
    arguments: tuple[tuple[str, str, bool], ...] = ()
    """(name, type, whether 16 divides address or number) of what is no constant"""
    constants: tuple[tuple[str, Any], ...] = ()
    num_warps: int = 4


class Watch(TorchDispatchMode):
    """Writes launches down and runs none; library calls run, on the meta device."""

    def __init__(self) -> None:
        super().__init__()
        self.launches: list[Launch] = []
        self.entries: list[str] = []
        """of the op table, in the order in which they were called"""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, result = func.overloadpacket.__name__, func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and not func.is_view and name not in RESERVES:
            self.launches.append(Launch(name))
        return result

    def __enter__(self) -> "Watch":
        def launcher(kernel: Any, grid: Any) -> Any:
            return lambda *args, **facts: self.launches.append(written(kernel, args, facts))

        self.patch = patch.object(KernelInterface, "__getitem__", launcher)
        self.patch.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.patch.__exit__(*error)


def written(kernel: Any, args: tuple[Any, ...], facts: dict[str, Any]) -> Launch:
    """A launch as the compiler would see it: None and bool are constants, as declared ones are."""
    function = kernel.fn
    given = dict(zip(function.__code__.co_varnames, args, strict=False)) | facts
    num_warps = given.pop("num_warps", 4)
    arguments, constants = [], []
    for name in function.__code__.co_varnames[: function.__code__.co_argcount]:
        value, declared = given[name], "constexpr" in str(function.__annotations__.get(name, ""))
        # the launcher makes a constant of a one
        if declared or value is None or isinstance(value, bool) or (isinstance(value, int) and value == 1):
            constants.append((name, value))
        else:
            arguments.append((name, *typed(value)))
    return Launch(function.__name__, function.__module__, tuple(arguments), tuple(constants), num_warps)


def typed(value: Any) -> tuple[str, bool]:
    """Triton's name of a type, and whether 16 divides the address (torch's allocator sees to it) or the number."""
    if isinstance(value, Tensor):
        kinds = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float8_e4m3fn: "fp8e4nv"}
        name = kinds.get(value.dtype) or re.sub("float|int", lambda m: m[0][0].replace("f", "fp"), str(value.dtype)[6:])
        return f"*{name}", value.storage_offset() * value.element_size() % 16 == 0
    if isinstance(value, float):
        return "fp32", False
    return "i32" if value < 2**31 else "i64", value % 16 == 0


class Entries:
    """The op table, which tells a watch what is called."""

    def __init__(self, ops: Triton, watch: Watch) -> None:
        self.ops, self.watch = ops, watch

    def __getattr__(self, name: str) -> Any:
        entry = getattr(self.ops, name)

        def call(*args: Any, **facts: Any) -> Any:
            self.watch.entries.append(name)
            return entry(*args, **facts)

        return call


class Marked:
    """A layer whose launches are told apart from its neighbours'."""

    def __init__(self, layer: Any, watch: Watch) -> None:
        self.layer, self.watch = layer, watch
        self.launches: list[Launch] = []
        self.entries: list[str] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.layer, name)

    def __call__(self, *args: Any) -> Any:
        return self.noted(self.layer, *args)

    def end(self, *args: Any) -> Any:
        """What a layer of Gemma 4 leaves to the kernel that opens the next one."""
        return self.noted(self.layer.end, *args)

    def noted(self, call: Any, *args: Any) -> Any:
        """Make a call, and take what it launched out of the list of all."""
        watch, before = self.watch, (len(self.watch.launches), len(self.watch.entries))
        result = call(*args)
        for mine, every, first in zip(
            (self.launches, self.entries), (watch.launches, watch.entries), before, strict=True
        ):
            mine += every[first:]
            del every[first:]
        return result


class Launches(NamedTuple):
    """Of one pass of a target over a few tokens."""

    layers: list[Marked]
    around: list[Launch]
    """embedding, slots and the last norm"""
    head: list[Launch]


@torch.no_grad()
def launches(pair: Pair, keys: dict[str, Any], num_rows: int = 16) -> Launches:
    """What a verify step of four tokens launches.

    keys      a published config.json
    num_rows  the most rows a step will have
    """
    watch = Watch()
    ops: Any = Entries(Triton(num_rows), watch)
    twin = pair.optimized(pair.read_config(keys), ops, SingleRank(), torch.bfloat16, "meta")
    if isinstance(twin, Shell):
        twin.take(towers_of(pair, twin.c).to(torch.bfloat16))
    text = getattr(twin, "language_model", twin)
    cache = text.new_cache(1, 2047)
    # tables are made, and weights packed, at first use
    with watch:
        text.states(*step("meta"), cache)
        text.lm_head.argmax(text.norm.weight[None])
    watch.launches.clear()
    watch.entries.clear()
    text.layers = [Marked(layer, watch) for layer in text.layers]
    with watch:
        hidden, _ = text.states(*step("meta"), cache)
        around = list(watch.launches)
        text.lm_head.argmax(hidden.flatten(0, 1))
    return Launches(text.layers, around, watch.launches[len(around) :])


def step(device: str) -> tuple[Tensor, Tensor]:
    """Four tokens and their positions."""
    return torch.zeros(1, 4, dtype=torch.int64, device=device), torch.arange(4, device=device)[None]


@contextmanager
def counted() -> Iterator[list[str]]:
    """The kernels that are launched for the time of a `with`, and run."""
    names: list[str] = []
    launcher = KernelInterface.__getitem__

    def noted(kernel: Any, grid: Any) -> Any:
        names.append(kernel.fn.__name__)
        return launcher(kernel, grid)

    with patch.object(KernelInterface, "__getitem__", noted):
        yield names
