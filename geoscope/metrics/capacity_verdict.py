"""One word for how an adapter uses its rank; the first rule that holds decides.

Ours; see docs/methods.md#capacity. The model takes the code of at least half of its matrices that
changed. Whether a rank was good for the task is not in the weights: a rank that holds 90 % of the
energy need not hold 90 % of the behaviour.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from geoscope.kinds import CAPACITY, FAR
from geoscope.metrics.capacity import servable
from geoscope.metrics.distance import distance, judge_distance
from geoscope.metrics.judging import (
    Check,
    MatrixVerdict,
    clause,
    explained,
    flagged_names,
    shares_of,
)
from geoscope.metrics.measure import Measured
from geoscope.records import Status, Verdict
from geoscope.thresholds import THRESHOLDS, limits_in_force

__all__ = ["CAPACITY_CODES", "judge_capacity", "judge_capacity_model"]

CAPACITY_CODES = CAPACITY.codes
_FLAGGED = (*FAR, "SATURATED", "RANK_COLLAPSE", "CONCENTRATED", "IDLE")
_OF_CAPACITY = ("capacity.", "unrelated.", "too_far.")

_SENTENCES = {
    "NO_UPDATE": "no weight in scope changed",
    "UNDETERMINED": "the rank that is used cannot be told: numbers are missing or below what "
    "storage resolves",
    "SATURATED": "the update fills its rank with a flat spectrum: a larger rank may have been used",
    "RANK_COLLAPSE": "a few directions hold the update, far fewer than the rank",
    "CONCENTRATED": "a few directions hold the update, fewer than the rank",
    "IDLE": "half of the rank or more holds next to nothing: a smaller one would have held the "
    "update",
    "USED": "the rank is used, and the spectrum falls towards its end",
    "FULL_UPDATE": "a full update, which has no rank to use up",
    "MIXED": "no single pattern: matrices use their rank differently",
}


def judge_capacity(row: Measured, limits: Mapping[str, float] | None = None) -> MatrixVerdict:
    """How one matrix uses its rank; `limits` override THRESHOLDS by name."""
    values = row.values
    if row.status.get("precision_ratio") is Status.ZERO_UPDATE:
        return MatrixVerdict("NO_UPDATE", None, "", "", ())
    limit = limits_in_force(limits)
    far, first = judge_distance(row, None, limit)
    if far is not None:
        return far
    for status in (Status.NON_FINITE, Status.NOT_CONVERGED):
        if status in row.status.values():
            return MatrixVerdict("UNDETERMINED", None, status.value, "", ())
    rank = values.get("nominal_rank")
    if rank is None:
        return MatrixVerdict("FULL_UPDATE", None, "", "", first)

    def check(code: str, name: str, value: float | None, sign: str, key: str) -> Check:
        return Check(code, name, value, sign, limit[key], THRESHOLDS[key].standing)

    few = "RANK_COLLAPSE" if rank >= limit["capacity.collapse_rank"] else "CONCENTRATED"
    # k99 is of r_max; idle is what fills half of the rank that was asked for.
    k99 = values.get("k99_share")
    of_nominal = None if k99 is None else k99 * row.weights["rank"] / rank
    k90, tail = values.get("k90_share"), values.get("tail_ratio")
    effective = values.get("effective_rank_share")
    rules = (
        (
            "SATURATED",
            [
                check("SATURATED", "k90/r_max", k90, "≥", "capacity.saturated_k90"),
                check("SATURATED", "σ_r/σ1", tail, "≥", "capacity.saturated_tail"),
            ],
        ),
        (few, [check(few, "effective rank/r_max", effective, "<", "capacity.concentrated")]),
        ("IDLE", [check("IDLE", "k99/r", of_nominal, "≤", "capacity.idle_k99")]),
    )
    seen = [*first]
    for code, checks in rules:
        seen += checks
        if all(one.holds for one in checks):
            return MatrixVerdict(code, None, clause(checks), "", tuple(seen))
    if open_ := [code for code, checks in rules if not _is_refuted(checks)]:
        reason = f"no number to rule out {' or '.join(open_)}"
        return MatrixVerdict("UNDETERMINED", None, reason, "", tuple(seen))
    return MatrixVerdict("USED", None, "no rule of misuse matched", "", tuple(seen))


def _is_refuted(checks: Sequence[Check]) -> bool:
    """Whether a number says that a rule does not hold; one that is missing says nothing."""
    return any(check.value is not None and not check.holds for check in checks)


def judge_capacity_model(
    names: Sequence[str],
    rows: Sequence[Measured],
    judged: Sequence[MatrixVerdict],
    limits: Mapping[str, float] | None = None,
) -> Verdict:
    """The verdict on a model: the code of at least half of the matrices, else MIXED.

    One list entry a matrix; without any the code is UNDETERMINED. share, shares: of the matrices
    that changed.
    """
    limits = limits_in_force(limits)
    changed = [one for one in judged if one.code != "NO_UPDATE"]
    shares = shares_of([1.0] * len(changed), changed, CAPACITY_CODES)
    far = distance(names, rows, judged, limits)
    if far is not None and far.code is not None:
        code, sentence = far.code, far.text
        share = math.fsum(shares.get(one, 0.0) for one in FAR)
    else:
        rest = [one for one in changed if one.code not in FAR]
        own = shares_of([1.0] * len(rest), rest, CAPACITY_CODES)
        code, share = _model_code(own, is_zero=len(changed) < len(judged))
        sentence = _SENTENCES[code] if far is None else f"{far.text}: {_SENTENCES[code]}"
    energy = [row.weights.get("update", 0.0) for row in rows]
    flagged = flagged_names(names, energy, judged, _FLAGGED)
    counts = {one: sum(each.code == one for each in judged) for one in CAPACITY_CODES}
    return Verdict(
        code=code,
        share=share,
        shares=shares,
        flagged=flagged,
        counts={one: number for one, number in counts.items() if number},
        text=f"{sentence}.{_advice(rows)}",
        thresholds={key: limits[key] for key in limits if key.startswith(_OF_CAPACITY)},
        explain=explained(judged),
        apart=() if far is None or far.code is not None else far.names,
    )


def _model_code(shares: Mapping[str, float], *, is_zero: bool) -> tuple[str, float | None]:
    """is_zero: whether matrices were seen that did not change."""
    if not shares:
        return ("NO_UPDATE" if is_zero else "UNDETERMINED"), None
    code, share = max(shares.items(), key=lambda item: item[1])
    return (code, share) if share >= 0.5 else ("MIXED", None)


def _advice(rows: Sequence[Measured]) -> str:
    """Ranks that would have held the update: of most matrices, and of all."""
    found = sorted(one for row in rows if (one := row.values.get("suggested_rank")) is not None)
    below = sum(row.status.get("suggested_rank") is Status.BELOW_RESOLUTION for row in rows)
    if not found:
        none = " No direction of the update is above its noise, so no rank can be suggested."
        return none if below else ""
    most = found[math.ceil(0.9 * len(found)) - 1]
    where = "9 of 10 matrices" if found[-1] > most else "every matrix"
    words = [f"{most:.0f} holds 90 % of the energy above the noise in {where}"]
    served = servable(most)
    if served is not None and served != most:
        words.append(f"{served} is the next rank that vLLM serves")
    if found[-1] > most:
        words.append(f"the largest need is {found[-1]:.0f}")
    if below:
        words.append("1 matrix is" if below == 1 else f"{below} matrices are")
        words[-1] += " below the noise"
    return f" Rank: {'; '.join(words)}. That is about energy and not about behaviour."
