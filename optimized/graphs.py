"""Whole cycles as one CUDA graph, and a watch over code that must be fit to be one.

A graph replays the same kernels on the same addresses: it cannot ask the host anything, cannot grow a buffer and
cannot choose a shape. `GuardMode` finds offenders on any machine, long before a capture fails or, worse, freezes a
number that should have changed.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

BUCKETS = (1, 2, 4, 8, 16, 32, 64)
"""batch sizes that graphs are captured for"""
WARM_UPS = 2
"""runs before a capture: a kernel's first launch compiles and loads it, which no capture survives"""


class GraphError(RuntimeError):
    """Work that a CUDA graph could not replay."""


def bucket_for(batch: int) -> int:
    """The smallest bucket that holds a batch; errors: ValueError beyond the largest."""
    for size in BUCKETS:
        if batch <= size:
            return size
    raise ValueError(f"a batch of {batch} rows is larger than the largest bucket, {BUCKETS[-1]}")


class Replay:
    """`num_cycles` calls of a function in a row: one graph on CUDA, plain calls elsewhere.

    Capturing runs the function for real, so its state must be one that a run does not harm, as one that nobody has
    started yet is.
    """

    def __init__(self, run: Callable[[], None], device: torch.device | str, num_cycles: int = 1) -> None:
        self.run, self.num_cycles = run, num_cycles
        self.graph: torch.cuda.CUDAGraph | None = None
        if torch.device(device).type == "cuda":
            self.graph = self._capture(torch.device(device))

    def __call__(self) -> None:
        """All cycles, once."""
        if self.graph is not None:
            return self.graph.replay()
        for _ in range(self.num_cycles):
            self.run()

    def _capture(self, device: torch.device) -> torch.cuda.CUDAGraph:
        with torch.cuda.device(device):
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(WARM_UPS):
                    self.run()
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                for _ in range(self.num_cycles):
                    self.run()
        return graph


# operations whose result, or whose result's shape, the host must wait for
HOST_READS = frozenset(
    (
        *(
            "_local_scalar_dense",
            "item",
            "is_nonzero",
            "equal",
            "allclose",
            "nonzero",
            "nonzero_numpy",
            "masked_select",
        ),
        *("_unique", "_unique2", "unique_dim", "unique_consecutive", "unique_dim_consecutive", "bincount"),
    )
)
INDEXING = frozenset(("index", "index_put", "index_put_", "_index_put_impl_"))
# methods that on a CPU leave no trace below Python
LEAVING = frozenset(("cpu", "numpy", "tolist", "item", "__bool__", "__int__", "__float__", "__index__"))


class _Leaving(TorchFunctionMode):
    """Refuses calls that hand numbers to the host."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = getattr(func, "__name__", "")
        if name in LEAVING:
            raise GraphError(f"Tensor.{name} hands a number to the host")
        if name == "to" and any(_is_cpu(a) for a in [*args[1:], *(kwargs or {}).values()]):
            raise GraphError("Tensor.to('cpu') hands numbers to the host")
        return func(*args, **(kwargs or {}))


class GuardMode(TorchDispatchMode):
    """Raises GraphError on host reads, on shapes that depend on values, and, at the end, on buffers that moved.

    buffers   gives the static tensors by name, asked at the beginning and at the end
    """

    def __init__(self, buffers: Callable[[], Mapping[str, Tensor]] | None = None) -> None:
        super().__init__()
        self.buffers = buffers or dict
        self.leaving = _Leaving()
        # the tensors themselves: while they are held, nothing else can take their addresses
        self.before: dict[str, Tensor] = {}
        self.num_calls = 0
        """operations seen, views included"""

    def __enter__(self) -> "GuardMode":
        self.before = dict(self.buffers())
        super().__enter__()
        self.leaving.__enter__()
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        self.leaving.__exit__(kind, error, trace)
        super().__exit__(kind, error, trace)
        if kind is None:
            after = self.buffers()
            moved = sorted(n for n in self.before.keys() | after if _address(self.before, n) != _address(after, n))
            if moved:
                raise GraphError(f"buffers {', '.join(moved)} moved: a graph would still use their old addresses")

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name, kwargs = func.overloadpacket.__name__, kwargs or {}
        self.num_calls += 1
        if name in HOST_READS:
            raise GraphError(f"aten.{name} reads a number back from the device")
        if name in INDEXING and any(_is_mask(index) for index in args[1]):
            raise GraphError(f"aten.{name} with a boolean mask has a shape that depends on values")
        if name in ("_to_copy", "copy_") and _leaves_device(args, kwargs):
            raise GraphError(f"aten.{name} copies from a device to the host")
        return func(*args, **kwargs)


def _address(buffers: Mapping[str, Tensor], name: str) -> tuple[int, tuple[int, ...]] | None:
    """Where a buffer lies and how it is read; None where there is none of the name."""
    tensor = buffers.get(name)
    return None if tensor is None else (tensor.data_ptr(), tensor.stride())


def _is_cpu(value: Any) -> bool:
    return (isinstance(value, str) and value == "cpu") or (isinstance(value, torch.device) and value.type == "cpu")


def _is_mask(index: Any) -> bool:
    return isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8)


def _leaves_device(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """A copy out of a device's memory; between tensors of one device there is none."""
    source = args[1] if len(args) > 1 and isinstance(args[1], Tensor) else args[0]
    target = args[0].device if source is not args[0] else torch.device(kwargs.get("device") or source.device)
    return source.device.type != "cpu" and target.type == "cpu"
