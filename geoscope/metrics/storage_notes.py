"""What is there to say about the storage of a pair: wide copies, FP8, different precisions?"""

from __future__ import annotations

import torch

from geoscope.linalg.changes import Side
from geoscope.linalg.storage import FP8, FloatFormat

__all__ = ["storage_notes"]

_STARTED_FROM_FP8 = "larger than the update, which started from FP8; ν leaves it out"
# ‖rounding error‖/‖W‖ of a Gaussian W with f fraction bits, times 2^f (docs/methods.md#floors).
_RELATIVE_ROUNDING = 1.6617e-3 * 2**7


def storage_notes(
    base: torch.dtype, tuned: torch.dtype, before: Side, after: Side, *, base_counts: bool
) -> tuple[str, ...]:
    """Remarks on one pair, from the dtypes as read and what both sides turned out to hold.

    base_counts: whether ν holds the rounding of an FP8 base, too.
    """
    notes = []
    for role, dtype, one in (("base", base, before), ("tuned", tuned, after)):
        stored = str(dtype).removeprefix("torch.")
        if stored != one.fmt.name and one.fmt is not FP8:
            notes.append(f"{role} is stored as {stored} and holds only {one.fmt.name} numbers")
    for role, one in (("base", before), ("tuned", after)):
        if one.fmt is FP8:
            inside = role == "tuned" or base_counts
            remark = f"{role} is block-scaled FP8: its quantisation error, {_error(FP8)} of the "
            remark += "weights, is "
            remark += "in the update; ν counts it" if inside else _STARTED_FROM_FP8
            notes.append(remark)
    if FP8 not in (before.fmt, after.fmt) and before.fmt != after.fmt:
        remark = f"base holds {before.fmt.name}, tuned {after.fmt.name}: ν counts the rounding of "
        remark += f"tuned, {_error(after.fmt)} of the weights"
        if before.fmt.fraction_bits < after.fmt.fraction_bits:
            remark += f"; a base rounded after training began adds {_error(before.fmt)}"
        notes.append(remark)
    return tuple(notes)


def _error(fmt: FloatFormat) -> str:
    """How much of a weight rounding takes away, as a share of its norm."""
    return f"about {_RELATIVE_ROUNDING * 2.0**-fmt.fraction_bits:.2g}"
