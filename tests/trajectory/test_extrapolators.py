"""Linear extrapolators: weights against closed forms and against fits on the weights themselves."""

from __future__ import annotations

import pytest
import torch

from geoscope.errors import OptionError
from geoscope.linalg.product import Product
from geoscope.trajectory.extrapolators import EXTRAPOLATORS
from geoscope.trajectory.increments import Increments, increments_of_weights
from geoscope.trajectory.methods import METHODS, PLAIN, Damped
from geoscope.trajectory.names import NAMES
from geoscope.trajectory.prediction import MethodInput, Pair, Prediction, damp
from geoscope.trajectory.rank1 import Rank1Path
from geoscope.trajectory.spatial_rank1 import SPATIAL

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
    torch.testing.assert_close(EXTRAPOLATORS["hold"].weights(inc, 55), last)
    torch.testing.assert_close(EXTRAPOLATORS["two_point"].weights(inc, 55), 55 / 40 * last)
    torch.testing.assert_close(EXTRAPOLATORS["linear"].weights(inc, 55), h)
    torch.testing.assert_close(EXTRAPOLATORS["linear_origin"].weights(inc, 55), 55 * t / (t @ t))
    torch.testing.assert_close(damp(h, 0.25), last + 0.25 * (h - last))


def test_relex_fits_the_leading_temporal_coefficient() -> None:
    """U_1U_1ᵀh is the SVD of the stack of updates, c_1(t) by its line, and W0 + ĉVᵀ."""
    inc, updates = series()
    U, S, Vh = torch.linalg.svd(updates, full_matrices=False)
    t = torch.tensor(STEPS[1:], dtype=torch.float64)
    X = torch.stack([torch.ones_like(t), t], 1)
    coefficients = U[:, :1] * S[:1]
    fit = torch.linalg.lstsq(X, coefficients).solution
    predicted = (torch.tensor([1.0, 60.0], dtype=torch.float64) @ fit) @ Vh[:1]
    torch.testing.assert_close(EXTRAPOLATORS["relex"].weights(inc, 60) @ updates, predicted)
    residual = updates[-1] - coefficients[-1] @ Vh[:1]
    pinned = EXTRAPOLATORS["relex_pinned"].weights(inc, 60) @ updates
    torch.testing.assert_close(pinned, predicted + residual)


@pytest.mark.parametrize("name", sorted(set(EXTRAPOLATORS) - {"hold"}))
def test_exact_lines_are_met(name: str) -> None:
    A = torch.randn(4, 7, generator=torch.Generator().manual_seed(1)).double()
    inc = increments_of_weights(STEPS, [1 + t * A for t in STEPS])
    predicted = float(EXTRAPOLATORS[name].weights(inc, 90) @ torch.tensor(STEPS[1:]).double())
    assert predicted == pytest.approx(90, rel=1e-12)


@pytest.mark.parametrize("name", sorted(EXTRAPOLATORS))
def test_times_count_from_the_base(name: str) -> None:
    """A series whose base is its own first checkpoint, at step 100."""
    inc, _ = series()
    late = Increments(tuple(t + 100 for t in STEPS), inc.H, inc.rounding, inc.base_energy)
    one, two = EXTRAPOLATORS[name].weights(inc, 55), EXTRAPOLATORS[name].weights(late, 155)
    torch.testing.assert_close(one, two)


def test_the_unit_of_steps_does_not_matter() -> None:
    inc, _ = series()
    scaled = Increments(tuple(7 * t for t in STEPS), inc.H, inc.rounding, inc.base_energy)
    for one in EXTRAPOLATORS.values():
        torch.testing.assert_close(one.weights(inc, 55), one.weights(scaled, 385))


def test_no_update_at_all() -> None:
    inc = Increments(STEPS, torch.zeros(6, 6, dtype=torch.float64), (0.0,) * 7, 1.0)
    for one in EXTRAPOLATORS.values():
        assert torch.isfinite(one.weights(inc, 50)).all()


