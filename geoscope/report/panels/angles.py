"""Principal angles between the leading subspaces of base and tuned, beside their isotropic null.

The null is an RMS angle; the mean over draws of an isotropic update is .4 to .9 of it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import SubFigure

from geoscope.records import LayerRecord
from geoscope.report.numbers import degrees
from geoscope.report.panels.curves import Points, middle_of, points
from geoscope.report.panels.drawing import (
    INK,
    LEFT,
    LIGHT,
    RIGHT,
    area_title,
    counted,
    log_axis,
    nothing,
    panel_title,
)
from geoscope.report.panels.modules import module_panels, shown_modules, shown_words
from geoscope.report.sections import Section, Subject, dimension, dimensions

__all__ = ["draw_angles", "draw_angles_by_module"]

_SIDES = (("right", RIGHT, -0.19), ("left", LEFT, 0.19))
_TITLE = "Principal angles from base to tuned"


def draw_angles(area: SubFigure, section: Section) -> None:
    """Mean angle of each matrix, one row per module kind; the bar is the isotropic value."""
    axes = area.subplots()
    shown = shown_modules(section)
    angles = [
        (row + offset, colour, _means(subject.layers, side))
        for row, (_, subject) in enumerate(shown)
        for side, colour, offset in _SIDES
    ]
    found = [angle for _, _, pairs in angles for pair in pairs for angle in pair if angle]
    below = f"{_counted_words(section.layers)}; bar: isotropic (RMS){shown_words(section)}"
    panel_title(axes, "Mean principal angle of each matrix", below if found else "")
    if not found:
        nothing(axes, "no angles in this report")
        return
    for height, colour, pairs in angles:
        _dots(axes, height, colour, pairs)
    log_axis(axes, "x", 0.8 * min(found), 1.5 * max(found))
    axes.set_yticks(range(len(shown)), [module for module, _ in shown])
    axes.set(ylim=(len(shown) - 0.4, -0.9), xlabel=f"degrees{_k_words(section.layers)}")
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", color=LIGHT, lw=0.6)
    for side, colour, offset in _SIDES:
        place = {"transform": axes.get_yaxis_transform(), "ha": "right", "va": "center"}
        axes.text(1, offset, side, color=colour, fontsize=8.5, **place)


def _counted_words(layers: Sequence[LayerRecord]) -> str:
    count = sum(bool(_means([layer], "left") or _means([layer], "right")) for layer in layers)
    return f"mean angle of {counted(count, len(layers))}"


def _means(layers: Iterable[LayerRecord], side: str) -> list[tuple[float, float]]:
    """(angle, null) in degrees of the matrices that have an angle; no null is 0."""
    pairs: list[tuple[float, float]] = []
    for layer in layers:
        key = f"angle_{side}_mean@{dimension(layer)}"
        angle = layer.values.get(key)
        if angle:
            pairs.append((math.degrees(angle), math.degrees(layer.nulls.get(key, 0.0))))
    return pairs


def _dots(axes: Axes, height: float, colour: str, pairs: Sequence[tuple[float, float]]) -> None:
    """One dot per matrix, and a bar at the middle of the nulls."""
    angles = [angle for angle, _ in pairs]
    nulls = [null for _, null in pairs if null]
    axes.plot(angles, [height] * len(angles), "o", ms=4.5, mew=0, color=colour, alpha=0.55)
    if nulls:
        axes.plot([float(np.median(nulls))], [height], "|", ms=13, mew=2, color=INK)


def _k_words(layers: Iterable[LayerRecord]) -> str:
    ks = sorted({k for layer in layers if (k := dimension(layer)) is not None})
    return f" (k = {', '.join(str(k) for k in ks)})" if ks else ""


def draw_angles_by_module(area: SubFigure, section: Section) -> None:
    """One panel per module kind: sorted angles, median and middle 80 % of the matrices."""
    chosen = {module: _curve_dimension(subject) for module, subject in shown_modules(section)}
    if not any(chosen.values()):
        nothing(area.subplots(), "no angle curves in this report")
        return
    drawn: list[Axes] = []
    angles: list[float] = []
    for axes, module, subject in module_panels(area, section):
        k = chosen[module]
        axes.set_title(f"{module} · k = {k}", loc="left", fontsize=9, color=INK)
        for side, colour, offset in _SIDES:
            angles += _sorted_angles(axes, subject, side, k, colour)
            _write_mean(axes, subject, f"angle_{side}_mean@{k}", side, colour, 0.9 - offset / 5)
        drawn.append(axes)
    for axes in drawn:
        log_axis(axes, "x", 1, max(2, *(k or 0 for k in chosen.values())))
        log_axis(axes, "y", max(min(angles), 1e-4 * max(angles)), 1.3 * max(angles))
    below = f"median and middle 80 % of the matrices; dashed: isotropic (RMS){shown_words(section)}"
    area_title(area, _TITLE, below)
    area.supxlabel("index i of the sorted angles", fontsize=9)
    area.supylabel("degrees", fontsize=9)


def _curve_dimension(subject: Subject) -> int | None:
    """The k of the row if it has curves, else the largest k that has."""
    keys = {key for layer in subject.layers for key in layer.curves}
    found = dimensions(keys, r"angles_(?:left|right)")
    return subject.k if subject.k in found else max(found, default=None)


def _sorted_angles(
    axes: Axes, subject: Subject, side: str, k: int | None, colour: str
) -> list[float]:
    """Draw one side; returns all angles drawn, for the limits."""
    key = f"angle_{side}_mean@{k}"
    layers = [layer for layer in subject.layers if not layer.status_of(key).is_null]
    found = [points(layer, f"angles_{side}@{k}") for layer in layers]
    curves: list[Points] = [(c[0], np.degrees(c[1])) for c in found if c is not None]
    middle = middle_of(curves)
    if middle is None:
        return []
    axes.plot(middle.x, middle.median, color=colour, lw=1.8)
    axes.fill_between(middle.x, middle.low, middle.high, color=colour, alpha=0.15, lw=0)
    null = subject.nulls.get(key)
    if null:
        axes.axhline(math.degrees(null), color=colour, ls="--", lw=1.2)
    return [*middle.low.tolist(), *middle.high.tolist(), *([math.degrees(null)] if null else [])]


def _write_mean(
    axes: Axes, subject: Subject, key: str, side: str, colour: str, height: float
) -> None:
    """The mean angle of the module at the top left, in the colour of its side."""
    place = {"transform": axes.transAxes, "va": "center", "fontsize": 8.5}
    axes.text(0.03, height, f"{side} {degrees(subject.values.get(key))}", color=colour, **place)
