"""Did the spectrum change from base to tuned, or did the singular frames only turn?

"Spectral collapse" in 2512.23165 is a failure of training, not a statistic; these are measurable
proxies of it. NSS alone measures the size of the update, so it is read through `spectral_share`
(NSS/ρ) and `spectral_lift` (the same over its isotropic value 1/√M).
"""

from __future__ import annotations

import torch
from torch import Tensor

from geoscope.metrics.spectrum import effective_rank, stable_rank

__all__ = [
    "INTRUDER_COSINE",
    "INTRUDER_DIRECTIONS",
    "intruder_count",
    "intruder_energy",
    "nss",
    "rank_ratio",
    "spectral_lift",
    "spectral_share",
    "stable_rank_ratio",
]

# Intruder dimensions: the leading 10 vectors, cosine ½ (2410.21228, official code).
INTRUDER_DIRECTIONS = 10
INTRUDER_COSINE = 0.5


def nss(base_S: Tensor, tuned_S: Tensor) -> Tensor:
    """Normalised spectral shift ‖σ(W1) − σ(W0)‖₂/‖σ(W0)‖₂, in [0, ρ].   [2511.08567, 2606.07082]

    (..., q) descending → (...,); NaN for a zero base.
    """
    size = torch.linalg.vector_norm(base_S, dim=-1)
    shift = torch.linalg.vector_norm(tuned_S - base_S, dim=-1)
    return torch.where(size > 0, shift / size, torch.nan)


def spectral_share(base_S: Tensor, tuned_S: Tensor, update_norm: Tensor) -> Tensor:
    """NSS/ρ = ‖σ(W1) − σ(W0)‖₂/‖ΔW‖_F, in [0, 1] (Mirsky); NaN for a zero base or update.

    The distance of W1 to the matrices that have W0's singular values, over the update.
    """
    shift = torch.linalg.vector_norm(tuned_S - base_S, dim=-1)
    return torch.where((update_norm > 0) & (base_S[..., 0] > 0), shift / update_norm, torch.nan)


def spectral_lift(
    base_S: Tensor, tuned_S: Tensor, update_norm: Tensor, *, shape: tuple[int, int]
) -> Tensor:
    """(NSS/ρ)·√M, M = max(m, n): the spectral share over that of an isotropic update."""
    return spectral_share(base_S, tuned_S, update_norm) * max(shape) ** 0.5


def rank_ratio(base_S: Tensor, tuned_S: Tensor) -> Tensor:
    """Effective rank of the tuned matrix over that of the base."""
    return effective_rank(tuned_S) / effective_rank(base_S)


def stable_rank_ratio(
    base_top: Tensor, base_norm: Tensor, tuned_top: Tensor, tuned_norm: Tensor
) -> Tensor:
    """Stable rank of the tuned matrix over that of the base."""
    return stable_rank(tuned_top, tuned_norm) / stable_rank(base_top, base_norm)


def intruder_count(cosines: Tensor) -> Tensor:
    """Number of leading tuned singular vectors without a base vector at |cos| ≥ ½.

    cosines: (..., ≤ 10), c_j = max_i |⟨u_j(W1), u_i(W0)⟩| over all thin vectors of the base
    → (...,).   [2410.21228]
    """
    count = (cosines < INTRUDER_COSINE).sum(-1).to(cosines.dtype)
    return torch.where(cosines.isnan().any(-1), torch.nan, count)


def intruder_energy(cosines: Tensor, tuned_top: Tensor) -> Tensor:
    """Σ_{intruders}σ_j²/Σ_{j≤10}σ_j² of the tuned matrix, in [0, 1]."""
    energy = tuned_top[..., : cosines.shape[-1]].square()
    share = (energy * (cosines < INTRUDER_COSINE)).sum(-1) / energy.sum(-1)
    return torch.where(cosines.isnan().any(-1), torch.nan, share)
