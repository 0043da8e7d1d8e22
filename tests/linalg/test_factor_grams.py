"""The leading pair of B·A from BᵀB and A·Aᵀ, against numpy's SVD of the product."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from geoscope.linalg.factor_grams import GRAM_ERROR, GramPair, gram_pairs
from tests.helpers.matrices import gaussian, with_spectrum


def stacked(m: int, n: int, r: int, *, count: int = 3) -> tuple[Tensor, Tensor]:
    B = torch.stack([gaussian(m, r, seed=i) * 10.0**-i for i in range(count)])
    A = torch.stack([gaussian(r, n, seed=50 + i) for i in range(count)])
    return B, A


def pairs_of(B: Tensor, A: Tensor) -> GramPair:
    return gram_pairs(B.mT @ B, A @ A.mT)


def assert_is_the_leading_pair(B: Tensor, A: Tensor) -> None:
    """Energies and vectors of every matrix of the stack, within the bound that is given."""
    found = pairs_of(B, A)
    for i, (b, a) in enumerate(zip(B, A, strict=True)):
        U, S, Vh = np.linalg.svd((b @ a).numpy(), full_matrices=False)
        second = S[1] if len(S) > 1 else 0.0
        bound = float(found.error[i])
        assert float(found.energies[i, 0]) == pytest.approx(S[0] ** 2, rel=bound)
        assert float(found.energies[i, 1]) == pytest.approx(second**2, abs=bound * S[0] ** 2)
        u, v = (b @ found.left[i]).numpy(), (a.T @ found.right[i]).numpy()
        gap = 1 - (second / S[0]) ** 2
        near = 4 * bound / gap + 1e-12
        assert np.linalg.norm(u) == pytest.approx(1, abs=near)
        assert np.linalg.norm(v) == pytest.approx(1, abs=near)
        # one sign for both: u·vᵀ is that of the product
        np.testing.assert_allclose(np.outer(u, v), np.outer(U[:, 0], Vh[0]), rtol=0, atol=near)


@pytest.mark.parametrize(("m", "n", "r"), [(20, 12, 4), (12, 20, 4), (30, 30, 1), (9, 7, 2)])
def test_random_products(m: int, n: int, r: int) -> None:
    B, A = stacked(m, n, r)
    assert float(pairs_of(B, A).error.max()) < 1e-12
    assert_is_the_leading_pair(B, A)


def test_a_rank_that_is_wider_than_the_product() -> None:
    assert_is_the_leading_pair(*stacked(3, 40, 6))


@pytest.mark.parametrize("deficient", ["B", "A", "both"])
def test_factors_of_lower_rank(deficient: str) -> None:
    """Columns that are equal, and rows that are zero."""
    B, A = stacked(20, 12, 4)
    if deficient != "A":
        B[:, :, 3] = B[:, :, 2]
    if deficient != "B":
        A[:, 1] = 0
    assert_is_the_leading_pair(B, A)


def test_a_steep_spectrum_keeps_its_leading_pair() -> None:
    S = torch.logspace(0, -7, 8, dtype=torch.float64)
    B = with_spectrum(40, 8, S, seed=1)[None]
    A = with_spectrum(8, 30, S.flip(0), seed=2)[None]
    assert_is_the_leading_pair(B, A)


def test_a_zero_product_among_others() -> None:
    """Zero factors, and factors that meet in no entry: no energy, no vector, no NaN."""
    B, A = stacked(20, 12, 4)
    B[1] = 0
    B[2, :, 2:], A[2, :2] = 0, 0
    found = pairs_of(B, A)
    for i in (1, 2):
        assert found.energies[i].tolist() == [0, 0]
        assert not found.left[i].any()
        assert not (A[i].mT @ found.right[i]).any()
    assert found.error[1:].tolist() == [0, 0]
    assert_is_the_leading_pair(B[:1], A[:1])


def test_the_bound_grows_where_terms_cancel() -> None:
    """[b, b + d]·[a; −a] = −d·a: the Gram matrix forgets d long before the product does."""
    b, a, d = gaussian(30, 1, seed=1), gaussian(1, 20, seed=2), gaussian(30, 1, seed=3)
    for size in (1e-2, 1e-4):
        B, A = torch.cat([b, b + size * d], 1)[None], torch.cat([a, -a])[None]
        found = pairs_of(B, A)
        exact = float((size * torch.linalg.vector_norm(d) * torch.linalg.vector_norm(a)) ** 2)
        off = abs(float(found.energies[0, 0]) - exact) / exact
        assert off <= float(found.error[0])
        assert float(found.error[0]) > 100 * GRAM_ERROR / size
    # so far that nothing of the product is left, the bound says so
    B = torch.cat([b, b + 1e-9 * d], 1)[None]
    assert not float(pairs_of(B, torch.cat([a, -a])[None]).error[0]) < 1
