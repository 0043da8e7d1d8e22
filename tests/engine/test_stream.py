"""The pipeline: every pair once, a bound on what is in flight, read-ahead, and a clean end."""

from __future__ import annotations

import _thread
import gc
import os
import random
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from geoscope import Options, Report, compare
from geoscope.engine import Batch, Outcome, one_blas_thread, stream
from geoscope.engine.plan import BASELINE
from geoscope.errors import Stopped
from geoscope.records import TensorInfo, WeightPair
from tests.helpers.matrices import gaussian, save_model, updated

CPU = torch.device("cpu")
PATIENCE = 20.0  # seconds that a test waits for a thread before it fails


def pair(i: int) -> WeightPair:
    info = TensorInfo(f"w{i}", (2, 2), "float32", 16, "model.safetensors")
    return WeightPair(f"w{i}", i, "q_proj", (2, 2), info, info)


def batches_of(sizes: Sequence[int], *, pairs: int = 1) -> list[Batch]:
    """One batch for each number of working bytes, of so many pairs."""
    return [
        Batch(tuple(pair(i * pairs + j) for j in range(pairs)), (2, 2), size)
        for i, size in enumerate(sizes)
    ]


def read(one: WeightPair) -> tuple[Tensor, Tensor]:
    number = float(one.name[1:])
    return torch.full((2, 2), number), torch.full((2, 2), number + 0.5)


def work(batch: Batch, base: Tensor, tuned: Tensor) -> list[tuple[str, float, float]]:
    return [
        (one.name, float(base[i, 0, 0]), float(tuned[i, 0, 0])) for i, one in enumerate(batch.pairs)
    ]


def run(batches: Sequence[Batch], **options: Any) -> Iterator[Outcome[Any]]:
    """The pipeline; room: bytes for what is in flight, beyond those of the process itself."""
    chosen: dict[str, Any] = {
        "read": read,
        "work": work,
        "devices": (CPU,),
        "workers": 2,
        "room": 1000,
    } | options
    return stream(batches, memory=BASELINE + chosen.pop("room"), **chosen)


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    """Whatever a test does to the pipeline, its threads end with it."""
    before, threads = set(threading.enumerate()), torch.get_num_threads()
    yield
    if not set(threading.enumerate()) <= before:
        gc.collect()  # closes a pipeline that an exception still refers to
    assert set(threading.enumerate()) <= before
    assert torch.get_num_threads() == threads


# --- every pair, once ---------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [1, 2, 5])
@pytest.mark.parametrize("pairs", [1, 3])
def test_every_pair_comes_out_once_with_its_own_tensors(workers: int, pairs: int) -> None:
    batches = batches_of([10] * 12, pairs=pairs)
    outcomes = list(run(batches, workers=workers))
    assert sorted(one.pair.name for one in outcomes) == sorted(f"w{i}" for i in range(12 * pairs))
    for one in outcomes:
        number = float(one.pair.name[1:])
        assert one.result == (one.pair.name, number, number + 0.5)
        assert one.note is None


def test_nothing_to_do_ends_at_once() -> None:
    assert list(run([])) == []


def test_one_worker_keeps_the_order_of_the_plan() -> None:
    outcomes = run(batches_of([10] * 8), workers=1)
    assert [one.pair.name for one in outcomes] == [f"w{i}" for i in range(8)]


def test_read_is_called_on_one_thread_and_never_on_the_callers() -> None:
    seen = set()

    def noted(one: WeightPair) -> tuple[Tensor, Tensor]:
        seen.add(threading.get_ident())
        return read(one)

    list(run(batches_of([10] * 6, pairs=2), read=noted, workers=3))
    assert len(seen) == 1
    assert threading.get_ident() not in seen


def test_work_runs_on_as_many_threads_as_asked_for() -> None:
    barrier = threading.Barrier(3)

    def together(batch: Batch, *stacks: Tensor) -> list[str]:
        barrier.wait(PATIENCE)  # breaks unless three are in work at once
        return [one.name for one in batch.pairs]

    assert len(list(run(batches_of([10] * 6), work=together, workers=3))) == 6


