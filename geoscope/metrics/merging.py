"""Would the updates of several tuned models of one base merge? Numbers, and a sentence.

Each update is its leading triplet H and the rest R. Heads are sharp and may conflict, the rests are
the stable part (2606.02252); entries that one model alone changed are lost in an average
(2601.13572). It is about directions: no merged model was made, and none was tried.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations
from typing import Any

from geoscope.records import Overlap

__all__ = ["merging_outlook"]

_SAME = "the updates are nearly equal: an average loses little"
_APART = "they pull against one another: a merge cancels part of both"
_HEADS = "one head, rests of their own: average the heads, add the rests"
_PART = "in part common: an average keeps that part, and 1/{count} of what each has alone"
_OWN = "updates of their own: a sum keeps each, an average of {count} keeps 1/{count} of it"


def merging_outlook(
    overlaps: Sequence[Overlap], count: int, limits: Mapping[str, float]
) -> dict[str, Any] | None:
    """Of `count` models, means over the matrices that all pairs have; None where there are none.

        head_agreement     mean over pairs of max(0, cos(H_i, H_j))
        head_cosine        mean over pairs of cos(H_i, H_j)
        residual_cosine    mean over pairs of cos(R_i, R_j)
        consensus          mean_i cos(R_i, Σ_j R_j/‖R_j‖) = √(n + 2·Σ_{i<j} cos(R_i, R_j))/n
        changed_shared     entries that both changed over those that either did

    nulls: 0 for the cosines, E max(0, x) = 1/√(2πmn) is not told apart from it; 1/√n for the
    consensus of orthogonal rests; of changed_shared that of independent isotropic updates.
    """
    rows = list(_whole_rows(overlaps, count))
    if not rows:
        return None
    heads = [[_number(pair, "head_cosine") for pair in row] for row in rows]
    rests = [[_number(pair, "residual_cosine") for pair in row] for row in rows]
    values: dict[str, float] = {
        "head_agreement": _mean(_mean(max(0.0, head) for head in row) for row in heads),
        "head_cosine": _mean(map(_mean, heads)),
        "residual_cosine": _mean(map(_mean, rests)),
        "consensus": _mean(
            math.sqrt(max(0.0, count + 2 * math.fsum(row))) / count for row in rests
        ),
    }
    nulls = {"head_agreement": 0.0, "head_cosine": 0.0, "residual_cosine": 0.0}
    nulls["consensus"] = 1 / math.sqrt(count)
    shared = _shared(rows)
    if shared is not None:
        values["changed_shared"], nulls["changed_shared"] = shared
    words = _words(values, count, limits)
    return {
        "models": count,
        "matrices": len(rows),
        "values": values,
        "nulls": nulls,
        "words": words,
    }


def _whole_rows(overlaps: Sequence[Overlap], count: int) -> Iterable[list[Overlap]]:
    """Of each matrix all pairs, where each has both cosines with their nulls."""
    rows: dict[str, list[Overlap]] = {}
    for pair in overlaps:
        if all(pair.values.get(key) is not None and key in pair.nulls for key in _COSINES):
            rows.setdefault(pair.name, []).append(pair)
    wanted = len(list(combinations(range(count), 2)))
    return (row for row in rows.values() if len(row) == wanted)


_COSINES = ("head_cosine", "residual_cosine")


def _number(pair: Overlap, key: str) -> float:
    value = pair.values[key]
    assert value is not None
    return float(value)


def _shared(rows: Sequence[Sequence[Overlap]]) -> tuple[float, float] | None:
    """Entries that both changed over those that either did, and its null, over all pairs."""
    pairs = [pair for row in rows for pair in row if "changed_shared" in pair.nulls]
    keys = ("changed_shared", "changed_only_a", "changed_only_b")
    if not pairs:
        return None
    measured = [[_number(pair, key) for key in keys] for pair in pairs]
    expected = [[pair.nulls[key] for key in keys] for pair in pairs]
    return _part(measured), _part(expected)


def _part(shares: Sequence[Sequence[float]]) -> float:
    either = math.fsum(share for row in shares for share in row)
    return math.fsum(row[0] for row in shares) / either if either else 0.0


def _mean(numbers: Iterable[float]) -> float:
    held = list(numbers)
    return math.fsum(held) / len(held)


def _words(values: Mapping[str, float], count: int, limits: Mapping[str, float]) -> str:
    agree, least = limits["words.merge_agree"], limits["words.merge_least"]
    head, rest = values["head_agreement"], values["residual_cosine"]
    if min(values["head_cosine"], rest) < -least:
        return _APART
    if rest > agree:
        return _SAME
    if head > agree:
        return _HEADS
    return (_PART if max(head, rest) > least else _OWN).format(count=count)
