"""Energy of the update captured by the base's leading k directions, against two baselines.

Beside C_R(k) and C_L(k) stand what an isotropic update would give and the base's own energy E_k:
the same update can be off-principal against the second and enriched against the first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

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
from geoscope.report.panels.modules import Parts, in_colours

__all__ = ["draw_capture"]

_TITLE = "Energy within the base's leading k directions"
_BAND, _NULL_BAND = 0.15, 0.1


@dataclass(frozen=True)
class _Line:
    """words: at its start; none for a model, whose colour has a key."""

    key: str
    words: str
    colour: str
    dashes: str = "-"
    band: float = 0.0
    at: int = 0


_BASE = _Line("energy_base", "base's own E_k", GREY)
_SIDES = (
    _Line("energy_right", "update, right", RIGHT, band=_BAND),
    _Line("energy_left", "update, left", LEFT, "-", band=_BAND),
)
_NULLS = (
    _Line("energy_right_null", "isotropic, right", RIGHT, "--", band=_NULL_BAND),
    _Line("energy_left_null", "isotropic, left", LEFT, "--", band=_NULL_BAND),
)


def _lines(parts: Parts) -> list[_Line]:
    """Of one model the sides have colours; of several the models."""
    if len(parts) == 1:
        return [_BASE, *_SIDES, *_NULLS]
    models = [
        replace(side, words="", colour=colour, band=0, at=at, dashes=dashes)
        for at, (_, colour) in enumerate(in_colours(parts))
        for side, dashes in zip(_SIDES, ("-", "-."), strict=True)
    ]
    return [_BASE, *models, *(replace(null, colour=GREY) for null in _NULLS)]


def draw_capture(area: SubFigure, parts: Parts) -> None:
    """Mean over matrices, with the band that holds the middle 80 % of them."""
    axes = area.subplots()
    resolved = [[layer for layer in part.layers if _is_resolved(layer)] for part in parts]
    means = [(line, _mean(resolved[line.at], line.key)) for line in _lines(parts)]
    drawn = [(line, mean) for line, mean in means if mean is not None]
    if not drawn:
        panel_title(axes, _TITLE)
        nothing(axes, "no energy curves in this report")
        return
    missing = ", ".join(dict.fromkeys(line.key for line, mean in means if mean is None))
    below = _below(parts, resolved)
    panel_title(axes, _TITLE, f"{below}; not in this report: {missing}" if missing else below)
    for line, mean in drawn:
        _plot(axes, line, mean)
    _set_axes(area, axes, drawn)


def _below(parts: Parts, resolved: Sequence[Sequence[LayerRecord]]) -> str:
    count = sum("energy_right" in layer.curves for layers in resolved for layer in layers)
    total = sum(len(part.layers) for part in parts)
    if len(parts) > 1:
        return f"mean over {counted(count, total)}; right: solid, left: dashes and dots"
    return f"mean over {counted(count, total)}; bands: middle 80 % of them"


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
    width = 1.2 if line.dashes == "--" else 2
    axes.plot(
        mean.x, mean.mean, color=line.colour, ls=line.dashes, lw=width, solid_capstyle="round"
    )
    if line.band:
        axes.fill_between(mean.x, mean.low, mean.high, color=line.colour, alpha=line.band, lw=0)


def _set_axes(area: SubFigure, axes: Axes, drawn: list[tuple[_Line, Middle]]) -> None:
    start = min(float(mean.x[0]) for _, mean in drawn)
    end = max(float(mean.x[-1]) for _, mean in drawn)
    log_axis(axes, "x", start, max(end, 2 * start))
    lowest = min(float((mean.low if line.band else mean.mean).min()) for line, mean in drawn)
    log_axis(axes, "y", 0.6 * lowest, 1.15)
    axes.set(xlabel="k", ylabel="share of energy")
    labels = [EndLabel(line.words, float(mean.mean[0]), line.colour) for line, mean in drawn]
    label_starts(area, axes, [label for label in labels if label.text], start)
