"""The candidates of a lineage in the order of their tree, each below what it is made from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from geoscope.records import Report

__all__ = ["NOT_GIVEN", "family_rows"]

# In place of a number: a model that is not among them.
NOT_GIVEN = -1


def family_rows(report: Report) -> list[tuple[int, int]]:
    """(depth, number as in `provenance.refs`, 0 the model) from the root on; then the others.

    Empty where the report has no tree. What shares a stem stands below NOT_GIVEN.
    """
    lineage = report.summary.lineage
    if lineage is None:
        return []
    children = _children(lineage)
    roots = [n for n in children.get(None, []) if n in children]
    rows = [row for root in roots for row in _below(root, 0, children)]
    seen = {number for _, number in rows}
    return [*rows, *((0, n) for n in range(1, len(lineage["parents"])) if n not in seen)]


def _children(lineage: Mapping[str, Any]) -> dict[int | None, list[int]]:
    """Number → what stands below it; stems that are not given have numbers below 0."""
    parents, beside = [*lineage["parents"]], lineage["beside"]
    stems: dict[int, int] = {}
    for other in beside:
        if other is not None:
            stems.setdefault(other, NOT_GIVEN - len(stems))
    above: dict[int, int | None] = dict(enumerate(parents))
    for other, stem in stems.items():
        above[stem], above[other] = above[other], stem
    for child, other in enumerate(beside):
        if other is not None:
            above[child] = stems[other]
    children: dict[int | None, list[int]] = {}
    for child, parent in sorted(above.items()):
        children.setdefault(parent, []).append(child)
    return children


def _below(
    number: int, depth: int, children: Mapping[int | None, list[int]]
) -> Iterator[tuple[int, int]]:
    """The way to the model first."""
    yield depth, max(number, NOT_GIVEN)
    own = sorted(children.get(number, []), key=lambda child: not _leads(child, children))
    for child in own:
        yield from _below(child, depth + 1, children)


def _leads(number: int, children: Mapping[int | None, list[int]]) -> bool:
    return number == 0 or any(_leads(child, children) for child in children.get(number, []))
