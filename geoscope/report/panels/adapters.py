"""An initialised adapter by module kind: what its masks keep, and the energy its rank holds."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import SubFigure

from geoscope.records import LayerRecord
from geoscope.report.panels.drawing import (
    GREY,
    INK,
    LEFT,
    RIGHT,
    key_below,
    log_axis,
    nothing,
    panel_title,
)
from geoscope.report.panels.modules import Parts, shown_modules, shown_words, subject_of
from geoscope.report.sections import Subject

__all__ = [
    "draw_adapter_energies",
    "draw_adapter_masks",
    "has_adapter_energies",
    "has_adapter_masks",
]

_MASKS = (
    ("density_spec", "spectral |W_r| ≤ τ", RIGHT),
    ("density_euc", "magnitude |W| ≤ τ", LEFT),
    ("density_union", "union: the mask", INK),
    ("density_intersection", "both", GREY),
)
_ENERGIES = (
    ("captured_energy", "captured by rank r", RIGHT),
    ("head_energy", "on the base's leading r", LEFT),
    ("relative_norm", "‖s·B₀A₀‖/‖W‖", INK),
)


def has_adapter_masks(parts: Parts) -> bool:
    """Whether a matrix was masked."""
    return _has(parts, _MASKS)


def has_adapter_energies(parts: Parts) -> bool:
    """Whether there is an initial product at all."""
    return _has(parts, _ENERGIES)


def _has(parts: Parts, ids: Sequence[tuple[str, str, str]]) -> bool:
    return any(
        _positive(layer, key) for part in parts for layer in part.layers for key, _, _ in ids
    )


def draw_adapter_masks(area: SubFigure, parts: Parts) -> None:
    """Densities of the masks, a dot for each matrix; independence as a line."""
    axes = area.subplots()
    if not _draw(axes, parts, _MASKS):
        nothing(axes, "this method masks nothing")
        return
    panel_title(axes, "Density of the masks", f"one dot a matrix{shown_words(parts)}")
    axes.set_xlim(0, None)
    axes.set_xlabel("share of the entries")
    key_below(area, axes)


def draw_adapter_energies(area: SubFigure, parts: Parts) -> None:
    """Energies and sizes, a dot for each matrix, the null of each as a stroke."""
    axes = area.subplots()
    seen = _draw(axes, parts, _ENERGIES)
    if not seen:
        nothing(axes, "no energies in this report")
        return
    below = f"one dot a matrix, its null as a stroke{shown_words(parts)}"
    panel_title(axes, "What the initial adapter holds", below)
    log_axis(axes, "x", min(seen) / 1.5, max(seen) * 1.5)
    axes.set_xlabel("share of energy; relative norm")
    key_below(area, axes)


def _draw(axes: Axes, parts: Parts, ids: Sequence[tuple[str, str, str]]) -> list[float]:
    """Rows of module kinds, dots of their matrices; every positive number that was drawn."""
    modules = shown_modules(parts)
    seen: list[float] = []
    for row, module in enumerate(modules):
        subject = subject_of(parts[0], module)
        for place, (key, label, colour) in enumerate(ids):
            y = row + 0.18 * (place - (len(ids) - 1) / 2)
            seen += _dots(axes, subject, key, y, colour, label if row == 0 else "")
    axes.set_yticks(range(len(modules)), modules)
    axes.set_ylim(max(1, len(modules)) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)
    return seen


def _dots(axes: Axes, subject: Subject, key: str, y: float, colour: str, label: str) -> list[float]:
    values = [value for layer in subject.layers if (value := _positive(layer, key)) is not None]
    nulls = [null for layer in subject.layers if (null := layer.nulls.get(key)) and null > 0]
    if values:
        places = [y] * len(values)
        axes.plot(values, places, "o", ms=4, alpha=0.6, mew=0, color=colour, label=label)
    if nulls:
        places = [y] * len(nulls)
        axes.plot(nulls, places, "|", ms=9, mew=1.2, alpha=0.6, color=colour)
    return [*values, *nulls]


def _positive(layer: LayerRecord, key: str) -> float | None:
    value = layer.values.get(key)
    return float(value) if value is not None and value > 0 else None
