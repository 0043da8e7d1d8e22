"""Spectra of products from r × r matrices, beside the SVD of what they make."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from geoscope.linalg.factor_spectra import product_spectra


def factors(m: int, n: int, r: int, *, seed: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    draws = torch.Generator().manual_seed(seed)
    B, A = torch.randn(m, r, generator=draws), torch.randn(r, n, generator=draws)
    return B.to(dtype), A.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_they_are_those_of_numpy(dtype: torch.dtype) -> None:
    shapes = [(24, 40, 4), (40, 24, 4), (16, 16, 2), (9, 30, 7)]
    given = [(*factors(*one, seed=i, dtype=dtype), 1.5 - i) for i, one in enumerate(shapes)]
    for S, (B, A, scaling) in zip(product_spectra(given), given, strict=True):  # type: ignore[arg-type]
        dense = scaling * (B.double() @ A.double()).numpy()
        wanted = np.linalg.svd(dense, compute_uv=False)[: len(S)]
        assert S.numpy() == pytest.approx(wanted, rel=1e-9, abs=1e-7 * wanted[0])


def test_zero_and_singular_factors_have_their_values() -> None:
    B, A = factors(24, 40, 4, seed=1, dtype=torch.float64)
    A[2:] = A[:2]  # rank 2, where Cholesky breaks down
    singular, zero = product_spectra([(B, A, 2.0), (torch.zeros_like(B), A, 2.0)])
    wanted = np.linalg.svd(2 * (B @ A).numpy(), compute_uv=False)
    assert singular[:2].numpy() == pytest.approx(wanted[:2], rel=1e-9)
    assert float(singular[2:].max()) < 1e-6 * wanted[0]
    assert zero.tolist() == [0.0] * 4
    assert product_spectra([]) == []
