"""One small panel per module kind: the grid, what of it is shown, and colours by depth."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, Normalize
from matplotlib.figure import SubFigure

from geoscope.records import LayerRecord
from geoscope.report.panels.drawing import GREY
from geoscope.report.sections import Section, Subject

__all__ = [
    "COLUMNS",
    "MODEL_COLOURS",
    "Depth",
    "Parts",
    "in_colours",
    "module_panels",
    "shown_modules",
    "shown_words",
    "subject_of",
]

Parts = Sequence[Section]
# Of the tuned models, as many as can be told apart.
MODEL_COLOURS = (
    *("#0072B2", "#D55E00", "#009E73", "#CC79A7"),
    *("#E69F00", "#56B4E9", "#8c510a", "#6b6b6b"),
)
_SHOWN = 12
_NOTHING = Subject({}, {}, ())
COLUMNS = 4
_DEPTHS = ListedColormap(colormaps["viridis"](range(216)))  # its light end is lost on white


def in_colours(parts: Parts) -> list[tuple[Section, str]]:
    """The first tuned models, each with its colour."""
    return list(zip(parts, MODEL_COLOURS, strict=False))


def shown_modules(parts: Parts) -> list[str]:
    """The first module kinds of all models, as many as stay readable."""
    return list(_every_module(parts))[:_SHOWN]


def _every_module(parts: Parts) -> dict[str, None]:
    return dict.fromkeys(module for part in parts for module in part.modules)


def subject_of(part: Section, module: str) -> Subject:
    """The module kind of a model, empty where it has none."""
    return part.modules.get(module, _NOTHING)


def shown_words(parts: Parts) -> str:
    """What to say where some module kinds are not shown."""
    total = len(_every_module(parts))
    return f"; first {_SHOWN} of {total} module kinds" if total > _SHOWN else ""


def module_panels(area: SubFigure, parts: Parts) -> Iterator[tuple[Axes, str]]:
    """Panels with shared axes, in reading order; places without a module are left empty."""
    modules = shown_modules(parts)
    columns = min(COLUMNS, len(modules))
    rows = -(-len(modules) // columns)
    grid = area.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    places = list(grid.flat)
    for axes in places[len(modules) :]:
        axes.set_axis_off()
    for index, (axes, module) in enumerate(zip(places, modules, strict=False)):
        axes.tick_params(
            labelleft=index % columns == 0, labelbottom=index + columns >= len(modules)
        )
        yield axes, module


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
