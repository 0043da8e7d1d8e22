"""Singular values of the update against those of an isotropic update, and the noise edge.

Every spectrum is divided by the largest singular value of an isotropic update of the same shape
and size, so that matrices compare: 1 at i = 1 is isotropic, and what lies below the noise edge is
not told from storage rounding. Without that null a spectrum is divided by its own largest value.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import SubFigure

from geoscope.records import LayerRecord
from geoscope.report.numbers import number
from geoscope.report.panels.curves import Points, middle_of, points
from geoscope.report.panels.drawing import (
    GREY,
    INK,
    EndLabel,
    area_title,
    label_starts,
    log_axis,
    module_colours,
    nothing,
    panel_title,
)
from geoscope.report.panels.modules import Depth, module_panels, shown_modules, shown_words
from geoscope.report.sections import Section, Subject

__all__ = ["draw_spectra", "draw_spectra_by_module"]

_UPDATE, _NULL, _FLOOR = "update.S", "update.S_null", "update.S_floor"
_TITLE = "Singular values of the update"
_EMPTY = "no spectra of the update in this report"


def draw_spectra(area: SubFigure, section: Section) -> None:
    """One line per module kind, the median of its matrices."""
    axes = area.subplots()
    shown = shown_modules(section)
    layers = [layer for _, subject in shown for layer in subject.layers]
    colours = module_colours([module for module, _ in shown])
    labels = [
        EndLabel(module, start, colours[module])
        for module, subject in shown
        if (start := _median(axes, subject.layers, _UPDATE, colours[module], "-")) is not None
    ]
    below = f"median of each module kind{shown_words(section)}{_missing(layers)}"
    panel_title(axes, _TITLE, below if labels else "")
    if not labels:
        nothing(axes, _EMPTY)
        return
    _name_baselines(axes, _baselines(axes, layers))
    _set_axes(axes, layers)
    axes.set(xlabel="index i", ylabel=_scale_words(layers))
    label_starts(area, axes, labels, 1)


def draw_spectra_by_module(area: SubFigure, section: Section) -> None:
    """One panel per module kind, one line per matrix, coloured by depth."""
    layers = section.layers
    if not any(points(layer, _UPDATE) for layer in layers):
        nothing(area.subplots(), _EMPTY)
        return
    depth = Depth.of(section)
    for index, (axes, module, subject) in enumerate(module_panels(area, section)):
        axes.set_title(_module_title(module, subject), loc="left", fontsize=9, color=INK)
        _each(axes, subject.layers, depth)
        baselines = _baselines(axes, subject.layers)
        _set_axes(axes, layers)
        if index == 0:
            _name_baselines(axes, baselines)
    area_title(area, _TITLE, f"one line for each matrix{shown_words(section)}{_missing(layers)}")
    area.supxlabel("index i", fontsize=9)
    area.supylabel(_scale_words(layers), fontsize=9)
    depth.draw_key(area)


def _scaled(layer: LayerRecord, key: str) -> Points | None:
    """A curve over the scale of its matrix."""
    curve = points(layer, key)
    scale = points(layer, _NULL) or points(layer, _UPDATE)
    return None if curve is None or scale is None else (curve[0], curve[1] / scale[1][0])


def _each(axes: Axes, layers: Iterable[LayerRecord], depth: Depth) -> None:
    for layer in layers:
        curve = _scaled(layer, _UPDATE)
        if curve is not None:
            axes.plot(*curve, color=depth.colour(layer), lw=1, alpha=0.85)


def _median(
    axes: Axes, layers: Iterable[LayerRecord], key: str, colour: str, dashes: str
) -> float | None:
    """Draw the median of the scaled curves and return where it starts."""
    middle = middle_of([curve for layer in layers if (curve := _scaled(layer, key)) is not None])
    if middle is None:
        return None
    axes.plot(middle.x, middle.median, color=colour, ls=dashes, lw=1.8 if dashes == "-" else 1.2)
    return float(middle.median[0])


def _baselines(axes: Axes, layers: Sequence[LayerRecord]) -> list[EndLabel]:
    """The isotropic spectrum of each shape, and the median noise edge."""
    starts = [
        _median(axes, [layer for layer in layers if layer.shape == shape], _NULL, GREY, "--")
        for shape in sorted({layer.shape for layer in layers})
    ]
    labels = [EndLabel("isotropic", start, GREY) for start in starts[:1] if start is not None]
    floors = [curve[1][0] for layer in layers if (curve := _scaled(layer, _FLOOR)) is not None]
    if floors:
        edge = float(np.median(floors))
        end = max(min(layer.shape) for layer in layers)
        axes.plot([1, end], [edge, edge], color=GREY, ls=":", lw=1.2)
        labels.append(EndLabel("noise edge", edge, GREY))
    return labels


def _name_baselines(axes: Axes, labels: Sequence[EndLabel]) -> None:
    """Words just below the dashed and the dotted line."""
    for label in labels:
        at = {"xy": (1, label.y), "xytext": (2, -3), "textcoords": "offset points"}
        axes.annotate(label.text, **at, va="top", fontsize=8, color=label.colour)


def _set_axes(axes: Axes, layers: Sequence[LayerRecord]) -> None:
    """Limits from all matrices, so that panels compare; far below the noise edge all is cut off."""
    found = [_scaled(layer, key) for layer in layers for key in (_UPDATE, _NULL)]
    curves = [curve for curve in found if curve is not None]
    edges = [curve[1][0] for layer in layers if (curve := _scaled(layer, _FLOOR)) is not None]
    top = max(float(y.max()) for _, y in curves)
    shown = float(min(edges)) / 5 if edges else 1e-4 * top
    bottom = max(min(float(y.min()) for _, y in curves), min(shown, 0.1 * top))
    log_axis(axes, "x", 1, max(2.0, *(float(x.max()) for x, _ in curves)))
    log_axis(axes, "y", 0.7 * bottom, 1.6 * top)


def _module_title(module: str, subject: Subject) -> str:
    key = "update.stable_rank"
    if subject.values.get(key) is None:
        return module
    return (
        f"{module} · stable rank {number(subject.values[key])} ({number(subject.nulls.get(key))})"
    )


def _scale_words(layers: Iterable[LayerRecord]) -> str:
    has_null = any(points(layer, _NULL) for layer in layers)
    return "σᵢ / σ₁ of an isotropic update" if has_null else "σᵢ / σ₁"


def _missing(layers: Sequence[LayerRecord]) -> str:
    words = {_NULL: "isotropic spectrum", _FLOOR: "noise edge"}
    absent = [
        name for key, name in words.items() if not any(points(layer, key) for layer in layers)
    ]
    return f"; not in this report: {', '.join(absent)}" if absent else ""
