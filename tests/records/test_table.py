"""Nouns as a table: what is written, that it reads back equal, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest

from geoscope.records import Curve, Status, decode, encode
from geoscope.records.codec import omitted_if_default, tabled


@dataclass(frozen=True)
class Row:
    name: str
    values: Mapping[str, float | None] = field(default_factory=dict)
    status: Mapping[str, Status] = field(default_factory=dict)
    curves: Mapping[str, Curve] = omitted_if_default({})
    series: Mapping[str, tuple[float | None, ...]] = omitted_if_default({})
    notes: tuple[str, ...] = omitted_if_default(())
    verdict: Mapping[str, Any] | None = omitted_if_default(None)


@dataclass(frozen=True)
class Sheet:
    rows: tuple[Row, ...] = tabled()
    others: tuple[Row, ...] = tabled(())


GRID = (1.0, 2.0)
ROWS = (
    Row("a", {"x": 0.5, "y": None}, {"y": Status.CAUTION}, {"c": Curve(GRID, (3.0, 4.0))}),
    Row("b", {"x": 7}, {}, {"c": Curve(GRID, (5.0, 6.0))}, {"s": (1.0, None)}, ("n",), {"k": 8}),
    Row("c", {"y": 2.5}, {"x": Status.OK}),
)


def test_each_field_is_a_list_and_a_mapping_one_for_each_key() -> None:
    assert encode(Sheet(ROWS)) == {
        "rows": {
            "name": ["a", "b", "c"],
            "values": {"x": [0.5, 7, None], "y": [None, None, 2.5]},
            "absent": {"values": {"x": [2], "y": [1]}},
            "status": {"y": ["CAUTION", None, None], "x": [None, None, "OK"]},
            "curves": {
                "c": {
                    "x": {"distinct": [[1.0, 2.0]], "at": [0, 0, None]},
                    "y": {"distinct": [[3.0, 4.0], [5.0, 6.0]], "at": [0, 1, None]},
                }
            },
            "series": {"s": [None, [1.0, None], None]},
            "notes": [[], ["n"], []],
            "verdict": [None, {"k": 8}, None],
        }
    }


@pytest.mark.parametrize("rows", [ROWS, ROWS[:1], ROWS[2:], (), (Row("bare"),)])
def test_it_reads_back_equal(rows: tuple[Row, ...]) -> None:
    again = decode(Sheet, json.loads(json.dumps(encode(Sheet(rows, rows)))))
    assert again == Sheet(rows, rows)
    assert [list(row.values) for row in again.rows] == [list(row.values) for row in rows]


def test_a_list_of_objects_is_read_too() -> None:
    listed = {"rows": [encode(row) for row in ROWS]}
    assert decode(Sheet, json.loads(json.dumps(listed))) == Sheet(ROWS)


@pytest.mark.parametrize(
    ("part", "wrong", "words"),
    [
        ("name", ["a", "b"], "name: .*2 entries|3 entries stand where 2"),
        ("name", ["a", "b", 3], "name: found 3, expected a text"),
        ("values", {"x": [1.0]}, "values: x: 1 entries stand where 3"),
        ("values", {"x": [1.0, "2", None]}, "values: x: found '2', expected a number"),
        ("values", {"x": [1.0, float("inf"), None]}, "values: x: found inf, expected a number"),
        ("values", {"x": [1.0, True, None]}, "values: x: found true, expected a number"),
        ("values", [], "values: .* stands where a table"),
        (
            "status",
            {"y": ["FINE", None, None]},
            "status: y: found 'FINE', expected one of N",
        ),
        ("curves", {"c": {"x": {"distinct": [], "at": [0, 0, None]}}}, "curves: c: "),
        ("absent", {"values": {"x": [9]}}, "values: "),
    ],
)
def test_what_is_wrong_is_told_with_its_place(part: str, wrong: Any, words: str) -> None:
    document = encode(Sheet(ROWS))
    document["rows"][part] = wrong
    with pytest.raises(TypeError, match=words):
        decode(Sheet, document)
