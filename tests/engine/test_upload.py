"""On the way to a device: what is page-locked, what runs beside what, and who waits for whom."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from geoscope.engine import upload
from geoscope.engine.upload import DeviceCopy, Sender, load
from geoscope.records import TensorInfo, WeightPair


def pairs(count: int) -> list[WeightPair]:
    info = TensorInfo("w", (3, 2), "bfloat16", 12, "model.safetensors")
    return [WeightPair(str(i), i, "q_proj", (3, 2), info, info) for i in range(count)]


def read(one: WeightPair) -> tuple[Tensor, Tensor]:
    number = float(one.name)
    return torch.full((3, 2), number).bfloat16(), torch.full((3, 2), number + 0.5)


@pytest.fixture
def locked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Shapes that were asked for in page-locked memory, which here is plain memory."""
    shapes: list[tuple[int, ...]] = []
    empty = torch.empty

    def noting(shape: tuple[int, ...], *, dtype: torch.dtype, pin_memory: bool = False) -> Tensor:
        if pin_memory:
            shapes.append(shape)
        return empty(shape, dtype=dtype)

    monkeypatch.setattr(torch, "empty", noting)
    return shapes


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("pin", [False, True])
def test_stacks_hold_every_pair_in_its_storage_dtype(
    count: int, pin: bool, locked: list[tuple[int, ...]]
) -> None:
    base, tuned = load(pairs(count), read, pin=pin)
    assert (base.dtype, tuned.dtype) == (torch.bfloat16, torch.float32)
    assert base.shape == tuned.shape == (count, 3, 2)
    assert [float(one[0, 0]) for one in base] == [float(i) for i in range(count)]
    assert [float(one[2, 1]) for one in tuned] == [i + 0.5 for i in range(count)]
    assert locked == ([(count, 3, 2)] * 2 if pin else [])


def test_where_nothing_more_can_be_locked_plain_memory_serves(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    empty = torch.empty

    def refusing(shape: tuple[int, ...], *, dtype: torch.dtype, pin_memory: bool = False) -> Tensor:
        if pin_memory:
            raise RuntimeError("CUDA error: out of memory")
        return empty(shape, dtype=dtype)

    monkeypatch.setattr(torch, "empty", refusing)
    base, _ = load(pairs(2), read, pin=True)
    assert base.shape == (2, 3, 2)


# --- CUDA, played ------------------------------------------------------------------------------


@dataclass
class Cuda:
    """Streams and events that note what happens, in order."""

    log: list[str] = field(default_factory=list)
    here: str = "main"
    room: bool = True

    def put_on(self, monkeypatch: pytest.MonkeyPatch) -> None:
        cuda = self

        @dataclass
        class Stream:
            device: Any = None
            name: str = "side"

            def wait_event(self, event: Any) -> None:
                cuda.log.append(f"{self.name} waits")

            def synchronize(self) -> None:
                cuda.log.append("host waits for side")

        class Event:
            def record(self, stream: Stream) -> None:
                cuda.log.append(f"event on {stream.name}")

            def synchronize(self) -> None:
                cuda.log.append("host waits for event")

        @contextmanager
        def on(stream: Stream):
            cuda.here = stream.name
            yield
            cuda.here = "main"

        monkeypatch.setattr(torch.cuda, "Stream", Stream)
        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "stream", on)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream(device, "main"))


@dataclass
class Stack:
    """Stands for a stack in page-locked memory, or on the device."""

    cuda: Cuda
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def to(self, device: torch.device, *, non_blocking: bool = False) -> Stack:
        if not self.cuda.room:
            raise torch.OutOfMemoryError("no room")
        self.cuda.log.append(f"copy on {self.cuda.here}{' beside' if non_blocking else ''}")
        return Stack(self.cuda, device)

    def record_stream(self, stream: Any) -> None:
        self.cuda.log.append(f"kept for {stream.name}")


def sent(cuda: Cuda, monkeypatch: pytest.MonkeyPatch) -> DeviceCopy:
    cuda.put_on(monkeypatch)
    stacks: Any = (Stack(cuda), Stack(cuda))
    return Sender(torch.device("cuda", 0)).send(stacks)


def test_copies_run_on_a_stream_of_their_own_and_the_work_waits_for_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cuda = Cuda()
    on_the_way = sent(cuda, monkeypatch)
    assert cuda.log == ["copy on side beside"] * 2 + ["event on side"]
    cuda.log.clear()
    stacks = on_the_way.received()
    assert {one.device.type for one in stacks} == {"cuda"}
    assert cuda.log == ["main waits", "kept for main"] * 2
    cuda.log.clear()
    on_the_way.wait()  # the sender does, with the sources in its hands
    assert cuda.log == ["host waits for event"]


def test_without_room_the_stacks_stay_on_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = Cuda(room=False)
    staying = sent(cuda, monkeypatch)
    assert {one.device.type for one in staying.received()} == {"cpu"}
    staying.wait()
    assert cuda.log == ["host waits for side"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_what_arrives_on_cuda_is_what_was_read() -> None:
    device = torch.device("cuda", 0)
    sender = Sender(device)
    for _ in range(3):
        stacks = load(pairs(4), read, pin=True)
        assert all(one.is_pinned() for one in stacks)
        on_the_way = sender.send(stacks)
        with upload.current(device):
            received = on_the_way.received()
            for one, other in zip(received, stacks, strict=True):
                assert one.device == device
                assert torch.equal(one.cpu(), other)
        on_the_way.wait()
