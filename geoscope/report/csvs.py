"""CSV: one row per matrix, the ids of the JSON as columns, an empty cell for null (RFC 4180)."""

from __future__ import annotations

import csv
import io

from geoscope.records import LayerRecord, Report
from geoscope.report.plain import plain

__all__ = ["render_csv"]


def render_csv(report: Report) -> str:
    """Columns: name, layer, module, shape, values, `nulls.<id>`, `status.<id>`, verdict."""
    report = plain(report)
    columns = _columns(report)
    stream = io.StringIO()
    writer = csv.DictWriter(stream, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(_row(layer) for layer in report.layers)
    return stream.getvalue()


def _columns(report: Report) -> list[str]:
    layers = report.layers
    columns = ["name", "layer", "module", "shape"]
    if any(layer.tuned is not None for layer in layers):
        columns.append("tuned")
    columns += sorted({key for layer in layers for key in layer.values})
    columns += sorted({f"nulls.{key}" for layer in layers for key in layer.nulls})
    columns += sorted({f"status.{key}" for layer in layers for key in layer.status})
    if any(layer.verdict is not None for layer in layers):
        columns += ["verdict.code", "verdict.k"]
    return columns


def _row(layer: LayerRecord) -> dict[str, object]:
    row: dict[str, object] = {
        "name": _text(layer.name),
        "layer": layer.layer,
        "module": _text(layer.module),
        "shape": "x".join(str(size) for size in layer.shape),
        **layer.values,
        **{f"nulls.{key}": value for key, value in layer.nulls.items()},
        **{f"status.{key}": status.value for key, status in layer.status.items()},
    }
    if layer.tuned is not None:
        row["tuned"] = layer.tuned
    if layer.verdict is not None:
        row["verdict.code"] = _text(layer.verdict["code"])
        row["verdict.k"] = layer.verdict.get("k")
    return row


def _text(value: str) -> str:
    """A cell of text; a spreadsheet takes none for a formula."""
    return f"'{value}" if value.startswith(("=", "+", "-", "@")) else value
