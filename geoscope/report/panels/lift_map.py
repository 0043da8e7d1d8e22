"""Layer × module map of the spectral lift: where the update changes singular values.

1 is what an isotropic update of the same size does; the colours are centred there, on a log scale.
Several tuned models have a map each, side by side, with the same colours.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.collections import QuadMesh
from matplotlib.colors import LogNorm
from matplotlib.figure import SubFigure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from geoscope.records import LayerRecord
from geoscope.report.cells import rows_of, tiles
from geoscope.report.numbers import number, shorten
from geoscope.report.panels.drawing import GREY, INK, area_title, nothing, panel_title, points_of
from geoscope.report.panels.modules import MODEL_COLOURS, Parts

__all__ = ["BESIDE", "draw_lift_map"]

BESIDE = 2  # so many maps in a row
_ID = "spectral_lift"
_TITLE = "Spectral lift by layer and module"
_TICKS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100)
_REACHES = (5, 10, 20, 50, 100)  # round, so that figures of like models compare
_WRITTEN = 8  # up to so many cells beside each other hold their numbers
_FINE = 60  # from so many layers on there are no lines between cells


def draw_lift_map(area: SubFigure, parts: Parts) -> None:
    """One cell per layer and module kind, the mean where it holds several matrices."""
    records = [layer for part in parts for layer in part.layers]
    if not records:
        nothing(area.subplots(), "no matrices")
        return
    parts = parts[: len(MODEL_COLOURS)]
    layers, modules = (
        rows_of(records),
        list(dict.fromkeys(m for part in parts for m in part.modules)),
    )
    tables = [_table(part.layers, layers, modules) for part in parts]
    columns = min(BESIDE, len(parts))
    grid = area.subplots(-(-len(parts) // columns), columns, sharey=True, squeeze=False)
    for axes in grid.flat[len(parts) :]:
        axes.set_axis_off()
    _name(area, grid.flat[0], parts, any(_nulls(*table).any() for table in tables))
    reach = _reach([lifts for lifts, _ in tables])
    meshes: list[QuadMesh] = []
    for axes, part, (lifts, held) in zip(grid.flat, parts, tables, strict=False):
        if len(parts) > 1:
            label = f"{part.tuned} {shorten(part.label, 24)}"
            axes.set_title(label, loc="left", fontsize=points_of(9), color=INK)
        _set_axes(axes, layers, modules, _labels(area, columns, layers))
        _hatch(axes, _nulls(lifts, held))
        is_written = columns * len(layers) <= _WRITTEN
        meshes += _paint(axes, lifts, reach, is_written=is_written)
    if meshes:
        _colour_bar(area, list(grid.flat), meshes[0], reach)


def _name(area: SubFigure, axes: Axes, parts: Parts, has_gaps: bool) -> None:
    said = "1: as an isotropic update; below 1: singular values kept"
    below = f"{said}; hatched: no number" if has_gaps else said
    if len(parts) > 1:
        area_title(area, _TITLE, below)
    else:
        panel_title(axes, _TITLE, below)


def _table(
    records: Sequence[LayerRecord], layers: list[int | None], modules: list[str]
) -> tuple[np.ndarray, np.ndarray]:
    """Mean lift and whether there is a matrix, both (modules, layers)."""
    lifts = np.full((len(modules), len(layers)), np.nan)
    held = np.zeros_like(lifts, dtype=bool)
    places = {at: column for column, at in enumerate(layers)}
    for (layer, module), tile in tiles(records, _ID).items():
        at = modules.index(module), places[layer]
        held[at] = True
        if tile.value is not None and tile.value > 0:
            lifts[at] = tile.value
    return lifts, held


def _nulls(lifts: np.ndarray, held: np.ndarray) -> np.ndarray:
    return held & np.isnan(lifts)


def _labels(area: SubFigure, columns: int, layers: Sequence[int | None]) -> int:
    """How many layers can be named below each map."""
    longest = max(len(str(at or "")) for at in layers)
    points = 72 * 0.76 * area.bbox.width / area.dpi / columns
    return max(2, int(points / points_of(5.5 * longest + 6)))


def _set_axes(axes: Axes, layers: Sequence[int | None], modules: Sequence[str], most: int) -> None:
    names = ["–" if at is None else str(at) for at in layers]
    step = -(-len(names) // most)
    axes.set_xticks(range(0, len(names), step), names[::step])
    axes.set_yticks(range(len(modules)), modules)
    axes.set_xlim(-0.5, max(3, len(names)) - 0.5)
    axes.set_ylim(max(3, len(modules)) - 0.5, -0.5)
    axes.set_xlabel("layer")
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)


def _hatch(axes: Axes, nulls: np.ndarray) -> None:
    for row, column in np.argwhere(nulls):
        cell = Rectangle((column - 0.5, row - 0.5), 1, 1, fill=True, facecolor="#f0f0f0")
        cell.set(hatch="////", edgecolor="#b5b5b5", linewidth=0)
        axes.add_patch(cell)


def _reach(tables: Sequence[np.ndarray]) -> float:
    """How far the colours go on both sides of 1."""
    known = np.concatenate([lifts[np.isfinite(lifts)] for lifts in tables])
    furthest = float(np.maximum(known, 1 / known).max()) if known.size else 1.0
    return next((reach for reach in _REACHES if reach >= furthest), furthest)


def _paint(axes: Axes, lifts: np.ndarray, reach: float, *, is_written: bool) -> list[QuadMesh]:
    """The cells; nothing where none has a number."""
    if not np.isfinite(lifts).any():
        return []
    between = 1 if is_written else 0.4 if lifts.shape[1] <= _FINE else 0
    mesh = axes.pcolormesh(
        np.arange(lifts.shape[1] + 1) - 0.5,
        np.arange(lifts.shape[0] + 1) - 0.5,
        np.ma.masked_invalid(lifts),
        cmap=colormaps["RdBu_r"],
        norm=LogNorm(1 / reach, reach),
        edgecolor="white" if between else "face",
        linewidth=between,
    )
    if is_written:
        for (row, column), lift in np.ndenumerate(lifts):
            _write(axes, column, row, lift, reach)
    return [mesh]


def _colour_bar(area: SubFigure, axes: Sequence[Axes], mesh: QuadMesh, reach: float) -> None:
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
