"""The increment Gram matrix: equal to the dense one, sums, factors of adapters, bad input."""

from __future__ import annotations

import pytest
import torch

from geoscope.errors import NumericsError
from geoscope.linalg.product import Product
from geoscope.linalg.small import gram_eigen, orthonormal_columns
from geoscope.linalg.storage import FORMATS, squared_spacing
from geoscope.trajectory.increments import (
    Increments,
    increment_gram,
    increments_of_products,
    increments_of_weights,
)
from tests.helpers.series import simulated

STEPS = (0, 10, 20, 50, 60, 100)


def test_it_is_the_dense_gram_and_G_is_that_of_the_updates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("geoscope.trajectory.increments._BLOCK", 999)  # many blocks, a ragged last
    weights = simulated(STEPS, drift=0.3, entries=5000, dtype=torch.bfloat16)
    inc = increments_of_weights(STEPS, [W.reshape(50, 100) for W in weights])
    wide = torch.stack(weights).double()
    taken, updates = wide.diff(dim=0), wide[1:] - wide[0]
    torch.testing.assert_close(inc.H, taken @ taken.T, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(inc.G, updates @ updates.T, rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(increment_gram(inc.G), inc.H, rtol=1e-9, atol=1e-12)
    noise = [float(squared_spacing(W, FORMATS[torch.bfloat16]).sum()) / 12 for W in weights]
    assert inc.rounding == pytest.approx(noise, rel=1e-12)
    assert inc.base_energy == pytest.approx(float(wide[0].square().sum()), rel=1e-12)
    assert inc.elapsed.tolist() == [10, 20, 50, 60, 100]
    assert inc.gaps.tolist() == [10, 10, 30, 10, 40]


def test_a_wide_file_of_bf16_numbers_has_the_rounding_of_bf16() -> None:
    weights = simulated(STEPS, entries=4096, dtype=torch.bfloat16)
    inc = increments_of_weights(STEPS, weights)
    wide = increments_of_weights(STEPS, [W.float() for W in weights])
    assert wide.rounding == pytest.approx(inc.rounding, rel=1e-12)


def test_sums_over_tensors_are_the_tensor_of_both() -> None:
    weights = simulated(STEPS, drift=0.3, entries=6000)
    one = increments_of_weights(STEPS, [W[:2000] for W in weights])
    two = increments_of_weights(STEPS, [W[2000:] for W in weights])
    both, sum_ = increments_of_weights(STEPS, weights), one + two
    torch.testing.assert_close(sum_.H, both.H, rtol=1e-11, atol=1e-12)
    assert sum_.rounding == pytest.approx(both.rounding)
    assert sum_.base_energy == pytest.approx(both.base_energy)
    with pytest.raises(NumericsError, match="different steps"):
        _ = one + increments_of_weights(range(6), [W[:2000] for W in weights])


def test_the_first_checkpoints_are_a_series() -> None:
    weights = simulated(STEPS, entries=500)
    inc = increments_of_weights(STEPS, weights)
    early = increments_of_weights(STEPS[:4], weights[:4])
    assert inc.observed(3).steps == early.steps
    torch.testing.assert_close(inc.observed(3).H, early.H)
    with pytest.raises(NumericsError, match="no first 6"):
        inc.observed(6)


def test_adapters_give_the_dense_gram_without_a_dense_matrix() -> None:
    """An adapter from a non-zero start: its initial factors go along, and cancel."""
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    B0, A0 = normal(40, 4), normal(4, 60)
    trained, B, A = [], B0, A0
    for _ in range(4):
        B, A = B + 1e-3 * normal(40, 4), A + 1e-3 * normal(4, 60)
        trained.append((B, A))
    updates = [Product.of(B, A, 2.0) - Product.of(B0, A0, 2.0) for B, A in trained]
    inc = increments_of_products(STEPS[:5], updates, rounding=(0.0,) * 5, base_energy=1.0)
    dense = torch.stack([2 * (B @ A - B0 @ A0).flatten() for B, A in trained])
    torch.testing.assert_close(inc.G, dense @ dense.T, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("steps", "size", "match"),
    [
        ((0, 2, 1), 2, "step 1 follows step 2"),
        ((0, 1, 1), 2, "step 1 follows step 1"),
        ((0, 1, 2), 3, "needed are T"),
        ((0,), 0, "needed are T"),
    ],
)
def test_what_is_no_series_is_refused(steps: tuple[float, ...], size: int, match: str) -> None:
    with pytest.raises(NumericsError, match=match):
        Increments(steps, torch.eye(size, dtype=torch.float64), (0.0,) * len(steps), 1.0)


def test_weights_that_do_not_belong_together_are_refused() -> None:
    with pytest.raises(NumericsError, match="3 weights of shape 4, 5 at 3 steps"):
        increments_of_weights((0, 1, 2), [torch.ones(4), torch.ones(4), torch.ones(5)])
    with pytest.raises(NumericsError, match="NaN or infinity"):
        increments_of_weights((0, 1), [torch.ones(4), torch.full((4,), torch.nan)])


# --- the small factorisations -------------------------------------------------------------------


def test_eigenpairs_are_descending_and_not_negative() -> None:
    X = torch.randn(6, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    values, vectors = gram_eigen(X @ X.T)
    assert bool((values.diff() <= 0).all())
    assert float(values.min()) >= 0
    torch.testing.assert_close(vectors @ values.diag() @ vectors.T, X @ X.T)


def test_dependent_columns_are_refused() -> None:
    with pytest.raises(NumericsError, match="no unique answer"):
        orthonormal_columns(torch.ones(4, 2))
    with pytest.raises(NumericsError, match="no unique answer"):
        orthonormal_columns(torch.ones(1, 2))
    for zero in (0, 1):
        columns = torch.tensor([[1.0, 2.0], [3.0, -1.0], [0.0, 4.0]])
        columns[:, zero] = 0
        with pytest.raises(NumericsError):
            orthonormal_columns(columns)
