"""Batches through a pipeline: a read-ahead thread, worker threads, a bound on what is in flight.

torch releases the interpreter lock inside its kernels, so worker threads keep the cores busy; each
keeps to one BLAS thread, which makes the numbers independent of the number of workers. Several
devices share one queue: each has a thread that copies one batch ahead of the device's own worker.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import copy_context
from dataclasses import dataclass, replace
from functools import partial
from typing import Generic, TypeVar

import torch
from threadpoolctl import threadpool_limits
from torch import Tensor

from geoscope.engine.boundary import matrix_boundary
from geoscope.engine.plan import Batch, room_for_batches
from geoscope.engine.upload import DeviceCopy, Read, Sender, current, load
from geoscope.errors import NumericsError
from geoscope.profile import stage
from geoscope.records import WeightPair

__all__ = ["Gate", "Outcome", "one_blas_thread", "stream"]

T = TypeVar("T")
Work = Callable[..., Sequence[T]]
_Item = tuple[Batch, DeviceCopy]


@dataclass(frozen=True)
class Outcome(Generic[T]):
    """One finished pair; `note` says when it had to be computed elsewhere than planned.

    failure: why there is no result, of a pair whose work raised by itself, too.
    """

    pair: WeightPair
    result: T | None
    note: str | None = None
    failure: str | None = None


class Gate:
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
    def let_in(self, amount: int) -> Iterator[None]:
        """Waits for room, and gives it back."""
        self.enter(amount)
        try:
            yield
        finally:
            self.leave(amount)


@contextmanager
def one_blas_thread() -> Iterator[None]:
    """One BLAS thread a worker for the duration, then as before."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with threadpool_limits(1, user_api="blas"):
            yield
    finally:
        torch.set_num_threads(before)


class _Lane:
    """The batches of one device other than the CPU: one copied ahead of those in work."""

    def __init__(self, device: torch.device, workers: int) -> None:
        self._sender, self._workers = Sender(device), workers
        self._there: queue.SimpleQueue[_Item | None] = queue.SimpleQueue()
        self._room = threading.Semaphore(1)

    def move(self, ready: queue.Queue[_Item | None]) -> None:
        """Takes what is ready as long as there is something; runs on a thread of its own."""
        while True:
            self._room.acquire()  # only then is a batch taken: another device may be idle
            item = ready.get()
            if item is None:
                break
            batch, here = item
            sent = self._sender.send(here.stacks)
            self._there.put((batch, sent))
            sent.wait()
            del item, here, sent

    def close(self) -> None:
        """No more comes."""
        for _ in range(self._workers):
            self._there.put(None)

    def take(self) -> _Item | None:
        """The next batch, on the device if it had room for it; None at the end."""
        item = self._there.get()
        self._room.release()
        return item


def stream(
    batches: Sequence[Batch],
    *,
    read: Read,
    work: Work[T],
    devices: Sequence[torch.device],
    workers: int,
    memory: int,
) -> Iterator[Outcome[T]]:
    """Outcome of every pair, in the order in which they finish.

    read: the stored tensors of a pair, called on one thread. work(batch, *stacks): the results, one
    a pair; called on `workers` threads, which share the devices evenly, with the stacks on the
    thread's device. memory: bound on the process, or on each device, of which batches in flight
    have what the baseline leaves.
    What `work` raises on a pair is the failure of its outcome; the others are computed. What `read`
    raises is raised here, after the threads have stopped; so is KeyboardInterrupt.
    """
    run = _Run(batches, read, work, devices, workers, memory)
    with one_blas_thread():
        run.start()
        try:
            for _ in batches:
                item = run.done.get()
                if isinstance(item, BaseException):
                    raise item
                yield from item
        finally:
            run.end()


