"""Singular values of the update against those of an isotropic update, and the noise edge.

Every spectrum is divided by the largest singular value of an isotropic update of the same shape
and size, so that matrices compare: 1 at i = 1 is isotropic, and what lies below the noise edge is
not told from storage rounding. Without that null a spectrum is divided by its own largest value.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import SubFigure

from geoscope.records import LayerRecord
from geoscope.report.numbers import number
from geoscope.report.panels.curves import Points, middle_of, points
from geoscope.report.panels.drawing import (
    GREY,
    INK,
    MANY,
    EndLabel,
    area_title,
    label_starts,
    log_axis,
    module_colours,
    nothing,
    panel_title,
    points_of,
)
from geoscope.report.panels.modules import (
    Depth,
    Parts,
    in_colours,
    module_panels,
    shown_modules,
    shown_words,
    subject_of,
)

__all__ = ["FLOOR", "NULL", "UPDATE", "Spectrum", "draw_spectra", "draw_spectra_by_module"]

UPDATE, NULL, FLOOR = "update.S", "update.S_null", "update.S_floor"
_TITLE = "Singular values of the update"
_EMPTY = "no spectra of the update in this report"


@dataclass(frozen=True)
class Spectrum:
    """The curves of a matrix over its scale; None for one that the report does not hold."""

    layer: LayerRecord
    update: Points | None
    null: Points | None
    floor: Points | None

    @classmethod
    def of(cls, layer: LayerRecord) -> Spectrum:
        curves = [points(layer, key) for key in (UPDATE, NULL, FLOOR)]
        scale = curves[1] or curves[0]
        if scale is None:
            return cls(layer, None, None, None)
        return cls(layer, *(curve and (curve[0], curve[1] / scale[1][0]) for curve in curves))

    @property
    def edge(self) -> float | None:
        """Of the noise."""
        return None if self.floor is None else float(self.floor[1][0])


Spectra = Sequence[Spectrum]


def draw_spectra(area: SubFigure, parts: Parts) -> None:
    """One line per module kind, the median of its matrices; of several models one line each."""
    axes = area.subplots()
    lines = _lines(parts)
    spectra = [spectrum for _, _, own in lines for spectrum in own]
    labels = [
        EndLabel(name, start, colour)
        for name, colour, own in lines
        if (start := _median(axes, [each.update for each in own], colour, "-")) is not None
    ]
    what = "each module kind" if len(parts) == 1 else "all matrices of each model"
    below = f"median of {what}{shown_words(parts)}{_missing(spectra)}"
    panel_title(axes, _TITLE, below if labels else "")
    if not labels:
        nothing(axes, _EMPTY)
        return
    _name_baselines(axes, _baselines(axes, spectra))
    _set_axes(axes, _limits(spectra))
    axes.set(xlabel="index i", ylabel=_scale_words(spectra))
    label_starts(area, axes, labels, 1)


def _lines(parts: Parts) -> list[tuple[str, str, Spectra]]:
    """Name, colour and spectra of each line."""
    if len(parts) > 1:
        return [
            (str(part.tuned), colour, [Spectrum.of(layer) for layer in part.layers])
            for part, colour in in_colours(parts)
        ]
    shown = shown_modules(parts)
    colours = module_colours(shown)
    return [
        (module, colours[module], _spectra(parts, module))
        for module in shown
        if subject_of(parts[0], module).layers
    ]


def _spectra(parts: Parts, module: str) -> list[Spectrum]:
    return [Spectrum.of(layer) for part in parts for layer in subject_of(part, module).layers]


def draw_spectra_by_module(area: SubFigure, parts: Parts) -> None:
    """One panel per module kind: a line per matrix, coloured by depth, or the median of a model."""
    own = {module: _spectra(parts, module) for module in shown_modules(parts)}
    spectra = [spectrum for each in own.values() for spectrum in each]
    if not any(spectrum.update for spectrum in spectra):
        nothing(area.subplots(), _EMPTY)
        return
    depth, limits = Depth.of(parts[0]), _limits(spectra)
    for index, (axes, module) in enumerate(module_panels(area, parts)):
        title = _module_title(parts, module)
        axes.set_title(title, loc="left", fontsize=points_of(9), color=INK)
        if len(parts) == 1:
            _each(axes, own[module], depth, is_dense=len(spectra) > MANY)
        else:
            _medians(axes, parts, module)
        baselines = _baselines(axes, own[module])
        _set_axes(axes, limits)
        if index == 0:
            _name_baselines(axes, baselines)
    each = "one line for each matrix" if len(parts) == 1 else "median of each model, middle 80 %"
    area_title(area, _TITLE, f"{each}{shown_words(parts)}{_missing(spectra)}")
    area.supxlabel("index i", fontsize=points_of(9))
    area.supylabel(_scale_words(spectra), fontsize=points_of(9))
    if len(parts) == 1:
        depth.draw_key(area)


def _each(axes: Axes, spectra: Spectra, depth: Depth, *, is_dense: bool) -> None:
    known = [(each.update, depth.colour(each.layer)) for each in spectra if each.update]
    segments = [np.column_stack(curve) for curve, _ in known]
    colours = [colour for _, colour in known]
    style = {"lw": 0.5 if is_dense else 1, "alpha": 0.85, "rasterized": is_dense}
    axes.add_collection(LineCollection(segments, colors=colours, **style))


def _medians(axes: Axes, parts: Parts, module: str) -> None:
    for part, colour in in_colours(parts):
        curves = [each.update for each in _spectra([part], module)]
        middle = middle_of([curve for curve in curves if curve is not None])
        if middle is not None:
            axes.plot(middle.x, middle.median, color=colour, lw=1.8)
            axes.fill_between(middle.x, middle.low, middle.high, color=colour, alpha=0.12, lw=0)


def _median(axes: Axes, curves: Iterable[Points | None], colour: str, dashes: str) -> float | None:
    """Draw the median of the scaled curves and return where it starts."""
    middle = middle_of([curve for curve in curves if curve is not None])
    if middle is None:
        return None
    axes.plot(middle.x, middle.median, color=colour, ls=dashes, lw=1.8 if dashes == "-" else 1.2)
    return float(middle.median[0])


def _baselines(axes: Axes, spectra: Spectra) -> list[EndLabel]:
    """The isotropic spectrum of each shape, and the median noise edge."""
    shapes = sorted({each.layer.shape for each in spectra})
    starts = [
        _median(axes, [each.null for each in spectra if each.layer.shape == shape], GREY, "--")
        for shape in shapes
    ]
    labels = [EndLabel("isotropic", start, GREY) for start in starts[:1] if start is not None]
    floors = [each.edge for each in spectra if each.edge is not None]
    if floors:
        edge = float(np.median(floors))
        end = max(min(shape) for shape in shapes)
        axes.plot([1, end], [edge, edge], color=GREY, ls=":", lw=1.2)
        labels.append(EndLabel("noise edge", edge, GREY))
    return labels


def _name_baselines(axes: Axes, labels: Sequence[EndLabel]) -> None:
    """Words just below the dashed and the dotted line."""
    for label in labels:
        at = {"xy": (1, label.y), "xytext": (2, -3), "textcoords": "offset points"}
        style = {"fontsize": points_of(8), "color": label.colour}
        axes.annotate(label.text, **at, va="top", **style)


def _limits(spectra: Spectra) -> tuple[float, float, float]:
    """Right, bottom and top for all matrices; far below the noise edge all is cut off."""
    curves = [curve for each in spectra for curve in (each.update, each.null) if curve]
    if not curves:
        return 2.0, 0.1, 1.0
    edges = [each.edge for each in spectra if each.edge is not None]
    top = max(float(y.max()) for _, y in curves)
    shown = min(edges) / 5 if edges else 1e-4 * top
    bottom = max(min(float(y.min()) for _, y in curves), min(shown, 0.1 * top))
    return max(2.0, *(float(x.max()) for x, _ in curves)), bottom, top


def _set_axes(axes: Axes, limits: tuple[float, float, float]) -> None:
    right, bottom, top = limits
    log_axis(axes, "x", 1, right)
    log_axis(axes, "y", 0.7 * bottom, 1.6 * top)


def _module_title(parts: Parts, module: str) -> str:
    subject, key = subject_of(parts[0], module), "update.stable_rank"
    if len(parts) > 1 or subject.values.get(key) is None:
        return module
    return (
        f"{module} · stable rank {number(subject.values[key])} ({number(subject.nulls.get(key))})"
    )


def _scale_words(spectra: Spectra) -> str:
    return "σᵢ / σ₁ of an isotropic update" if any(each.null for each in spectra) else "σᵢ / σ₁"


def _missing(spectra: Spectra) -> str:
    absent = [
        name
        for name, is_known in (
            ("isotropic spectrum", any(each.null for each in spectra)),
            ("noise edge", any(each.floor for each in spectra)),
        )
        if not is_known
    ]
    return f"; not in this report: {', '.join(absent)}" if absent else ""
