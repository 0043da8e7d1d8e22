"""How many directions does a matrix use? Functions of its singular values alone.

"Anisotropy" is how unevenly the energy is spent over directions: each quantity here, read beside
its value for an isotropic matrix of the same shape. With p_i = σ_i²/Σσ² and p̃_i = σ_i/Σσ, the
Rényi chain holds: stable rank ≤ participation ratio ≤ entropy rank ≤ effective rank ≤ rank.

S: (..., q), descending → (...,). A zero matrix gives NaN. Functions that take a `norm` need only
the leading values in S; without one the norm is that of S, which then has to be whole.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = [
    "condition_number",
    "effective_rank",
    "energy_rank",
    "entropy_rank",
    "noise_edge",
    "nuclear_ratio",
    "numerical_rank",
    "participation_ratio",
    "signal_rank",
    "spectral_norm",
    "stable_rank",
    "top_share",
]

# E_k reaches a level within rounding: ten equal values reach .9 at k = 9, not at 10.
_LEVEL_SLACK = 1e-12


def spectral_norm(S: Tensor) -> Tensor:
    """Spectral norm σ1."""
    return S[..., 0]


def stable_rank(S: Tensor, norm: Tensor | None = None) -> Tensor:
    """Stable rank ‖A‖_F²/σ1², in [1, q].   [Rudelson & Vershynin 2007]"""
    return (_norm(S, norm) / S[..., 0]).square()


def participation_ratio(S: Tensor) -> Tensor:
    """Participation ratio (Σσ²)²/Σσ⁴ = 1/Σp², in [1, q]."""
    energy = _scaled(S).square()
    return energy.sum(-1).square() / energy.square().sum(-1)


def entropy_rank(S: Tensor) -> Tensor:
    """Entropy rank exp(−Σ p ln p) on the energies p = σ²/Σσ², in [1, q]."""
    return _perplexity(_scaled(S).square())


def effective_rank(S: Tensor) -> Tensor:
    """Effective rank exp(−Σ p̃ ln p̃) on the amplitudes p̃ = σ/Σσ.   [Roy & Vetterli 2007]"""
    return _perplexity(_scaled(S))


def nuclear_ratio(S: Tensor) -> Tensor:
    """Nuclear over Frobenius norm, Σσ/(√q·√Σσ²), in [1/√q, 1]."""
    scaled = _scaled(S)
    return scaled.sum(-1) / (S.shape[-1] * scaled.square().sum(-1)).sqrt()


def energy_rank(S: Tensor, *, level: float) -> Tensor:
    """Least k with E_k = Σ_{i≤k}σ²/Σσ² ≥ level (k90, k95, k99), in [1, q]."""
    energy = _scaled(S).square()
    reached = energy.cumsum(-1) / energy.sum(-1, keepdim=True)
    k = (reached < level - _LEVEL_SLACK).sum(-1) + 1.0
    return torch.where(S[..., 0] > 0, k.to(S.dtype), torch.nan)


def top_share(S: Tensor, norm: Tensor | None = None, *, k: int) -> Tensor:
    """Energy share of the leading k directions, E_k = Σ_{i≤k}σ²/Σσ², in [0, 1]."""
    if k > S.shape[-1]:
        return torch.full_like(S[..., 0], torch.nan)
    return (S[..., :k] / _norm(S, norm)[..., None]).square().sum(-1)


def signal_rank(S: Tensor, noise: Tensor, bulk_median: Tensor, *, shape: tuple[int, int]) -> Tensor:
    """Number of σ above the noise edge s(√m + √n).

    s is the larger of the rounding noise per entry (noise/√(mn), noise = √(Σulp²/12)) and the
    noise that the median of the spectrum implies, median(σ)/√(M·μ), with μ = `bulk_median` the
    median of the Marchenko-Pastur law (docs/methods.md#noise-edge); inf where the spectrum has no
    bulk of noise, and rounding alone counts.
    """
    count = (S > noise_edge(S, noise, bulk_median, shape=shape)[..., None]).sum(-1)
    return torch.where(S[..., 0] > 0, count.to(S.dtype), torch.nan)


def noise_edge(S: Tensor, noise: Tensor, bulk_median: Tensor, *, shape: tuple[int, int]) -> Tensor:
    """Largest singular value that noise of this size leaves, s(√m + √n); see `signal_rank`.

    At least max(m, n)·2⁻⁵²·σ1, which an fp64 solver may leave of a zero.
    """
    m, n = shape
    rounding = noise / (m * n) ** 0.5
    median = S.quantile(0.5, dim=-1)
    bulk = median / (max(m, n) * bulk_median).sqrt()
    edge = torch.maximum(rounding, bulk) * (m**0.5 + n**0.5)
    return torch.maximum(edge, max(m, n) * 2.0**-52 * S[..., 0])


def numerical_rank(S: Tensor, eps: Tensor, *, shape: tuple[int, int]) -> Tensor:
    """Number of σ above max(m, n)·eps·σ1, eps of the dtype the matrix is stored in.

    NaN where max(m, n)·eps ≥ 1, which is every bf16 matrix with a side of 128 or more: the
    tolerance then exceeds σ1 and the count says nothing.
    """
    count = (S > _rank_tolerance(S, eps, shape)[..., None]).sum(-1)
    defined = (S[..., 0] > 0) & (max(shape) * eps < 1)
    return torch.where(defined, count.to(S.dtype), torch.nan)


def condition_number(S: Tensor, eps: Tensor, *, shape: tuple[int, int]) -> Tensor:
    """σ1/σq where σq is above the tolerance of the numerical rank, NaN elsewhere."""
    resolved = S[..., -1] > _rank_tolerance(S, eps, shape)
    return torch.where(resolved, S[..., 0] / S[..., -1], torch.nan)


def _rank_tolerance(S: Tensor, eps: Tensor, shape: tuple[int, int]) -> Tensor:
    return max(shape) * eps * S[..., 0]


def _norm(S: Tensor, norm: Tensor | None) -> Tensor:
    """√Σσ²: of all values, or given where S holds only the leading ones."""
    return S[..., 0] * _scaled(S).square().sum(-1).sqrt() if norm is None else norm


def _scaled(S: Tensor) -> Tensor:
    """σ/σ1, so that squares neither overflow nor vanish; NaN for the zero matrix."""
    return S / S[..., :1]


def _perplexity(weights: Tensor) -> Tensor:
    """exp of the entropy of weights/Σweights; vanishing weights are dropped."""
    p = weights / weights.sum(-1, keepdim=True)
    return torch.special.entr(p).sum(-1).exp()
