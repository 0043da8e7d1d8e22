"""The panels of figures: one function each, which draws a section of a report into an area.

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
from geoscope.report.panels.lift_map import draw_lift_map
from geoscope.report.panels.lineage import draw_distances
from geoscope.report.panels.modules import COLUMNS, shown_modules
from geoscope.report.panels.spectra import draw_spectra, draw_spectra_by_module
from geoscope.report.panels.trajectory import (
    draw_trajectory_cosines,
    draw_trajectory_norms,
    draw_trajectory_pca,
    draw_trajectory_rank1,
    draw_trajectory_sigma1,
    draw_trajectory_skill,
)
from geoscope.report.sections import Section

__all__ = ["PANELS", "Panel"]


@dataclass(frozen=True)
class Panel:
    """How a panel is drawn, how high it wants to be, in inches, and whether there is anything."""

    draw: Callable[[SubFigure, Section], None]
    height: Callable[[Section], float]
    has_data: Callable[[Section], bool] = lambda _: True


def _one(section: Section) -> float:
    return max(3.9, 1.4 + 0.3 * len(section.modules))


def _grid(section: Section) -> float:
    return 1.2 + 2.2 * -(-max(1, len(shown_modules(section))) // COLUMNS)


PANELS = {
    "distances": Panel(draw_distances, _one),
    "lift_map": Panel(draw_lift_map, _one),
    "capture": Panel(draw_capture, _one),
    "spectra": Panel(draw_spectra, _one),
    "angles": Panel(draw_angles, _one),
    "spectra_by_module": Panel(draw_spectra_by_module, _grid),
    "angles_by_module": Panel(draw_angles_by_module, _grid),
    "trajectory_cosines": Panel(draw_trajectory_cosines, _one),
    "trajectory_norms": Panel(draw_trajectory_norms, _one),
    "trajectory_pca": Panel(draw_trajectory_pca, _one),
    "trajectory_rank1": Panel(draw_trajectory_rank1, _one),
    "trajectory_sigma1": Panel(draw_trajectory_sigma1, _one),
    "trajectory_skill": Panel(draw_trajectory_skill, _one),
    "adapter_masks": Panel(draw_adapter_masks, _one, has_adapter_masks),
    "adapter_energies": Panel(draw_adapter_energies, _one, has_adapter_energies),
}
