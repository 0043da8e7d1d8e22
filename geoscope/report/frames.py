"""A report as data frames of pandas, which is imported when one is asked for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from geoscope.errors import OptionError, ReportError
from geoscope.records import LayerRecord, Report

if TYPE_CHECKING:
    from pandas import DataFrame

__all__ = ["PARTS", "to_frame"]

# part → the mapping of a record that has it.
PARTS = {"values": "values", "nulls": "nulls", "statuses": "status", "raw": "raw"}


def to_frame(report: Report, part: str = "values") -> DataFrame:
    """One row a matrix, named; columns: layer, module, rows, columns, verdict, then the ids.

    part: one of PARTS. What has no number is NaN; a status that is not listed is OK.
    Raises OptionError, or ReportError without pandas.
    """
    if part not in PARTS:
        raise OptionError(f"part {part!r} is not one of {', '.join(PARTS)}")
    try:
        import pandas
    except ImportError:
        raise ReportError(
            "to_frame needs pandas, which is not installed: pip install 'geoscope[notebook]'"
        ) from None
    ids = list(dict.fromkeys(key for layer in report.layers for key in layer.values))
    rows = [{**_place(layer), **_numbers(layer, ids, part)} for layer in report.layers]
    names = pandas.Index([layer.name for layer in report.layers], name="name")
    columns = list(dict.fromkeys(key for row in rows for key in row)) or list(_PLACE)
    return pandas.DataFrame(rows, index=names, columns=columns)


_PLACE = ("layer", "module", "rows", "columns", "verdict")


def _place(layer: LayerRecord) -> dict[str, Any]:
    code = None if layer.verdict is None else layer.verdict["code"]
    sides = (*layer.shape, None)[:2]
    facts = (layer.layer, layer.module, *sides, code)
    place: dict[str, Any] = dict(zip(_PLACE, facts, strict=True))
    return place if layer.tuned is None else {"tuned": layer.tuned, **place}


def _numbers(layer: LayerRecord, ids: list[str], part: str) -> dict[str, Any]:
    if part == "statuses":
        return {key: layer.status_of(key).value for key in ids if key in layer.values}
    found: Mapping[str, float | int | None] = getattr(layer, PARTS[part])
    # null and no number alike, so that a column stays one of floats
    return {key: float("nan") if (one := found.get(key)) is None else one for key in ids}
