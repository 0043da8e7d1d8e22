"""Stored entries from checkpoint to checkpoint: bits, bytes of a sync, and the isotropic null."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from geoscope.linalg.changes import side
from geoscope.linalg.grids import Grid
from geoscope.trajectory.changed import (
    ChangedEntries,
    StepChange,
    changed_step,
    expected_change,
)
from tests.helpers.matrices import gaussian

BITS = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32}
LONG = 70_000


def differing_bits(one: Tensor, other: Tensor) -> int:
    bits = BITS[one.dtype]
    pair = (each.contiguous().view(bits).numpy() for each in (one, other))
    return int(np.count_nonzero(np.not_equal(*pair)))


def moved(dtype: torch.dtype, rho: float, *shape: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A matrix as stored, and itself with an isotropic increment of relative size rho."""
    before = gaussian(*shape, seed=seed).to(dtype)
    after = before.double() + rho * gaussian(*shape, seed=seed + 1)
    return before, after.to(dtype)


@pytest.mark.parametrize("dtype", BITS)
@pytest.mark.parametrize("rho", [0.0, 1e-4, 1e-2])
def test_changed_entries_are_those_whose_bits_differ(dtype: torch.dtype, rho: float) -> None:
    before, after = moved(dtype, rho, 600, 700)  # more than a block
    assert changed_step(before, after).changed == differing_bits(before, after)


def test_a_zero_that_changes_its_sign_is_the_same_number() -> None:
    zeros = torch.zeros(8, dtype=torch.bfloat16)
    assert differing_bits(zeros, -zeros) == 8
    assert changed_step(zeros, -zeros).changed == 0
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        before = torch.tensor([0.0, -0.0, 1.0, 0.0, -1.0], dtype=dtype)
        after = torch.tensor([-0.0, 0.0, 1.0, 2.0, 1.0], dtype=dtype)
        assert changed_step(before, after) == StepChange(2, 2)


def test_a_wider_dtype_with_the_same_numbers_changes_nothing() -> None:
    before = moved(torch.bfloat16, 1e-2, 40, 30)[0]
    after = before.float()
    assert changed_step(before, after).changed == 0
    after[3, 4] += 1
    assert changed_step(before, after).changed == 1


@pytest.mark.parametrize(
    ("places", "gap_bytes"),
    [
        ((0, 1, 2), 2),
        ((65534,), 2),
        ((65535,), 4),
        ((10, 10 + 65535), 2),
        ((10, 10 + 65536), 4),
        ((), 2),
    ],
)
def test_gaps_take_two_bytes_where_every_one_fits(places: tuple[int, ...], gap_bytes: int) -> None:
    before = torch.zeros(1 << 20)
    after = before.clone()
    after[list(places)] = 1.0
    assert changed_step(before, after) == StepChange(len(places), gap_bytes)


def test_a_gap_goes_on_from_block_to_block() -> None:
    before = torch.zeros((1 << 18) + LONG, dtype=torch.bfloat16)
    after = before.clone()
    after[:: 1 << 15] = 1.0
    assert changed_step(before, after).gap_bytes == 2
    after[(1 << 18) - 1 :] = 0.0  # the last gap is as long as ever
    after[-1] = 1.0
    assert changed_step(before, after).gap_bytes == 4


@pytest.mark.parametrize(("size", "even"), [(2, 1 / 3), (4, 1 / 2), (8, 2 / 3)])
def test_bytes_of_a_sync_in_closed_form(size: int, even: float) -> None:
    found = ChangedEntries.of(
        1200, [StepChange(round(1200 * even), 2), StepChange(0, 2)], [0.5, None], [size, size]
    )
    assert found.break_even == pytest.approx(even)
    assert found.full == (1200 * size, 1200 * size)
    assert found.sent == (round(1200 * even) * (4 + size), 0)
    assert found.sync_shares == (pytest.approx(1.0), 0)
    assert found.gap_sync_shares == (pytest.approx(even * (2 + size) / size), 0)
    assert found.shares == (pytest.approx(even), 0)
    assert found.expected_shares == (0.5, None)


def test_tensors_add_up_by_their_entries() -> None:
    short = ChangedEntries.of(100, [StepChange(50, 2)], [0.25], [2])
    wide = ChangedEntries.of(300, [StepChange(0, 2)], [0.75], [4])
    both = short + wide
    assert both.shares == (50 / 400,)
    assert both.expected_shares == ((25 + 225) / 400,)
    assert both.sync_shares == (300 / (200 + 1200),)
    assert both.break_even == pytest.approx(1400 / (1400 + 1600))


def test_codes_have_no_bytes_and_a_grid_no_null() -> None:
    coded = ChangedEntries.of(100, [StepChange(50, 2)], [None], [None])
    both = coded + ChangedEntries.of(300, [StepChange(0, 2)], [0.75], [2])
    assert (both.shares, both.break_even) == ((50 / 400,), None)
    assert both.expected_shares == both.sync_shares == both.gap_sync_shares == (None,)
    before, after = moved(torch.bfloat16, 1e-3, 64, 64)
    on_grid = replace(side(before), grid=Grid("a grid", 1.0))
    assert expected_change(side(before), on_grid, 1e-3) is None
    assert expected_change(side(before), side(after), 1e-3) is not None


def null_of(before: Tensor, after: Tensor) -> float:
    rms = float((after.double() - before.double()).square().mean().sqrt())
    found = expected_change(side(before), side(after), rms)
    assert found is not None
    return found


def test_nothing_changes_by_chance_where_nothing_moved() -> None:
    before, _ = moved(torch.bfloat16, 0.0, 64, 64)
    assert null_of(before, before) == 0


def test_an_increment_of_few_entries_changes_fewer_than_its_null() -> None:
    """Negative control: the same norm on one row in sixteen."""
    before, after = moved(torch.bfloat16, 1e-3, 256, 256)
    sparse = before.clone()
    moving = before[::16].double() + 4e-3 * gaussian(16, 256, seed=9)
    sparse[::16] = moving.to(torch.bfloat16)
    isotropic = changed_step(before, after).changed / before.numel()
    assert isotropic == pytest.approx(null_of(before, after), abs=0.01)
    assert changed_step(before, sparse).changed / before.numel() < null_of(before, sparse) / 3


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rho", [1e-4, 1e-3, 1e-2])
def test_the_null_is_the_share_that_isotropic_increments_change(
    dtype: torch.dtype, rho: float
) -> None:
    """40 draws of 65 536 entries: the mean difference within 4 standard errors, and a margin for
    the spread, which is estimated from the measured size."""
    differences: list[float] = []
    for seed in range(0, 80, 2):
        before, after = moved(dtype, rho, 256, 256, seed=seed)
        share = changed_step(before, after).changed / before.numel()
        differences.append(share - null_of(before, after))
    error = float(np.std(differences) / len(differences) ** 0.5)
    assert abs(float(np.mean(differences))) < 4 * error + 2e-4
