"""RLPO and RLMO: the rows of A against numpy's own SVD, their nulls against dense Gaussians."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from geoscope.adapters.factors import LoraFactors
from geoscope.adapters.rlpo import rlmo, rlpo
from geoscope.linalg.iid import iid_cut, iid_draws
from tests.helpers.matrices import DTYPES, gaussian, with_spectrum

Matrix = NDArray[np.float64]
METHODS: dict[str, Callable[..., LoraFactors]] = {"rlpo": rlpo, "rlmo": rlmo}
both = pytest.mark.parametrize("name", METHODS)


def rows_of(W: Tensor, r: int, name: str) -> tuple[Matrix, Matrix]:
    """The rows that numpy has, and all singular values of the thin SVD."""
    _, S, Vh = np.linalg.svd(W.double().numpy(), full_matrices=False)
    return (Vh[:r] if name == "rlpo" else Vh[len(S) - r :]), S


def sine(rows: Matrix, truth: Matrix) -> float:
    """Largest sine between two row spaces of one dimension."""
    return float(np.linalg.norm(rows - (rows @ truth.T) @ truth, 2))


@both
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("shape", [(72, 40), (40, 72), (48, 48)])
def test_rows_are_the_directions_of_the_svd(
    name: str, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    W = with_spectrum(*shape, np.geomspace(2, 0.05, min(shape)), seed=1).to(dtype)
    made = METHODS[name](W, 5, alpha=7.0)
    truth, S = rows_of(W, 5, name)
    rows = made.A.double().numpy()
    assert np.abs(rows @ rows.T - np.eye(5)).max() < 1e-6
    assert not made.B.any()
    cosines = np.abs((rows * truth).sum(1))  # the values differ: row by row, up to sign
    assert np.abs(cosines - 1).max() < 1e-6
    largest = rows[np.arange(5), np.abs(rows).argmax(1)]
    assert (largest > 0).all()
    chosen = S[:5] if name == "rlpo" else S[-5:]
    above, below = (S[4], S[5]) if name == "rlpo" else (S[-6], S[-5])
    assert made.facts["captured_energy"] == pytest.approx((chosen**2).sum() / (S**2).sum())
    assert made.facts["gap"] == pytest.approx((above - below) / above, rel=1e-6)
    assert made.facts["relative_norm"] == 0
    assert made.notes == ()


@both
def test_scale_and_alpha_leave_the_rows(name: str) -> None:
    W = gaussian(50, 40, seed=2)
    one, two = METHODS[name](W, 4), METHODS[name](1e-3 * W, 4, alpha=64.0)
    assert sine(one.A.double().numpy(), two.A.double().numpy()) < 1e-6
    assert (one.scaling, two.scaling) == (2.0, 16.0)


@both
def test_large_matrices_take_the_certified_route(name: str) -> None:
    W = gaussian(900, 620, seed=3).bfloat16()
    for weights in (W, W.T.contiguous()):
        made = METHODS[name](weights, 6)
        truth, _ = rows_of(weights, 6, name)
        assert sine(made.A.double().numpy(), truth) < 1e-6
        (method,) = made.method.values()
        assert method["how"] != "svd64" and method["fallback"] is None


@both
def test_repeated_values_inside_turn_the_rows_and_not_their_space(name: str) -> None:
    values = np.r_[np.full(4, 2.0), np.linspace(1.5, 0.5, 24), np.full(4, 0.1)]
    W = with_spectrum(64, 32, values, seed=4)
    made = METHODS[name](W, 4)
    truth, _ = rows_of(W, 4, name)
    assert sine(made.A.double().numpy(), truth) < 1e-6
    assert made.notes == ()


@both
def test_a_tie_at_the_cut_is_told(name: str) -> None:
    values = np.r_[2.0, 1.0, 1.0, np.linspace(0.9, 0.5, 10), 0.2, 0.2, 0.1]
    made = METHODS[name](with_spectrum(30, 16, values, seed=5), 2)
    assert made.facts["gap"] == pytest.approx(0, abs=1e-9)
    (note,) = made.notes
    assert note.startswith("ill-conditioned subspace: ")


@both
@pytest.mark.parametrize("shape", [(40, 24), (24, 40)])
def test_rows_of_zero_directions_are_orthonormal_and_told(
    name: str, shape: tuple[int, int]
) -> None:
    """Rank 3 of 24: there is no fourth direction, and no last one."""
    values = np.r_[3.0, 2.0, 1.0, np.zeros(21)]
    made = METHODS[name](with_spectrum(*shape, values, seed=6), 5)
    rows = made.A.double()
    assert float((rows @ rows.T - torch.eye(5, dtype=torch.float64)).abs().max()) < 1e-6
    count = 2 if name == "rlpo" else 5
    assert any(note.startswith(f"{count} of the ") for note in made.notes)


def test_the_last_directions_of_a_wide_matrix_do_not_lean_to_the_first() -> None:
    """σ1/σq = 1e5: images of left vectors have their error along u1 a hundred thousandfold."""
    W = with_spectrum(256, 400, np.geomspace(1e5, 1, 256), seed=7)
    made = rlmo(W, 4)
    truth, _ = rows_of(W, 4, "rlmo")
    assert sine(made.A.double().numpy(), truth) < 1e-6
    assert made.method["tail"]["fallback"] is not None


def test_a_whole_tail_has_no_cut() -> None:
    made = rlmo(gaussian(9, 6, seed=8), 6)
    assert made.facts["gap"] is None and "gap" not in made.nulls
    assert made.facts["captured_energy"] == pytest.approx(1.0)
    assert rlpo(gaussian(9, 6, seed=8), 6).facts["gap"] == 1.0


@pytest.mark.parametrize("is_last", [False, True])
@pytest.mark.parametrize("shape", [(60, 60), (60, 90), (120, 40)])
def test_nulls_are_those_of_gaussian_matrices(shape: tuple[int, int], is_last: bool) -> None:
    shares, gaps = [], []
    generator = np.random.default_rng(9)
    for _ in range(400):
        S = np.linalg.svd(generator.standard_normal(shape), compute_uv=False)
        at = len(S) - 5 if is_last else 5
        shares.append(float(((S[at:] if is_last else S[:at]) ** 2).sum() / (S**2).sum()))
        gaps.append(float((S[at - 1] - S[at]) / S[at - 1]))
    share, gap = iid_cut(*shape, 5, 0, is_last=is_last)
    assert gap is not None
    draws = iid_draws(min(shape))
    for found, drawn in ((share, shares), (gap, gaps)):
        spread = float(np.std(drawn)) * (1 / 400 + 1 / draws) ** 0.5
        assert abs(found - float(np.mean(drawn))) < 4 * spread
