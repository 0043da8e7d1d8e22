"""What is there to say about the storage of a pair: wide copies, grids, different precisions?"""

from __future__ import annotations

import torch

from geoscope.linalg.changes import Side
from geoscope.linalg.storage import FloatFormat

__all__ = ["base_notes", "storage_notes"]

_STARTED_THERE = "larger than the update, which started from {where}; ν leaves it out"
_INSIDE = "in the update; ν counts it"
# ‖rounding error‖/‖W‖ of a Gaussian W with f fraction bits, times 2^f (docs/methods.md#floors).
_RELATIVE_ROUNDING = 1.6617e-3 * 2**7


def storage_notes(
    base: torch.dtype, tuned: torch.dtype, before: Side, after: Side, *, base_counts: bool
) -> tuple[str, ...]:
    """Remarks on one pair, from the dtypes as read and what both sides turned out to hold.

    base_counts: whether ν holds the rounding of a quantised base, too.
    """
    notes = []
    for role, dtype, one in (("base", base, before), ("tuned", tuned, after)):
        stored = str(dtype).removeprefix("torch.")
        if stored != one.fmt.name and not one.is_quantised:
            notes.append(f"{role} is stored as {stored} and holds only {one.fmt.name} numbers")
    for role, one in (("base", before), ("tuned", after)):
        if one.is_quantised:
            notes.append(_quantised(role, one, inside=role == "tuned" or base_counts))
    if not (before.is_quantised or after.is_quantised) and before.fmt != after.fmt:
        remark = f"base holds {before.fmt.name}, tuned {after.fmt.name}: ν counts the rounding of "
        remark += f"tuned, {_error(after.fmt)} of the weights"
        if before.fmt.fraction_bits < after.fmt.fraction_bits:
            remark += f"; a base rounded after training began adds {_error(before.fmt)}"
        notes.append(remark)
    return tuple(notes)


def base_notes(base: Side) -> tuple[str, ...]:
    """Remarks on the base of an update in its factors, which hold nothing of its rounding."""
    if base.quantisation is not None:
        where = f"is {base.quantisation.name}"
    elif base.grid is not None:
        where = f"lies on {_with_article(base.grid.name)}"
    else:
        return ()
    return (f"base {where}; the adapter's update holds none of its rounding",)


def _quantised(role: str, one: Side, *, inside: bool) -> str:
    if one.quantisation is not None:
        name, error = one.quantisation.name, one.quantisation.error
        remark = f"{role} is {name}: its quantisation error, about {error:.2g} of the weights, is "
        short = name.removeprefix("block-scaled ").partition(" with ")[0]
        return remark + (_INSIDE if inside else _STARTED_THERE.format(where=short))
    assert one.grid is not None
    remark = f"{role} lies on {_with_article(one.grid.name)}, coarser than its dtype: the rounding "
    return f"{remark}is {_INSIDE if inside else _STARTED_THERE.format(where='the grid')}"


def _with_article(name: str) -> str:
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def _error(fmt: FloatFormat) -> str:
    """How much of a weight rounding takes away, as a share of its norm."""
    return f"about {_RELATIVE_ROUNDING * 2.0**-fmt.fraction_bits:.2g}"
