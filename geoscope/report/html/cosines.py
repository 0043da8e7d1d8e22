"""Several tuned models: which updates go the same way, as one square of mean cosines."""

from __future__ import annotations

from collections.abc import Sequence

from geoscope.records import Report
from geoscope.report.html.maps import Shade, side
from geoscope.report.numbers import number
from geoscope.report.sections import Section

__all__ = ["cosines"]

_ID = "update_cosine"


def cosines(report: Report, parts: Sequence[Section]) -> list[tuple[str, list[Shade]]]:
    """A row for each model: label, cells; nothing without overlaps of updates."""
    found: dict[tuple[int, int], list[float]] = {}
    for overlap in report.overlaps:
        value = overlap.values.get(_ID)
        if value is not None:
            found.setdefault((overlap.a, overlap.b), []).append(value)
    if not found:
        return []
    return [
        (f"{row.tuned} {row.label}", [_cell(found, row.tuned, column.tuned) for column in parts])
        for row in parts
    ]


def _cell(found: dict[tuple[int, int], list[float]], row: int, column: int) -> Shade:
    if row == column:
        return Shade("1", "", "the same update")
    values = found.get((min(row, column), max(row, column)), [])
    if not values:
        return Shade("–", "x", "")
    mean = sum(values) / len(values)
    return Shade(number(mean), side(mean), f"mean of {len(values)} matrices, null 0")
