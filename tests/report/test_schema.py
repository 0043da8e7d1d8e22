"""The published JSON Schema: what it says is what reports are, of every kind and earlier ones."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator
from torch import Tensor

import geoscope
from geoscope.kinds import KINDS, UPDATE
from geoscope.metrics import RULES, Measured
from geoscope.records import SCHEMA, Report, encode, report_schema
from geoscope.verbs.options import Options
from tests.helpers.examples import all_null, example
from tests.helpers.matrices import gaussian
from tests.helpers.running import TABLES, run

PARTS = ("values", "nulls", "status", "raw")
FILE = Path(__file__).parents[2] / "geoscope" / "records" / "report.schema.json"
PUBLISHED: dict[str, Any] = json.loads(FILE.read_text(encoding="utf-8"))


def strict(schema: Any) -> Any:
    """The schema with no other keys than those it names, where it does not say that there are."""
    if isinstance(schema, list):
        return [strict(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    own = {key: strict(value) for key, value in schema.items()}
    is_object = own.get("type") == "object" and isinstance(own.get("properties"), dict)
    return ({"additionalProperties": False} if is_object else {}) | own


STRICT = Draft202012Validator(strict(PUBLISHED))


def faults(document: Any) -> list[str]:
    return [f"{fault.json_path}: {fault.message[:200]}" for fault in STRICT.iter_errors(document)]


def test_the_file_is_what_the_records_give() -> None:
    """Write it again with `python -m tests.report.test_schema`, and read the change."""
    assert report_schema() == PUBLISHED
    Draft202012Validator.check_schema(PUBLISHED)


def test_the_command_prints_the_file() -> None:
    assert run("schema").out == FILE.read_text(encoding="utf-8")


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_every_kind_of_report_validates(kind: str) -> None:
    several = example(kind, layers=1, runs=2, partial=True)
    for report in (example(kind, layers=2), example(kind, layers=0), several, all_null(several)):
        assert faults(json.loads(report.dumps())) == []


def put(place: str, value: Any) -> Callable[[Any], None]:
    """Puts a value at a place of a document, such as `layers/values/nss`."""

    def change(document: Any) -> None:
        *path, last = place.split("/")
        for part in path:
            document = document[int(part) if part.isdigit() else part]
        document[last] = value

    return change


@pytest.mark.parametrize(
    ("place", "value"),
    [
        ("schema", "geoscope.report/1"),
        ("kind", None),
        ("unknown", 1),
        ("layers/values/nss", ["a text"]),
        ("layers/status/nss", ["FINE"]),
        ("layers/shape", [[64, "64"]]),
        ("layers/curves/update.S", [[1, 2.0]]),
        ("summary/model/nss", "much"),
        ("summary/verdict/shares", [1]),
        ("summary/verdict/explain", [{"code": "MIXED"}]),
        ("summary/distance", {"code": "TOO_FAR", "text": None}),
        ("layers/verdict/0/k", "8"),
        ("layers/method/update.S/0/bound", "x"),
        ("provenance/parameters/limits", {"nss": "x"}),
        ("coverage/status", None),
        ("provenance/refs", [{"given": "base"}]),
    ],
)
def test_what_a_report_is_not_is_a_fault(place: str, value: Any) -> None:
    document = json.loads(example(layers=1).dumps())
    assert faults(document) == []
    put(place, value)(document)
    assert faults(document)


def of_schema_1(report: Report) -> dict[str, Any]:
    """The document as version 0.2 wrote it: rows, curves of pairs."""
    document: dict[str, Any] = encode(report) | {"schema": "geoscope.report/1"}
    for name in TABLES:
        if name in document:
            document[name] = [encode(row) for row in getattr(report, name)]
    for row in document["layers"]:
        for key, curve in row.get("curves", {}).items():
            row["curves"][key] = [list(pair) for pair in zip(curve["x"], curve["y"], strict=True)]
    return json.loads(json.dumps(document))


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_reports_of_schema_1_are_read(kind: str) -> None:
    report = example(kind, layers=1, runs=2)
    earlier = of_schema_1(report)
    assert isinstance(earlier["layers"][0]["values"], dict)
    again = Report.from_json(earlier)
    assert again == report
    assert again.to_json()["schema"] == SCHEMA


# --- a real report --------------------------------------------------------------------------------


def experts(count: int, rho: float) -> dict[str, Tensor]:
    """Matrices as an MoE checkpoint has them, in bf16."""
    return {
        f"model.layers.0.mlp.experts.{i}.{module}.weight": (
            gaussian(*shape, seed=i) + rho * gaussian(*shape, seed=1000 + i)
        ).bfloat16()
        for i in range(count)
        for module, shape in (("up_proj", (96, 64)), ("down_proj", (64, 96)))
    }


@pytest.fixture(scope="module")
def measured() -> Report:
    return geoscope.compare(experts(20, 0), experts(20, 0.05), options=Options(cache=None))


def test_a_report_of_many_matrices_is_small_and_validates(measured: Report) -> None:
    document = json.loads(measured.dumps())
    assert faults(document) == []
    table = json.dumps(document["layers"], separators=(",", ":"), ensure_ascii=False)
    assert len(table.encode()) / len(measured.layers) < 5000
    assert 4752 * len(table.encode()) / len(measured.layers) < 25e6


def test_curves_are_rounded_and_numbers_are_not(measured: Report) -> None:
    digits: set[int] = set()
    for layer in measured.layers:
        assert len(layer.curves) == 11
        for curve in layer.curves.values():
            assert 2 <= len(curve) <= 32
            assert curve.x[0] == 1 and curve.x[-1] in (8, 64)
            assert all(y == float(f"{y:.4g}") for y in curve.y)
        assert layer.curves["energy_right_null"].y[-1] == round(64 / layer.shape[1], 4)
        assert layer.values["update.spectral_norm"] == pytest.approx(
            layer.curves["update.S"].y[0], rel=5e-4
        )
        digits |= {len(repr(value)) for value in layer.values.values() if isinstance(value, float)}
    assert max(digits) > 16


def test_the_verdict_follows_from_what_was_written(measured: Report) -> None:
    again = Report.loads(measured.dumps())
    assert again == measured
    for layer in again.layers:
        assert layer.verdict is not None
        row = Measured(
            **{part: dict(getattr(layer, part)) for part in PARTS},
            floors={},
            weights={"parameters": layer.shape[0] * layer.shape[1]},
        )
        judged = RULES[UPDATE].matrix(row, int(layer.verdict["k"]), {})
        assert judged.to_json() == layer.verdict


if __name__ == "__main__":
    text = json.dumps(report_schema(), indent=2, ensure_ascii=False)
    FILE.write_text(text + "\n", encoding="utf-8")
