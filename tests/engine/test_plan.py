"""Which pairs are computed together, in which order, and what the memory options mean."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from geoscope.engine import (
    default_memory,
    device_memory,
    estimate_seconds,
    plan,
    speed,
)
from geoscope.engine.plan import (
    BASELINE,
    asked_memory,
    least_memory,
    room_for_batches,
    working_bytes,
)
from geoscope.errors import OptionError
from geoscope.linalg.choice import rates
from geoscope.records import TensorInfo, WeightPair

BYTES = {"bfloat16": 2, "float32": 4, "float64": 8}
MB = 10**6


def pair(
    name: str, shape: tuple[int, int], base: str = "bfloat16", tuned: str = "bfloat16"
) -> WeightPair:
    m, n = shape
    before, after = (
        TensorInfo(name, shape, dtype, m * n * BYTES[dtype], "model.safetensors")
        for dtype in (base, tuned)
    )
    return WeightPair(name, 0, "q_proj", shape, before, after)


def names(batches: tuple) -> list[list[str]]:
    return [[one.name for one in batch.pairs] for batch in batches]


def room_for(count: int, one: WeightPair) -> int:
    """Memory for a stack in work, and another one ahead of it."""
    return BASELINE + 2 * count * working_bytes(one, stack=True)


def test_without_stacking_every_batch_holds_one_pair() -> None:
    pairs = [pair(name, (64, 32)) for name in "abc"]
    batches = plan(pairs, memory=10**12, stack=False)
    assert names(batches) == [["a"], ["b"], ["c"]]
    assert [batch.shape for batch in batches] == [(64, 32)] * 3


def test_equal_pairs_are_stacked_as_far_as_the_memory_reaches() -> None:
    pairs = [pair(name, (64, 32)) for name in "abcde"]
    assert names(plan(pairs, memory=room_for(2, pairs[0]), stack=True)) == [
        ["a", "b"],
        ["c", "d"],
        ["e"],
    ]
    assert names(plan(pairs, memory=room_for(5, pairs[0]), stack=True)) == [list("abcde")]
    assert len(plan(pairs, memory=room_for(5, pairs[0]) - 1, stack=True)) == 2


def test_stacks_of_one_shape_are_of_even_height() -> None:
    pairs = [pair(str(i), (64, 32)) for i in range(10)]
    batches = plan(pairs, memory=room_for(9, pairs[0]), stack=True)
    assert [len(batch.pairs) for batch in batches] == [5, 5]


@pytest.mark.parametrize(
    ("parts", "heights"), [(1, [8]), (2, [4, 4]), (3, [3, 3, 2]), (20, [1] * 8)]
)
def test_a_shape_is_cut_so_that_every_device_has_a_part(parts: int, heights: list[int]) -> None:
    pairs = [pair(str(i), (64, 32)) for i in range(8)]
    batches = plan(pairs, memory=10**12, stack=True, parts=parts)
    assert [len(batch.pairs) for batch in batches] == heights
    alone = plan(pairs, memory=10**12, stack=False, parts=parts)
    assert [len(batch.pairs) for batch in alone] == [1] * 8


def test_however_large_the_memory_a_stack_holds_four_gb_of_stored_bytes() -> None:
    pairs = [pair(str(i), (10_000, 10_000)) for i in range(30)]  # 0.4 GB each
    batches = plan(pairs, memory=10**15, stack=True)
    assert [len(batch.pairs) for batch in batches] == [10] * 3
    large = [pair(str(i), (50_000, 50_000)) for i in range(2)]  # 10 GB each
    assert [len(batch.pairs) for batch in plan(large, memory=10**15, stack=True)] == [1, 1]


def test_a_device_plans_with_four_fifths_of_what_the_fullest_has_free() -> None:
    assert device_memory([10**10]) == 8 * 10**9
    assert device_memory(iter([10**10, 5 * 10**9, 2 * 10**10])) == 4 * 10**9


def test_a_stack_needs_no_less_for_a_pair_than_the_blockwise_work_on_the_cpu() -> None:
    for shape in ((300, 200), (200, 300), (300, 300), (2000, 20)):
        one = pair("w", shape)
        m, n = shape
        q = min(shape)
        gram, basis, single = 8 * q * q, 8 * q * q, 4 * m * n
        assert working_bytes(one, stack=True) >= working_bytes(one)
        assert working_bytes(one, stack=True) >= 4 * m * n + max(3 * gram + basis, single)


@pytest.mark.parametrize("memory", [0, 1, BASELINE, -5])
def test_one_pair_alone_is_always_let_in(memory: int) -> None:
    pairs = [pair(name, (64, 32)) for name in "ab"]
    assert names(plan(pairs, memory=memory, stack=True)) == [["a"], ["b"]]


def test_shapes_and_dtypes_of_either_side_are_never_mixed_in_a_batch() -> None:
    pairs = [
        pair("square", (32, 32)),
        pair("tall", (64, 32)),
        pair("wide", (32, 64)),
        pair("base_wider", (32, 32), base="float32"),
        pair("tuned_wider", (32, 32), tuned="float32"),
        pair("square_too", (32, 32)),
    ]
    batches = plan(pairs, memory=10**12, stack=True)
    groups = {frozenset(one) for one in names(batches)}
    assert groups == {
        frozenset({"square", "square_too"}),
        frozenset({"tall"}),
        frozenset({"wide"}),
        frozenset({"base_wider"}),
        frozenset({"tuned_wider"}),
    }


def test_the_longest_work_starts_first_and_equals_keep_their_order() -> None:
    pairs = [pair("small", (8, 8)), pair("a", (64, 64)), pair("b", (64, 64)), pair("c", (80, 64))]
    assert names(plan(pairs, memory=0, stack=False)) == [["c"], ["a"], ["b"], ["small"]]


@settings(deadline=None, derandomize=True, database=None)
@given(
    shapes=st.lists(
        st.tuples(st.sampled_from([2, 16, 300]), st.sampled_from([2, 40])), max_size=12
    ),
    extra=st.integers(0, 40 * MB),
    stack=st.booleans(),
)
def test_every_pair_is_planned_once_and_a_batch_of_several_fits(
    shapes: list[tuple[int, int]], extra: int, stack: bool
) -> None:
    pairs = [pair(f"w{i}", shape) for i, shape in enumerate(shapes)]
    batches = plan(pairs, memory=BASELINE + extra, stack=stack)
    planned = [one.name for batch in batches for one in batch.pairs]
    assert sorted(planned) == sorted(one.name for one in pairs)
    for batch in batches:
        assert batch.working_bytes == sum(working_bytes(one, stack=stack) for one in batch.pairs)
        assert len(batch.pairs) == 1 or batch.working_bytes <= extra
        assert {one.shape for one in batch.pairs} == {batch.shape}
    sizes = [batch.working_bytes for batch in batches]
    assert sizes == sorted(sizes, reverse=True)


def test_batches_have_the_memory_that_the_process_leaves() -> None:
    assert BASELINE == 500 * MB
    assert room_for_batches(BASELINE + 7 * MB) == 7 * MB
    assert room_for_batches(BASELINE - 1) == room_for_batches(-5) == 0


def test_working_bytes_cover_what_is_held() -> None:
    one = pair("w", (300, 200), base="bfloat16", tuned="float32")
    stored, gram, leading_vectors = 300 * 200 * (2 + 4), 8 * 200 * 200, 8 * 64 * (300 + 200)
    assert working_bytes(one) >= stored + gram + 2 * leading_vectors
    assert working_bytes(one) == working_bytes(pair("w", (200, 300), "bfloat16", "float32"))


def test_the_least_memory_is_four_times_the_largest_pair_in_fp32_and_500_mb() -> None:
    pairs = [pair("small", (8, 8)), pair("large", (1000, 500)), pair("also", (500, 1000))]
    assert least_memory(pairs) == 4 * (2 * 4 * 1000 * 500) + 500 * MB
    assert least_memory([]) == 500 * MB


def test_the_default_memory_lets_every_worker_have_its_pair_and_one_be_read_ahead() -> None:
    pairs = [pair(f"large {i}", (1000, 500)) for i in range(40)] + [pair("small", (8, 8))]
    need = working_bytes(pairs[0])
    for workers in (16, 39):
        bound = default_memory(pairs, workers=workers, available=10**12)
        assert bound == (workers + 1) * need + 500 * MB
    assert default_memory(pairs, workers=64, available=10**12) == 40 * need + 500 * MB + (
        working_bytes(pairs[-1])
    )


def test_the_default_memory_leaves_half_of_what_the_machine_has() -> None:
    pairs = [pair(f"{i}", (4000, 4000)) for i in range(64)]
    assert default_memory(pairs, workers=64, available=4 * 10**9) == 2 * 10**9
    # but never less than what one pair takes
    assert default_memory(pairs, workers=64, available=10**8) == least_memory(pairs)
    more = default_memory(pairs, workers=8, available=10**13, entry_bytes=24)
    assert more == default_memory(pairs, workers=8, available=10**13) + 9 * 24 * 4000**2


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("2000000000", 2 * 10**9),
        ("8GB", 8 * 10**9),
        ("8G", 8 * 10**9),
        ("8gb", 8 * 10**9),
        (" 8 GB ", 8 * 10**9),
        ("1.5GB", 1_500_000_000),
        ("500M", 500 * MB),
        ("500MB", 500 * MB),
        ("64K", 64_000),
        ("64kb", 64_000),
        ("0", 0),
    ],
)
def test_sizes_are_read_in_decimal_units(text: str, expected: int) -> None:
    assert asked_memory([], text) == expected


@pytest.mark.parametrize(
    "text",
    ["", "GB", "8GiB", "8TB", "8MG", "eight", "8GB!", "nan", "inf", "1e400", "-5GB", "-1", "8,5GB"],
)
def test_what_is_no_size_is_refused_in_one_line(text: str) -> None:
    with pytest.raises(OptionError) as caught:
        asked_memory([], text)
    message = str(caught.value)
    assert "\n" not in message
    assert f"`max_memory` {text!r}" in message
    assert "8GB" in message  # what to write instead


def test_the_estimate_adds_up_and_is_shared_by_the_workers() -> None:
    pairs = [pair("a", (512, 256)), pair("b", (300, 300))]
    whole = estimate_seconds(pairs, workers=1)
    assert whole > 0
    assert estimate_seconds(pairs, workers=4) == pytest.approx(whole / 4)
    assert whole == pytest.approx(sum(estimate_seconds([one], workers=1) for one in pairs))
    assert estimate_seconds([], workers=1) == 0


def test_the_estimate_grows_with_the_shorter_side_cubed_and_not_with_the_turn() -> None:
    def seconds(*shape: int) -> float:
        return estimate_seconds([pair("w", (shape[0], shape[1]))], workers=1)

    assert seconds(1024, 256) == seconds(256, 1024)
    assert seconds(16384, 16384) == pytest.approx(8 * seconds(8192, 8192), rel=0.1)
    assert seconds(8192, 256) < 2 * seconds(4096, 256)


def test_small_matrices_cost_what_a_matrix_costs_whatever_its_size() -> None:
    many = estimate_seconds([pair(str(i), (96, 64)) for i in range(100)], workers=1)
    assert many == pytest.approx(100 * estimate_seconds([pair("w", (32, 16))], workers=1), rel=0.1)


def test_a_machine_that_is_slower_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half the committed rate, twice the ratio: it is a ratio to that rate."""
    clock = iter([0.0, 3.0, 0.0, 3.0])
    monkeypatch.setattr(speed.time, "perf_counter", lambda: next(clock))
    usual = speed.slowness(1)
    assert usual == pytest.approx(0.93 * rates().gram64 * 1e9 / (2 * 1024**3))
    half = replace(rates(), gram64=rates().gram64 / 2)
    monkeypatch.setattr(speed, "rates", lambda: half)
    assert speed.slowness(1) == pytest.approx(usual / 2)


