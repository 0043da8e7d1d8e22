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
