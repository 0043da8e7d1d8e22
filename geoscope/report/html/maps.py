"""Maps of layers × module kinds, one for each metric: numbers on colours that are centred.

The colour says how far a number is from its null, on a log scale where the null is not 0; a metric
without a null has colours from its smallest number to its largest. Several tuned models stand
beside each other in the same colours.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from geoscope.kinds import Kind
from geoscope.report.cells import Tile, rows_of, tiles
from geoscope.report.grids import null_text, value_text
from geoscope.report.numbers import number
from geoscope.report.sections import Section
from geoscope.report.tables import QUANTITIES, Quantity

__all__ = ["Map", "Shade", "maps", "side"]

_STEPS = 6  # on each side of the null
_SHADES = 8  # of a metric without a null
_REACHES = (2, 5, 10, 20, 50, 100, 1000)
_LIFT = "spectral_lift"
_COLUMNS = 40  # so many module kinds are shown


@dataclass(frozen=True)
class Shade:
    """A cell: its number, the class of its colour, and all that is known of it."""

    text: str
    colour: str
    words: str


@dataclass(frozen=True)
class Map:
    """One metric.

    key: what the colours mean, from the first to the last, as class and words.
    modules: heads of the columns.
    models: label and rows of each tuned model; a row is its layer and its cells.
    """

    head: str
    label: str
    key: list[tuple[str, str]]
    modules: list[str]
    models: list[tuple[str, list[tuple[str, list[Shade]]]]]


@dataclass(frozen=True)
class _Scale:
    """How numbers become colours.

    centre: null, zero, or none.
    reach: the largest ratio to the null, or distance from 0, or the two ends.
    """

    centre: str
    low: float
    reach: float

    @classmethod
    def of(cls, cells: Sequence[Tile]) -> _Scale:
        known = [(tile.value, tile.null) for tile in cells if tile.value is not None]
        ratios = [value / null for value, null in known if null and value / null > 0]
        if ratios:
            furthest = max(max(ratio, 1 / ratio) for ratio in ratios)
            return cls("null", 1, next((r for r in _REACHES if r >= furthest), furthest))
        values = [value for value, _ in known]
        if any(null == 0 for _, null in known):
            return cls("zero", 0, max(map(abs, values)) or 1.0)
        return cls("none", min(values), max(values))

    def colour(self, tile: Tile) -> str:
        """`a1` … `a6` above, `b1` … `b6` below, `o` at the null, `s0` … `s7` without one."""
        value = tile.value
        if value is None:
            return "x"
        match self.centre:
            case "null":
                if not tile.null or value / tile.null <= 0:
                    return "x"
                return side(math.log(value / tile.null) / math.log(self.reach))
            case "zero":
                return side(value / self.reach)
            case _:
                span = self.reach - self.low
                return f"s{round((_SHADES - 1) * (value - self.low) / span) if span else 0}"

    def key(self, quantity: Quantity) -> list[tuple[str, str]]:
        match self.centre:
            case "null":
                reach = number(self.reach)
                ends = (f"1/{reach} of its null", "as its null", f"{reach}×")
            case "zero":
                ends = (value_text(quantity, -self.reach), "0", value_text(quantity, self.reach))
            case _:
                low, high = (value_text(quantity, end) for end in (self.low, self.reach))
                return [("s0", low), *((f"s{i}", "") for i in range(1, _SHADES - 1)), ("s7", high)]
        below = [(f"b{i}", "") for i in range(_STEPS - 1, 0, -1)]
        above = [(f"a{i}", "") for i in range(1, _STEPS)]
        return [(f"b{_STEPS}", ends[0]), *below, ("o", ends[1]), *above, (f"a{_STEPS}", ends[2])]


def side(part: float) -> str:
    """The class of a distance from the null, from −1 to 1."""
    step = min(_STEPS, round(abs(part) * _STEPS))
    return "o" if step == 0 else f"{'a' if part > 0 else 'b'}{step}"


def maps(kind: Kind, parts: Sequence[Section]) -> list[Map]:
    """A map for each metric that has numbers, first the one that the figures show."""
    patterns = dict.fromkeys((_LIFT, kind.worst, *kind.columns))
    made = (_map(pattern, parts) for pattern in patterns if pattern in QUANTITIES)
    return [each for each in made if each is not None]


def _map(pattern: str, parts: Sequence[Section]) -> Map | None:
    own = [tiles(part.layers, pattern) for part in parts]
    cells = [tile for found in own for tile in found.values()]
    if not any(tile.numbered for tile in cells):
        return None
    scale, quantity = _Scale.of(cells), QUANTITIES[pattern]
    layers = rows_of([layer for part in parts for layer in part.layers])
    modules = _modules(parts)
    models = [
        (
            part.label,
            [
                (
                    "–" if at is None else str(at),
                    [_shade(found.get((at, module)), scale, quantity) for module in modules],
                )
                for at in layers
            ],
        )
        for part, found in zip(parts, own, strict=True)
    ]
    texts = (quantity.head, quantity.label, quantity.reading)
    head, label, reading = (text.format(k="k") for text in texts)
    return Map(head, f"{label}: {reading}", scale.key(quantity), modules, models)


def _modules(parts: Sequence[Section]) -> list[str]:
    return list(dict.fromkeys(module for part in parts for module in part.modules))[:_COLUMNS]


def _shade(tile: Tile | None, scale: _Scale, quantity: Quantity) -> Shade:
    if tile is None:
        return Shade("", "", "")
    text = value_text(quantity, tile.value)
    words = "" if tile.null is None else f"null {null_text(quantity, tile.null)}"
    mean = f"mean of {tile.numbered} of {tile.held} matrices" if tile.held > 1 else ""
    said = ", ".join(filter(None, (mean, words)))
    return Shade(text, scale.colour(tile), said)
