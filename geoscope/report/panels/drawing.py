"""What the panels share: colours, axes with plain numbers, titles, labels at the lines' ends.

Colours are those of Okabe and Ito (2008), which colour-blind readers tell apart; attention is cool,
MLP is warm. Nothing here touches pyplot or a global setting.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from matplotlib import rcParams
from matplotlib.axes import Axes
from matplotlib.figure import SubFigure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

__all__ = [
    "GREY",
    "INK",
    "LEFT",
    "LIGHT",
    "MANY",
    "RIGHT",
    "EndLabel",
    "area_title",
    "counted",
    "key_below",
    "label_starts",
    "log_axis",
    "module_colours",
    "nothing",
    "panel_title",
    "points_of",
]

INK, GREY, LIGHT = "#222222", "#6b6b6b", "#d9d9d9"
RIGHT, LEFT = "#0072B2", "#D55E00"
_COOL = ("#0072B2", "#56B4E9", "#009E73", "#222222")
_WARM = ("#D55E00", "#E69F00", "#CC79A7", "#8c510a")
_MLP = ("gate", "up", "down", "fc", "mlp", "experts", "intermediate", "output.dense")
MANY = 400  # from so many lines or dots on, a drawing of vectors holds them as pixels
_LABEL_SIZE = 8.5
_USUAL_SIZE = 9.0
_LETTER = 0.56  # mean width of a letter over its size


def points_of(size: float) -> float:
    """A size of letters, in the scale of the style that is drawn in."""
    return size * rcParams["font.size"] / _USUAL_SIZE


def module_colours(modules: Sequence[str]) -> dict[str, str]:
    """A colour for each module kind; kinds beyond the palette are grey."""
    cool, warm = iter(_COOL), iter(_WARM)
    return {
        module: next(warm if any(part in module for part in _MLP) else cool, GREY)
        for module in modules
    }


def log_axis(axes: Axes, name: Literal["x", "y"], low: float, high: float) -> None:
    """A logarithmic axis from `low` to `high` with plain numbers, sparse where it is long."""
    axes.set(**{f"{name}scale": "log", f"{name}lim": (low, high)})
    axis = axes.xaxis if name == "x" else axes.yaxis
    axis.set_major_locator(FixedLocator(_log_ticks(low, high)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.6g}"))
    axis.set_minor_locator(NullLocator())


def _log_ticks(low: float, high: float) -> list[float]:
    """At decades, or at more places where fewer than three decades are in the range."""
    decades = 10.0 ** np.arange(np.floor(np.log10(low)), np.ceil(np.log10(high)) + 1)
    ticks: list[float] = []
    for steps in ((1,), (1, 2, 5), (1, 1.5, 2, 3, 4, 5, 7)):
        ticks = [
            float(step * ten) for ten in decades for step in steps if low <= step * ten <= high
        ]
        if len(ticks) >= 3:
            break
    return ticks


def panel_title(axes: Axes, text: str, below: str = "") -> None:
    """A bold title at the left, and lines in grey below it, within the panel."""
    area = axes.figure
    lines = _within(below, 0.84 * area.bbox.width / area.dpi)
    style = {"fontsize": points_of(10), "fontweight": "bold", "color": INK}
    axes.set_title(text, loc="left", pad=points_of(8 + 11 * len(lines)), **style)
    style = {"fontsize": points_of(_LABEL_SIZE), "color": GREY}
    line = axes.text(0, 1.015, "\n".join(lines), transform=axes.transAxes, **style)
    line.set_in_layout(False)


def _within(words: str, inches: float) -> list[str]:
    """Lines of small letters, none longer than this."""
    return textwrap.wrap(words, int(72 * inches / (_LETTER * points_of(_LABEL_SIZE))))


def area_title(area: SubFigure, text: str, below: str = "") -> None:
    """The same over an area of several panels; empty lines of the title make room."""
    lines = _within(below, 0.97 * area.bbox.width / area.dpi)
    style = {"x": 0.01, "ha": "left", "fontweight": "bold", "color": INK, "linespacing": 1.35}
    area.suptitle(text + "\n " * max(1, len(lines)), fontsize=points_of(10), **style)
    y = 1 - points_of(24) / 72 * area.dpi / area.bbox.height
    style = {"va": "top", "fontsize": points_of(_LABEL_SIZE), "color": GREY}
    line = area.text(0.01, y, "\n".join(lines), **style)
    line.set_in_layout(False)


def key_below(area: SubFigure, axes: Axes) -> None:
    """The key of the colours under the axes, where nothing is drawn."""
    handles, labels = axes.get_legend_handles_labels()
    longest = max(map(len, labels), default=0)
    inches = (_LETTER * longest + 5) * points_of(8) / 72
    area.legend(
        handles,
        labels,
        loc="outside lower left",
        ncols=max(1, int(area.bbox.width / area.dpi / inches)),
        frameon=False,
        fontsize=points_of(8),
        labelcolor=INK,
        handletextpad=0.4,
        columnspacing=1.2,
    )


def nothing(axes: Axes, why: str) -> None:
    """An empty panel that says why it is empty."""
    axes.set_axis_off()
    place = {"transform": axes.transAxes, "ha": "center"}
    axes.text(0.5, 0.5, why, color=GREY, fontsize=points_of(9), **place)


def counted(count: int, total: int) -> str:
    """`28 matrices`, or `24 of 28 matrices` where some have nothing to draw."""
    return f"{total} matrices" if count == total else f"{count} of {total} matrices"


@dataclass(frozen=True)
class EndLabel:
    """Words for a line, at the height of one of its points."""

    text: str
    y: float
    colour: str


def label_starts(area: SubFigure, axes: Axes, labels: Sequence[EndLabel], x: float) -> None:
    """Labels left of where the lines start at `x`, moved apart; call it when the limits are set.

    Room is made by stretching the logarithmic x axis to the left.
    """
    longest = max(len(label.text) for label in labels)
    room = min(0.5, points_of(0.25 + 0.07 * longest) * area.dpi / area.bbox.width)
    right = axes.get_xlim()[1]
    axes.set_xlim(x * (x / right) ** (room / (1 - room)), right)
    low, high = axes.get_ylim()
    heights = np.log10([label.y for label in labels])
    places = _apart((heights - np.log10(low)) / np.log10(high / low), gap=0.062)
    for label, place in zip(labels, places, strict=True):
        axes.annotate(
            label.text,
            (x, place),
            xycoords=("data", "axes fraction"),
            xytext=(-4, 0),
            textcoords="offset points",
            ha="right",
            va="center",
            fontsize=points_of(_LABEL_SIZE),
            color=label.colour,
        )


def _apart(places: np.ndarray, gap: float) -> np.ndarray:
    """Positions in [0, 1] at least `gap` apart, moved as a pile, order kept."""
    order = np.argsort(places, kind="stable")
    moved = places[order].astype(float)
    for _ in range(200):
        gaps = np.diff(moved)
        close = gaps < gap - 1e-9
        if not close.any():
            break
        shift = np.where(close, (gap - gaps) / 2, 0)
        moved[:-1] -= shift
        moved[1:] += shift
        moved = np.clip(moved, 0.02, 0.97)
    result = np.empty_like(moved)
    result[order] = moved
    return result