# --- the table of all methods -------------------------------------------------------------------


def test_every_method_is_named_as_it_is_listed_and_stands_damped() -> None:
    assert all(method.name == name for name, method in METHODS.items())
    assert set(NAMES) == {*EXTRAPOLATORS, *SPATIAL, "next"}
    plain = [*PLAIN, "next"]
    assert list(METHODS) == ["hold", *plain, *(f"damped({name})" for name in plain)]


@pytest.mark.parametrize("name", sorted(METHODS))
def test_a_damped_prediction_lies_between_the_last_update_and_the_plain_one(name: str) -> None:
    """ΔŴ = Σw_iΔ_i + Σσuvᵀ made dense, of models and of factors alike; λ of the way when damped."""
    seen, updates = all_seen()
    dense = dense_of(METHODS[name].predict(seen, 50), updates)
    if isinstance(method := METHODS[name], Damped):
        plain = dense_of(method.inner.predict(seen, 50), updates)
        torch.testing.assert_close(dense, updates[-1] + 0.4 * (plain - updates[-1]))
    factors = [Product.of(torch.eye(6), update) for update in updates]
    product = METHODS[name].predict(seen, 50).of(factors)
    torch.testing.assert_close((product.B * product.scale[:, None] @ product.A)[0], dense)


def all_seen() -> tuple[MethodInput, torch.Tensor]:
    """A 6×5 matrix with everything that a method may ask for, and its updates (T, 6, 5)."""
    inc, rows = series()
    updates = rows.reshape(-1, 6, 5)
    U, S, Vh = torch.linalg.svd(updates, full_matrices=False)
    path = Rank1Path(S[:, 0], S[:, 1], rows.norm(dim=1), U[:, :, 0], Vh[:, 0])
    step = Pair(0.5, U[-1, :, 2], Vh[-1, 2])
    return MethodInput(inc, path, step, dict.fromkeys([*PLAIN, "next"], 0.4)), updates


def dense_of(prediction: Prediction, updates: torch.Tensor) -> torch.Tensor:
    whole = torch.einsum("t,tmn->mn", prediction.weights, updates)
    return whole + sum(pair.sigma * torch.outer(pair.u, pair.v) for pair in prediction.pairs)


def test_predictions_of_the_leading_pair() -> None:
    seen, updates = all_seen()
    assert seen.path is not None
    last = seen.path.sigma[-1] * torch.outer(seen.path.u[-1], seen.path.v[-1])
    free, pinned, alpha, trained = (
        dense_of(METHODS[name].predict(seen, 50), updates)
        for name in ("spatial_rank1", "spatial_rank1_pinned", "alpha_rank1", "next")
    )
    torch.testing.assert_close(pinned, updates[-1] + free - last)
    torch.testing.assert_close(alpha, last / last.norm() * updates[-1].norm())
    assert seen.step is not None
    torch.testing.assert_close(trained, updates[-1] + seen.step.dense())


def test_nothing_weighed_is_a_zero_product() -> None:
    _, updates = all_seen()
    nothing = Prediction(torch.zeros(len(updates), dtype=torch.float64))
    product = nothing.of([Product.of(torch.eye(6), update) for update in updates])
    assert product.shape == (6, 5) and not product.scale.any()


@pytest.mark.parametrize(
    ("name", "reason"),
    [("damped(linear)", "backtest"), ("alpha_rank1", "leading pairs"), ("next", "networks")],
)
def test_what_was_not_seen_is_asked_for(name: str, reason: str) -> None:
    inc, _ = series()
    with pytest.raises(OptionError, match=reason):
        METHODS[name].predict(MethodInput(inc), 50)


def test_too_few_checkpoints() -> None:
    inc, _ = series()
    with pytest.raises(OptionError, match="2 are needed"):
        EXTRAPOLATORS["linear"].weights(inc.observed(1), 50)
