"""H and leading pairs of adapters through Gram matrices, against dense fp64; when they refuse."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from geoscope.trajectory.factor_series import Factor, FactorSeries

M, N, R, T = 40, 30, 4, 5
SCALE = 2.0


def _factors(*, zero_start: bool, size: float = 0.1, seed: int = 0) -> list[Factor]:
    """The factors before training and after each of T steps of it."""
    made = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=made, dtype=torch.float64)

    B = torch.zeros(M, R, dtype=torch.float64) if zero_start else noise(M, R)
    A = noise(R, N)
    rows = [(B, A, SCALE)]
    for _ in range(T):
        B, A = B + size * noise(M, R), A + size * noise(R, N)
        rows.append((B, A, SCALE))
    return rows


def _dense(rows: list[Factor]) -> Tensor:
    """Δ_0 … Δ_T from the first row on, (T + 1, M, N)."""
    whole = torch.stack([SCALE * B @ A for B, A, _ in rows])
    return whole - whole[0]


@pytest.mark.parametrize("zero_start", [True, False])
def test_gram_equals_dense(zero_start: bool) -> None:
    rows = _factors(zero_start=zero_start)
    found = FactorSeries.of(rows[1:], None if zero_start else rows[0])
    assert found is not None
    steps = _dense(rows).diff(dim=0).flatten(1)
    torch.testing.assert_close(found.H, steps @ steps.T, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("zero_start", [True, False])
def test_pairs_equal_dense(zero_start: bool) -> None:
    rows = _factors(zero_start=zero_start)
    series = FactorSeries.of(rows[1:], None if zero_start else rows[0])
    assert series is not None
    paths = series.paths()
    assert paths is not None
    dense = _dense(rows)
    for path, kind, true in (
        (paths[0], "updates", dense[1:]),
        (paths[1], "steps", dense.diff(dim=0)),
    ):
        U, S, Vh = torch.linalg.svd(true)
        torch.testing.assert_close(path.sigma, S[:, 0], rtol=1e-11, atol=0)
        torch.testing.assert_close(path.second, S[:, 1], rtol=1e-9, atol=0)
        torch.testing.assert_close(path.norm, true.flatten(1).norm(dim=1), rtol=1e-11, atol=0)
        rank1 = path.u[:, :, None] * path.v[:, None, :]
        torch.testing.assert_close(rank1, U[:, :, :1] @ Vh[:, :1], rtol=0, atol=1e-9)
        assert 0 < paths[2][kind]["bound"] < 1e-10
    products = torch.einsum("im,tmn,jn->tij", paths[0].u, dense[1:], paths[0].v)
    torch.testing.assert_close(series.pair_products(paths[0]), products, rtol=1e-11, atol=1e-11)


def test_the_start_is_taken_off() -> None:
    """Negative control: without the initial factors the same files give another answer."""
    rows = _factors(zero_start=False)
    whole, blind = FactorSeries.of(rows[1:], rows[0]), FactorSeries.of(rows[1:], None)
    assert whole is not None and blind is not None
    assert whole.H is not None and blind.H is not None
    assert float(blind.H[0, 0]) > 10 * float(whole.H[0, 0])


def test_equal_steps_move_exactly_nothing() -> None:
    rows = _factors(zero_start=True)
    rows[3] = rows[2]
    found = FactorSeries.of(rows[1:], None)
    assert found is not None and found.H is not None
    assert float(found.H[2].abs().max()) == 0
    paths = found.paths()
    assert paths is not None
    assert float(paths[1].sigma[2]) == 0 and float(paths[1].u[2].norm()) == 0


def test_terms_that_cancel_are_refused() -> None:
    """A product that does not move while its factors do: B → cB, A → A/c."""
    B, A, _ = _factors(zero_start=False)[0]
    rows = [(B, A, SCALE), (B * 1.5, A / 1.5, SCALE), (B * 3.1, A / 3.1, SCALE)]
    found = FactorSeries.of(rows[1:], rows[0])
    assert found is not None
    assert found.H is None and found.paths() is None


def test_other_ranks_or_scalings_have_no_common_blocks() -> None:
    rows = _factors(zero_start=True)
    B, A, scale = rows[2]
    assert FactorSeries.of([rows[1], (B, A, 2 * scale)], None) is None
    assert FactorSeries.of([rows[1], (B[:, :2], A[:2], scale)], None) is None


@pytest.mark.parametrize("size", [1e-2, 1e-4, 1e-6])
def test_pairs_of_small_moves_are_exact_to_their_bound(size: float) -> None:
    """Small differences beside large factors: a graded Gram matrix must not lose them."""
    rows = _factors(zero_start=False, size=size)
    series = FactorSeries.of(rows[1:], rows[0])
    assert series is not None
    paths = series.paths()
    assert paths is not None
    B0, A0, _ = rows[0]
    before = (B0, A0)
    for i, (B, A, _) in enumerate(rows[1:]):
        moved = [(B - B0) @ A + B0 @ (A - A0), (B - before[0]) @ A + before[0] @ (A - before[1])]
        before = (B, A)
        for path, kind, delta in zip(paths[:2], ("updates", "steps"), moved, strict=True):
            sigma = float(torch.linalg.svdvals(SCALE * delta)[0])
            error = abs(float(path.sigma[i]) - sigma) / sigma
            assert error <= max(paths[2][kind]["bound"], 1e-13)


def test_an_update_that_returns_to_zero_is_zero() -> None:
    rows = _factors(zero_start=True)
    rows[3] = (torch.zeros_like(rows[3][0]), rows[3][1], SCALE)
    series = FactorSeries.of(rows[1:], None)
    assert series is not None and series.H is not None
    paths = series.paths()
    assert paths is not None
    assert float(paths[0].sigma[2]) == 0
    assert float(paths[0].sigma[1]) > 0 < float(paths[0].sigma[3])


def test_a_step_far_smaller_than_its_neighbours_is_refused_or_right() -> None:
    rows = _factors(zero_start=True, size=1.0)
    B, A, _ = rows[3]
    rows[4] = (B + 1e-9, A, SCALE)
    found = FactorSeries.of(rows[1:], None)
    assert found is not None
    H = found.H
    true = float((SCALE * (rows[4][0] - B) @ A).square().sum())
    assert H is None or float(H[3, 3]) == pytest.approx(true, rel=1e-9)
