"""Markdown: the content of the text in tables that GitHub draws."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from geoscope.kinds import KINDS
from geoscope.records import Report
from geoscope.report.markdown import render_markdown
from tests.helpers.examples import example


def tables(report: Report) -> list[list[str]]:
    parts = render_markdown(report).split("\n\n")
    return [part.strip().splitlines() for part in parts if part.startswith("|")]


@pytest.mark.parametrize("kind", sorted(KINDS))
@pytest.mark.parametrize("runs", [1, 2])
def test_rows_of_a_table_have_equally_many_cells(kind: str, runs: int) -> None:
    for table in tables(example(kind, rho=0.006, runs=runs, partial=True)):
        counts = {len(re.findall(r"(?<!\\)\|", row)) for row in table}
        assert len(counts) == 1
        assert set(table[1]) <= set("|:- ")


def test_blocks_of_the_text_are_there() -> None:
    text = render_markdown(example())
    assert text.startswith("# Base and tuned compared: tiny/base → grpo/checkpoint-240\n")
    for head in ("OFF_PRINCIPAL", "model", "modules", "statuses", "coverage"):
        assert f"\n## {head}" in text
    assert "\nCOMPLETE 28 of 28 matrices\n" in text


def test_names_are_whole_and_code() -> None:
    report = example(layers=1, modules=("k_proj",))
    assert "| `model.layers.0.self_attn.k_proj.weight` |" in render_markdown(report)


def test_marks_in_a_name_are_escaped() -> None:
    report = example(layers=1)
    refs = tuple(replace(ref, given="a|b_*c*") for ref in report.provenance.refs)
    report = replace(report, provenance=replace(report.provenance, refs=refs))
    assert render_markdown(report).startswith("# Base and tuned compared: a\\|b\\_\\*c\\* →")
