"""How much of its rank does an adapter use, and what rank would an update need?

See docs/methods.md#capacity. All `ours`. S: (b, q), the singular values of the update, descending;
rank: (b,), r_max, the largest rank that it can have, NaN where it has none to name (a full update).
A share is NaN there, and of a zero update.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from geoscope.metrics.spectrum import effective_rank, energy_rank, entropy_rank, noise_edge

__all__ = [
    "ENERGY_LEVEL",
    "SERVABLE_RANKS",
    "effective_rank_share",
    "energy_rank_share",
    "entropy_rank_share",
    "flat_energy_share",
    "flat_share",
    "nominal_rank",
    "servable",
    "suggested_rank",
    "tail_ratio",
]

# Energy above the noise that a suggested rank is to hold.
ENERGY_LEVEL = 0.9
# Ranks that vLLM serves.
SERVABLE_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


def nominal_rank(rank: Tensor) -> Tensor:
    """r of the adapter's config; r_max/2 where the layout doubles it."""
    return rank


def effective_rank_share(S: Tensor, rank: Tensor) -> Tensor:
    """Effective rank (amplitudes) over r_max, in (0, 1]."""
    return _share(effective_rank, S, rank)


def entropy_rank_share(S: Tensor, rank: Tensor) -> Tensor:
    """Entropy rank (energies) over r_max, in (0, 1]."""
    return _share(entropy_rank, S, rank)


def energy_rank_share(S: Tensor, rank: Tensor, *, level: float) -> Tensor:
    """Least k that holds `level` of the energy, over r_max, in (0, 1]."""
    return _share(lambda values: energy_rank(values, level=level), S, rank)


def tail_ratio(S: Tensor, rank: Tensor) -> Tensor:
    """σ_{r_max}/σ1: how much the last direction still does, in [0, 1]."""
    place = rank.nan_to_num(1.0).long().clamp(1, S.shape[-1])[..., None] - 1
    last = S.gather(-1, place)[..., 0]
    return torch.where(rank.isnan() | (S[..., 0] == 0), torch.nan, last / S[..., 0])


def flat_share(rank: Tensor) -> Tensor:
    """Of a flat spectrum of r_max values: 1."""
    return torch.where(rank.isnan(), torch.nan, 1.0)


def flat_energy_share(rank: Tensor, *, level: float) -> Tensor:
    """Of a flat spectrum of r_max values: ⌈level·r_max⌉/r_max."""
    return (level * rank - 1e-9).ceil() / rank


def suggested_rank(
    S: Tensor, noise: Tensor, bulk_median: Tensor, *, shape: tuple[int, int]
) -> Tensor:
    """Least k with Σ_{i≤k}σ² ≥ .9·Σ_{i≤k_s}σ², k_s the number of σ above the noise edge.

    0 where none is above it; NaN for a zero update.
    """
    above = S > noise_edge(S, noise, bulk_median, shape=shape)[..., None]
    energy = (torch.where(above, S, 0.0) / S[..., :1]).square()
    reached = energy.cumsum(-1) / energy.sum(-1, keepdim=True)
    k = (reached < ENERGY_LEVEL - 1e-12).sum(-1) + 1.0
    k = torch.where(above.any(-1), k, 0.0).to(S.dtype)
    return torch.where(S[..., 0] > 0, k, torch.nan)


def servable(rank: float) -> int | None:
    """The least rank that is served and no smaller; None above all."""
    return next((one for one in SERVABLE_RANKS if one >= rank), None)


def _share(function: Callable[[Tensor], Tensor], S: Tensor, rank: Tensor) -> Tensor:
    return torch.where(rank.isnan(), torch.nan, function(S) / rank)
