"""Tables of a report: the model's numbers, and rows of subjects with the kind's columns.

Every number stands with its null; one that some matrix marks CAUTION carries a trailing ~.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from geoscope.kinds import Kind
from geoscope.report.numbers import degrees, number, times
from geoscope.report.page import Cell, Grid, Head
from geoscope.report.sections import Subject, dimensions, with_dimension
from geoscope.report.tables import QUANTITIES, Quantity

__all__ = [
    "MATRIX",
    "VERDICT",
    "code_cell",
    "model_grid",
    "null_text",
    "shown_quantities",
    "subject_grid",
    "value_text",
]

MATRIX = Head("matrix", is_words=True, is_name=True)
VERDICT = Head("verdict", is_words=True)


def _model_heads(kind: Kind) -> tuple[Head, ...]:
    plain = ("value", kind.null[0], "ratio", "matrices", "base", "tuned")
    words = Head("", is_words=True)
    return (words, *map(Head, plain), words)


def model_grid(kind: Kind, whole: Subject, ks: Collection[int]) -> Grid:
    """One row per quantity of the model, in groups; at each of `ks` where it has a dimension."""
    rows: list[tuple[Cell, ...]] = []
    for group, patterns in kind.model:
        shown = [pattern for pattern in patterns if not kind.drops_empty or whole.numbered(pattern)]
        own = [row for pattern in shown for row in _model_rows(whole, QUANTITIES[pattern], ks)]
        rows += [(Cell(group),), *own] if own else []
    return Grid(_model_heads(kind), tuple(rows))


def _model_rows(
    whole: Subject, quantity: Quantity, wanted: Collection[int]
) -> list[tuple[Cell, ...]]:
    """One row for each k there is and that is wanted, or one, or none."""
    stem = quantity.id.removesuffix("@k")
    found = [k for k in dimensions(whole.values, stem) if k in wanted]
    ks = [None] if quantity.id == stem else found
    keys = [(with_dimension(quantity.id, k), k) for k in ks]
    return [_model_row(whole, quantity, key, k) for key, k in keys if _counts(whole, quantity, key)]


def _counts(whole: Subject, quantity: Quantity, key: str) -> bool:
    """Whether there is a row for this id: one that is only of note above a value, from there on."""
    if quantity.above is None:
        return key in whole.values
    return (whole.values.get(key) or 0) > quantity.above


def _model_row(whole: Subject, quantity: Quantity, key: str, k: int | None) -> tuple[Cell, ...]:
    role = key.removeprefix("update.")
    others = [
        Cell(number(whole.values[other])) if role != key and other in whole.values else Cell()
        for other in (f"base.{role}", f"tuned.{role}")
    ]
    null = whole.nulls.get(key)
    return (
        Cell(quantity.label.format(k=k)),
        Cell(_value(whole, quantity, key)),
        Cell("" if null is None else null_text(quantity, null)),
        Cell(_ratio(whole, quantity, key, k)),
        Cell(_resolved(whole, key)),
        *others,
        Cell(quantity.reading.format(k=k)),
    )


def _ratio(whole: Subject, quantity: Quantity, key: str, k: int | None) -> str:
    """Value over null: the id that holds it where there is one, else the quotient."""
    if quantity.ratio is not None:
        ratio = whole.values.get(with_dimension(quantity.ratio, k))
        return "" if ratio is None else times(ratio)
    value, null = whole.values[key], whole.nulls.get(key)
    return times(value / null) if value is not None and null not in (None, 0, 1) else ""


def _resolved(whole: Subject, key: str) -> str:
    """`4 of 28` where only some matrices have a number."""
    count, total = whole.numbered(key), len(whole.layers)
    return f"{count} of {total}" if 0 < count < total else ""


def subject_grid(
    kind: Kind, heads: Sequence[Head], cells: Sequence[Sequence[Cell]], subjects: Sequence[Subject]
) -> Grid:
    """Rows that begin with `cells` and go on with the kind's columns.

    Where the rows differ in k, each row shows its own and a column says which.
    """
    ks = {subject.k for subject in subjects}
    k = ks.pop() if len(ks) == 1 else "k"
    shown = shown_quantities(kind, subjects)
    has_own_k = k == "k" and any(quantity.id.endswith("@k") for quantity in shown)
    rows = [
        (
            *first,
            *([Cell(number(subject.k))] if has_own_k else []),
            *(_beside_null(subject, quantity) for quantity in shown),
        )
        for first, subject in zip(cells, subjects, strict=True)
    ]
    columns = [Head(quantity.head.format(k=k)) for quantity in shown]
    return Grid((*heads, *([Head("k")] if has_own_k else []), *columns), tuple(rows))


def code_cell(verdict: Mapping[str, Any] | None) -> Cell:
    """The verdict on a matrix, in the colour of its code."""
    code = str(verdict["code"]) if verdict else ""
    return Cell(code, code=code)


def shown_quantities(kind: Kind, subjects: Sequence[Subject]) -> list[Quantity]:
    """The columns of a kind that some row has."""
    return [
        QUANTITIES[pattern]
        for pattern in kind.columns
        if any(_is_shown(kind, subject, with_dimension(pattern, subject.k)) for subject in subjects)
    ]


def _is_shown(kind: Kind, subject: Subject, key: str) -> bool:
    return key in subject.values and (not kind.drops_empty or subject.numbered(key) > 0)


def _beside_null(subject: Subject, quantity: Quantity) -> Cell:
    key = with_dimension(quantity.id, subject.k)
    if key not in subject.values:
        return Cell()
    null = subject.nulls.get(key)
    beside = "" if null is None else f"({null_text(quantity, null)})"
    return Cell(_value(subject, quantity, key), beside)


def _value(subject: Subject, quantity: Quantity, key: str) -> str:
    value = subject.values[key]
    mark = "~" if value is not None and subject.is_cautioned(key) else ""
    return value_text(quantity, value) + mark


def value_text(quantity: Quantity, value: float | int | None) -> str:
    """A value in the unit of its quantity."""
    return degrees(value) if quantity.unit == "rad" else number(value)


def null_text(quantity: Quantity, null: float) -> str:
    """A null of 1 is exact: it belongs to a ratio."""
    return "1" if null == 1 else value_text(quantity, null)
