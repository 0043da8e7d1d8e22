"""Beside other models: overlaps of the updates of several, and ratios to an anchor."""

from __future__ import annotations

import re
from collections.abc import Sequence

from geoscope.kinds import Kind
from geoscope.records import Overlap, Report
from geoscope.report.grids import null_text, value_text
from geoscope.report.numbers import DASH, times
from geoscope.report.page import Block, Cell, Grid, Head
from geoscope.report.sections import Section, with_dimension
from geoscope.report.tables import OVERLAPS, QUANTITIES, Quantity

__all__ = ["anchor_block", "overlap_block"]

_COUNT = Head("n")
# Counts and properties of the base, of which a ratio means nothing.
_WITHOUT_RATIO = ("gap@k", "intruders")


def overlap_block(report: Report, section: Section) -> Block:
    """Pairs of tuned models: the mean over matrices of each overlap, with its null."""
    pairs: dict[tuple[int, int], list[Overlap]] = {}
    for overlap in report.overlaps:
        pairs.setdefault((overlap.a, overlap.b), []).append(overlap)
    columns = _overlap_columns(report.overlaps, section.whole.k)
    rows = tuple(
        (
            Cell(f"{a} with {b}"),
            Cell(str(len(found))),
            *(_mean_cell(found, key, quantity) for key, quantity in columns),
        )
        for (a, b), found in sorted(pairs.items())
    )
    heads = [Head(quantity.head) for _, quantity in columns]
    grid = Grid((Head("updates", is_words=True), _COUNT, *heads), rows)
    return Block("overlap of the updates, mean over matrices", grid=grid)


def _overlap_columns(overlaps: Sequence[Overlap], k: int | None) -> list[tuple[str, Quantity]]:
    """The ids that are there: the telling ones first, at the report's own k, then the others."""
    rest = sorted({key for overlap in overlaps for key in overlap.values}, key=_natural)
    columns: list[tuple[str, Quantity]] = []
    for quantity in OVERLAPS:
        own = _nearest(quantity.id, rest, k)
        if own in rest:
            head = quantity.head.format(k=own.partition("@")[2])
            columns.append((own, Quantity(own, head, "", "", unit=quantity.unit)))
            rest.remove(own)
    for key in rest:
        unit = next((one.unit for one in OVERLAPS if _stem(one.id) == _stem(key)), "")
        columns.append((key, Quantity(key, key, "", "", unit=unit)))
    return columns


def _nearest(pattern: str, keys: Sequence[str], k: int | None) -> str:
    """The id at k, else at the largest dimension below it, else at the smallest there is."""
    if not pattern.endswith("@k"):
        return pattern
    ks = sorted(int(key.partition("@")[2]) for key in keys if _stem(key) == _stem(pattern))
    within = [one for one in ks if k is not None and one <= k]
    return with_dimension(pattern, within[-1] if within else ks[0]) if ks else pattern


def _stem(key: str) -> str:
    return key.partition("@")[0]


def _natural(key: str) -> tuple[str, tuple[int, ...]]:
    return _stem(key), tuple(int(part) for part in re.findall(r"\d{1,9}", key.partition("@")[2]))


def _mean_cell(overlaps: Sequence[Overlap], key: str, quantity: Quantity) -> Cell:
    values = [value for overlap in overlaps if (value := overlap.values.get(key)) is not None]
    nulls = [overlap.nulls[key] for overlap in overlaps if key in overlap.nulls]
    null = f"({null_text(quantity, sum(nulls) / len(nulls))})" if nulls else ""
    return Cell(value_text(quantity, sum(values) / len(values)) if values else DASH, null)


def anchor_block(report: Report, kind: Kind, section: Section) -> Block:
    """The kind's headline numbers of the first tuned model beside those of the anchor."""
    anchor = report.summary.anchor
    if anchor is None:
        return Block("")
    ratios, k = anchor["ratios"], section.whole.k
    rows = tuple(
        _anchor_row(QUANTITIES[pattern], section, ratios[key])
        for pattern in kind.columns
        if pattern not in _WITHOUT_RATIO and (key := with_dimension(pattern, k)) in ratios
    )
    heads = (Head("", is_words=True), Head("value"), Head("anchor"), Head("ratio"))
    said = _preservation(anchor["spectrum_preserving"], ratios.get("nss"))
    name = f"{section.label} against the anchor {anchor['ref']['given']}"
    return Block(name, (said,), Grid(heads, rows))


def _anchor_row(quantity: Quantity, section: Section, ratio: float | None) -> tuple[Cell, ...]:
    k = section.whole.k
    value = section.whole.values.get(with_dimension(quantity.id, k))
    # The report keeps the ratio alone; it is undefined where the anchor's number is 0 or missing.
    other = value / ratio if value is not None and ratio else None
    texts = (
        quantity.label.format(k=k),
        value_text(quantity, value),
        value_text(quantity, other),
        times(ratio),
    )
    return tuple(Cell(text) for text in texts)


def _preservation(preserving: bool | None, ratio: float | None) -> str:
    """Whether the spectrum is preserved beside the anchor, in words.

    See docs/methods.md#thresholds.
    """
    if preserving is None:
        return "Whether the spectrum is preserved is not known: one of both has no NSS."
    limit = "at most half" if preserving else "more than half"
    size = "" if ratio is None else f", {times(ratio)} the anchor's"
    what = "is" if preserving else "is not"
    return f"The update {what} spectrum-preserving beside the anchor: its NSS{size}, is {limit}."
