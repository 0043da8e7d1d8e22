"""Layer × module cells: of an id its mean where a cell holds several matrices, and of its null."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from geoscope.records import LayerRecord
from geoscope.report.sections import dimension, with_dimension

__all__ = ["Tile", "rows_of", "tiles"]

Place = tuple[int | None, str]


@dataclass
class Tile:
    """Sums over the matrices of one layer and module kind.

    held: matrices.
    numbered: those that have a number.
    """

    held: int = 0
    numbered: int = 0
    total: float = 0.0
    nulls: float = 0.0
    with_null: int = 0

    @property
    def value(self) -> float | None:
        """The mean of the numbers there are."""
        return self.total / self.numbered if self.numbered else None

    @property
    def null(self) -> float | None:
        """The mean of their nulls."""
        return self.nulls / self.with_null if self.with_null else None

    def add(self, value: float | None, null: float | None) -> None:
        self.held += 1
        if value is None:
            return
        self.numbered += 1
        self.total += value
        if null is not None:
            self.with_null += 1
            self.nulls += null


def tiles(layers: Sequence[LayerRecord], pattern: str) -> dict[Place, Tile]:
    """(layer, module) → its tile; an id `…@k` is taken at each matrix's own k."""
    found: dict[Place, Tile] = {}
    for layer in layers:
        key = with_dimension(pattern, dimension(layer) if pattern.endswith("@k") else None)
        tile = found.setdefault((layer.layer, layer.module), Tile())
        tile.add(layer.values.get(key), layer.nulls.get(key))
    return found


def rows_of(layers: Sequence[LayerRecord]) -> list[int | None]:
    """The layers in their order; matrices outside of all layers last."""
    return sorted({layer.layer for layer in layers}, key=lambda at: (at is None, at))
