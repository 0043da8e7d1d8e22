"""How far a model is from a candidate along its depth."""

from __future__ import annotations

from matplotlib.figure import SubFigure
from matplotlib.ticker import MaxNLocator

from geoscope.report.panels.drawing import INK, counted, log_axis, nothing, panel_title
from geoscope.report.panels.modules import Parts, in_colours
from geoscope.report.sections import Section

__all__ = ["draw_distances"]


def draw_distances(area: SubFigure, parts: Parts) -> None:
    """ρ of each matrix over its block, a dot each; of several candidates a colour each."""
    axes = area.subplots()
    colours = [(part, INK) for part in parts] if len(parts) == 1 else in_colours(parts)
    points = [(_points(part), colour) for part, colour in colours]
    sizes = [size for each, _ in points for _, size in each]
    if not sizes:
        nothing(axes, "no matrix of a block is apart from the candidate's")
        return
    for each, colour in points:
        axes.plot(*zip(*each, strict=True) if each else ([], []), "o", color=colour, markersize=3)
    log_axis(axes, "y", min(sizes) / 1.5, max(sizes) * 1.5)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.set_xlabel("block")
    axes.set_ylabel("distance ρ")
    total = sum(len(part.layers) for part, _ in colours)
    panel_title(axes, "Distance from the candidate", counted(len(sizes), total))


def _points(part: Section) -> list[tuple[int, float]]:
    """(block, ρ) of the matrices that are apart."""
    return [
        (layer.layer, size)
        for layer in part.layers
        if layer.layer is not None and (size := layer.values.get("relative_update"))
    ]
