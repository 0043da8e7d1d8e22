"""A report as a figure: the panels of its kind, several tuned models over each other.

Drawn with `matplotlib.figure.Figure` alone, under matplotlib's own defaults, so that neither a
backend nor a user's style changes the picture; equal reports give equal bytes.
"""

from __future__ import annotations

import io
import textwrap
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
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
from geoscope.report.panels.modules import Parts, in_colours
from geoscope.report.plain import plain
from geoscope.report.sections import Section, answering, sections
from geoscope.report.tables import kind_of

__all__ = ["figure", "panel_names", "render_figure", "render_panel"]

_MARGIN = 0.2
_LINE = 0.21  # height of a line of the header, in inches
_LETTERS = 13.75  # of the header in an inch
_SIZE = 9.0


@dataclass(frozen=True)
class _Style:
    """Where the figure is read.

    width: in inches.
    scale: of letters and panels.
    has_title: on paper a caption says it.
    settings: of matplotlib.
    """

    width: float
    scale: float
    dpi: int
    has_title: bool
    settings: tuple[tuple[str, Any], ...] = ()


# paper: the width of a page of text, letters that are read there. page: a part of a page of HTML,
# whose letters are the browser's.
_STYLES = {
    "screen": _Style(12.0, 1.0, 150, has_title=True),
    "paper": _Style(7.0, 0.78, 300, has_title=False),
    "page": _Style(6.4, 1.0, 150, has_title=False, settings=(("svg.fonttype", "none"),)),
}
_SETTINGS = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GREY,
    "axes.labelcolor": INK,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "hatch.linewidth": 0.6,
    "text.parse_math": False,  # names hold underscores and may hold a dollar
    "pdf.fonttype": 42,
    "svg.hashsalt": "geoscope",
}
_METADATA: dict[str, dict[str, Any]] = {
    ".svg": {"Date": None},
    ".pdf": {"CreationDate": None},
}


def render_figure(report: Report, suffix: str, style: str = "screen") -> bytes:
    """The bytes of the figure as `.png`, `.svg` or `.pdf`. Raises OptionError for a style."""
    return _saved(figure(plain(report), style=style), suffix, _style_of(style))


def figure(report: Report, name: str | None = None, *, style: str = "screen") -> Figure:
    """All panels of a report, or one by its name. Raises OptionError with the names there are."""
    kind = kind_of(report.kind)
    if name is not None:
        if name not in panel_names(kind):
            known = ", ".join(panel_names(kind))
            raise OptionError(f"name {name!r} is not one of {known}")
        kind = replace(kind, panels=((name,),))
    chosen = _style_of(style)
    with _drawn_in(chosen):
        return _figure(report, kind, chosen)


def render_panel(parts: Parts, name: str, *, is_wide: bool) -> bytes:
    """One panel as SVG for a page of HTML: letters as text, no title of the report."""
    style = _STYLES["page"]
    style = replace(style, width=2 * style.width) if is_wide else style
    style = replace(style, settings=(*style.settings, ("svg.hashsalt", f"geoscope-{name}")))
    panel = PANELS[name]
    with _drawn_in(style):
        made = Figure(figsize=(style.width, panel.height(parts)), layout="constrained")
        panel.draw(made.subfigures(1, 1, squeeze=False)[0, 0], parts)
        _settle(made)
    return _saved(made, ".svg", style, transparent=True)


def panel_names(kind: Kind) -> list[str]:
    """Every panel of a kind."""
    return [*(name for row in kind.panels for name in row), *kind.close]


def _style_of(name: str) -> _Style:
    known = [each for each in _STYLES if each != "page"]
    if name not in known:
        raise OptionError(f"style {name!r} is not one of {', '.join(known)}")
    return _STYLES[name]


class _Shown(Figure):
    """A figure that notebooks show without pyplot."""

    def _repr_png_(self) -> bytes:
        return _saved(self, ".png", _STYLES["screen"])


def _saved(figure: Figure, suffix: str, style: _Style, **options: Any) -> bytes:
    stream = io.BytesIO()
    metadata = _METADATA.get(suffix)
    with _drawn_in(style):
        form = suffix.removeprefix(".")
        figure.savefig(stream, format=form, dpi=style.dpi, metadata=metadata, **options)
    return stream.getvalue()


