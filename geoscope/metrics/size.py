"""How large is the update, how much of it is storage rounding, how many weights moved at all?"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["as_measured", "precision_ratio", "relative_update"]


def relative_update(update_norm: Tensor, base_norm: Tensor) -> Tensor:
    """Relative update ρ = ‖ΔW‖_F/‖W0‖_F.   Norms (...,) → (...,); NaN for a zero base."""
    return torch.where(base_norm > 0, update_norm / base_norm, torch.nan)


def precision_ratio(noise: Tensor, update_norm: Tensor) -> Tensor:
    """Rounding-noise ratio ν = √(Σulp(W1)²/12)/‖ΔW‖_F; NaN for a zero update.

    See docs/methods.md#floors.
    """
    return torch.where(update_norm > 0, noise / update_norm, torch.nan)


def as_measured(share: Tensor) -> Tensor:
    """A share that was counted on the entries: the number itself."""
    return share
