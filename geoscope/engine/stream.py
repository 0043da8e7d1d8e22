"""Batches through a pipeline: a read-ahead thread, worker threads, a bound on what is in flight.

torch releases the interpreter lock inside its kernels, so worker threads keep the cores busy; each
keeps to one BLAS thread, which makes the numbers independent of the number of workers.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import copy_context
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

import torch
from torch import Tensor

from geoscope.engine.plan import Batch, room_for_batches
from geoscope.linalg.blas import one_thread
from geoscope.profile import stage
from geoscope.records import WeightPair

__all__ = ["Outcome", "one_blas_thread", "stream"]

T = TypeVar("T")
Read = Callable[[WeightPair], tuple[Tensor, ...]]
Work = Callable[..., Sequence[T]]
_Item = tuple[Batch, tuple[Tensor, ...]]


@dataclass(frozen=True)
class Outcome(Generic[T]):
    """One finished pair; `note` says when it had to be computed elsewhere than planned."""

    pair: WeightPair
    result: T
    note: str | None = None


class _Gate:
    """Lets batches in while their working bytes fit; one batch alone always fits."""

    def __init__(self, capacity: int) -> None:
        self._capacity, self._used = capacity, 0
        self._free = threading.Condition()
        self.closed = False

    def enter(self, amount: int) -> None:
        with self._free:
            self._free.wait_for(
                lambda: self.closed or self._used == 0 or self._used + amount <= self._capacity
            )
            self._used += amount

    def leave(self, amount: int) -> None:
        with self._free:
            self._used -= amount
            self._free.notify_all()

    def close(self) -> None:
        with self._free:
            self.closed = True
            self._free.notify_all()


@contextmanager
def one_blas_thread() -> Iterator[None]:
    """One BLAS thread a worker for the duration, then as before."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with one_thread():
            yield
    finally:
        torch.set_num_threads(before)


def stream(
    batches: Sequence[Batch],
    *,
    read: Read,
    work: Work[T],
    device: torch.device,
    workers: int,
    memory: int,
) -> Iterator[Outcome[T]]:
    """Outcome of every pair, in the order in which they finish.

    read: the stored tensors of a pair, called on one thread. work(batch, *stacks): the results, one
    a pair; called on `workers` threads with the stacks on `device`. memory: bound on
    the process, of which batches in flight have what the baseline leaves.
    An exception of either is raised here, after the threads have stopped; so is KeyboardInterrupt.
    """
    gate = _Gate(room_for_batches(memory))
    # At most one batch waits beyond those in work: that is the read-ahead.
    ready: queue.Queue[_Item | None] = queue.Queue(maxsize=1)
    done: queue.Queue[list[Outcome[T]] | BaseException] = queue.Queue()
    stop = threading.Event()

    def reader() -> None:
        try:
            for batch in batches:
                gate.enter(batch.working_bytes)
                if stop.is_set():
                    break
                ready.put((batch, _load(batch, read, device)))
        except BaseException as error:
            done.put(error)
        finally:
            for _ in range(workers):
                ready.put(None)

    def worker() -> None:
        while (item := ready.get()) is not None:
            batch, stacks = item
            del item
            if not stop.is_set():
                try:
                    done.put(_attempt(batch, stacks, work, device))
                except BaseException as error:
                    done.put(error)
            del stacks
            gate.leave(batch.working_bytes)

    # Each thread runs in a copy of this context: a profile that is being taken goes with it.
    threads = [
        threading.Thread(target=copy_context().run, args=(job,), daemon=True)
        for job in (reader, *[worker] * workers)
    ]
    with one_blas_thread():
        for thread in threads:
            thread.start()
        try:
            for _ in batches:
                item = done.get()
                if isinstance(item, BaseException):
                    raise item
                yield from item
        finally:
            stop.set()
            gate.close()
            while any(thread.is_alive() for thread in threads):
                _drain(ready)
                for thread in threads:
                    thread.join(timeout=0.05)


def _drain(ready: queue.Queue[_Item | None]) -> None:
    """Makes room for a reader that waits; end marks go back, for the workers need them."""
    try:
        item = ready.get_nowait()
    except queue.Empty:
        return
    if item is None:
        ready.put(None)


@stage("read")
def _load(batch: Batch, read: Read, device: torch.device) -> tuple[Tensor, ...]:
    """The stacks (b, m, n) of a batch, in storage dtypes; on the device if it has room for them."""
    rows = [read(pair) for pair in batch.pairs]
    if len(rows) == 1:
        stacks = tuple(one.unsqueeze(0) for one in rows[0])
    else:
        stacks = tuple(torch.stack([row[i] for row in rows]) for i in range(len(rows[0])))
    try:
        return tuple(one.to(device) for one in stacks)
    except torch.OutOfMemoryError:
        return stacks


def _attempt(
    batch: Batch, stacks: tuple[Tensor, ...], work: Work[T], device: torch.device
) -> list[Outcome[T]]:
    """The batch; in halves when the device runs out of memory, and at last on the CPU."""
    elsewhere = f"computed on the CPU: {device.type} ran out of memory"
    note = None if next(iter(stacks)).device.type == device.type else elsewhere
    try:
        results = work(batch, *stacks)
        return [Outcome(pair, one, note) for pair, one in zip(batch.pairs, results, strict=True)]
    except torch.OutOfMemoryError:
        pass  # outside of the handler the failed attempt's tensors are free
    if len(batch.pairs) > 1:
        half = len(batch.pairs) // 2
        outcomes = []
        for part in (slice(None, half), slice(half, None)):
            smaller = replace(batch, pairs=batch.pairs[part])
            outcomes += _attempt(smaller, tuple(one[part] for one in stacks), work, device)
        return outcomes
    result = next(iter(work(batch, *(one.cpu() for one in stacks))))
    return [Outcome(next(iter(batch.pairs)), result, elsewhere)]
