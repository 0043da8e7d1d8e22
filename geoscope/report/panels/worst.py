"""The worst matrices, a small panel each: spectrum, captured energy, angles or path, with nulls."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import SubFigure

from geoscope.records import LayerRecord
from geoscope.report.numbers import shorten
from geoscope.report.panels.curves import points
from geoscope.report.panels.drawing import (
    GREY,
    INK,
    LEFT,
    RIGHT,
    area_title,
    key_below,
    log_axis,
    points_of,
)
from geoscope.report.panels.modules import COLUMNS, Parts, in_colours
from geoscope.report.panels.spectra import FLOOR, NULL, UPDATE
from geoscope.report.sections import Section
from geoscope.report.worst import worst, worst_words

__all__ = ["draw_worst", "has_worst", "worst_rows"]

_MOST = 8
# key, words, colour, dashes of the curves of each drawing
_Lines = tuple[tuple[str, str, str, str], ...]
_SPECTRUM: _Lines = (
    (UPDATE, "singular values of the update", INK, "-"),
    (NULL, "isotropic", GREY, "--"),
    (FLOOR, "noise edge", GREY, ":"),
)
_ENERGY: _Lines = (
    ("energy_right", "captured energy, right", RIGHT, "-"),
    ("energy_left", "left", LEFT, "-"),
    ("energy_base", "base's own", GREY, "-"),
    ("energy_right_null", "isotropic, right", RIGHT, "--"),
    ("energy_left_null", "isotropic, left", LEFT, "--"),
)
_PATH = ("update_norm_by_step", "sigma1")


def has_worst(parts: Parts) -> bool:
    """Whether a matrix has something to draw."""
    return any(_drawing(layer) is not None for layer in _chosen(parts))


def worst_rows(parts: Parts) -> int:
    """Rows of small panels."""
    return -(-max(1, len(_chosen(parts))) // COLUMNS)


def draw_worst(area: SubFigure, parts: Parts) -> None:
    """At most eight matrices; of several tuned models some of each, in its colour."""
    chosen = [layer for layer in _chosen(parts) if _drawing(layer) is not None]
    columns = min(COLUMNS, max(2, len(chosen)))
    rows = -(-len(chosen) // columns)
    grid = area.subplots(rows, columns, squeeze=False)
    colours = {part.tuned: colour for part, colour in in_colours(parts)}
    for axes in grid.flat[len(chosen) :]:
        axes.set_axis_off()
    for axes, layer in zip(grid.flat, chosen, strict=False):
        colour = colours.get(layer.tuned or 0, INK) if len(parts) > 1 else INK
        _name(axes, layer, colour)
        _draw(axes, layer, parts[0])
    area_title(area, "The worst matrices", worst_words(parts[0]) if len(parts) == 1 else "")
    key_below(area, grid.flat[0])


def _name(axes: Axes, layer: LayerRecord, colour: str) -> None:
    code = f"{layer.verdict['code']}" if layer.verdict else ""
    model = "" if layer.tuned is None else f"{layer.tuned} "
    name = f"{model}{shorten(layer.name, 30)}"
    axes.set_title(f"{name}\n{code}".strip(), loc="left", fontsize=points_of(8), color=colour)


def _chosen(parts: Parts) -> list[LayerRecord]:
    own = max(1, _MOST // len(parts))
    return [layer for part in parts for layer in worst(part, own)][:_MOST]


def _drawing(layer: LayerRecord) -> Callable[[Axes, LayerRecord, Section], None] | None:
    """How the matrix is drawn: by the first curves that it has."""
    for key, drawing in _DRAWINGS.items():
        if points(layer, key) is not None:
            return drawing
    return _draw_path if layer.series.get(_PATH[0]) else None


def _draw(axes: Axes, layer: LayerRecord, section: Section) -> None:
    drawing = _drawing(layer)
    if drawing is not None:
        drawing(axes, layer, section)


def _draw_spectrum(axes: Axes, layer: LayerRecord, _: Section) -> None:
    _draw_lines(axes, layer, _SPECTRUM)
    axes.set_xlabel("index i", fontsize=points_of(8))


def _draw_energy(axes: Axes, layer: LayerRecord, _: Section) -> None:
    _draw_lines(axes, layer, _ENERGY)
    axes.set_xlabel("k", fontsize=points_of(8))


def _draw_lines(axes: Axes, layer: LayerRecord, lines: _Lines) -> None:
    found = [(points(layer, key), *style) for key, *style in lines]
    drawn = [curve for curve, *_ in found if curve is not None]
    for curve, words, colour, dashes in found:
        if curve is not None:
            axes.plot(*curve, color=colour, ls=dashes, lw=1.4, label=words)
    top = max(float(y.max()) for _, y in drawn)
    bottom = max(min(float(y.min()) for _, y in drawn), 1e-4 * top)
    log_axis(axes, "x", 1, max(2.0, *(float(x.max()) for x, _ in drawn)))
    log_axis(axes, "y", 0.7 * bottom, 1.5 * top)


def _draw_path(axes: Axes, layer: LayerRecord, section: Section) -> None:
    for key, words, colour in zip(_PATH, ("distance ‖Δ‖", "its σ1"), (INK, LEFT), strict=True):
        series = np.array([np.nan if y is None else y for y in layer.series.get(key, ())], float)
        steps = section.steps[1 : 1 + len(series)]
        axes.plot(steps, series[: len(steps)], "o-", ms=2.5, lw=1.2, color=colour, label=words)
    axes.set_ylim(0, None)
    axes.set_xlabel("step", fontsize=points_of(8))


_DRAWINGS: Mapping[str, Callable[[Axes, LayerRecord, Section], None]] = MappingProxyType(
    {UPDATE: _draw_spectrum, "energy_right": _draw_energy}
)
