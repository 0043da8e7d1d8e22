"""Energy of the update captured by the base's leading k directions, against two baselines.

Beside C_R(k) and C_L(k) stand what an isotropic update would give and the base's own energy E_k:
the same update can be off-principal against the second and enriched against the first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import SubFigure

from geoscope.records import LayerRecord, Status
from geoscope.report.panels.curves import Middle, middle_of, points
from geoscope.report.panels.drawing import (
    GREY,
    LEFT,
    RIGHT,
    EndLabel,
    counted,
    label_starts,
    log_axis,
    nothing,
    panel_title,
)
from geoscope.report.sections import Section

__all__ = ["draw_capture"]

_TITLE = "Energy within the base's leading k directions"


@dataclass(frozen=True)
class _Line:
    key: str
    words: str
    colour: str
    is_null: bool = False
    has_spread: bool = False


_LINES = (
    _Line("energy_base", "base's own E_k", GREY),
    _Line("energy_right", "update, right", RIGHT, has_spread=True),
    _Line("energy_left", "update, left", LEFT, has_spread=True),
    _Line("energy_right_null", "isotropic, right", RIGHT, is_null=True),
    _Line("energy_left_null", "isotropic, left", LEFT, is_null=True),
)


def draw_capture(area: SubFigure, section: Section) -> None:
    """Mean over matrices, with the band that holds the middle 80 % of them."""
    axes = area.subplots()
    resolved = [layer for layer in section.layers if _is_resolved(layer)]
    means = [(line, _mean(resolved, line.key)) for line in _LINES]
    drawn = [(line, mean) for line, mean in means if mean is not None]
    if not drawn:
        panel_title(axes, _TITLE)
        nothing(axes, "no energy curves in this report")
        return
    missing = ", ".join(line.key for line, mean in means if mean is None)
    count = sum("energy_right" in layer.curves for layer in resolved)
    below = f"mean over {counted(count, len(section.layers))}; band: middle 80 % of them"
    panel_title(axes, _TITLE, f"{below}; not in this report: {missing}" if missing else below)
    for line, mean in drawn:
        _plot(axes, line, mean)
    _set_axes(area, axes, drawn)


def _is_resolved(layer: LayerRecord) -> bool:
    """Whether its captured energy may enter a mean: not where rounding is as large."""
    return not any(
        status is Status.BELOW_RESOLUTION
        for key, status in layer.status.items()
        if key.startswith("energy_")
    )


def _mean(layers: Sequence[LayerRecord], key: str) -> Middle | None:
    found = [(layer, curve) for layer in layers if (curve := points(layer, key)) is not None]
    return middle_of([curve for _, curve in found], [min(layer.shape) for layer, _ in found])


def _plot(axes: Axes, line: _Line, mean: Middle) -> None:
    style = {"ls": "--", "lw": 1.2} if line.is_null else {"ls": "-", "lw": 2}
    axes.plot(mean.x, mean.mean, color=line.colour, solid_capstyle="round", **style)
    if line.has_spread:
        axes.fill_between(mean.x, mean.low, mean.high, color=line.colour, alpha=0.15, lw=0)


def _set_axes(area: SubFigure, axes: Axes, drawn: list[tuple[_Line, Middle]]) -> None:
    start = min(float(mean.x[0]) for _, mean in drawn)
    end = max(float(mean.x[-1]) for _, mean in drawn)
    log_axis(axes, "x", start, max(end, 2 * start))
    log_axis(axes, "y", 0.6 * min(float(mean.mean[0]) for _, mean in drawn), 1.15)
    axes.set(xlabel="k", ylabel="share of energy")
    labels = [EndLabel(line.words, float(mean.mean[0]), line.colour) for line, mean in drawn]
    label_starts(area, axes, labels, start)