def test_small_pairs_are_stacked_on_the_cpu_and_shared_out_among_the_workers() -> None:
    pairs = [pair(str(i), (96, 64)) for i in range(600)]
    for workers in (1, 2, 16):
        heights = [len(one.pairs) for one in plan(pairs, memory=10**10, workers=workers)]
        assert sum(heights) == 600
        assert len(heights) >= 3 * workers
        assert all(one.working_bytes <= 32 * MB for one in plan(pairs, memory=10**10, workers=2))
    few = plan(pairs[:5], memory=10**10, workers=8)
    assert [len(one.pairs) for one in few] == [1] * 5


def test_large_pairs_are_not_stacked_on_the_cpu() -> None:
    pairs = [pair(str(i), (512, 512)) for i in range(40)]  # 1.05 MB stored
    assert all(len(one.pairs) == 1 for one in plan(pairs, memory=10**12, workers=2))


@pytest.mark.parametrize("workers", [1, 2, 8])
def test_a_stack_and_those_of_the_other_workers_fit_the_memory(workers: int) -> None:
    pairs = [pair(str(i), (96, 64)) for i in range(600)]
    for room in (0, 2 * MB, 20 * MB, 200 * MB):
        batches = plan(pairs, memory=BASELINE + room, workers=workers)
        most = max(batches, key=lambda one: one.working_bytes)
        assert len(most.pairs) == 1 or (workers + 1) * most.working_bytes <= room


def test_the_default_memory_holds_a_stack_for_every_worker() -> None:
    pairs = [pair(str(i), (96, 64)) for i in range(600)]
    memory = default_memory(pairs, workers=2, available=10**11)
    assert plan(pairs, memory=memory, workers=2) == plan(pairs, memory=10**11, workers=2)
    assert memory <= BASELINE + 3 * 32 * MB
