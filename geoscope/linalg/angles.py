"""Principal angles between subspaces, in the form that is right for small and for large angles.

An arccos of a cosine near 1 loses half of the digits (6e-4 rad between identical subspaces in
fp32), and angles after RLVR are below half a degree; so small angles come from sines.
"""

from __future__ import annotations

import torch
from torch import Tensor

from geoscope.profile import stage

__all__ = ["principal_angles"]

# Up to this many columns the host is faster (docs/benchmarks.md; 64 were measured).
_HOST_SIDE = 256


@stage("angles")
def principal_angles(Q0: Tensor, Q1: Tensor) -> Tensor:
    """Principal angles of span(Q0) and span(Q1), ascending, in radians.

    Q0, Q1: (..., d, k) with orthonormal columns → (..., k). Cosines are σ(Q0ᵀQ1), sines are
    σ(Q1 − Q0Q0ᵀQ1); θ is the arcsine where cos² ≥ ½ and the arccosine elsewhere. Error ≈ eps.
    [Björck & Golub 1973; Knyazev & Argentati 2002]

    >>> Q = torch.eye(3, dtype=torch.float64)
    >>> principal_angles(Q[:, :1], Q[:, 1:2])
    tensor([1.5708], dtype=torch.float64)
    """
    # 1. cosines, descending, so that the angles ascend
    overlap = Q0.mT @ Q1
    cosines = _values(overlap).clamp_max(1.0)
    # 2. sines of the same angles: the part of Q1 outside span(Q0); its values ascend with θ
    outside = Q1 - Q0 @ overlap
    sines = _small_side_values(outside).flip(-1).clamp_max(1.0)
    # 3. each angle from the branch that is accurate there
    return torch.where(cosines.square() >= 0.5, torch.asin(sines), torch.acos(cosines))


def _small_side_values(A: Tensor) -> Tensor:
    """Singular values of a tall (..., d, k) matrix through its triangular factor."""
    if A.shape[-2] <= 2 * A.shape[-1]:
        return _values(A)
    return _values(torch.linalg.qr(A, mode="r").R)


def _values(A: Tensor) -> Tensor:
    """Singular values of small matrices. CUDA's driver loops over them: 7 times the host's time."""
    if A.is_cuda and A.shape[-1] <= _HOST_SIDE:
        return torch.linalg.svdvals(A.cpu()).to(A.device)
    return torch.linalg.svdvals(A)
