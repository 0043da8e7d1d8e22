"""Linear extrapolators: weights against closed forms and against fits on the weights themselves."""

from __future__ import annotations

import pytest
import torch

from geoscope.errors import OptionError
from geoscope.trajectory.extrapolators import (
    EXTRAPOLATORS,
    between,
    damp,
    expo,
    extrapolator,
    relex,
    undamped,
    weights_of,
)
from geoscope.trajectory.increments import Increments, increments_of_weights

STEPS = (0.0, 3.0, 10.0, 12.0, 25.0, 31.0, 40.0)


def series(seed: int = 0, steps: tuple[float, ...] = STEPS) -> tuple[Increments, torch.Tensor]:
    """Increments of a 6×5 series, and its updates as rows (T, 30)."""
    noise = torch.randn(len(steps), 6, 5, generator=torch.Generator().manual_seed(seed))
    weights = noise.double().cumsum(0)
    return increments_of_weights(steps, list(weights)), (weights[1:] - weights[0]).flatten(1)


def test_weights_are_the_closed_forms() -> None:
    inc, _ = series()
    t = torch.tensor(STEPS[1:], dtype=torch.float64)
    X = torch.stack([torch.ones_like(t), t], 1)
    h = X @ torch.linalg.inv(X.T @ X) @ torch.tensor([1.0, 55.0], dtype=torch.float64)
    last = torch.eye(6, dtype=torch.float64)[-1]
    torch.testing.assert_close(EXTRAPOLATORS["hold"](inc, 55), last)
    torch.testing.assert_close(EXTRAPOLATORS["two_point"](inc, 55), 55 / 40 * last)
    torch.testing.assert_close(EXTRAPOLATORS["linear"](inc, 55), h)
    torch.testing.assert_close(EXTRAPOLATORS["linear_origin"](inc, 55), 55 * t / (t @ t))
    torch.testing.assert_close(expo(0.3)(inc, 55), 1.3 * last)
    expected = torch.zeros(6, dtype=torch.float64)
    b = (55 - 31) / (40 - 31)
    expected[4], expected[5] = 1 - b, b
    torch.testing.assert_close(between(-2, -1)(inc, 55), expected)
    torch.testing.assert_close(extrapolator("two_point(4, 5)")(inc, 55), expected)
    torch.testing.assert_close(damp(h, 0.25), last + 0.25 * (h - last))


@pytest.mark.parametrize("rank", [1, 2, 6])
def test_relex_fits_the_temporal_coefficients(rank: int) -> None:
    """U_kU_kᵀh is the SVD of the stack of updates, each c_k(t) by its line, and W0 + ĉVᵀ."""
    inc, updates = series()
    U, S, Vh = torch.linalg.svd(updates, full_matrices=False)
    t = torch.tensor(STEPS[1:], dtype=torch.float64)
    X = torch.stack([torch.ones_like(t), t], 1)
    coefficients = U[:, :rank] * S[:rank]
    fit = torch.linalg.lstsq(X, coefficients).solution
    predicted = (torch.tensor([1.0, 60.0], dtype=torch.float64) @ fit) @ Vh[:rank]
    torch.testing.assert_close(relex(rank)(inc, 60) @ updates, predicted)
    residual = updates[-1] - coefficients[-1] @ Vh[:rank]
    pinned = extrapolator(f"relex_pinned({rank})")(inc, 60) @ updates
    torch.testing.assert_close(pinned, predicted + residual)


def test_relex_of_full_rank_is_linear() -> None:
    inc, _ = series()
    torch.testing.assert_close(relex(6)(inc, 60), EXTRAPOLATORS["linear"](inc, 60))


@pytest.mark.parametrize("name", sorted(set(EXTRAPOLATORS) - {"hold"}))
def test_exact_lines_are_met(name: str) -> None:
    A = torch.randn(4, 7, generator=torch.Generator().manual_seed(1)).double()
    inc = increments_of_weights(STEPS, [1 + t * A for t in STEPS])
    predicted = float(EXTRAPOLATORS[name](inc, 90) @ torch.tensor(STEPS[1:]).double())
    assert predicted == pytest.approx(90, rel=1e-12)


@pytest.mark.parametrize("name", sorted(EXTRAPOLATORS))
def test_times_count_from_the_base(name: str) -> None:
    """A series whose base is its own first checkpoint, at step 100."""
    inc, _ = series()
    late = Increments(tuple(t + 100 for t in STEPS), inc.H, inc.rounding, inc.base_energy)
    one, two = EXTRAPOLATORS[name](inc, 55), EXTRAPOLATORS[name](late, 155)
    torch.testing.assert_close(one, two)


def test_the_unit_of_steps_does_not_matter() -> None:
    inc, _ = series()
    scaled = Increments(tuple(7 * t for t in STEPS), inc.H, inc.rounding, inc.base_energy)
    for one in EXTRAPOLATORS.values():
        torch.testing.assert_close(one(inc, 55), one(scaled, 385))


def test_no_update_at_all() -> None:
    inc = Increments(STEPS, torch.zeros(6, 6, dtype=torch.float64), (0.0,) * 7, 1.0)
    for one in EXTRAPOLATORS.values():
        assert torch.isfinite(one(inc, 50)).all()


def test_weights_by_name() -> None:
    inc, _ = series()
    expected = damp(EXTRAPOLATORS["relex"](inc, 50), 0.4)
    torch.testing.assert_close(
        weights_of("damped(relex)", inc, 50, factors={"relex": 0.4}), expected
    )
    torch.testing.assert_close(weights_of("hold", inc, 50), EXTRAPOLATORS["hold"](inc, 50))
    assert undamped("damped(relex(2))") == "relex(2)"
    assert undamped("relex") is None
    with pytest.raises(OptionError, match="backtest it first"):
        weights_of("damped(linear)", inc, 50)


@pytest.mark.parametrize("name", ["cubic", "relex(0)", "relex(1.5)", "two_point(1)", "damped(x)"])
def test_unknown_names_are_refused(name: str) -> None:
    with pytest.raises(OptionError, match="no linear extrapolator"):
        extrapolator(name)


def test_too_few_checkpoints() -> None:
    inc, _ = series()
    with pytest.raises(OptionError, match="2 are needed"):
        EXTRAPOLATORS["linear"](inc.observed(1), 50)
    with pytest.raises(OptionError, match="needed"):
        between(-3, -1)(inc.observed(2), 50)
