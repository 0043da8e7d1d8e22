"""Reports of earlier schemas, in the words of this one."""

from __future__ import annotations

from typing import Any

from geoscope.foreign import shown

__all__ = ["FIRST", "upgraded"]

FIRST = "geoscope.report/1"


def upgraded(data: dict[str, Any]) -> dict[str, Any]:
    """A document of schema 1, whose curves are lists of [x, y]; its rows are read as they are.

    Raises KeyError, TypeError or ValueError where it is not one.
    """
    return data | {"layers": [_with_curves(row) for row in data["layers"]]}


def _with_curves(row: Any) -> dict[str, Any]:
    curves = _table(row).get("curves", {})
    return row | {"curves": {key: _curve(points) for key, points in _table(curves).items()}}


def _table(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise TypeError(f"layers: found {shown(value)}, expected a table")
    return value


def _curve(points: Any) -> dict[str, Any]:
    pairs = points if isinstance(points, list) else [points]
    if any(not isinstance(pair, list) or len(pair) != 2 for pair in pairs):
        raise TypeError(f"layers: curves: found {shown(points)}, expected pairs")
    return {"x": [x for x, _ in pairs], "y": [y for _, y in pairs]}
