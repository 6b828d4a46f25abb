"""W ranks on one machine: threads that meet, or processes that talk over gloo.

A group has `rank`, `size` and three calls. Threads are the test double: they sum in rank order, so a result does not
depend on who came first; they notice a rank that raised, that returned early or that called something else. Processes
are the real thing (torch.distributed); a planted bug lives in the parent's modules and does not reach them.
"""

import multiprocessing
import pickle
import threading
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from functools import reduce
from multiprocessing.connection import Connection, wait
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from harness.contracts import Group

R = TypeVar("R")


class RankError(RuntimeError):
    """A rank was lost, or the ranks did not all make the same call."""


class Meeting:
    """Where the threads of one world leave a value and take everybody's."""

    def __init__(self, size: int, timeout: float) -> None:
        self.size, self.timeout = size, timeout
        self.changed = threading.Condition()
        self.values: list[Any] = [None] * size
        self.taken: list[Any] = []
        self.arrived = self.gone = self.round = 0
        self.broken: str | None = None

    def exchange(self, rank: int, value: Any) -> list[Any]:
        """Wait for all ranks; returns their values in rank order."""
        with self.changed:
            mine = self.round
            self.values[rank] = value
            self.arrived += 1
            if self.arrived == self.size:
                # nobody can finish the next round before everybody has left this one, so `taken` stays as it is
                self.taken, self.arrived, self.round = list(self.values), 0, self.round + 1
                self.changed.notify_all()
            self._look_for_absentees()
            met = self.changed.wait_for(lambda: self.round != mine or self.broken is not None, self.timeout)
            if self.round != mine:
                return self.taken
            raise RankError(self.broken if met and self.broken else f"waited {self.timeout} s for the other ranks")

    def leave(self, error: bool) -> None:
        """A rank is done; whoever still waits for it must not wait for ever."""
        with self.changed:
            self.gone += 1
            if error:
                self.broken = self.broken or "another rank raised an error"
            self._look_for_absentees()
            self.changed.notify_all()

    def _look_for_absentees(self) -> None:
        if self.arrived and self.gone and self.arrived + self.gone >= self.size and self.broken is None:
            self.broken = f"{self.arrived} ranks wait for {self.gone} that already returned"
            self.changed.notify_all()


class ThreadGroup:
    """One rank's view of a meeting."""

    def __init__(self, rank: int, size: int, meeting: Meeting) -> None:
        self.rank, self.size, self.meeting = rank, size, meeting

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """The sum over ranks, added in rank order."""
        shards = self._meet("all_reduce", tensor)
        shapes = {tuple(shard.shape) for shard in shards}
        if len(shapes) > 1:
            raise RankError(f"all_reduce of unequal shapes {sorted(shapes)}")
        return reduce(torch.add, shards[1:], shards[0].clone())

    def all_gather(self, tensor: Tensor, dim: int = 0) -> Tensor:
        """Every rank's tensor side by side, in rank order."""
        return torch.cat(self._meet(f"all_gather dim {dim}", tensor), dim)

    def broadcast(self, tensor: Tensor, src: int = 0) -> Tensor:
        """The tensor of rank `src`."""
        return self._meet(f"broadcast from {src}", tensor)[src].clone()

    def _meet(self, call: str, tensor: Tensor) -> list[Tensor]:
        # a clone: the caller may write into its tensor while a slower rank still adds
        met = self.meeting.exchange(self.rank, (call, tensor.detach().clone()))
        calls = [name for name, _ in met]
        if len(set(calls)) > 1:
            raise RankError("the ranks made different calls: " + ", ".join(f"{r}: {c}" for r, c in enumerate(calls)))
        return [shard for _, shard in met]


class ProcessGroup:
    """The same three calls on torch.distributed's default group."""

    def __init__(self) -> None:
        self.rank, self.size = dist.get_rank(), dist.get_world_size()

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """The sum over ranks, in the backend's own order."""
        total = tensor.detach().clone()
        dist.all_reduce(total)
        return total

    def all_gather(self, tensor: Tensor, dim: int = 0) -> Tensor:
        """Every rank's tensor side by side, in rank order; shapes must be equal."""
        shards = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for _ in range(self.size)]
        dist.all_gather(shards, tensor.detach().contiguous())
        return torch.cat(shards, dim)

    def broadcast(self, tensor: Tensor, src: int = 0) -> Tensor:
        """The tensor of rank `src`."""
        copy = tensor.detach().clone()
        dist.broadcast(copy, src)
        return copy


