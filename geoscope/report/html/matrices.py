"""The table of all matrices: what is shown, and the numbers behind it for sorting and CSV."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from geoscope.kinds import Kind
from geoscope.report.grids import MATRIX, VERDICT, code_cell, shown_quantities, subject_grid
from geoscope.report.page import Cell, Grid, Head
from geoscope.report.sections import Section, Subject, with_dimension

__all__ = ["Table", "table"]

_DIGITS = 6


@dataclass(frozen=True)
class Table:
    """All matrices: the grid, and `data` of its columns of numbers.

    data: `first`, the column where they begin; `ids`; `values` and `nulls`, for each id a number of
    six digits or null for each row, as `kinds` of numbers and which of them each row has.
    """

    grid: Grid
    data: dict[str, Any]


def table(kind: Kind, parts: Sequence[Section]) -> Table:
    """One row a matrix and tuned model, in the order of the report."""
    layers = [layer for part in parts for layer in part.layers]
    has_code = any(layer.verdict for layer in layers)
    heads = [MATRIX, Head("layer"), Head("shape", is_words=True)]
    heads += [Head("tuned")] if len(parts) > 1 else []
    heads += [VERDICT] if has_code else []
    cells = [
        [
            Cell(layer.name),
            Cell("–" if layer.layer is None else str(layer.layer)),
            Cell("×".join(map(str, layer.shape))),
            *([Cell(str(layer.tuned))] if len(parts) > 1 else []),
            *([code_cell(layer.verdict)] if has_code else []),
        ]
        for layer in layers
    ]
    subjects = [Subject(layer.values, layer.nulls, (layer,)) for layer in layers]
    grid = subject_grid(kind, heads, cells, subjects)
    patterns = [quantity.id for quantity in shown_quantities(kind, subjects)]
    data = {
        "first": len(grid.heads) - len(patterns),
        "ids": patterns,
        "values": [_column(subjects, pattern, "values") for pattern in patterns],
        "nulls": [_column(subjects, pattern, "nulls") for pattern in patterns],
    }
    return Table(grid, data)


def _column(subjects: Sequence[Subject], pattern: str, part: str) -> dict[str, Any]:
    """The numbers that occur, and which of them each row has: nulls are those of few shapes."""
    numbers = [_rounded(subject, pattern, part) for subject in subjects]
    kinds = list(dict.fromkeys(numbers))
    if len(kinds) > len(numbers) // 2:
        return {"kinds": numbers}
    places = {number: at for at, number in enumerate(kinds)}
    return {"kinds": kinds, "at": [places[number] for number in numbers]}


def _rounded(subject: Subject, pattern: str, part: str) -> float | int | None:
    value = getattr(subject, part).get(with_dimension(pattern, subject.k))
    if value is None or isinstance(value, int):
        return value
    return float(f"{value:.{_DIGITS}g}")