def test_workers_keep_to_one_blas_thread_and_the_caller_gets_his_back() -> None:
    before, counts = torch.get_num_threads(), []
    torch.set_num_threads(2)

    def counted(batch: Batch, *stacks: Tensor) -> list[None]:
        counts.append(torch.get_num_threads())
        return [None] * len(batch.pairs)

    try:
        list(run(batches_of([10] * 4), work=counted))
        assert set(counts) == {1}
        assert torch.get_num_threads() == 2
        with pytest.raises(KeyError), one_blas_thread():
            raise KeyError
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


# --- what is in flight --------------------------------------------------------------------------


@dataclass
class Scale:
    """Weighs what was read and is not worked off yet."""

    sizes: dict[str, int]
    now: int = 0
    count: int = 0
    heaviest: int = 0
    most: int = 0
    together: list[tuple[int, int]] = field(default_factory=list)  # (bytes, batches) at each read
    lock: threading.Lock = field(default_factory=threading.Lock)

    def read(self, one: WeightPair) -> tuple[Tensor, Tensor]:
        with self.lock:
            self.now += self.sizes[one.name]
            self.count += 1
            self.heaviest = max(self.heaviest, self.now)
            self.most = max(self.most, self.count)
            self.together.append((self.now, self.count))
        return read(one)

    def work(self, batch: Batch, *stacks: Tensor) -> list[str]:
        time.sleep(0.001)
        with self.lock:
            self.now -= sum(self.sizes[one.name] for one in batch.pairs)
            self.count -= len(batch.pairs)
        return [one.name for one in batch.pairs]


def weighed(sizes: Sequence[int], room: int, workers: int) -> Scale:
    batches = batches_of(sizes)
    scale = Scale({batch.pairs[0].name: batch.working_bytes for batch in batches})
    outcomes = run(batches, read=scale.read, work=scale.work, workers=workers, room=room)
    assert len(list(outcomes)) == len(sizes)
    return scale


@pytest.mark.parametrize("workers", [1, 2, 4])
@pytest.mark.parametrize("seed", range(4))
def test_what_is_in_flight_never_exceeds_the_memory_beyond_the_process(
    seed: int, workers: int
) -> None:
    draw = random.Random(seed)
    sizes = [draw.randint(1, 100) for _ in range(40)]
    assert weighed(sizes, 150, workers).heaviest <= 150


@pytest.mark.parametrize("workers", [1, 3])
def test_a_batch_larger_than_the_memory_goes_alone(workers: int) -> None:
    scale = weighed([5, 500, 5, 700, 5, 5], 100, workers)
    assert all(count == 1 for size, count in scale.together if size > 100)
    assert scale.heaviest == 700


@pytest.mark.parametrize("room", [0, -BASELINE])
def test_without_memory_one_batch_at_a_time_still_gets_through(room: int) -> None:
    assert weighed([10] * 6, room, 3).most == 1


def test_memory_is_free_again_after_a_batch_that_was_done_in_halves() -> None:
    def work_in_halves(batch: Batch, *stacks: Tensor) -> list[str]:
        if len(batch.pairs) > 1:
            raise torch.OutOfMemoryError
        return [one.name for one in batch.pairs]

    found: list[Outcome[str]] = []
    outcomes = run(batches_of([100] * 5, pairs=4), work=work_in_halves, room=100)
    consumer = threading.Thread(target=lambda: found.extend(outcomes), daemon=True)
    consumer.start()
    consumer.join(PATIENCE)  # it waits for ever if a half keeps its bytes
    assert len(found) == 20


