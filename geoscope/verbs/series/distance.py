"""Is the series one that began at this base? From the cosines that the pass over it keeps."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import add

from geoscope.kinds import FAR
from geoscope.metrics import far_code, limits_in_force
from geoscope.trajectory.increments import Increments
from geoscope.verbs.series.tensors import MatchedSeries

__all__ = ["SeriesDistance", "series_distance"]


@dataclass(frozen=True)
class SeriesDistance:
    """code: UNRELATED or TOO_FAR. first: whether it is so from the first checkpoint on. text: one
    line, with what to do.
    """

    code: str
    first: bool
    text: str


def series_distance(
    found: MatchedSeries, increments: Mapping[str, Increments]
) -> SeriesDistance | None:
    """The first checkpoint of which more than half of the matrices are far from the base.

    None where there is none, and for adapters, whose base is part of what they mean. The limits are
    the usual ones: no command on series sets them.
    """
    for i, step in enumerate(found.steps[1:]):
        far = [name for name in increments if _code(found, [name], increments, i) in FAR]
        if 2 * len(far) > len(increments):
            return _told(found, increments, far, i, step)
    return None


def _code(
    found: MatchedSeries, names: Sequence[str], increments: Mapping[str, Increments], i: int
) -> str | None:
    cosine = _together(names, increments).base_cosines[i]
    return far_code(cosine, _deviation(found, names), limits_in_force(None))


def _together(names: Sequence[str], increments: Mapping[str, Increments]) -> Increments:
    return reduce(add, (increments[name] for name in names))


def _deviation(found: MatchedSeries, names: Sequence[str]) -> float:
    """1/√N of the entries."""
    return sum(math.prod(found.tensors[name].shape) for name in names) ** -0.5


def _told(
    found: MatchedSeries,
    increments: Mapping[str, Increments],
    far: Sequence[str],
    i: int,
    step: int,
) -> SeriesDistance:
    code = _code(found, far, increments, i) or "TOO_FAR"
    cosine = _together(far, increments).base_cosines[i] or 0.0
    base = found.refs[0].given
    what = "has nothing of" if code == "UNRELATED" else "is too far from"
    whole = len(increments)
    where = "" if len(far) == whole else f" in {len(far)} of {whole} matrices"
    return SeriesDistance(
        code,
        i == 0,
        f"{code}: step {step:g} {what} the base {base}{where} (cosine {cosine:.2g}, of unrelated "
        f"weights 0 ± {_deviation(found, far):.1g}). From this step on, every update contains −W_0 "
        "itself. Give the model that the series was trained from as `base`",
    )
