"""Is the tuned model one that was trained from this base at all?

ΔW = a·W0 + R with ⟨R, W0⟩ = 0: the base itself is part of every update, with the share s of its
energy, and gives s·E_k to the energies along the base's directions. Where training keeps the norm
s = (1 − c)/2 = ρ²/4, with c the cosine of base and tuned: nothing at ρ = .1, and a half for models
that have nothing to do with one another. These codes come before all others.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from geoscope.kinds import FAR
from geoscope.metrics.judging import Check, MatrixVerdict, clause
from geoscope.metrics.measure import Measured
from geoscope.records import Status
from geoscope.thresholds import THRESHOLDS, limits_in_force

__all__ = ["Distance", "cosine_and_deviation", "distance", "far_code", "judge_distance"]

# Matrices set apart that are named before the rest is counted.
_NAMED = 3


@dataclass(frozen=True)
class Distance:
    """What is far from the base in a model.

    code: of the whole model where most of its matrices are far, else None. names: of the far
    matrices. text: a sentence, without its full stop.
    """

    code: str | None
    names: tuple[str, ...]
    text: str

    def to_json(self) -> dict[str, Any]:
        return {"code": self.code, "matrices": list(self.names), "text": self.text}


def judge_distance(
    row: Measured, k: int | None, limits: Mapping[str, float]
) -> tuple[MatrixVerdict | None, tuple[Check, ...]]:
    """The verdict on one matrix that is far from its base, else None; and the conditions."""
    if row.status.get("precision_ratio") is Status.ZERO_UPDATE:
        return None, ()
    if zero := _zero_side(row):
        return MatrixVerdict("TOO_FAR", k, f"the {zero} matrix is zero", "", ()), ()
    cosine = row.values.get("base_cosine")
    if cosine is None:
        return None, ()
    band = _band(row.weights["parameters"] ** -0.5, limits)
    near_zero = _check("UNRELATED", "|c|", abs(cosine), "≤", band)
    small = _check("TOO_FAR", "c", cosine, "<", limits["too_far.cosine"])
    for check in (near_zero, small):
        if check.holds and small.holds:
            return MatrixVerdict(check.code, k, clause([check]), "", (near_zero, small)), ()
    return None, (near_zero, small)


def _zero_side(row: Measured) -> str | None:
    """Which of the two matrices is zero, where the other is not."""
    if not row.weights.get("update"):
        return None
    return next((side for side in ("base", "tuned") if row.weights.get(side) == 0), None)


def _check(code: str, name: str, value: float, sign: str, limit: float) -> Check:
    key = "unrelated.cosine" if code == "UNRELATED" else "too_far.cosine"
    return Check(code, name, value, sign, limit, THRESHOLDS[key].standing)


def _band(deviation: float, limits: Mapping[str, float]) -> float:
    """The largest |c| that reads as unrelated.

    Some standard deviations of unrelated matrices, and not less than a cosine without weight; of
    tiny matrices not more than half of what is too far, where chance could explain anything.
    """
    chance = min(limits["unrelated.deviations"] * deviation, limits["too_far.cosine"] / 2)
    return max(limits["unrelated.cosine"], chance)


def far_code(cosine: float | None, deviation: float, limits: Mapping[str, float]) -> str | None:
    """The code of a pooled cosine with its standard deviation; None for one that is not far."""
    if cosine is None or cosine >= limits["too_far.cosine"]:
        return None
    return "UNRELATED" if abs(cosine) <= _band(deviation, limits) else "TOO_FAR"


def cosine_and_deviation(rows: Sequence[Measured]) -> tuple[float | None, float]:
    """c = Σ⟨W0, W1⟩/√(Σ‖W0‖²Σ‖W1‖²), and its standard deviation for unrelated matrices.

    With frames that know nothing of one another ⟨W0, W1⟩ has the variance ‖W0‖²‖W1‖²/(mn),
    whatever the spectra: 1/√N where the energies are as the sizes. None, and NaN, of zero sides.
    """
    weights = [row.weights for row in rows if row.weights.get("tuned") is not None]
    base, tuned = (math.fsum(weight[side] for weight in weights) for side in ("base", "tuned"))
    if not base * tuned:
        return None, math.nan
    inner = math.fsum(
        (weight["base"] + weight["tuned"] - weight["update"]) / 2 for weight in weights
    )
    variance = math.fsum(
        weight["base"] * weight["tuned"] / weight["parameters"] for weight in weights
    )
    return inner / math.sqrt(base * tuned), math.sqrt(variance / (base * tuned))


def distance(
    names: Sequence[str],
    rows: Sequence[Measured],
    judged: Sequence[MatrixVerdict],
    limits: Mapping[str, float] | None = None,
) -> Distance | None:
    """What is far from the base, by the codes of the matrices; None where nothing is.

    The model is far where more than half of its matrices are, those that did not change among
    the others. Its code is then that of their pooled cosine.
    """
    far = [i for i, one in enumerate(judged) if one.code in FAR]
    if not far:
        return None
    parted = tuple(names[i] for i in far)
    if 2 * len(far) <= len(judged):
        return Distance(None, parted, _apart([(names[i], judged[i]) for i in far]))
    own = [rows[i] for i in far]
    cosine, deviation = cosine_and_deviation(own)
    code = far_code(cosine, deviation, limits_in_force(limits)) or "TOO_FAR"
    return Distance(code, parted, _whole(code, own, [judged[i] for i in far], len(judged)))


def _apart(far: Sequence[tuple[str, MatrixVerdict]]) -> str:
    """The matrices that are set apart, with their clause."""
    listed = [f"{name} ({one.code}: {one.clause})" for name, one in far[:_NAMED]]
    if len(far) > _NAMED:
        listed.append(f"{len(far) - _NAMED} more")
    what = "1 matrix that is" if len(far) == 1 else f"{len(far)} matrices that are"
    return f"apart from {what} no update of the base's: {', '.join(listed)}"


def _whole(code: str, rows: Sequence[Measured], judged: Sequence[MatrixVerdict], count: int) -> str:
    cosine, deviation = cosine_and_deviation(rows)
    zero = sum(one.clause.endswith("is zero") for one in judged)
    if cosine is None:
        sides = {one.clause for one in judged}
        return f"not an update: {' and '.join(sorted(sides))}" + _share_of_base(rows)
    known = f"cosine {cosine:.2g}, of unrelated weights 0 ± {deviation:.1g}"
    if code == "UNRELATED":
        words = f"the tuned model has nothing of this base ({known})"
    else:
        words = f"the tuned model is too far from this base for a verdict ({known})"
    if len(rows) < count:
        words += f", in {len(rows)} of {count} matrices"
    if zero:
        words += f"; {zero} of them are zero on one side"
    return f"{words}{_share_of_base(rows)}. Give the model that the tuned one was trained from"


def _share_of_base(rows: Sequence[Measured]) -> str:
    """What of the update is −W0 itself, in words."""
    known = [
        (share, row.weights["update"])
        for row in rows
        if (share := row.values.get("base_share")) is not None
    ]
    energy = math.fsum(weight for _, weight in known)
    if not energy:
        return ""
    share = math.fsum(share * weight for share, weight in known) / energy
    return f"; {100 * share:.0f} % of the update's energy is −W0 itself"
