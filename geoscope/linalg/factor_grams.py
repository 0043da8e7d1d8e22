"""The leading pair of a product B·A from BᵀB and A·Aᵀ alone, where these are exact enough.

With BᵀB = R·Rᵀ, (B·A)(B·A)ᵀ has the eigenvalues of Rᵀ·(A·Aᵀ)·R, r × r. A Gram matrix squares the
condition: an error of σ1² is relative to (Σ_k ‖b_k‖·‖a_k‖)², not to σ1² itself, so that the bound
says where terms cancel too far and `Product` is to be taken [Golub & Van Loan 2013, §5.3.2].
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from geoscope.linalg.precision import EPS
from geoscope.profile import stage

__all__ = ["GRAM_ERROR", "GramPair", "gram_pairs"]

# A Gram matrix of columns of some ten thousand entries, and sums of a few dozen blocks of it, err
# by less than this, relative to the lengths of the columns.
GRAM_ERROR = 64 * EPS


@dataclass(frozen=True)
class GramPair:
    """Of a stack of products: energies (b, 2), σ1² and σ2². error (b,): bound on the error of σ1²
    over σ1². left, right (b, r): u1 = B·left, v1 = Aᵀ·right, up to rounding; zero for a zero
    product.
    """

    energies: Tensor
    error: Tensor
    left: Tensor
    right: Tensor


@stage("leading pair")
def gram_pairs(left: Tensor, right: Tensor) -> GramPair:
    """left: BᵀB, right: A·Aᵀ, (b, r, r) each, finite, fp64."""
    # Columns of unit length: eigenvectors of a graded matrix lose its small columns.
    size = torch.diagonal(left, dim1=1, dim2=2).clamp_min(0).sqrt()
    size = size.where(size > 0, torch.ones_like(size))
    both = size[:, :, None] * size[:, None, :]
    left, right = left / both, right * both
    values, vectors = torch.linalg.eigh(left)
    root = vectors * values.clamp_min(0).sqrt()[:, None, :]
    squares, turned = torch.linalg.eigh(root.mT @ right @ root)
    squares = squares.flip(-1).clamp_min(0)
    lengths = torch.diagonal(left, dim1=1, dim2=2) * torch.diagonal(right, dim1=1, dim2=2)
    terms = lengths.clamp_min(0).sqrt().sum(-1).square()
    largest = squares[:, 0]
    unit = largest.sqrt().where(largest > 0, torch.ones_like(largest))[:, None]
    inside = (root @ turned[:, :, -1:])[..., 0] / unit
    outside = (right @ inside[..., None])[..., 0] / unit
    second = squares[:, 1] if squares.shape[1] > 1 else torch.zeros_like(largest)
    error = torch.where(terms > 0, GRAM_ERROR * terms / largest, torch.zeros_like(terms))
    return GramPair(torch.stack([largest, second], -1), error, outside / size, inside * size)
