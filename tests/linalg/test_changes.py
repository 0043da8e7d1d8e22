"""One pass over the stored entries: norms, rounding noise, what stayed the same."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from geoscope.linalg import FORMATS
from geoscope.linalg.changes import changed_mask, nonfinite_entries, side, unchanged
from geoscope.linalg.storage import squared_spacing
from tests.helpers.matrices import DTYPES, gaussian, updated

WIDE = {**DTYPES, "fp64": torch.float64}
every_dtype = pytest.mark.parametrize("dtype", WIDE.values(), ids=WIDE)


def stored_pair(dtype: torch.dtype, rho: float, shape: tuple[int, int] = (300, 400)):
    """More entries than one block holds."""
    base = gaussian(*shape, seed=1)
    return base.to(dtype), updated(base, gaussian(*shape, seed=2), rho).to(dtype)


@every_dtype
@pytest.mark.parametrize("shape", [(3, 2), (300, 400)])
def test_a_side_has_its_norm_and_its_noise(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    weight = gaussian(*shape, seed=3).to(dtype)
    found = side(weight)
    wide = weight.double()
    noise = math.sqrt(float(squared_spacing(wide, FORMATS[dtype]).sum()) / 12)
    assert found.norm == pytest.approx(float(wide.norm()), rel=1e-13)
    assert found.noise == pytest.approx(noise, rel=1e-12)
    assert found.fmt == FORMATS[dtype]


@every_dtype
def test_levels_and_counts_describe_all_entries(dtype: torch.dtype) -> None:
    weight = gaussian(300, 400, seed=4).to(dtype)
    found = side(weight)
    assert float(found.counts.sum()) == pytest.approx(weight.numel())
    mean = float(torch.dot(found.counts, found.levels.abs())) / weight.numel()
    assert mean == pytest.approx(float(weight.double().abs().mean()), rel=1e-9)
    if dtype in (torch.bfloat16, torch.float16):
        values, counts = torch.unique(weight.double().abs(), return_counts=True)
        order = found.levels.argsort()
        assert torch.equal(found.levels[order], values)
        assert torch.equal(found.counts[order], counts.double())


def test_a_wide_file_of_bf16_numbers_has_the_noise_of_bf16() -> None:
    narrow = gaussian(64, 64, seed=5).to(torch.bfloat16)
    assert side(narrow.float()).noise == pytest.approx(side(narrow).noise, rel=1e-12)
    assert side(gaussian(64, 64, seed=5).float()).noise < 1e-4 * side(narrow).noise


def test_zeros_have_no_norm_and_almost_no_noise() -> None:
    found = side(torch.zeros(40, 40, dtype=torch.bfloat16))
    assert found.norm == 0
    assert 0 < found.noise < 1e-37


@every_dtype
@pytest.mark.parametrize("shape", [(4, 5), (300, 400)])
def test_nonfinite_entries_are_counted(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    weight = gaussian(*shape, seed=6).to(dtype)
    largest = torch.finfo(dtype).max
    weight[0, 0], weight[1, 1], weight[2, 0] = largest, -largest, torch.finfo(dtype).tiny
    assert nonfinite_entries(weight) == 0
    weight[0, 1], weight[3, 0], weight[3, 4] = torch.nan, torch.inf, -torch.inf
    assert nonfinite_entries(weight) == 3
    assert nonfinite_entries(weight.T) == 3
    assert nonfinite_entries(torch.full(shape, torch.nan, dtype=dtype)) == math.prod(shape)


def by_definition(base: Tensor, tuned: Tensor) -> tuple[float, float, float, np.ndarray]:
    """Relative, absolute, exact share and the changed mask, in numpy."""
    a, b = (x.to(torch.bfloat16).float().numpy() for x in (base, tuned))
    distance = np.abs(a - b)
    same = distance <= 1e-3 * np.maximum(np.abs(a), np.abs(b))
    exact = base.double().numpy() == tuned.double().numpy()
    return float(same.mean()), float((distance <= 1e-5).mean()), float(exact.mean()), ~same


@pytest.mark.parametrize("rho", [0.0, 1e-4, 1e-2, 1.0])
@pytest.mark.parametrize("dtypes", [("bf16", "bf16"), ("fp16", "fp16"), ("fp32", "fp32"),
                                    ("fp32", "bf16"), ("bf16", "fp16")], ids="-".join)  # fmt: skip
def test_shares_are_those_of_the_definitions(dtypes: tuple[str, str], rho: float) -> None:
    base, tuned = stored_pair(torch.float64, rho)
    base, tuned = base.to(DTYPES[dtypes[0]]), tuned.to(DTYPES[dtypes[1]])
    relative, absolute, exact, mask = by_definition(base, tuned)
    found = unchanged(base, tuned)
    assert found.relative == pytest.approx(relative, abs=1e-12)
    assert found.absolute == pytest.approx(absolute, abs=1e-12)
    assert found.exact == pytest.approx(exact, abs=1e-12)
    assert np.array_equal(changed_mask(base, tuned).numpy(), mask)
    assert changed_mask(base, tuned).shape == base.shape


def test_the_rule_is_bitwise_inequality_of_bf16_but_for_the_sign_of_zero() -> None:
    base, tuned = stored_pair(torch.bfloat16, 3e-3)
    base[0, 0], tuned[0, 0] = 0.0, -0.0
    bits = base.view(torch.int16) != tuned.view(torch.int16)
    bits[0, 0] = False
    assert torch.equal(changed_mask(base, tuned), bits)


@pytest.mark.parametrize(
    ("before", "after", "moved"),
    [
        (0.0, 0.0, False),
        (0.0, -0.0, False),
        (0.0, 1e-30, True),
        (1.0, -1.0, True),
        (1.0, 1.0078125, True),  # the next bf16 number
        (1.0, 1.003, False),  # rounds back
        (1.0, 1.005, True),
    ],
)
def test_entries_that_move(before: float, after: float, moved: bool) -> None:
    base, tuned = torch.full((2, 2), before), torch.full((2, 2), after)
    assert bool(changed_mask(base, tuned).all()) == moved
    assert unchanged(base, tuned).relative == (not moved)


def test_the_absolute_rule_reads_higher_on_small_weights() -> None:
    small = gaussian(100, 100, seed=7, sd=1e-4).to(torch.bfloat16)
    tuned = updated(small.double(), gaussian(100, 100, seed=8), 0.05).to(torch.bfloat16)
    found = unchanged(small, tuned)
    assert found.absolute > 0.9 > 0.3 > found.relative
