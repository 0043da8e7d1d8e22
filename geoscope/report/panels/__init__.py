"""The panels of figures: one function each, which draws sections of a report into an area.

A panel draws what the report holds, says in its title what is missing, and never raises for it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from matplotlib.figure import SubFigure

from geoscope.report.panels.adapters import (
    draw_adapter_energies,
    draw_adapter_masks,
    has_adapter_energies,
    has_adapter_masks,
)
from geoscope.report.panels.angles import draw_angles, draw_angles_by_module
from geoscope.report.panels.capture import draw_capture
from geoscope.report.panels.lift_map import BESIDE, draw_lift_map
from geoscope.report.panels.lineage import draw_distances
from geoscope.report.panels.modules import COLUMNS, MODEL_COLOURS, Parts, shown_modules
from geoscope.report.panels.spectra import draw_spectra, draw_spectra_by_module
from geoscope.report.panels.trajectory import (
    draw_trajectory_alignment,
    draw_trajectory_changed,
    draw_trajectory_cosines,
    draw_trajectory_depth,
    draw_trajectory_norms,
    draw_trajectory_pca,
    draw_trajectory_rank1,
    draw_trajectory_ranks,
    draw_trajectory_sigma1,
    draw_trajectory_skill,
    has_changes,
    has_spectra,
)
from geoscope.report.panels.worst import draw_worst, has_worst, worst_rows

__all__ = ["PANELS", "Panel"]


@dataclass(frozen=True)
class Panel:
    """How a panel is drawn, of one tuned model or of several over each other.

    height: that it wants, in inches.
    words: what it shows, for those who do not see it.
    has_data: whether there is anything.
    """

    draw: Callable[[SubFigure, Parts], None]
    height: Callable[[Parts], float]
    words: str
    has_data: Callable[[Parts], bool] = lambda _: True


def _single(parts: Parts) -> float:
    return max(3.9, 1.4 + 0.3 * max(len(part.modules) for part in parts))


def _maps(parts: Parts) -> float:
    """Several maps stand in rows."""
    rows = -(-min(len(parts), len(MODEL_COLOURS)) // BESIDE)
    return max(_single(parts), rows * (0.9 + 0.22 * max(len(part.modules) for part in parts)))


def _rows(parts: Parts) -> float:
    """Rows of several models grow with their number."""
    models = min(len(parts), len(MODEL_COLOURS))
    return max(_single(parts), 1.4 + 0.1 * models * len(shown_modules(parts)))


def _grid(parts: Parts) -> float:
    return 1.2 + 2.2 * -(-max(1, len(shown_modules(parts))) // COLUMNS)


def _worst(parts: Parts) -> float:
    return 1.1 + 2.1 * worst_rows(parts)


PANELS = {
    "distances": Panel(
        draw_distances, _single, "distance from each candidate by block, a dot for a matrix"
    ),
    "lift_map": Panel(draw_lift_map, _maps, "spectral lift of each layer and module kind"),
    "capture": Panel(
        draw_capture, _single, "energy within the base's leading k directions, over k, with nulls"
    ),
    "spectra": Panel(
        draw_spectra, _single, "singular values of the update beside those of an isotropic one"
    ),
    "angles": Panel(
        draw_angles, _rows, "mean principal angle of each matrix, by module kind, with nulls"
    ),
    "spectra_by_module": Panel(
        draw_spectra_by_module, _grid, "singular values of the update, a panel for a module kind"
    ),
    "angles_by_module": Panel(
        draw_angles_by_module, _grid, "sorted principal angles, a panel for a module kind"
    ),
    "worst": Panel(draw_worst, _worst, "the worst matrices, a small panel each", has_worst),
    "trajectory_cosines": Panel(
        draw_trajectory_cosines, _single, "cosines between the increments of all steps"
    ),
    "trajectory_ranks": Panel(
        draw_trajectory_ranks, _single, "ranks of the update by step, over nulls", has_spectra
    ),
    "trajectory_alignment": Panel(
        draw_trajectory_alignment,
        _single,
        "how the update lies in the base by step, over nulls",
        has_spectra,
    ),
    "trajectory_changed": Panel(
        draw_trajectory_changed,
        _single,
        "share of stored entries that change in a step, by module kind, with nulls",
        has_changes,
    ),
    "trajectory_depth": Panel(
        draw_trajectory_depth, _single, "energy of the update by block and step, and its centre"
    ),
    "trajectory_norms": Panel(
        draw_trajectory_norms, _single, "distance from the base by step, beside a random walk"
    ),
    "trajectory_pca": Panel(
        draw_trajectory_pca, _single, "the run in its two leading directions, beside a random walk"
    ),
    "trajectory_rank1": Panel(
        draw_trajectory_rank1, _single, "share of the leading pair by step and module kind"
    ),
    "trajectory_sigma1": Panel(
        draw_trajectory_sigma1, _single, "largest singular value by step and module kind"
    ),
    "trajectory_skill": Panel(
        draw_trajectory_skill, _single, "held-out skill of the extrapolators by distance"
    ),
    "adapter_masks": Panel(
        draw_adapter_masks, _single, "densities of the masks by module kind", has_adapter_masks
    ),
    "adapter_energies": Panel(
        draw_adapter_energies,
        _single,
        "energies that the initial adapter holds, by module kind, with nulls",
        has_adapter_energies,
    ),
}
