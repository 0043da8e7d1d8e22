"""One small panel per module kind: the grid, what of it is shown, and colours by depth."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, Normalize
from matplotlib.figure import SubFigure

from geoscope.records import LayerRecord
from geoscope.report.panels.drawing import GREY
from geoscope.report.sections import Section, Subject

__all__ = ["COLUMNS", "Depth", "module_panels", "shown_modules", "shown_words"]

_SHOWN = 12
COLUMNS = 4
_DEPTHS = ListedColormap(colormaps["viridis"](range(216)))  # its light end is lost on white


def shown_modules(section: Section) -> list[tuple[str, Subject]]:
    """The first module kinds, as many as stay readable."""
    return list(section.modules.items())[:_SHOWN]


def shown_words(section: Section) -> str:
    """What to say where some module kinds are not shown."""
    total = len(section.modules)
    return f"; first {_SHOWN} of {total} module kinds" if total > _SHOWN else ""


def module_panels(area: SubFigure, section: Section) -> Iterator[tuple[Axes, str, Subject]]:
    """Panels with shared axes, in reading order; places without a module are left empty."""
    modules = shown_modules(section)
    columns = min(COLUMNS, len(modules))
    rows = -(-len(modules) // columns)
    grid = area.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    places = list(grid.flat)
    for axes in places[len(modules) :]:
        axes.set_axis_off()
    for index, (axes, (module, subject)) in enumerate(zip(places, modules, strict=False)):
        axes.tick_params(
            labelleft=index % columns == 0, labelbottom=index + columns >= len(modules)
        )
        yield axes, module, subject


@dataclass(frozen=True)
class Depth:
    """Colours from the first layer (dark) to the last (light)."""

    first: int
    last: int

    @classmethod
    def of(cls, section: Section) -> Depth:
        found = [layer.layer for layer in section.layers if layer.layer is not None]
        return cls(min(found, default=0), max(found, default=0))

    def colour(self, layer: LayerRecord) -> tuple[float, float, float, float]:
        span = max(1, self.last - self.first)
        return _DEPTHS(((layer.layer or self.first) - self.first) / span)

    def draw_key(self, area: SubFigure) -> None:
        """The key of the colours at the right, where there are several layers."""
        if self.first == self.last:
            return
        colours = ScalarMappable(Normalize(self.first, self.last), _DEPTHS)
        bar = area.colorbar(colours, ax=list(area.axes), aspect=40, pad=0.01, label="layer")
        bar.outline.set_visible(False)  # pyright: ignore[reportCallIssue]
        span = self.last - self.first
        bar.set_ticks(sorted({round(self.first + span * part / 4) for part in range(5)}))
        bar.ax.tick_params(length=0, colors=GREY)
