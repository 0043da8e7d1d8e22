"""Do the weights that visibly moved sit on the small weights, or on the principal ones?

M is the mask of changed weights. In bf16 rounding alone puts M on small weights, so
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
    Side,
    matched_spread,
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
_BLOCK = 1 << 18  # entries of one step
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
    base_side: Side,
    tuned_format: FloatFormat,
    density: float = MASK_DENSITY,
) -> MaskOverlaps:
    """Overlaps |M* ∩ M|/|M| of the changed mask with the low and the principal mask.

    base: (m, n), stored dtype or fp64; reconstruction: its rank-64 part, None where the rank
    exceeds q; changed: (m, n) bool. base_side: `side(base)`. tuned_format: what the matched null
    is stored in. The control is M_principal without M_low. Ties at the quantile are kept, so the
    achieved density is returned. NaN where nothing changed, or the base is zero.
    """
    low_edge = quantile(base.abs(), density)
    sizes = None if reconstruction is None else reconstruction.abs()
    principal_edge = 0.0 if sizes is None else quantile(sizes, 1 - density)
    keys: list[str] = ["low"] if sizes is None else ["low", "principal", "control"]
    count = int(changed.sum())
    meaningful = count > 0 and bool(base.any())  # a zero base has no small and no large weights
    spread = 0.0
    if meaningful:
        spread = matched_spread(base_side, count / base.numel(), tuned_format)
    shown = Visible(base.dtype, tuned_format, spread, device=base.device)
    held, hit, expected = (dict.fromkeys(keys, 0.0) for _ in range(3))
    total = 0.0
    rows = max(1, _BLOCK // base.shape[1])
    for start in range(0, len(base), rows):
        part = slice(start, start + rows)
        masks = {"low": base[part].abs() <= low_edge}
        if sizes is not None:
            masks["principal"] = sizes[part] >= principal_edge
            masks["control"] = masks["principal"] & ~masks["low"]
        visible = shown(base[part]) if meaningful else torch.zeros(base[part].shape)
        total += float(visible.sum())
        for key, mask in masks.items():
            held[key] += int(mask.sum())
            hit[key] += int((mask & changed[part]).sum())
            expected[key] += float(visible[mask].sum())
    if not meaningful:
        nothing = dict.fromkeys(keys, float("nan"))
        return MaskOverlaps(nothing, nothing, nothing, 0)
    return MaskOverlaps(
        overlap={key: number / count for key, number in hit.items()},
        density={key: number / base.numel() for key, number in held.items()},
        matched={key: number / total for key, number in expected.items()},
        changed=count,
    )


class Visible:
    """P(an entry visibly changes) under an isotropic update of entry sd `spread`.

    For the 16-bit formats from a table of all 65 536 codes.
    """

    def __init__(
        self, dtype: torch.dtype, tuned_format: FloatFormat, spread: float, *, device: torch.device
    ) -> None:
        self._format, self._spread, self._table = tuned_format, spread, None
        if dtype in (torch.bfloat16, torch.float16) and spread > 0:
            codes = torch.arange(-32768, 32768, device=device).to(torch.int16)
            self._table = self._probability(codes.view(dtype).double().nan_to_num())

    def __call__(self, block: Tensor) -> Tensor:
        """fp64, shape of `block`."""
        if self._table is None:
            return self._probability(block.double())
        codes = block.contiguous().view(torch.int16).to(torch.int32) + 32768
        return self._table[codes]

    def _probability(self, weights: Tensor) -> Tensor:
        cell = unchanged_cell(weights, self._format)
        return 1 - unchanged_probability(weights, cell, self._spread)


def mask_lift(overlap: Tensor, matched: Tensor) -> Tensor:
    """Overlap over that of an isotropic update of equal visible density; 1 = no preference."""
    return torch.where(matched > 0, overlap / matched, torch.nan)
