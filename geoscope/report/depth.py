"""Where along the depth of a model its update is: a row of the answer, and a line of bars."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise

from geoscope.kinds import Kind
from geoscope.records import LayerRecord
from geoscope.report.grids import value_text
from geoscope.report.page import Block, Cell, Grid, Head
from geoscope.report.sections import Section, dimension, with_dimension
from geoscope.report.tables import QUANTITIES, Quantity

__all__ = ["depth_block", "depth_row"]

_Matrix = tuple[LayerRecord, int | None]
_BARS = "▁▂▃▄▅▆▇█"
_WIDEST = 48
_ROWS = 5
_FEWEST_BLOCKS = 3
_PARTS = 4  # so many parts of the depth are told apart in the row


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


def depth_row(section: Section) -> tuple[Cell, ...]:
    """Shares of the update's energy along the depth, in at most four parts; a row of two cells."""
    parts = _along_depth(section.layers)
    total = sum(energy for _, energy in parts)
    if len(parts) < 2 or not 0 < total < math.inf:
        return ()
    shares = [energy / total for _, energy in parts]
    first, last = parts[0][0][0], parts[-1][0][-1]
    what = "by block" if all(len(blocks) == 1 for blocks, _ in parts) else "by depth, blocks"
    listed = " · ".join(f"{100 * each:.0f}" for each in shares)
    return Cell("where"), Cell(f"{what} {first} … {last}: {listed} %  {_depth_word(shares)}")


def _along_depth(layers: Sequence[LayerRecord]) -> list[tuple[list[int], float]]:
    """Blocks of each part of the depth, and the update's energy in them."""
    energy: Counter[int] = Counter()
    for layer in layers:
        norm = layer.values.get("update.frobenius_norm")
        if layer.layer is not None and norm is not None:
            energy[layer.layer] += norm * norm  # pyright: ignore[reportArgumentType]
    blocks = sorted(energy)
    count = min(_PARTS, len(blocks))
    ends = [round(i * len(blocks) / count) for i in range(count + 1)] if count else []
    groups = [blocks[start:end] for start, end in pairwise(ends)]
    return [(group, sum(energy[block] for block in group)) for group in groups]


def _depth_word(shares: Sequence[float]) -> str:
    """early, late or in the middle where one part has half as much again as an even share."""
    largest = max(range(len(shares)), key=lambda i: shares[i])
    if shares[largest] * len(shares) < 1.5:
        return "even"
    return {0: "early", len(shares) - 1: "late"}.get(largest, "in the middle")
