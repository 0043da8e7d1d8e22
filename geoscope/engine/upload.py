"""From files to devices: stacks in pinned memory, copied beside the work of the batch before."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from geoscope.records import WeightPair

__all__ = ["DeviceCopy", "Read", "Sender", "current", "load"]

Read = Callable[[WeightPair], tuple[Tensor, ...]]


def load(pairs: Sequence[WeightPair], read: Read, *, pin: bool) -> tuple[Tensor, ...]:
    """The stacks (b, m, n) of some pairs of one shape, in storage dtypes, in host memory.

    pin: page-locked, so that the copy to a device can run beside everything else.
    """
    first = read(pairs[0])
    if len(pairs) == 1 and not pin:
        return tuple(one.unsqueeze(0) for one in first)
    stacks = tuple(_empty((len(pairs), *one.shape), one.dtype, pin=pin) for one in first)
    for i, pair in enumerate(pairs):
        for stack, one in zip(stacks, first if i == 0 else read(pair), strict=True):
            stack[i].copy_(one)
    return stacks


def _empty(shape: tuple[int, ...], dtype: torch.dtype, *, pin: bool) -> Tensor:
    if pin:
        try:
            return torch.empty(shape, dtype=dtype, pin_memory=True)
        except RuntimeError:  # there is a limit to what may be locked: copies then are slower
            pass
    return torch.empty(shape, dtype=dtype)


@dataclass(frozen=True)
class DeviceCopy:
    """Stacks that are on a device, or on the way to it, or that stay where they are.

    arrived: the CUDA event behind the copies, None where nothing is to wait for.
    """

    stacks: tuple[Tensor, ...]
    arrived: Any = None

    def received(self) -> tuple[Tensor, ...]:
        """The stacks, for work on the current stream: it starts once the copies are done."""
        if self.arrived is not None:
            for stack in self.stacks:
                stream = torch.cuda.current_stream(stack.device)
                stream.wait_event(self.arrived)
                stack.record_stream(stream)  # they were allocated for the stream of the copies
        return self.stacks

    def wait(self) -> None:
        """Returns when the copies are done: so long their sources have to stay."""
        if self.arrived is not None:
            self.arrived.synchronize()


class Sender:
    """Copies to one device; on CUDA on a stream of their own, beside what is computed."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream: Any = torch.cuda.Stream(device) if device.type == "cuda" else None

    def send(self, stacks: tuple[Tensor, ...]) -> DeviceCopy:
        """Starts the copies. Where the device has no room the stacks stay where they are."""
        try:
            if self._stream is None:
                return DeviceCopy(tuple(stack.to(self._device) for stack in stacks))
            with torch.cuda.stream(self._stream):
                there = tuple(stack.to(self._device, non_blocking=True) for stack in stacks)
                arrived = torch.cuda.Event()
                arrived.record(self._stream)
            return DeviceCopy(there, arrived)
        except torch.OutOfMemoryError:
            if self._stream is not None:
                self._stream.synchronize()  # what was on the way is dropped
            return DeviceCopy(stacks)


def current(device: torch.device) -> AbstractContextManager[Any]:
    """Makes a CUDA device the current one of this thread."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
