"""How large is the update, how much of it is storage rounding, how many weights moved at all?"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["as_measured", "base_cosine", "base_share", "precision_ratio", "relative_update"]

# Below this ρ the norms no longer tell how much of an update lies along the base: they round at
# 1e-16 of the base, and its share would be off by more than a hundredth.
_RESOLVED = 1e-12


def relative_update(update_norm: Tensor, base_norm: Tensor) -> Tensor:
    """Relative update ρ = ‖ΔW‖_F/‖W0‖_F.   Norms (...,) → (...,); NaN for a zero base."""
    return torch.where(base_norm > 0, update_norm / base_norm, torch.nan)


def precision_ratio(noise: Tensor, update_norm: Tensor) -> Tensor:
    """Rounding-noise ratio ν = √(Σulp(W1)²/12)/‖ΔW‖_F; NaN for a zero update.

    See docs/methods.md#floors.
    """
    return torch.where(update_norm > 0, noise / update_norm, torch.nan)


def base_cosine(base_norm: Tensor, tuned_norm: Tensor, update_norm: Tensor) -> Tensor:
    """Cosine c = ⟨W0, W1⟩/(‖W0‖‖W1‖) of base and tuned, in [−1, 1].   Norms (...,) → (...,).

    From 1 − c = (‖ΔW‖² − (‖W1‖ − ‖W0‖)²)/(2‖W0‖‖W1‖), where the difference of norms is exact and
    small, so that 1 − c ≈ ρ²/2 has no cancellation: its error is some eps/ρ of itself, and the
    rounding of c as a number, 1.1e-16, is larger. NaN where a side is zero.
    """
    apart = update_norm.square() - (tuned_norm - base_norm).square()
    cosine = 1 - apart / (2 * base_norm * tuned_norm)
    return torch.where((base_norm > 0) & (tuned_norm > 0), cosine.clamp(-1, 1), torch.nan)


def base_share(base_norm: Tensor, tuned_norm: Tensor, update_norm: Tensor) -> Tensor:
    """Share of the update's energy along the base itself, s = ⟨ΔW, W0⟩²/(‖ΔW‖²‖W0‖²), in [0, 1].

    ⟨ΔW, W0⟩ = ((‖W1‖ − ‖W0‖)(‖W1‖ + ‖W0‖) − ‖ΔW‖²)/2; the error of √s is some eps/ρ. Norms (...,)
    → (...,); NaN for a zero base, a zero update, and for ρ ≤ 1e-12, where the norms do not tell.
    """
    longer = (tuned_norm - base_norm) * (tuned_norm + base_norm)
    inner = (longer - update_norm.square()) / 2
    share = (inner / (update_norm * base_norm)).square().clamp_max(1)
    return torch.where((base_norm > 0) & (update_norm > _RESOLVED * base_norm), share, torch.nan)


def as_measured(share: Tensor) -> Tensor:
    """A share that was counted on the entries: the number itself."""
    return share
