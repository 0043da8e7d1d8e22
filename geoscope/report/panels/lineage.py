"""How far a model is from a candidate along its depth."""

from __future__ import annotations

from matplotlib.figure import SubFigure
from matplotlib.ticker import MaxNLocator

from geoscope.report.panels.drawing import INK, counted, log_axis, nothing, panel_title
from geoscope.report.sections import Section

__all__ = ["draw_distances"]


def draw_distances(area: SubFigure, section: Section) -> None:
    """ρ of each matrix over its block, a dot each."""
    axes = area.subplots()
    points = [
        (layer.layer, size)
        for layer in section.layers
        if layer.layer is not None and (size := layer.values.get("relative_update"))
    ]
    if not points:
        nothing(axes, "no matrix of a block is apart from the candidate's")
        return
    sizes = [size for _, size in points]
    axes.plot([layer for layer, _ in points], sizes, "o", color=INK, markersize=3)
    log_axis(axes, "y", min(sizes) / 1.5, max(sizes) * 1.5)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.set_xlabel("block")
    axes.set_ylabel("distance ρ")
    panel_title(axes, "Distance from the candidate", counted(len(points), len(section.layers)))
