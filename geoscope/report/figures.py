"""A report as a figure: the panels of its kind, one block of them for each tuned model.

Drawn with `matplotlib.figure.Figure` alone, under matplotlib's own defaults, so that neither a
backend nor a user's style changes the picture; equal reports give equal bytes.
"""

from __future__ import annotations

import io
import textwrap
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import matplotlib.style
from matplotlib.figure import Figure, SubFigure

from geoscope.errors import OptionError
from geoscope.kinds import Kind
from geoscope.records import Report
from geoscope.report.content import headline, title
from geoscope.report.coverage import compared_line
from geoscope.report.panels import PANELS, Panel
from geoscope.report.panels.drawing import GREY, INK
from geoscope.report.plain import plain
from geoscope.report.sections import Section, answering, sections
from geoscope.report.tables import kind_of

__all__ = ["figure", "render_figure"]

_WIDTH = 12.0
_MARGIN = 0.2
_LINE = 0.21  # height of a line of the header, in inches
_STYLE = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GREY,
    "axes.labelcolor": INK,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "hatch.linewidth": 0.6,
    "text.parse_math": False,  # names hold underscores and may hold a dollar
    "pdf.fonttype": 42,
    "svg.hashsalt": "geoscope",
}
_OPTIONS: dict[str, dict[str, Any]] = {
    ".png": {"dpi": 150},
    ".svg": {"metadata": {"Date": None}},
    ".pdf": {"metadata": {"CreationDate": None}},
}


def render_figure(report: Report, suffix: str) -> bytes:
    """The bytes of the figure as `.png`, `.svg` or `.pdf`."""
    return _saved(figure(plain(report)), suffix)


def figure(report: Report, name: str | None = None) -> Figure:
    """All panels of a report, or one by its name. Raises OptionError with the names there are."""
    kind = kind_of(report.kind)
    names = [each for row in kind.panels for each in row]
    if name is not None:
        if name not in names:
            raise OptionError(f"name {name!r} is not one of {', '.join(names)}")
        kind = replace(kind, panels=((name,),))
    with _own_style():
        made = _figure(report, kind)
        _settle(made)
    return made


class _Shown(Figure):
    """A figure that notebooks show without pyplot."""

    def _repr_png_(self) -> bytes:
        return _saved(self, ".png")


def _saved(figure: Figure, suffix: str) -> bytes:
    stream = io.BytesIO()
    with _own_style():
        figure.savefig(stream, format=suffix.removeprefix("."), **_OPTIONS[suffix])
    return stream.getvalue()


@contextmanager
def _own_style() -> Iterator[None]:
    """Matplotlib's defaults and ours for the time of drawing."""
    with matplotlib.style.context(["default", _STYLE]), warnings.catch_warnings():
        # A model's name may hold letters that the font lacks; the boxes say so.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        yield


def _figure(report: Report, kind: Kind) -> Figure:
    parts = sections(report)
    header = _header(report, kind, parts)
    top = _MARGIN + _LINE * (len(header) + 1.3)
    heights = [sum(_heights(kind, part)) for part in parts]
    height = top + sum(heights) + _MARGIN
    figure = _Shown(figsize=(_WIDTH, height), layout="constrained")
    _write_header(figure, header, height)
    bottom, side = _MARGIN / 2 / height, _MARGIN / 2 / _WIDTH
    rect = (side, bottom, 1 - 2 * side, 1 - bottom - top / height)
    figure.get_layout_engine().set(rect=rect, h_pad=0.08, w_pad=0.08)  # pyright: ignore
    areas = figure.subfigures(len(parts), 1, squeeze=False, height_ratios=heights)
    for area, part in zip(areas[:, 0], parts, strict=True):
        if len(parts) > 1:
            area.suptitle(_section_title(kind, part), x=0.01, ha="left", fontsize=11, color=INK)
        _draw_section(area, kind, part)
    return figure


def _settle(figure: Figure) -> None:
    """Lay out once and round every place: the last digits of the layout's solver vary by run."""
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    for area in _areas(figure):
        area.bbox_relative.set_points(area.bbox_relative.get_points().round(6))
        for text in area.texts:
            x, y = text.get_position()
            text.set_position((round(x, 6), round(y, 6)))
    for axes in figure.axes:
        left, bottom, width, height = axes.get_position(original=True).bounds
        axes.set_position((round(left, 6), round(bottom, 6), round(width, 6), round(height, 6)))


def _areas(figure: Figure | SubFigure) -> Iterator[SubFigure]:
    """All areas of a figure, outer ones first."""
    for area in figure.subfigs:
        yield area
        yield from _areas(area)


def _header(report: Report, kind: Kind, parts: tuple[Section, ...]) -> list[str]:
    """Title, what was found, what was compared."""
    asked = answering(report)
    said = ": ".join(filter(None, headline(kind, asked[0]))) if len(asked) == 1 else ""
    return [title(report), *textwrap.wrap(said, 165), compared_line(report)]


def _write_header(figure: Figure, lines: list[str], height: float) -> None:
    at = height - _MARGIN
    for index, line in enumerate(lines):
        words = figure.text(_MARGIN / _WIDTH, at / height, line, va="top", color=GREY)
        words.set_in_layout(False)
        if index == 0:
            words.set(fontsize=13, fontweight="bold", color=INK)
        at -= _LINE * (1.5 if index == 0 else 1)


def _section_title(kind: Kind, section: Section) -> str:
    return f"{section.tuned} {section.label} · {headline(kind, section)[0]}".removesuffix(" · ")


def _panels(kind: Kind, section: Section) -> list[tuple[Panel, ...]]:
    """Rows of panels: those that have something to draw, or the first row where none has."""
    rows = [tuple(PANELS[name] for name in row) for row in kind.panels]
    kept = [tuple(panel for panel in row if panel.has_data(section)) for row in rows]
    return [row for row in kept if row] or rows[:1]


def _heights(kind: Kind, section: Section) -> list[float]:
    return [max(panel.height(section) for panel in row) for row in _panels(kind, section)]


def _draw_section(area: SubFigure, kind: Kind, section: Section) -> None:
    panels = _panels(kind, section)
    rows = area.subfigures(len(panels), 1, squeeze=False, height_ratios=_heights(kind, section))
    for row, shown in zip(rows[:, 0], panels, strict=True):
        places = row.subfigures(1, len(shown), squeeze=False, wspace=0.03)
        for place, panel in zip(places[0], shown, strict=True):
            panel.draw(place, section)
