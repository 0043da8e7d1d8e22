"""Do the weights that visibly moved sit on the small weights, or on the principal ones?

M is the mask of changed weights (METHODS §2.1). In bf16 rounding alone puts M on small weights, so
an overlap says nothing by itself: it is read against the *matched null*, an isotropic update whose
visible density equals the measured one. That null is an expectation over the rounding cells of the
base, not a draw.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from geoscope.linalg import FloatFormat, quantile
from geoscope.linalg.changes import (
    matched_spread,
    regular_sample,
    unchanged_cell,
    unchanged_probability,
)
from geoscope.profile import stage

__all__ = [
    "MASK_DENSITY",
    "MASK_RANK",
    "MaskOverlaps",
    "mask_lift",
    "mask_overlaps",
]

MASK_RANK = 64  # rank of the reconstruction behind the principal mask (2606.07082, appendix)
MASK_DENSITY = 0.5  # density of both masks there; its figure uses 0.3


@dataclass(frozen=True)
class MaskOverlaps:
    """Per mask (low, principal, control): measured overlap, density, and the matched null.

    changed: number of changed entries, |M|.
    """

    overlap: dict[str, float]
    density: dict[str, float]
    matched: dict[str, float]
    changed: int


@stage("masks")
def mask_overlaps(
    base: Tensor,
    reconstruction: Tensor | None,
    changed: Tensor,
    *,
    tuned_format: FloatFormat,
    density: float = MASK_DENSITY,
) -> MaskOverlaps:
    """Overlaps |M* ∩ M|/|M| of the changed mask with the low and the principal mask.

    base: (m, n) fp64; reconstruction: its rank-64 part, None where the rank exceeds q; changed:
    (m, n) bool. tuned_format: what the matched null is stored in. The control is M_principal
    without M_low. Ties at the quantile are kept, so the achieved density is returned. NaN where
    nothing changed, or the base is zero.
    """
    masks = {"low": base.abs() <= quantile(base.abs(), density)}
    if reconstruction is not None:
        size = reconstruction.abs()
        masks["principal"] = size >= quantile(size, 1 - density)
        masks["control"] = masks["principal"] & ~masks["low"]
    count = int(changed.sum())
    if count == 0 or not bool(base.any()):  # a zero base has no small and no principal weights
        nothing = dict.fromkeys(masks, float("nan"))
        return MaskOverlaps(nothing, _densities(masks), nothing, 0)
    spread = matched_spread(regular_sample(base), count / base.numel(), tuned_format)
    visible = 1 - unchanged_probability(base, unchanged_cell(base, tuned_format), spread)
    total = float(visible.sum())
    return MaskOverlaps(
        overlap={key: int((mask & changed).sum()) / count for key, mask in masks.items()},
        density=_densities(masks),
        matched={key: float(visible[mask].sum()) / total for key, mask in masks.items()},
        changed=count,
    )


def _densities(masks: dict[str, Tensor]) -> dict[str, float]:
    return {key: float(mask.double().mean()) for key, mask in masks.items()}


def mask_lift(overlap: Tensor, matched: Tensor) -> Tensor:
    """Overlap over that of an isotropic update of equal visible density; 1 = no preference."""
    return torch.where(matched > 0, overlap / matched, torch.nan)