# --- read-ahead ---------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [1, 2])
def test_the_next_batch_is_read_while_the_workers_are_busy(workers: int) -> None:
    was_read = [threading.Event() for _ in range(6)]

    def noted(one: WeightPair) -> tuple[Tensor, Tensor]:
        was_read[int(one.name[1:])].set()
        return read(one)

    def waiting(batch: Batch, *stacks: Tensor) -> list[bool]:
        number = int(batch.pairs[0].name[1:])
        # Each holds its worker until the batch beyond those in work is read.
        ahead = min(number + workers, len(was_read) - 1)
        return [was_read[ahead].wait(PATIENCE)]

    outcomes = run(batches_of([10] * 6), read=noted, work=waiting, workers=workers)
    assert all(one.result for one in outcomes)


def test_reading_does_not_run_far_ahead() -> None:
    scale = weighed([1] * 60, 10**6, 2)
    assert scale.most <= 2 + 2  # in work, one that waits, one on the reader's hands


# --- the end ------------------------------------------------------------------------------------


class Broken(Exception):
    pass


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("at", [0, 4, 9])
def test_an_exception_of_read_is_raised_to_the_caller(at: int, workers: int) -> None:
    def failing(one: WeightPair) -> tuple[Tensor, Tensor]:
        if one.name == f"w{at}":
            raise Broken(one.name)
        return read(one)

    seen = []
    with pytest.raises(Broken, match=f"w{at}"):
        for one in run(batches_of([10] * 10), read=failing, workers=workers):
            seen.append(one.pair.name)
    assert f"w{at}" not in seen


