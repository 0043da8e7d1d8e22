"""Where along the depth of a model its update is, as a row of the answer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import pairwise

from geoscope.records import LayerRecord
from geoscope.report.page import Cell
from geoscope.report.sections import Section

__all__ = ["depth_row"]

_BLOCKS = 4  # so many parts of the depth are told apart


def depth_row(section: Section) -> tuple[Cell, ...]:
    """Shares of the update's energy along the depth, in at most four parts; a row of two cells."""
    parts = _along_depth(section.layers)
    total = sum(energy for _, energy in parts)
    if len(parts) < 2 or not total:
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
            energy[layer.layer] += norm**2  # pyright: ignore[reportArgumentType]
    blocks = sorted(energy)
    count = min(_BLOCKS, len(blocks))
    ends = [round(i * len(blocks) / count) for i in range(count + 1)] if count else []
    groups = [blocks[start:end] for start, end in pairwise(ends)]
    return [(group, sum(energy[block] for block in group)) for group in groups]


def _depth_word(shares: Sequence[float]) -> str:
    """early, late or in the middle where one part has half as much again as an even share."""
    largest = max(range(len(shares)), key=lambda i: shares[i])
    if shares[largest] * len(shares) < 1.5:
        return "even"
    return {0: "early", len(shares) - 1: "late"}.get(largest, "in the middle")
