"""Is the arithmetic of a conversion exact, and its compression the best of its rank?"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from geoscope.adapters.conversion import alpha_for, compressed, concatenated, fused_experts
from geoscope.errors import NumericsError
from geoscope.linalg import Product

# fp32 factors: relative error of a product of them
FP32 = 2e-6


def draw(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


def trained(m: int, n: int, r: int, *, seed: int = 0, step: float = 1e-3) -> tuple[Tensor, ...]:
    """B, A after a small step from B0, A0, as stacks of two."""
    B0, A0 = draw(2, m, r, seed=seed), draw(2, r, n, seed=seed + 1)
    return (
        B0 + draw(2, m, r, seed=seed + 2, scale=step),
        A0 + draw(2, r, n, seed=seed + 3, scale=step),
        B0,
        A0,
    )


def test_the_concatenation_holds_the_stored_numbers() -> None:
    B, A, B0, A0 = trained(7, 5, 3)
    wide, tall = concatenated(B, A, B0.to(torch.bfloat16), A0)
    assert wide.shape == (2, 7, 6)
    assert tall.shape == (2, 6, 5)
    assert wide.dtype == tall.dtype == torch.float32
    assert torch.equal(wide[..., :3], B)
    assert torch.equal(wide[..., 3:], -B0.to(torch.bfloat16).float())
    assert torch.equal(tall, torch.cat([A, A0], 1))


@settings(max_examples=30, deadline=None)
@given(
    m=st.integers(1, 12), n=st.integers(1, 12), r=st.integers(1, 5), k=st.integers(1, 12),
    scaling=st.sampled_from([0.25, 1.0, 2.0, 1 / math.sqrt(3)]),
)  # fmt: skip
def test_compression_is_the_truncated_svd(m: int, n: int, r: int, k: int, scaling: float) -> None:
    B, A, B0, A0 = trained(m, n, r, step=0.1)
    made = compressed(Product.of(B, A, scaling) - Product.of(B0, A0, scaling), k, scaling)
    assert made.B.shape == (2, m, k)
    assert made.A.shape == (2, k, n)
    dense = scaling * (B.double() @ A.double() - B0.double() @ A0.double())
    U, S, Vh = torch.linalg.svd(dense, full_matrices=False)
    best = (U[..., :k] * S[:, None, :k]) @ Vh[:, :k]
    size = float(dense.norm())
    assert float((scaling * made.B.double() @ made.A.double() - best).norm()) <= 1e-5 * size
    assert made.energy == pytest.approx(size**2, rel=1e-9)
    assert made.discarded == pytest.approx(float(S[:, k:].square().sum()), abs=1e-9 * size**2)


def test_both_factors_share_the_size_of_a_triplet() -> None:
    made = compressed(Product.of(draw(9, 4), draw(4, 8, seed=1), 3.0), 4, 0.5)
    columns, rows = made.B[0].norm(dim=0), made.A[0].norm(dim=1)
    torch.testing.assert_close(columns, rows, rtol=1e-5, atol=0)


def test_a_small_update_is_resolved_beside_a_large_start() -> None:
    """The initial part cancels before it can drown a step of 1e-6 of it."""
    B, A, B0, A0 = trained(40, 30, 4, step=1e-6)
    made = compressed(Product.of(B, A) - Product.of(B0, A0), 8, 1.0)
    dense = B.double() @ A.double() - B0.double() @ A0.double()
    missed = float((made.B.double() @ made.A.double() - dense).norm() / dense.norm())
    assert missed < FP32


def test_no_change_is_zero_and_has_no_energy() -> None:
    B, A, *_ = trained(6, 5, 2)
    made = compressed(Product.of(B, A) - Product.of(B, A), 3, 1.0)
    assert made.energy == made.discarded == 0
    assert not made.B.any()
    assert not made.A.any()


def test_ranks_beyond_the_matrix_are_zeros() -> None:
    made = compressed(Product.of(draw(3, 4), draw(4, 8, seed=1)), 6, 1.0)
    assert made.B.shape == (1, 3, 6)
    assert made.B[..., :3].any(1).all()
    assert not made.B[..., 3:].any()
    assert not made.A[:, 3:].any()
    assert made.discarded == 0


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_is_refused(bad: float) -> None:
    B, A, B0, A0 = trained(4, 4, 2)
    A[0, 1, 2] = bad
    with pytest.raises(NumericsError, match="1 of 32 entries of a factor are NaN or infinite"):
        concatenated(B, A, B0, A0)
    with pytest.raises(NumericsError, match="NaN or infinity"):
        compressed(Product.of(B, A), 2, 1.0)


@pytest.mark.parametrize("use_rslora", [False, True])
def test_alpha_gives_its_scaling_back(use_rslora: bool) -> None:
    alpha = alpha_for(0.75, 16, use_rslora=use_rslora)
    assert alpha / (4 if use_rslora else 16) == 0.75


def test_fused_parts_stand_on_top_of_one_another() -> None:
    gate = draw(2, 3, 2), draw(2, 2, 5, seed=1)
    up = draw(2, 4, 3, seed=2), draw(2, 3, 5, seed=3)
    B, A = fused_experts([gate, up])
    assert (B.shape, A.shape) == ((2, 7, 5), (2, 5, 5))
    torch.testing.assert_close(B @ A, torch.cat([gate[0] @ gate[1], up[0] @ up[1]], 1))
    assert fused_experts([gate]) == gate
