"""Is a number about the update above what storing the weights rounds away?

ν = √(Σulp(W1)²/12)/‖ΔW‖_F is the share of the update that is rounding. How much of it a quantity
bears depends on how it weighs small singular values (docs/methods.md#floors).
"""

from __future__ import annotations

import math

from geoscope.linalg.precision import CAUTION_ABOVE, UNRESOLVED_ABOVE
from geoscope.records import Status

__all__ = ["FLOORS", "floor_status"]

# class → (largest ν that is OK, largest ν that is CAUTION). For `amplitude` ν is weighed by
# √(q/PR), PR the participation ratio of the update. All thresholds are ours.
FLOORS = {
    "top": (CAUTION_ABOVE, UNRESOLVED_ABOVE),
    "energy": (0.1, 0.2),
    "amplitude": (0.02, 0.1),
}


def floor_status(floor: str, noise_ratio: float, participation: float, q: int) -> Status:
    """OK, CAUTION or BELOW_RESOLUTION of a quantity of this class at rounding-noise ratio ν.

    q: how many directions rounding fills; of a product of stored factors its rank, for the product
    of rounded factors has no higher one.
    A ν that is undefined (zero update) gives OK: such a value needs another status anyway.
    """
    if not math.isfinite(noise_ratio):
        return Status.OK
    if floor == "amplitude":
        noise_ratio *= math.sqrt(q / participation)
    fine, usable = FLOORS[floor]
    if noise_ratio <= fine:
        return Status.OK
    return Status.CAUTION if noise_ratio <= usable else Status.BELOW_RESOLUTION
