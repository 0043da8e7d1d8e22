"""Matrices with one row per checkpoint: eigenpairs of a Gram matrix, bases by QR. fp64.

They are a few dozen rows at most, so LAPACK on the CPU is all they need. Fits go through Q of the
design's thin QR and never through (XᵀX)⁻¹, whose condition number is the square.
"""

from __future__ import annotations

import torch
from torch import Tensor

from geoscope.errors import NumericsError

__all__ = ["gram_eigen", "orthonormal_columns"]

# A column of the design that is this much shorter than it was, once the others are taken out of
# it, is theirs.
_DEPENDENT = 1e-12


def gram_eigen(G: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (T,) of a Gram matrix, descending and clipped at 0, and eigenvectors (T, T).

    Vectors are columns, in the order of the values; their signs are arbitrary.
    """
    values, vectors = torch.linalg.eigh(G.to(torch.float64))
    return values.flip(0).clamp_min(0), vectors.flip(1)


def orthonormal_columns(X: Tensor) -> Tensor:
    """An orthonormal basis (T, p) of the columns of X (T, p), p ≤ T, of full rank.

    Raises NumericsError where the columns depend on one another.
    """
    X = X.to(torch.float64)
    lengths = torch.linalg.vector_norm(X, dim=0)
    if len(X) < X.shape[1] or bool((lengths == 0).any()):
        raise NumericsError(_dependent(X))
    Q, R = torch.linalg.qr(X / lengths)
    if float(R.diagonal().abs().min()) < _DEPENDENT:
        raise NumericsError(_dependent(X))
    return Q


def _dependent(X: Tensor) -> str:
    return (
        f"a fit of {X.shape[1]} coefficients to {len(X)} checkpoints has no unique answer; "
        "it needs as many distinct steps"
    )
