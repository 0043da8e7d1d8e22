"""CSV: the cells are the numbers of the JSON."""

from __future__ import annotations

import csv
import io

import pytest

from geoscope.records import LayerRecord, Layers, Report
from geoscope.report.csvs import render_csv
from tests.helpers.examples import example


def rows_of(report: Report) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(render_csv(report), newline="")))


def assert_row(row: dict[str, str], layer: LayerRecord) -> None:
    assert row["name"] == layer.name
    assert row["layer"] == str(layer.layer)
    assert row["module"] == layer.module
    assert row["shape"] == f"{layer.shape[0]}x{layer.shape[1]}"
    for key, value in layer.values.items():
        assert row[key] == "" if value is None else float(row[key]) == value
    for key, null in layer.nulls.items():
        assert float(row[f"nulls.{key}"]) == null
    for key, status in layer.status.items():
        assert row[f"status.{key}"] == status


@pytest.mark.parametrize("kind", ["collapse", "anisotropy", "alignment", "compare"])
def test_cells_are_the_numbers_of_the_report(kind: str) -> None:
    report = example(kind, layers=2, partial=True)
    rows = rows_of(report)
    assert len(rows) == len(report.layers)
    for row, layer in zip(rows, report.layers, strict=True):
        assert_row(row, layer)


def test_verdict_and_tuned_have_columns_where_there_are_any() -> None:
    row = rows_of(example("collapse", runs=2))[0]
    assert row["tuned"] == "1"
    assert row["verdict.code"] in ("OFF_PRINCIPAL", "MIXED")
    assert row["verdict.k"] == "24"
    assert not {"tuned", "verdict.code"} & set(rows_of(example("anisotropy"))[0])


def test_names_with_commas_and_quotes_are_quoted() -> None:
    report = example(layers=0)
    layer = LayerRecord('odd, "name"', None, "x", (2, 3), values={"nss": 1.0})
    made, covered = report.provenance, report.coverage
    row = rows_of(Report("compare", made, covered, Layers([layer]), report.summary))[0]
    assert row["name"] == 'odd, "name"'
    assert row["layer"] == ""


def test_report_without_matrices_has_a_head_alone() -> None:
    assert render_csv(example(layers=0)) == "name,layer,module,shape\n"