REASONS = {Broken: "Broken: w4", MemoryError: "memory ran out", RuntimeError: "w4"}


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("pairs", [1, 4])
@pytest.mark.parametrize("error", REASONS)
def test_what_work_raises_on_a_pair_is_its_failure_alone(
    error: type[Exception], pairs: int, workers: int
) -> None:
    def failing(batch: Batch, *stacks: Tensor) -> list[str]:
        if "w4" in [one.name for one in batch.pairs]:
            raise error("w4")
        return [one.name for one in batch.pairs]

    outcomes = list(
        run(batches_of([10] * (12 // pairs), pairs=pairs), work=failing, workers=workers)
    )
    assert len(outcomes) == 12
    for one in outcomes:
        failed = one.pair.name == "w4"
        assert one.result == (None if failed else one.pair.name)
        assert one.failure == (REASONS[error] if failed else None)


@pytest.mark.parametrize("workers", [1, 3])
def test_a_stop_in_work_is_raised_to_the_caller(workers: int) -> None:
    def stopping(batch: Batch, *stacks: Tensor) -> list[None]:
        if batch.pairs[0].name == "w4":
            raise KeyboardInterrupt("w4")
        return [None]

    with pytest.raises(KeyboardInterrupt, match="w4"):
        list(run(batches_of([10] * 10), work=stopping, workers=workers))


def test_after_a_stop_no_further_batch_is_started() -> None:
    started = []

    def stopping(batch: Batch, *stacks: Tensor) -> list[None]:
        started.append(batch.pairs[0].name)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(run(batches_of([10] * 200), work=stopping, workers=1))
    assert len(started) < 200


def test_too_few_results_are_an_error_and_no_pair_is_lost_without_a_word() -> None:
    with pytest.raises(ValueError, match="shorter"):
        list(run(batches_of([10], pairs=2), work=lambda batch, *stacks: ["one"]))


@pytest.mark.parametrize("stop", [KeyboardInterrupt(), Stopped(signal.SIGTERM), Broken()])
def test_what_the_consumer_raises_ends_the_pipeline(stop: BaseException) -> None:
    with pytest.raises(type(stop)):
        for i, _ in enumerate(run(batches_of([10] * 50), workers=3)):
            if i == 2:
                raise stop


def test_a_consumer_that_loses_interest_ends_the_pipeline() -> None:
    outcomes = run(batches_of([10] * 50), workers=3)
    next(outcomes)
    cast(Any, outcomes).close()


def test_ctrl_c_while_waiting_for_a_result_ends_the_pipeline() -> None:
    release = threading.Event()

    def interrupting(batch: Batch, *stacks: Tensor) -> list[None]:
        if batch.pairs[0].name == "w3":
            _thread.interrupt_main()
            release.wait(0.2)  # the caller meanwhile waits for a result
        return [None]

    with pytest.raises(KeyboardInterrupt):
        list(run(batches_of([10] * 50), work=interrupting, workers=1))


def test_a_signal_handler_may_stop_the_pipeline() -> None:
    def handler(signum: int, _: object) -> None:
        raise Stopped(signum)

    def signalling(batch: Batch, *stacks: Tensor) -> list[None]:
        if batch.pairs[0].name == "w3":
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.2)
        return [None]

    before = signal.signal(signal.SIGTERM, handler)
    try:
        with pytest.raises(Stopped) as caught:
            list(run(batches_of([10] * 50), work=signalling, workers=1))
    finally:
        signal.signal(signal.SIGTERM, before)
    assert caught.value.exit_code == 143


# --- out of memory ------------------------------------------------------------------------------


@pytest.mark.parametrize("fits", [1, 2, 3, 5])
def test_a_stack_that_does_not_fit_is_halved_until_it_does(fits: int) -> None:
    tried = []

    def limited(batch: Batch, base: Tensor, tuned: Tensor) -> list[tuple[str, float, float]]:
        assert len(base) == len(tuned) == len(batch.pairs)
        tried.append(len(batch.pairs))
        if len(batch.pairs) > fits:
            raise torch.OutOfMemoryError("no room")
        return work(batch, base, tuned)

    outcomes = list(run(batches_of([10], pairs=7), work=limited))
    assert [one.pair.name for one in outcomes] == [f"w{i}" for i in range(7)]
    assert all(one.result == (one.pair.name, float(i), i + 0.5) for i, one in enumerate(outcomes))
    assert tried[0] == 7
    assert sum(size for size in tried if size <= fits) == 7  # each pair succeeds once
    assert all(one.note is None for one in outcomes)  # a smaller stack on the same device


# A device that is not the CPU, and wants none of the streams and events of CUDA.
GPU, SECOND = torch.device("xpu", 0), torch.device("xpu", 1)


@dataclass
class Elsewhere:
    """Stands for a tensor of a machine with a GPU, of which `held` holds the numbers."""

    held: Tensor
    device: torch.device = CPU
    room: bool = True  # for this tensor on the GPU

    def unsqueeze(self, axis: int) -> Elsewhere:
        return replace(self, held=self.held.unsqueeze(axis))

    def to(self, device: torch.device) -> Elsewhere:
        if not self.room and device != CPU:
            raise torch.OutOfMemoryError("no room for the tensor itself")
        return replace(self, device=device)

    def cpu(self) -> Elsewhere:
        return replace(self, device=CPU)


def on_gpu(*, full_for: str, moves: bool) -> dict[str, Outcome[Any]]:
    """Three pairs on a GPU whose memory does not suffice for one of them, before or in its work."""

    def bring(one: WeightPair) -> tuple[Any, ...]:
        room = moves or one.name != full_for
        return tuple(Elsewhere(part, room=room) for part in read(one))

    def limited(batch: Batch, base: Any, tuned: Any) -> list[tuple[str, float, float]]:
        if base.device == GPU and batch.pairs[0].name == full_for:
            raise torch.OutOfMemoryError("no room for the work")
        return work(batch, base.held, tuned.held)

    outcomes = run(batches_of([10] * 3), read=bring, work=limited, devices=(GPU,))
    return {one.pair.name: one for one in outcomes}


@pytest.mark.parametrize("moves", [True, False], ids=["in_work", "on_the_way"])
def test_a_single_pair_that_does_not_fit_is_computed_on_the_cpu_and_says_so(moves: bool) -> None:
    outcomes = on_gpu(full_for="w1", moves=moves)
    assert {name: one.note for name, one in outcomes.items()} == {
        "w0": None,
        "w1": "computed on the CPU: xpu ran out of memory",
        "w2": None,
    }
    assert outcomes["w1"].result == ("w1", 1.0, 1.5)


def test_what_does_not_fit_on_the_cpu_either_fails_by_itself() -> None:
    def hopeless(batch: Batch, *stacks: Tensor) -> list[str]:
        if "w2" in [one.name for one in batch.pairs]:
            raise torch.OutOfMemoryError("no room anywhere")
        return [one.name for one in batch.pairs]

    outcomes = list(run(batches_of([10], pairs=4), work=hopeless))
    assert [one.result for one in outcomes] == ["w0", "w1", None, "w3"]
    assert [one.failure for one in outcomes] == [None, None, "no room anywhere", None]


def test_a_pair_that_fails_on_a_device_is_computed_on_the_cpu_and_says_so() -> None:
    def failing(batch: Batch, base: Any, tuned: Any) -> list[str]:
        if base.device == GPU and "w1" in [one.name for one in batch.pairs]:
            raise RuntimeError("kernel failed\nand much more")
        return [one.name for one in batch.pairs]

    outcomes = list(run(batches_of([10] * 3), read=bring, work=failing, devices=(GPU,)))
    notes = {one.result: one.note for one in outcomes}
    told = "computed on the CPU: xpu failed (kernel failed)"
    assert notes == {"w0": None, "w1": told, "w2": None}


def test_room_that_is_there_only_when_its_turn_comes_is_used() -> None:
    """A batch is copied ahead; if the one in work leaves it no room, it goes when that is done."""
    busy = threading.Event()

    @dataclass
    class Waiting(Elsewhere):
        def to(self, device: torch.device) -> Elsewhere:
            if busy.is_set():
                raise torch.OutOfMemoryError("the batch in work has it")
            return Elsewhere(self.held, device)

    def bring(one: WeightPair) -> tuple[Any, ...]:
        if one.name == "w0":
            return tuple(Elsewhere(part) for part in read(one))
        return tuple(Waiting(part) for part in read(one))

    def working(batch: Batch, base: Any, tuned: Any) -> list[torch.device]:
        if batch.pairs[0].name == "w0":
            busy.set()
            time.sleep(0.1)
            busy.clear()
        return [base.device]

    outcomes = list(run(batches_of([10] * 2), read=bring, work=working, devices=(GPU,), workers=1))
    assert [one.result for one in outcomes] == [GPU, GPU]
    assert [one.note for one in outcomes] == [None, None]


# --- several devices ----------------------------------------------------------------------------


def bring(one: WeightPair) -> tuple[Any, ...]:
    return tuple(Elsewhere(part) for part in read(one))


def test_several_devices_share_the_batches() -> None:
    """Both are at work at the same time, and every pair comes out once, from one of them."""
    together, met = threading.Barrier(2), set()

    def meeting(batch: Batch, base: Any, tuned: Any) -> list[Any]:
        assert base.device == tuned.device
        if base.device not in met:  # the first batch of each waits for that of the other
            met.add(base.device)
            together.wait(PATIENCE)
        return work(batch, base.held, tuned.held)

    batches = batches_of([10] * 8)
    outcomes = list(run(batches, read=bring, work=meeting, devices=(GPU, SECOND), workers=2))
    assert sorted(one.pair.name for one in outcomes) == [f"w{i}" for i in range(8)]
    assert all(
        cast(Any, one.result)[:2] == (one.pair.name, float(one.pair.name[1:])) for one in outcomes
    )
    assert met == {GPU, SECOND}


def test_a_slow_device_does_not_hold_up_the_other() -> None:
    release = threading.Event()

    def uneven(batch: Batch, base: Any, tuned: Any) -> list[torch.device]:
        if base.device == SECOND:
            release.wait(PATIENCE)
        return [base.device]

    outcomes = run(batches_of([1] * 30), read=bring, work=uneven, devices=(GPU, SECOND), workers=2)
    found = []
    for one in outcomes:
        found.append(one.result)
        if len(found) == 26:  # one in work there, one ahead of it, and what is read meanwhile
            release.set()
    assert found.count(SECOND) <= 4
    assert len(found) == 30


@pytest.mark.parametrize("workers", [1, 2])
def test_one_batch_is_copied_ahead_of_those_in_work(workers: int) -> None:
    lock, copied, most = threading.Lock(), 0, 0

    @dataclass
    class Counted(Elsewhere):
        def to(self, device: torch.device) -> Elsewhere:
            nonlocal copied, most
            with lock:
                copied, most = copied + 1, max(most, copied + 1)
            return Elsewhere(self.held, device)

    def counted(one: WeightPair) -> tuple[Any, ...]:
        return (Counted(read(one)[0]),)

    def slow(batch: Batch, base: Any) -> list[None]:
        nonlocal copied
        time.sleep(0.005)
        with lock:
            copied -= 1
        return [None]

    outcomes = run(batches_of([1] * 20), read=counted, work=slow, devices=(GPU,), workers=workers)
    assert len(list(outcomes)) == 20
    assert most <= workers + 1


def test_fewer_workers_than_devices_leave_some_idle() -> None:
    def where(batch: Batch, base: Any, tuned: Any) -> list[torch.device]:
        return [base.device]

    outcomes = run(batches_of([1] * 6), read=bring, work=where, devices=(GPU, SECOND), workers=1)
    assert {one.result for one in outcomes} == {GPU}


def test_the_cpu_named_twice_is_one_device() -> None:
    outcomes = list(run(batches_of([10] * 6), devices=(CPU, CPU), workers=2))
    assert sorted(one.pair.name for one in outcomes) == [f"w{i}" for i in range(6)]
    assert weighed([10] * 6, 20, 2).heaviest <= 20


@pytest.mark.parametrize("count", [1, 2])
def test_an_exception_on_the_way_to_a_device_is_raised_to_the_caller(count: int) -> None:
    @dataclass
    class Lost(Elsewhere):
        def to(self, device: torch.device) -> Elsewhere:
            raise Broken("the device is gone")

    def lost(one: WeightPair) -> tuple[Any, ...]:
        return tuple(Lost(part) for part in read(one))

    devices = (GPU, SECOND)[:count]
    with pytest.raises(Broken, match="gone"):
        list(run(batches_of([1] * 10), read=lost, devices=devices, workers=count))


@pytest.mark.parametrize("at", [0, 5])
def test_a_stop_on_one_of_several_devices_ends_all(at: int) -> None:
    def failing(batch: Batch, base: Any, tuned: Any) -> list[None]:
        if batch.pairs[0].name == f"w{at}":
            raise KeyboardInterrupt
        return [None]

    outcomes = run(batches_of([1] * 10), read=bring, work=failing, devices=(GPU, SECOND))
    with pytest.raises(KeyboardInterrupt):
        list(outcomes)


# --- the numbers --------------------------------------------------------------------------------


def test_a_report_does_not_depend_on_the_number_of_workers(tmp_path) -> None:
    shapes = [(40, 24), (24, 40), (32, 32)] * 3
    base = {
        f"model.layers.{i}.mlp.up_proj.weight": gaussian(m, n, seed=i)
        for i, (m, n) in enumerate(shapes)
    }
    tuned = {
        name: updated(weight, gaussian(*weight.shape, seed=50 + i), 0.05)
        for i, (name, weight) in enumerate(base.items())
    }
    for folder, weights in (("base", base), ("tuned", tuned)):
        save_model(tmp_path / folder, {key: one.float() for key, one in weights.items()})

    def report(jobs: int) -> Report:
        options = Options(jobs=jobs, ks=(4,), masks=True)
        found = compare(tmp_path / "base", tmp_path / "tuned", options=options)
        return replace(found, provenance=replace(found.provenance, seconds=0.0))

    alone = report(1).dumps()
    assert report(2).dumps() == alone
    assert report(5).dumps() == alone
