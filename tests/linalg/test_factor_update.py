"""An update in its factors: what the tuned weight is with it, and what storing it rounded away."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from geoscope.errors import NumericsError
from geoscope.linalg.factor_update import FactorUpdate
from tests.helpers.matrices import gaussian, with_spectrum

M, N, R = 14, 9, 3


def stack(m: int, n: int, *, seed: int, count: int = 2) -> Tensor:
    return torch.stack([gaussian(m, n, seed=seed + i) for i in range(count)])


def factors(seed: int = 0, *, r: int = R, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """B (2, m, r), A (2, r, n), scaling (2, 1): two matrices of unlike size."""
    scale = torch.tensor([[0.5], [3.0]], dtype=torch.float64)
    return [stack(M, r, seed=seed + 1).to(dtype), stack(r, N, seed=seed + 11).to(dtype), scale]


def dense(given: list[Tensor]) -> Tensor:
    """s·B·A in a loop over entries of the stack, less those of the second three."""
    parts = [given[i : i + 3] for i in range(0, len(given), 3)]
    whole = [torch.stack([s * (b.double() @ a.double()) for b, a, s in zip(*one, strict=True)])
             for one in parts]  # fmt: skip
    return whole[0] - sum(whole[1:], torch.zeros_like(whole[0]))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("with_start", [False, True])
def test_the_tuned_weight_is_the_base_and_the_update(dtype: torch.dtype, with_start: bool) -> None:
    given = factors(dtype=dtype) + (factors(30, dtype=dtype) if with_start else [])
    update = FactorUpdate.of(given)
    base = stack(M, N, seed=60).to(dtype)
    expected = base.double() + dense(given)
    torch.testing.assert_close(update.over(base), expected, rtol=1e-13, atol=1e-12)
    torch.testing.assert_close(
        update.tuned_norm(base), torch.linalg.matrix_norm(expected), rtol=1e-12, atol=0
    )
    torch.testing.assert_close(update.product.norm(), torch.linalg.matrix_norm(dense(given)))


def test_a_base_that_the_update_takes_away_leaves_nothing() -> None:
    given = factors()
    base = -dense(given)
    update = FactorUpdate.of(given)
    assert bool((update.tuned_norm(base) < 1e-6 * update.product.norm()).all())
    assert bool((update.over(base).abs() < 1e-12).all())


def test_the_rank_is_that_of_both_products_and_the_nominal_one_of_the_first() -> None:
    update = FactorUpdate.of(factors() + factors(30))
    assert (update.product.rank, update.nominal) == (2 * R, R)
    assert FactorUpdate.of(factors(r=5), nominal=2).nominal == 2
    assert FactorUpdate.of(factors(r=12)).product.rank == N  # the shorter side
    assert FactorUpdate.of(factors(dtype=torch.bfloat16)).fmt.name == "bfloat16"


def test_an_update_that_did_not_move_is_zero_and_its_rounding_stays() -> None:
    given = factors(dtype=torch.bfloat16)
    update = FactorUpdate.of(given + given)
    assert bool((update.product.norm() == 0).all())
    both = FactorUpdate.of(given).noise * math.sqrt(2)
    torch.testing.assert_close(update.noise, both)


def test_factors_that_do_not_multiply_are_refused() -> None:
    B, _, s = factors()
    with pytest.raises(NumericsError, match="ranks differ"):
        FactorUpdate.of([B, stack(R + 1, N, seed=5), s])


@pytest.mark.parametrize("sizes", ["alike", "apart"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_noise_is_that_of_rounding_the_factors(dtype: torch.dtype, sizes: str) -> None:
    """Monte-Carlo over random factors; `apart`: B a thousandth of A, as after a short training."""
    generator = torch.Generator().manual_seed(3)
    draws, r, size = 24, 4, 1.0 if sizes == "alike" else 1e-3
    B = size * torch.randn(draws, 64, r, generator=generator, dtype=torch.float64)
    A = torch.randn(draws, r, 48, generator=generator, dtype=torch.float64)
    scale = torch.linspace(0.5, 2, draws, dtype=torch.float64)[:, None]
    stored = [B.to(dtype), A.to(dtype), scale]
    error = scale[:, :, None] * (B @ A - stored[0].double() @ stored[1].double())
    measured = torch.linalg.matrix_norm(error).square().sum()
    expected = FactorUpdate.of(stored).noise.square().sum()
    assert float(measured / expected) == pytest.approx(1, abs=0.04)


def test_the_noise_of_plain_factors_is_what_methods_says() -> None:
    """≈ 2.35e-3·‖sBA‖_F in bf16, whatever the size of the update."""
    for size in (1.0, 1e-4):
        B, A = size * stack(200, 8, seed=1), stack(8, 150, seed=9)
        update = FactorUpdate.of([B.bfloat16(), A.bfloat16(), factors()[2]])
        for ratio in (update.noise / update.product.norm()).tolist():
            assert ratio == pytest.approx(2.35e-3, rel=0.05)


def test_a_rank_that_is_not_filled_adds_no_noise_of_its_own() -> None:
    B, A, s = factors(dtype=torch.bfloat16)
    padded = [
        torch.cat([B, torch.zeros(2, M, 2, dtype=B.dtype)], -1),
        torch.cat([A, torch.zeros(2, 2, N, dtype=A.dtype)], -2),
        s,
    ]
    torch.testing.assert_close(
        FactorUpdate.of(padded).noise, FactorUpdate.of([B, A, s]).noise, rtol=1e-9, atol=0
    )


def test_norms_of_a_steep_base() -> None:
    base = with_spectrum(M, N, torch.logspace(0, -8, N, dtype=torch.float64), seed=2)[None]
    given = [one[:1] for one in factors()]
    expected = torch.linalg.matrix_norm(base + dense(given))
    torch.testing.assert_close(FactorUpdate.of(given).tuned_norm(base), expected)
