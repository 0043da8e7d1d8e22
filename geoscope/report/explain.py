"""`--explain`: every condition of the verdict's rules, its limit and standing, what it met."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from geoscope.records import Verdict
from geoscope.report.grids import MATRIX, VERDICT, code_cell
from geoscope.report.numbers import degrees, number
from geoscope.report.page import Block, Cell, Grid, Head
from geoscope.report.sections import Section

__all__ = ["explain_blocks"]

_NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?(?![.\w])"
_ANGLE = re.compile(rf"(?P<name>mean angle) (?P<value>{_NUMBER}) (?P<sign>\S) (?P<limit>{_NUMBER})")


def explain_blocks(section: Section, most: int | None = None) -> list[Block]:
    """Rules, thresholds in force, and the clause that decided on each matrix, or on the first."""
    verdict = section.verdict
    if verdict is None:
        return []
    clauses = _clauses(section, most)
    return [
        Block(
            "rules in order: each condition, its limit, and the values it met",
            grid=_rules(verdict),
        ),
        Block(
            "thresholds in force; their reasons: docs/methods.md#thresholds",
            grid=_thresholds(verdict),
        ),
        *([Block(_decided(section, most), grid=clauses)] if clauses.rows else []),
    ]


def _rules(verdict: Verdict) -> Grid:
    """Per code its conditions: on how many matrices each held, and the range that it met."""
    heads = (Head("", is_words=True), Head("limit"), Head("held"), Head("least"), Head("largest"))
    rows: list[tuple[Cell, ...]] = []
    for entry in verdict.explain:
        head = (Cell(str(entry["code"])),)
        rows += [_rule(entry)] if head in rows else [head, _rule(entry)]
    return Grid((*heads, Head("standing", is_words=True)), tuple(rows))


def _rule(entry: Mapping[str, Any]) -> tuple[Cell, ...]:
    condition = str(entry["condition"])
    limit, *met = (_limit(condition, entry[key]) for key in ("threshold", "least", "largest"))
    held = f"{entry['holds']} of {entry['of']}"
    texts = (condition, limit, held, *met, str(entry["standing"]))
    return tuple(Cell(text) for text in texts)


def _thresholds(verdict: Verdict) -> Grid:
    rows = [(Cell(key), Cell(_limit(key, limit))) for key, limit in verdict.thresholds.items()]
    heads = (Head("threshold", is_words=True), Head("limit"))
    return Grid(heads, tuple(sorted(rows, key=lambda row: row[0].text)))


def _limit(name: str, value: float | None) -> str:
    """Angles are radians in the report and degrees for people."""
    is_angle = name.startswith("mean angle") or name.endswith(".angle")
    return degrees(value) if is_angle else number(value)


def _decided(section: Section, most: int | None) -> str:
    total = sum(layer.verdict is not None for layer in section.layers)
    return "what decided" + ("" if most is None or total <= most else f", first {most} of {total}")


def _clauses(section: Section, most: int | None) -> Grid:
    """Of each matrix code and clause, and the k of the rules where they have one."""
    judged = [(layer.name, layer.verdict) for layer in section.layers if layer.verdict][:most]
    has_k = any(verdict.get("k") is not None for _, verdict in judged)
    rows = [
        (
            Cell(name),
            code_cell(verdict),
            *([Cell(number(verdict.get("k")))] if has_k else []),
            Cell(_in_degrees(str(verdict.get("clause") or ""))),
        )
        for name, verdict in judged
    ]
    clause = Head("clause", is_words=True, is_long=True)
    return Grid((MATRIX, VERDICT, *([Head("k")] if has_k else []), clause), tuple(rows))


def _in_degrees(clause: str) -> str:
    """The clause with its angle and the limit of it as everywhere else for people."""

    def turned(match: re.Match[str]) -> str:
        value, limit = (degrees(float(match[part])) for part in ("value", "limit"))
        return f"{match['name']} {value} {match['sign']} {limit}"

    return _ANGLE.sub(turned, clause)
