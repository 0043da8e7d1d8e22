"""RLVR-Linearity's R² per entry: against a fit of each, its null, its filter, sums of blocks."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from geoscope.errors import NumericsError
from geoscope.trajectory.increments import increments_of_weights
from geoscope.trajectory.scalar_r2 import ScalarR2, ScalarR2Counts, scalar_r2_walk
from tests.helpers.series import from_steps, number, simulated

STEPS = (0, 1, 2, 5, 6, 10, 11, 12, 18)


def measured(weights: list[torch.Tensor], steps: tuple[int, ...] | range, **options) -> ScalarR2:
    found = ScalarR2(list(steps[1:]), **options)
    for t, W in zip(steps[1:], weights[1:], strict=True):
        found.add(t, W.double() - weights[0].double())
    return found


def published(weights: list[torch.Tensor], steps: tuple[int, ...] | range) -> np.ndarray:
    """R² of each entry by its own fit, in a loop; NaN where the entry stands still."""
    t, W = np.array(steps[1:], dtype=float), torch.stack(weights[1:]).double().numpy()
    out = np.full(W.shape[1], np.nan)
    for j, y in enumerate(W.T):
        if np.ptp(y) > 0:
            slope, start = np.polyfit(t, y, 1)
            out[j] = 1 - ((y - slope * t - start) ** 2).sum() / ((y - y.mean()) ** 2).sum()
    return out


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_each_entry_has_the_r2_of_its_own_fit(dtype: torch.dtype) -> None:
    weights = simulated(STEPS, drift=0.4, entries=400, dtype=dtype, rho=5e-3)
    found = measured(weights, STEPS)
    r2, kept = found.r2()
    expected = published(weights, STEPS)
    assert kept.tolist() == np.isfinite(expected).tolist()
    np.testing.assert_allclose(r2[kept], expected[kept], atol=1e-9)
    counts = found.counts()
    assert counts.median == pytest.approx(np.nanmedian(expected), abs=3e-3)
    assert counts.share_linear == pytest.approx((expected[kept] > 0.7).mean(), abs=1e-9)
    assert counts.kept_fraction == pytest.approx(kept.double().mean())


def test_entries_that_stand_still_have_none() -> None:
    """Also those that moved once, by a number whose sums round."""
    block = torch.tensor([0.0, 0.1, 0.3], dtype=torch.float64)
    found = ScalarR2([1, 2, 3, 4, 5, 6, 7])
    for t in range(1, 8):
        found.add(t, block + torch.tensor([0.0, 0.0, t * 0.1]))
    r2, kept = found.r2()
    assert kept.tolist() == [False, False, True]
    assert float(r2[2]) == pytest.approx(1)
    counts = found.counts()
    assert (counts.kept, counts.entries, counts.share_linear) == (1, 3, 1.0)


def test_the_order_of_steps_and_the_cut_into_blocks_do_not_matter() -> None:
    weights = simulated(STEPS, drift=0.2, entries=900)
    whole = measured(weights, STEPS).counts()
    parts = [measured([W[at] for W in weights], STEPS).counts()
             for at in (slice(0, 100), slice(100, 900))]  # fmt: skip
    assert torch.equal((parts[0] + parts[1]).counts, whole.counts)
    assert (parts[0] + parts[1]).entries == whole.entries
    turned = ScalarR2(STEPS[1:])
    for t, W in reversed(list(zip(STEPS[1:], weights[1:], strict=True))):
        turned.add(t, (W - weights[0]).reshape(30, 30))
    torch.testing.assert_close(turned.r2()[0], measured(weights, STEPS).r2()[0])


def test_the_walk_has_the_null_of_methods() -> None:
    null = scalar_r2_walk(from_steps(torch.eye(60)))
    assert null.median == pytest.approx(0.44, abs=0.01)
    assert null.share_linear == pytest.approx(0.26, abs=0.01)
    simulation = measured(simulated(range(28), entries=50_000), range(28)).counts()
    inc = increments_of_weights(range(28), simulated(range(28), entries=50_000))
    null = scalar_r2_walk(inc)
    assert simulation.median == pytest.approx(null.median, abs=0.01)
    assert simulation.share_linear == pytest.approx(null.share_linear, abs=0.01)
    assert null.kept_fraction == 1


def test_drift_is_more_linear_than_the_null() -> None:
    weights = simulated(range(28), drift=1.0, entries=20_000)
    found = measured(weights, range(28)).counts()
    null = scalar_r2_walk(increments_of_weights(range(28), weights))
    assert number(found.median) > 0.85 > 0.5 > number(null.median)
    assert number(found.share_linear) > 0.7


def test_the_published_filter_selects_movers() -> None:
    """Range above 1e-4 and four values; survivors of slow noise in bf16 look linear."""
    weights = simulated(STEPS, rho=2e-3, entries=4000, dtype=torch.bfloat16)
    found = measured(weights, STEPS, published_filter=True)
    W = torch.stack(weights[1:]).double().numpy()
    passes = np.array([np.ptp(y) > 1e-4 and len(np.unique(y)) >= 4 for y in W.T])
    assert 0.01 < passes.mean() < 0.99
    assert found.r2()[1].tolist() == passes.tolist()
    still = measured([W * 1e-6 for W in simulated(STEPS, entries=50)], STEPS, published_filter=True)
    counts = still.counts()
    assert (counts.kept, counts.median, counts.share_linear) == (0, None, None)


def test_an_exact_line_is_one() -> None:
    found = measured(simulated(STEPS, drift=1.0, noise=0, entries=300), STEPS).counts()
    assert found.median == pytest.approx(1, abs=1e-4)
    assert found.share_linear == 1


def test_what_cannot_be_fitted_is_refused() -> None:
    with pytest.raises(NumericsError, match="3 or more distinct steps"):
        ScalarR2([1, 2])
    with pytest.raises(NumericsError, match="3 or more distinct steps"):
        ScalarR2([1, 2, 3, 3])
    found = ScalarR2([1, 2, 3])
    found.add(1, torch.zeros(2))
    with pytest.raises(NumericsError, match="step 1 was added already"):
        found.add(1, torch.zeros(2))
    with pytest.raises(NumericsError, match="step 9 is not among"):
        found.add(9, torch.zeros(2))
    with pytest.raises(NumericsError, match="1 of 3 steps"):
        found.counts()


def test_the_median_of_few() -> None:
    counts = torch.zeros(10_000, dtype=torch.long)
    counts[1000], counts[5000], counts[9000] = 1, 1, 1
    found = ScalarR2Counts(counts, 3)
    assert found.median == pytest.approx(0.5, abs=1e-4)
    assert found.share_linear == pytest.approx(1 / 3)
