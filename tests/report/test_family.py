"""The tree of a lineage as rows: the way to the model first, stems that are not given."""

from __future__ import annotations

from dataclasses import replace

from geoscope.report import render_text
from geoscope.report.family import NOT_GIVEN, family_rows
from tests.helpers.examples import example


def rows(
    parents: list[int | None], beside: list[int | None] | None = None
) -> list[tuple[int, int]]:
    report = example("lineage", layers=1, runs=len(parents) - 1)
    told = {"parents": parents, "beside": beside or [None] * len(parents)}
    return family_rows(replace(report, summary=replace(report.summary, lineage=told)))


def test_each_stands_below_what_it_is_made_from() -> None:
    assert rows([2, None, 1, 2, 1]) == [(0, 1), (1, 2), (2, 0), (2, 3), (1, 4)]


def test_what_is_no_relative_comes_last() -> None:
    assert rows([2, None, None]) == [(0, 2), (1, 0), (0, 1)]


def test_a_shared_stem_is_a_model_that_is_not_given() -> None:
    assert rows([1, None, 1], [2, None, None]) == [(0, 1), (1, NOT_GIVEN), (2, 0), (2, 2)]


def test_it_is_drawn_for_more_than_three() -> None:
    report = example("lineage", layers=1, runs=4)
    told = {"parents": [2, None, 1, 1, None], "beside": [None, None, None, 2, None]}
    text = render_text(
        replace(report, summary=replace(report.summary, lineage=told)), width=80, colour=False
    )
    names = [line[:24].rstrip() for line in text.splitlines()]
    assert "  (not given)" in names
    assert any(name.startswith("      • tiny/base") for name in names)
    assert family_rows(example("lineage", layers=1)) == []