def run_threads(world: int, fn: Callable[[Group], R], *, timeout: float = 60.0) -> list[R]:
    """`fn(group)` on every rank at once; results in rank order, or the error of the rank that raised first."""
    meeting = Meeting(world, timeout)
    results: dict[int, R] = {}
    errors: list[tuple[int, BaseException]] = []
    # both are a thread's own: a rank must not compute with other settings than its caller
    grad, num_threads = torch.is_grad_enabled(), torch.get_num_threads()

    def work(rank: int) -> None:
        failed = True
        try:
            torch.set_num_threads(num_threads)
            with torch.set_grad_enabled(grad):
                results[rank] = fn(ThreadGroup(rank, world, meeting))
            failed = False
        except BaseException as error:
            errors.append((rank, error))
        finally:
            meeting.leave(failed)

    threads = [threading.Thread(target=work, args=(rank,), name=f"rank{rank}", daemon=True) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        # ranks that lost a partner only tell the echo of the first error
        rank, error = next((e for e in errors if not isinstance(e[1], RankError)), errors[0])
        error.add_note(f"raised by rank {rank} of {world}")
        raise error
    return [results[rank] for rank in range(world)]


def run_processes(world: int, fn: Callable[..., R], *args: Any, timeout: float = 120.0) -> list[R]:
    """`fn(group, *args)` in `world` fresh processes over gloo; `fn` and `args` must pickle.

    Results in rank order, or the first error that arrived, its rank and its traceback in the notes.
    """
    # the parent's store picks a free port by itself, so no two runs can race for one
    store = TCPStore("127.0.0.1", 0, world, is_master=True, wait_for_workers=False)
    context = multiprocessing.get_context("spawn")
    pipes: dict[Any, int] = {}
    processes = []
    for rank in range(world):
        ours, theirs = context.Pipe(duplex=False)
        processes.append(
            context.Process(target=_serve, args=(theirs, rank, world, store.port, timeout, fn, args), daemon=True)
        )
        processes[-1].start()
        theirs.close()
        pipes[ours] = rank
    try:
        results = _collect(pipes, world, timeout)
        for process in processes:
            process.join(timeout=10)
        return results
    finally:
        for process in processes:
            if process.is_alive():
                process.terminate()
            process.join()
        for pipe in pipes:
            pipe.close()


def _collect(pipes: dict[Any, int], world: int, timeout: float) -> list[Any]:
    results: dict[int, Any] = {}
    open_pipes, deadline = dict(pipes), time.monotonic() + timeout
    while open_pipes:
        ready = wait(list(open_pipes), max(0.0, deadline - time.monotonic()))
        if not ready:
            raise RankError(f"ranks {sorted(open_pipes.values())} of {world} did not answer in {timeout} s")
        for pipe in ready:
            rank = open_pipes.pop(pipe)
            try:
                error, answer = pickle.loads(pipe.recv_bytes())  # type: ignore[union-attr]
            except EOFError:
                raise RankError(f"rank {rank} of {world} died without an answer") from None
            if error is not None:
                error.add_note(f"raised by rank {rank} of {world}\n{answer}")
                raise error
            results[rank] = answer
    return [results[rank] for rank in range(world)]


def _serve(
    pipe: Connection, rank: int, world: int, port: int, timeout: float, fn: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    """One rank's process."""
    torch.set_num_threads(1)
    try:
        limit = timedelta(seconds=timeout)
        store = TCPStore("127.0.0.1", port, world, is_master=False, timeout=limit)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=limit)
        answer = fn(ProcessGroup(), *args)
        # nobody leaves while a slower rank still reads from its sockets
        dist.barrier()
        pipe.send_bytes(pickle.dumps((None, answer)))
        dist.destroy_process_group()
    except BaseException as error:
        pipe.send_bytes(_pickled_error(error))


def _pickled_error(error: BaseException) -> bytes:
    story = "".join(traceback.format_exception(error))
    try:
        message = pickle.dumps((error, story))
        # some errors pickle and cannot be built again
        pickle.loads(message)
    except Exception:
        return pickle.dumps((RankError(f"{type(error).__name__}: {error}"), story))
    return message
