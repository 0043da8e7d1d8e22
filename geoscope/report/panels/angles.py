"""Principal angles between the leading subspaces of base and tuned, beside their isotropic null.

The null is an RMS angle; the mean over draws of an isotropic update is .4 to .9 of it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import SubFigure

from geoscope.records import LayerRecord
from geoscope.report.numbers import degrees
from geoscope.report.panels.curves import Points, middle_of, points
from geoscope.report.panels.drawing import (
    GREY,
    INK,
    LEFT,
    LIGHT,
    MANY,
    RIGHT,
    area_title,
    counted,
    log_axis,
    nothing,
    panel_title,
    points_of,
)
from geoscope.report.panels.modules import (
    Parts,
    in_colours,
    module_panels,
    shown_modules,
    shown_words,
    subject_of,
)
from geoscope.report.sections import Section, Subject, dimension, dimensions

__all__ = ["draw_angles", "draw_angles_by_module"]

_TITLE = "Principal angles from base to tuned"


@dataclass(frozen=True)
class _Side:
    """One side of one model: of one model the sides have colours, of several the models.

    place: of its dots in the row, from −.5 to .5.
    """

    part: Section
    name: str
    colour: str
    place: float
    is_filled: bool = True
    dashes: str = "-"


def _sides(parts: Parts) -> list[_Side]:
    if len(parts) == 1:
        return [
            _Side(parts[0], "right", RIGHT, -0.19),
            _Side(parts[0], "left", LEFT, 0.19),
        ]
    models = in_colours(parts)
    step = 0.8 / (2 * len(models))
    return [
        _Side(part, name, colour, step * (2 * at + side + 0.5) - 0.4, side == 0, dashes)
        for at, (part, colour) in enumerate(models)
        for side, (name, dashes) in enumerate((("right", "-"), ("left", "-.")))
    ]


@dataclass(frozen=True)
class _Row:
    """Where dots stand, and their angles with their nulls in degrees."""

    height: float
    side: _Side
    pairs: list[tuple[float, float]] = field(default_factory=list)


def draw_angles(area: SubFigure, parts: Parts) -> None:
    """Mean angle of each matrix, one row per module kind; the band is the isotropic value."""
    axes = area.subplots()
    shown = shown_modules(parts)
    rows = [
        _Row(row + side.place, side, _means(subject_of(side.part, module).layers, side.name))
        for row, module in enumerate(shown)
        for side in _sides(parts)
    ]
    found = [angle for row in rows for pair in row.pairs for angle in pair if angle]
    panel_title(axes, "Mean principal angle of each matrix", _below(parts) if found else "")
    if not found:
        nothing(axes, "no angles in this report")
        return
    is_dense = len(found) > MANY
    for row in rows:
        _dots(axes, row, is_dense=is_dense)
    log_axis(axes, "x", 0.8 * min(found), 1.5 * max(found))
    axes.set_yticks(range(len(shown)), shown)
    axes.set(ylim=(len(shown) - 0.4, -0.9), xlabel=f"degrees{_k_words(parts)}")
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", color=LIGHT, lw=0.6)
    if len(parts) == 1:
        _name_sides(axes, _sides(parts))


def _name_sides(axes: Axes, sides: Sequence[_Side]) -> None:
    for side in sides:
        place = {"transform": axes.get_yaxis_transform(), "ha": "right", "va": "center"}
        style = {"color": side.colour, "fontsize": points_of(8.5)}
        axes.text(1, side.place, side.name, **place, **style)


def _below(parts: Parts) -> str:
    layers = [layer for part in parts for layer in part.layers]
    count = sum(bool(_means([layer], "left") or _means([layer], "right")) for layer in layers)
    sides = "right: filled, left: open; " if len(parts) > 1 else ""
    what = f"mean angle of {counted(count, len(layers))}; {sides}bar: isotropic (RMS), median"
    return f"{what} and middle 80 %{shown_words(parts)}"


def _means(layers: Iterable[LayerRecord], side: str) -> list[tuple[float, float]]:
    """(angle, null) in degrees of the matrices that have an angle; no null is 0."""
    pairs: list[tuple[float, float]] = []
    for layer in layers:
        key = f"angle_{side}_mean@{dimension(layer)}"
        angle = layer.values.get(key)
        if angle:
            pairs.append((math.degrees(angle), math.degrees(layer.nulls.get(key, 0.0))))
    return pairs


def _dots(axes: Axes, row: _Row, *, is_dense: bool) -> None:
    """One dot per matrix, a bar at the middle of the nulls and a band over most of them."""
    angles = [angle for angle, _ in row.pairs]
    nulls = [null for _, null in row.pairs if null]
    face = row.side.colour if row.side.is_filled else "none"
    style = {"mfc": face, "mec": row.side.colour, "mew": 0 if row.side.is_filled else 0.8}
    heights = [row.height] * len(angles)
    axes.plot(angles, heights, "o", ms=4.5, alpha=0.55, rasterized=is_dense, **style)
    if nulls:
        low, middle, high = np.quantile(nulls, (0.1, 0.5, 0.9)).tolist()
        axes.plot([low, high], [row.height] * 2, color=GREY, lw=4, alpha=0.3, solid_capstyle="butt")
        axes.plot([middle], [row.height], "|", ms=9, mew=1.8, color=INK)


def _k_words(parts: Parts) -> str:
    ks = sorted({k for part in parts for k in part.whole.own_ks})
    return f" (k = {', '.join(str(k) for k in ks)})" if ks else ""


def draw_angles_by_module(area: SubFigure, parts: Parts) -> None:
    """One panel per module kind: sorted angles, median and middle 80 % of the matrices."""
    chosen = {module: _curve_dimension(parts, module) for module in shown_modules(parts)}
    if not any(chosen.values()):
        nothing(area.subplots(), "no angle curves in this report")
        return
    drawn: list[Axes] = []
    angles: list[float] = []
    for axes, module in module_panels(area, parts):
        k = chosen[module]
        axes.set_title(f"{module} · k = {k}", loc="left", fontsize=points_of(9), color=INK)
        for side in _sides(parts):
            angles += _sorted_angles(axes, subject_of(side.part, module), side, k, len(parts) == 1)
        if len(parts) == 1:
            _write_means(axes, module, k, _sides(parts))
        drawn.append(axes)
    for axes in drawn:
        log_axis(axes, "x", 1, max(2, *(k or 0 for k in chosen.values())))
        log_axis(axes, "y", max(min(angles), 1e-4 * max(angles)), 1.3 * max(angles))
    sides = "right: solid, left: dashes and dots; median"
    what = "median and middle 80 %" if len(parts) == 1 else sides
    below = f"{what} of the matrices; dashed: isotropic (RMS){shown_words(parts)}"
    area_title(area, _TITLE, below)
    area.supxlabel("index i of the sorted angles", fontsize=points_of(9))
    area.supylabel("degrees", fontsize=points_of(9))


def _curve_dimension(parts: Parts, module: str) -> int | None:
    """The k of the row if it has curves, else the largest k that has."""
    subjects = [subject_of(part, module) for part in parts]
    keys = {key for subject in subjects for layer in subject.layers for key in layer.curves}
    found = dimensions(keys, r"angles_(?:left|right)")
    own = next((subject.k for subject in subjects if subject.k is not None), None)
    return own if own in found else max(found, default=None)


def _sorted_angles(
    axes: Axes, subject: Subject, side: _Side, k: int | None, has_band: bool
) -> list[float]:
    """Draw one side; returns all angles drawn, for the limits."""
    key = f"angle_{side.name}_mean@{k}"
    layers = [layer for layer in subject.layers if not layer.status_of(key).is_null]
    middle = middle_of(list(_curves(layers, f"angles_{side.name}@{k}")))
    if middle is None:
        return []
    axes.plot(middle.x, middle.median, color=side.colour, lw=1.8, ls=side.dashes)
    if has_band:
        axes.fill_between(middle.x, middle.low, middle.high, color=side.colour, alpha=0.15, lw=0)
    nulls = [math.degrees(null) for layer in layers if (null := layer.nulls.get(key))]
    if nulls:
        low, high = np.quantile(nulls, (0.1, 0.9)).tolist()
        axes.axhspan(low, high, color=side.colour, alpha=0.08, lw=0)
        axes.axhline(float(np.median(nulls)), color=side.colour, ls="--", lw=1.2)
    return [*middle.low.tolist(), *middle.high.tolist(), *nulls]


def _curves(layers: Iterable[LayerRecord], key: str) -> Iterator[Points]:
    """Angles in degrees."""
    for layer in layers:
        curve = points(layer, key)
        if curve is not None:
            yield curve[0], np.degrees(curve[1])


def _write_means(axes: Axes, module: str, k: int | None, sides: Sequence[_Side]) -> None:
    """The mean angles of the module at the top left, in the colours of the sides."""
    place = {"transform": axes.transAxes, "va": "center", "fontsize": points_of(8.5)}
    for side, height in zip(sides, (0.93, 0.83), strict=True):
        value = subject_of(side.part, module).values.get(f"angle_{side.name}_mean@{k}")
        axes.text(0.03, height, f"{side.name} {degrees(value)}", color=side.colour, **place)