@contextmanager
def _drawn_in(style: _Style) -> Iterator[None]:
    """Matplotlib's defaults and ours for the time of drawing."""
    sizes = {
        "font.size": _SIZE * style.scale,
        "xtick.labelsize": 8.5 * style.scale,
        "ytick.labelsize": 8.5 * style.scale,
        "axes.labelsize": _SIZE * style.scale,
    }
    own = {**_SETTINGS, **sizes, **dict(style.settings)}
    with matplotlib.style.context(["default", own]), warnings.catch_warnings():
        # A model's name may hold letters that the font lacks; the boxes say so.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        yield


def _figure(report: Report, kind: Kind, style: _Style) -> Figure:
    parts = sections(report)
    lines = _header(report, parts, style)
    top = style.scale * (_MARGIN + _LINE * (len(lines) + 1.3)) if lines else 0.0
    panels = _panels(kind, parts)
    heights = [style.scale * max(panel.height(parts) for panel in row) for row in panels]
    height = top + sum(heights) + _MARGIN
    figure = _Shown(figsize=(style.width, height), layout="constrained")
    _write_header(figure, lines, style)
    bottom, side = _MARGIN / 2 / height, _MARGIN / 2 / style.width
    rect = (side, bottom, 1 - 2 * side, 1 - bottom - top / height)
    figure.get_layout_engine().set(rect=rect, h_pad=0.08, w_pad=0.08)  # pyright: ignore
    rows = figure.subfigures(len(panels), 1, squeeze=False, height_ratios=heights)
    for row, shown in zip(rows[:, 0], panels, strict=True):
        places = row.subfigures(1, len(shown), squeeze=False, wspace=0.03)
        for place, panel in zip(places[0], shown, strict=True):
            panel.draw(place, parts)
    _settle(figure)
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


@dataclass(frozen=True)
class _Line:
    text: str
    colour: str = GREY
    is_title: bool = False


def _header(report: Report, parts: Parts, style: _Style) -> list[_Line]:
    """Title, what was found, what was compared; of several models the key of their colours."""
    letters = int(style.width / style.scale * _LETTERS)
    asked = answering(report)
    words = ": ".join(filter(None, headline(parts[0].kind, asked[0]))) if len(asked) == 1 else ""
    said = [_Line(line) for line in textwrap.wrap(words, letters)]
    if len(parts) > 1:
        said += [
            _Line(textwrap.shorten(f"■ {_found(part)}", letters), colour)
            for part, colour in in_colours(parts)
        ]
        more = len(parts) - len(said)
        said += [_Line(f"{more} more tuned models are not drawn")] if more else []
    if not style.has_title:
        return said if len(parts) > 1 else []
    name = [_Line(line, INK, is_title=True) for line in _title_lines(report, letters)]
    return [*name, *said, *map(_Line, textwrap.wrap(compared_line(report), letters))]


def _title_lines(report: Report, letters: int) -> list[str]:
    """In letters half as large again."""
    return textwrap.wrap(title(report), int(0.6 * letters), break_on_hyphens=False)


def _found(section: Section) -> str:
    code = "" if section.kind.answer.is_joint else headline(section.kind, section)[0]
    return f"{section.tuned} {section.label} · {code}".removesuffix(" · ")


def _write_header(figure: Figure, lines: list[_Line], style: _Style) -> None:
    width, height = figure.get_size_inches()
    at = height - _MARGIN * style.scale
    for line in lines:
        words = figure.text(_MARGIN / width, at / height, line.text, va="top", color=line.colour)
        words.set_in_layout(False)
        if line.is_title:
            words.set(fontsize=13 * style.scale, fontweight="bold")
        at -= _LINE * style.scale * (1.5 if line.is_title else 1)


def _panels(kind: Kind, parts: Parts) -> list[tuple[Panel, ...]]:
    """Rows of panels: those that have something to draw, or the first row where none has."""
    rows = [tuple(PANELS[name] for name in row) for row in kind.panels]
    kept = [tuple(panel for panel in row if panel.has_data(parts)) for row in rows]
    return [row for row in kept if row] or rows[:1]
