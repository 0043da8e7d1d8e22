"""Does the rounding of a grid explain the change? In words, for a matrix and for a model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from geoscope.metrics.measure import Measured

__all__ = ["COPY", "quantised_words"]

COPY = "a model and its quantised copy"


def quantised_words(rows: Sequence[Measured], limits: Mapping[str, float]) -> str:
    """What the rounding of grids leaves of the change of those rows that lie on one; "" without.

    With N² = Σ of the rounding expected of the grids and t = `words.quantised_copy`: a copy where
    t ≤ N/‖ΔW‖ ≤ 1/t.
    """
    on_grids = [row for row in rows if row.weights.get("grid") and row.weights["update"] > 0]
    if not on_grids:
        return ""
    sums = (math.fsum(row.weights[key] for row in on_grids) for key in ("grid", "update", "base"))
    noise, update, base = sums
    share, limit = math.sqrt(noise / update), limits["words.quantised_copy"]
    if share > 1 / limit:
        return f"the change is smaller than the grid's rounding, {share:.3g} × as large"
    if share >= limit:
        return f"{COPY}: the rounding of its grid, {100 * share:.0f} % of the change, explains it"
    left = math.sqrt((update - noise) / base) if base else math.inf
    return f"more than the grid's rounding explains: ρ without it is {left:.3g}"
