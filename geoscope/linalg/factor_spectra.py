"""Singular values of many products B·A at once, from r × r matrices: for watching, not for reports.

σ_i² are the eigenvalues of Lᵀ(BᵀB)L, where AAᵀ = LLᵀ with L from its eigenpairs, so that it may be
singular. In fp64 a value comes to about 1e-8·σ1, which ranks and shares of energy do not see;
`factorise_product` gives each to its last digits.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["product_spectra"]


def product_spectra(factors: Sequence[tuple[Tensor, Tensor, float]]) -> list[Tensor]:
    """Singular values of s·B·A, (r,) each and descending, for B (m, r), A (r, n); all finite."""
    found: list[Tensor | None] = [None] * len(factors)
    shapes = [B.shape[1] for B, _, _ in factors]
    for rank in sorted(set(shapes)):
        which = [i for i, own in enumerate(shapes) if own == rank]
        grams = [_grams(*factors[i][:2]) for i in which]
        left, right = (torch.stack([pair[side] for pair in grams]) for side in (0, 1))
        values, vectors = torch.linalg.eigh(right)
        root = vectors * values.clamp_min(0).sqrt()[:, None, :]
        squares = torch.linalg.eigvalsh(root.mT @ left @ root).clamp_min(0)
        for i, square in zip(which, squares, strict=True):
            found[i] = square.sqrt().flip(-1) * abs(factors[i][2])
    return [one for one in found if one is not None]


def _grams(B: Tensor, A: Tensor) -> tuple[Tensor, Tensor]:
    """BᵀB and AAᵀ, (r, r) in fp64."""
    wide, tall = A.double(), B.double()
    return tall.T @ tall, wide @ wide.T