class _Run(Generic[T]):
    """The threads of one stream, and the queues between them.

    ready: batches that are read; at most one waits beyond those in work, the read-ahead.
    done: outcomes of a batch, or what a thread raised.
    """

    def __init__(
        self,
        batches: Sequence[Batch],
        read: Read,
        work: Work[T],
        devices: Sequence[torch.device],
        workers: int,
        memory: int,
    ) -> None:
        self._batches, self._read, self._work = batches, read, work
        self._devices = list(dict.fromkeys(devices))[:workers]
        self._places = [self._devices[i % len(self._devices)] for i in range(workers)]
        self._gate = Gate(room_for_batches(memory) * len(self._devices))
        self._ready: queue.Queue[_Item | None] = queue.Queue(maxsize=1)
        self.done: queue.Queue[list[Outcome[T]] | BaseException] = queue.Queue()
        self._stop = threading.Event()
        self._lanes = {
            device: _Lane(device, self._places.count(device))
            for device in self._devices
            if device.type != "cpu"
        }
        # Each thread runs in a copy of this context: a profile that is being taken goes with it.
        jobs: list[Callable[[], None]] = [self._reader]
        jobs += [partial(self._mover, lane) for lane in self._lanes.values()]
        jobs += [partial(self._worker, place) for place in self._places]
        self._threads = [
            threading.Thread(target=copy_context().run, args=(job,), daemon=True) for job in jobs
        ]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def end(self) -> None:
        """Stops the threads, whatever they wait for."""
        self._stop.set()
        self._gate.close()
        while any(thread.is_alive() for thread in self._threads):
            _drain(self._ready)
            for thread in self._threads:
                thread.join(timeout=0.05)

    def _reader(self) -> None:
        pin = any(device.type == "cuda" for device in self._devices)
        try:
            for batch in self._batches:
                self._gate.enter(batch.working_bytes)
                if self._stop.is_set():
                    break
                with stage("read"), current(self._devices[0]):
                    stacks = load(batch.pairs, self._read, pin=pin)
                self._ready.put((batch, DeviceCopy(stacks)))
                del stacks
        except BaseException as error:
            self.done.put(error)
        finally:
            takers = len(self._lanes) + sum(place not in self._lanes for place in self._places)
            for _ in range(takers):
                self._ready.put(None)

    def _mover(self, lane: _Lane) -> None:
        try:
            lane.move(self._ready)
        except BaseException as error:
            self.done.put(error)
            while self._ready.get() is not None:
                pass  # the reader must not be left waiting
        finally:
            lane.close()

    def _worker(self, device: torch.device) -> None:
        take = self._lanes[device].take if device in self._lanes else self._ready.get
        while (item := take()) is not None:
            batch, sent = item
            del item
            if not self._stop.is_set():
                try:
                    with current(device):
                        self.done.put(_attempt(batch, sent.received(), self._work, device))
                except BaseException as error:
                    self.done.put(error)
            del sent
            self._gate.leave(batch.working_bytes)


def _drain(ready: queue.Queue[_Item | None]) -> None:
    """Makes room for a reader that waits; end marks go back, for the workers need them."""
    try:
        item = ready.get_nowait()
    except queue.Empty:
        return
    if item is None:
        ready.put(None)


def _attempt(
    batch: Batch, stacks: tuple[Tensor, ...], work: Work[T], device: torch.device
) -> list[Outcome[T]]:
    """The batch; where it fails in parts, and a pair that fails by itself at last on the CPU.

    Parts are halves where the device runs out of memory, else single pairs, so that one does not
    take the others down with it.
    """
    try:
        # Nothing moves where they are there; else the batch before has left its room by now.
        with matrix_boundary():
            there = tuple(stack.to(device) for stack in stacks)
            results = work(batch, *there)
        return [Outcome(pair, one) for pair, one in zip(batch.pairs, results, strict=True)]
    except NumericsError as error:
        reason, is_full = str(error), isinstance(error.__cause__, torch.OutOfMemoryError)
    there = ()  # outside of the handler the failed attempt's tensors are free
    count = len(batch.pairs)
    if count > 1:
        size = -(-count // 2) if is_full else 1
        parts = [slice(start, start + size) for start in range(0, count, size)]
        outcomes = []
        for part in parts:
            smaller = replace(batch, pairs=batch.pairs[part])
            outcomes += _attempt(smaller, tuple(stack[part] for stack in stacks), work, device)
        return outcomes
    if device.type == "cpu":
        return [Outcome(batch.pairs[0], None, failure=reason)]
    why = "ran out of memory" if is_full else f"failed ({reason})"
    note = f"computed on the CPU: {device.type} {why}"
    here = tuple(stack.cpu() for stack in stacks)
    return [replace(one, note=note) for one in _attempt(batch, here, work, torch.device("cpu"))]
