"""Does the update work on the principal directions of the base, and did those directions turn?

Captured energy is measured against two baselines: what an isotropic update would have there
(`lift`), and the base's own energy there (`versus_base`). The same update can be far below the
second and above the first.

Inputs are energies along the base's singular directions, so that one product serves all k:
right_j = ‖ΔW v_j‖², left_j = ‖u_jᵀΔW‖², core_ij = (u_iᵀΔW v_j)². `cut` is 1, and NaN where the base
defines no subspace of dimension k: beyond its rank, or inside a repeated singular value.
"""

from __future__ import annotations

import torch
from torch import Tensor

from geoscope.metrics.size import base_share
from geoscope.metrics.spectrum import top_share

__all__ = [
    "captured_area",
    "energy_left",
    "energy_of_base",
    "energy_right",
    "energy_two_sided",
    "gap",
    "largest_angle",
    "lift",
    "mean_angle",
    "outside_span",
    "versus_base",
]


def energy_right(right: Tensor, update_norm: Tensor, cut: Tensor, *, k: int) -> Tensor:
    """C_R(k) = ‖ΔW V_k‖_F²/‖ΔW‖_F², in [0, 1].   right: (..., K ≥ k) → (...,)."""
    return _share(right[..., :k].sum(-1) * cut, update_norm)


def energy_left(left: Tensor, update_norm: Tensor, cut: Tensor, *, k: int) -> Tensor:
    """C_L(k) = ‖U_kᵀΔW‖_F²/‖ΔW‖_F², in [0, 1].   left: (..., K ≥ k) → (...,)."""
    return _share(left[..., :k].sum(-1) * cut, update_norm)


def energy_two_sided(core: Tensor, update_norm: Tensor, cut: Tensor, *, k: int) -> Tensor:
    """C_LR(k) = ‖U_kᵀΔW V_k‖_F²/‖ΔW‖_F², in [0, 1].   core: (..., K, K) → (...,)."""
    return _share(core[..., :k, :k].sum((-2, -1)) * cut, update_norm)


def lift(
    core: Tensor, update_norm: Tensor, cut: Tensor, *, k: int, shape: tuple[int, int]
) -> Tensor:
    """C_LR(k) over its isotropic value k²/(mn)."""
    m, n = shape
    return energy_two_sided(core, update_norm, cut, k=k) * (m * n / k**2)


def versus_base(
    core: Tensor, update_norm: Tensor, cut: Tensor, base_top: Tensor, base_norm: Tensor, *, k: int
) -> Tensor:
    """C_LR(k) over the base's own share E_k = Σ_{i≤k}σ²/Σσ²."""
    return energy_two_sided(core, update_norm, cut, k=k) / top_share(base_top, base_norm, k=k)


def energy_of_base(
    base_norm: Tensor, tuned_norm: Tensor, update_norm: Tensor, base_top: Tensor, *, k: int
) -> Tensor:
    """s·E_k: what the part of ΔW along W0 alone gives to C_L(k), C_R(k) and C_LR(k), in [0, 1].

    That part is a·W0 with a = ⟨ΔW, W0⟩/‖W0‖²; it holds the share s of the update's energy
    (`base_share`), and the share E_k of it lies on the base's leading k directions.
    """
    share = base_share(base_norm, tuned_norm, update_norm)
    return share * top_share(base_top, base_norm, k=k)


def outside_span(
    left: Tensor, right: Tensor, update_norm: Tensor, *, shape: tuple[int, int]
) -> Tensor:
    """Share of the update outside the base's span on its longer side; NaN for a square matrix.

    1 − C_L(q) for m > n, 1 − C_R(q) for n > m.
    """
    m, n = shape
    if m == n:
        return torch.full_like(update_norm, torch.nan)
    inside = left if m > n else right
    return (1 - _share(inside.sum(-1), update_norm)).clamp_min(0)


def captured_area(energies: Tensor, update_norm: Tensor) -> Tensor:
    """(1/q)Σ_{k≤q}C(k), the area under the captured-energy curve.   (..., q) → (...,)."""
    return _share(energies.cumsum(-1).mean(-1), update_norm)


def mean_angle(angles: Tensor) -> Tensor:
    """Mean principal angle between the leading subspaces of base and tuned, radians."""
    return angles.mean(-1)


def largest_angle(angles: Tensor) -> Tensor:
    """Largest principal angle, radians; fragile where σ_k ≈ σ_{k+1}."""
    return angles[..., -1]


def gap(base_top: Tensor, edge: Tensor, *, k: int, shape: tuple[int, int]) -> Tensor:
    """(σ_k − σ_{k+1})/σ_k of the base, in [0, 1], σ_{q+1} = 0; NaN where σ_k ≤ edge (...,)."""
    kept = base_top[..., k - 1]
    dropped = base_top[..., k] if k < min(shape) else torch.zeros_like(kept)
    return torch.where(kept > edge, (kept - dropped) / kept, torch.nan)


def _share(energy: Tensor, update_norm: Tensor) -> Tensor:
    return torch.where(update_norm > 0, energy / update_norm.square(), torch.nan)
