"""How the numbers go through the depth of the model: a line of small bars for each."""

from __future__ import annotations

from collections.abc import Sequence

from geoscope.kinds import Kind
from geoscope.records import LayerRecord
from geoscope.report.grids import value_text
from geoscope.report.page import Block, Cell, Grid, Head
from geoscope.report.sections import Section, dimension, with_dimension
from geoscope.report.tables import QUANTITIES, Quantity

__all__ = ["depth_block"]

_Matrix = tuple[LayerRecord, int | None]
_BARS = "▁▂▃▄▅▆▇█"
_WIDEST = 48
_ROWS = 5
_FEWEST_BLOCKS = 3


def depth_block(kind: Kind, section: Section) -> Block:
    """The kind's first numbers by block of the model; empty for a model of few blocks.

    A bar is the mean over the matrices of a block, or of some blocks that follow each other, from
    0 to the largest.
    """
    blocks = sorted({layer.layer for layer in section.layers if layer.layer is not None})
    if len(blocks) < _FEWEST_BLOCKS:
        return Block("")
    groups = _groups(section, blocks)
    rows = [
        (Cell(quantity.head.format(k="k")), *_cells(quantity, means))
        for quantity in (QUANTITIES[pattern] for pattern in kind.columns)
        if any(means := [_mean(group, quantity) for group in groups])
    ]
    words = Head(f"blocks {blocks[0]} … {blocks[-1]}", is_words=True)
    heads = (Head("", is_words=True), words, Head("least"), Head("largest"))
    of = "block" if len(groups) == len(blocks) else f"of {len(groups)} groups of blocks"
    lines = (f"mean of each {of}; bars from 0",) if rows else ()
    return Block("by depth", lines, Grid(heads, tuple(rows[:_ROWS])))


def _groups(section: Section, blocks: Sequence[int]) -> list[list[_Matrix]]:
    """The matrices of each block, or of as many groups of blocks as are drawn; with their k."""
    count = min(len(blocks), _WIDEST)
    place = {block: i * count // len(blocks) for i, block in enumerate(blocks)}
    groups: list[list[_Matrix]] = [[] for _ in range(count)]
    for layer in section.layers:
        if layer.layer is not None:
            groups[place[layer.layer]].append((layer, dimension(layer)))
    return groups


def _mean(group: Sequence[_Matrix], quantity: Quantity) -> float | None:
    """Over the matrices that have a number, each at its own k; None where none has."""
    values = (layer.values.get(with_dimension(quantity.id, k)) for layer, k in group)
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _cells(quantity: Quantity, means: Sequence[float | None]) -> tuple[Cell, Cell, Cell]:
    known = [mean for mean in means if mean is not None]
    least, largest = (Cell(value_text(quantity, limit)) for limit in (min(known), max(known)))
    return Cell("".join(_bar(mean, max(known)) for mean in means)), least, largest


def _bar(mean: float | None, largest: float) -> str:
    """A bar of eight heights; a space where there is no number."""
    if mean is None:
        return " "
    share = min(max(mean / largest, 0.0), 1.0) if largest > 0 else 0.0
    return _BARS[min(int(share * len(_BARS)), len(_BARS) - 1)]
