"""Layer × module map of the spectral lift: where the update changes singular values.

1 is what an isotropic update of the same size does; the colours are centred there, on a log scale.
"""

from __future__ import annotations

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.collections import QuadMesh
from matplotlib.colors import LogNorm
from matplotlib.figure import SubFigure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from geoscope.records import LayerRecord
from geoscope.report.numbers import number
from geoscope.report.panels.drawing import GREY, INK, nothing, panel_title
from geoscope.report.sections import Section

__all__ = ["draw_lift_map"]

_ID = "spectral_lift"
_TICKS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100)
_REACHES = (5, 10, 20, 50, 100)  # round, so that figures of like models compare
_WRITTEN = 8  # up to so many layers the numbers stand in the cells


def draw_lift_map(area: SubFigure, section: Section) -> None:
    """One cell per layer and module kind, the mean where it holds several matrices."""
    axes = area.subplots()
    if not section.layers:
        nothing(axes, "no matrices")
        return
    layers = sorted({layer.layer for layer in section.layers}, key=lambda at: (at is None, at))
    modules = list(section.modules)
    lifts, held = _table(section.layers, layers, modules)
    nulls = np.argwhere(held & np.isnan(lifts))
    panel_title(axes, "Spectral lift by layer and module", _below(len(nulls)))
    _set_axes(axes, ["–" if at is None else str(at) for at in layers], modules)
    for row, column in nulls:
        cell = Rectangle((column - 0.5, row - 0.5), 1, 1, fill=True, facecolor="#f0f0f0")
        cell.set(hatch="////", edgecolor="#b5b5b5", linewidth=0)
        axes.add_patch(cell)
    if np.isfinite(lifts).any():
        _paint(area, axes, lifts, is_written=len(layers) <= _WRITTEN)


def _below(nulls: int) -> str:
    said = "1: as an isotropic update; below 1: singular values kept"
    return f"{said}; hatched: no number" if nulls else said


def _table(
    records: tuple[LayerRecord, ...], layers: list[int | None], modules: list[str]
) -> tuple[np.ndarray, np.ndarray]:
    """Mean lift and whether there is a matrix, both (modules, layers)."""
    total = np.zeros((len(modules), len(layers)))
    count, held = np.zeros_like(total), np.zeros_like(total, dtype=bool)
    for record in records:
        at = modules.index(record.module), layers.index(record.layer)
        held[at] = True
        value = record.values.get(_ID)
        if value is not None and value > 0:
            total[at] += value
            count[at] += 1
    return np.where(count > 0, total / np.maximum(count, 1), np.nan), held


def _set_axes(axes: Axes, layers: list[str], modules: list[str]) -> None:
    step = max(1, -(-len(layers) // 18))
    axes.set_xticks(range(0, len(layers), step), layers[::step])
    axes.set_yticks(range(len(modules)), modules)
    axes.set_xlim(-0.5, max(3, len(layers)) - 0.5)
    axes.set_ylim(max(3, len(modules)) - 0.5, -0.5)
    axes.set_xlabel("layer")
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)


def _paint(area: SubFigure, axes: Axes, lifts: np.ndarray, *, is_written: bool) -> None:
    furthest = float(np.nanmax(np.maximum(lifts, 1 / lifts)))
    reach = next((reach for reach in _REACHES if reach >= furthest), furthest)
    mesh = axes.pcolormesh(
        np.arange(lifts.shape[1] + 1) - 0.5,
        np.arange(lifts.shape[0] + 1) - 0.5,
        np.ma.masked_invalid(lifts),
        cmap=colormaps["RdBu_r"],
        norm=LogNorm(1 / reach, reach),
        edgecolor="white",
        linewidth=1 if is_written else 0.4,
    )
    _colour_bar(area, axes, mesh, reach)
    if is_written:
        for (row, column), lift in np.ndenumerate(lifts):
            _write(axes, column, row, lift, reach)


def _colour_bar(area: SubFigure, axes: Axes, mesh: QuadMesh, reach: float) -> None:
    bar = area.colorbar(mesh, ax=axes, aspect=30, pad=0.02)
    bar.outline.set_visible(False)  # pyright: ignore[reportCallIssue]
    bar.ax.yaxis.set_major_locator(FixedLocator([t for t in _TICKS if 1 / reach <= t <= reach]))
    bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}×"))
    bar.ax.yaxis.set_minor_locator(NullLocator())
    bar.ax.tick_params(length=0, colors=GREY)


def _write(axes: Axes, column: int, row: int, lift: float, reach: float) -> None:
    if np.isfinite(lift):
        is_dark = abs(np.log(lift)) > 0.62 * np.log(reach)
        colour = "white" if is_dark else INK
        axes.text(column, row, number(float(lift)), ha="center", va="center", color=colour)
