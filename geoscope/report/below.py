"""The lines below the facts: coverage, what marks mean, what cannot be seen, what to do next."""

from __future__ import annotations

from collections.abc import Sequence

from geoscope.answers import Answer
from geoscope.kinds import Kind
from geoscope.records import Report
from geoscope.report.beside import anchor_block, overlap_block
from geoscope.report.coverage import compared_line
from geoscope.report.numbers import number
from geoscope.report.page import Cell, Grid
from geoscope.report.sections import Section, answering

__all__ = ["CAUTIOUS", "ELSEWHERE", "PARTLY", "tail"]

PARTLY = "*"
CAUTIOUS = "~"
ELSEWHERE = "`details`"
_PAIRS = 3
_MERGING = {
    "head_agreement": "heads agree",
    "consensus": "rests with their sum",
    "changed_shared": "changed entries in common",
}


def tail(
    report: Report, kind: Kind, parts: Sequence[Section], body: Grid, where: str
) -> tuple[str, ...]:
    """Coverage, what the columns and marks mean, what cannot be seen, and what to do next."""
    said = kind.answer
    others = "; `all_matrices` reads the others" if report.coverage.unread else ""
    complete = "" if report.coverage.missing else f"{compared_line(report)}{others}."
    pairs = _pairs(report, parts[0]) if kind.overlaps and len(parts) > 1 else ""
    lines = [
        pairs,
        _merging(report) if said.tells_merging else "",
        *anchor_block(report, kind, parts[0]).lines,
        " ".join(filter(None, (complete, _noise(said, body, is_alone=len(parts) == 1)))),
        _marks(body),
        said.caveat,
        _next(said, answering(report))
        if where == ELSEWHERE
        else said.next and f"Next: {said.next}",
    ]
    return tuple(filter(None, lines))


def _pairs(report: Report, section: Section) -> str:
    grid = overlap_block(report, section).grid
    rows = () if grid is None else grid.rows
    told = [f"{row[0].text} {row[2].text} {row[2].null}".rstrip() for row in rows[:_PAIRS]]
    more = f" and {len(rows) - _PAIRS} more" if len(rows) > _PAIRS else ""
    return f"Cosine of the updates: {', '.join(told)}{more}." if told else ""


def _merging(report: Report) -> str:
    """Of several tuned models how their updates would merge, in a sentence."""
    outlook = report.summary.merging
    if outlook is None:
        return ""
    values, nulls = outlook["values"], outlook["nulls"]
    told = [
        f"{words} {number(values[key])} ({number(nulls.get(key))})"
        for key, words in _MERGING.items()
        if key in values
    ]
    return f"To merge: {outlook['words']}; {', '.join(told)}."


def _noise(said: Answer, body: Grid, *, is_alone: bool) -> str:
    """What the nulls are, where the table has some."""
    name, words = said.noise
    cells = [cell for row in _whole_rows(body) for cell in row]
    columns = [i for i, head in enumerate(body.heads) if is_alone and head.text == name]
    has_null = any(row[i].text for row in _whole_rows(body) for i in columns)
    if not has_null and not any(cell.null for cell in cells):
        return ""
    return f"{name.capitalize() if is_alone else '(…)'}: {words}."


def _marks(body: Grid) -> str:
    """What the marks behind numbers mean."""
    texts = [cell.text for row in _whole_rows(body) for cell in row]
    words = {PARTLY: "not all matrices have this number", CAUTIOUS: "rounding is a visible part"}
    told = [
        f"{mark} {what}"
        for mark, what in words.items()
        if any(len(text) > 1 and text.endswith(mark) for text in texts)
    ]
    return f"{'; '.join(told)}." if told else ""


def _whole_rows(body: Grid) -> list[tuple[Cell, ...]]:
    return [row for row in body.rows if len(row) == len(body.heads)]


def _next(said: Answer, parts: Sequence[Section]) -> str:
    explained = any(part.verdict and part.verdict.explain for part in parts)
    words = [f"All numbers: {ELSEWHERE}", "why: `explain`" if explained else "", said.next]
    return " · ".join(filter(None, words))
