"""Panels of the figure as SVG for the page: letters are text, colours follow light and dark."""

from __future__ import annotations

import re
from dataclasses import dataclass

from geoscope.kinds import Kind
from geoscope.report.sections import Section

__all__ = ["Picture", "pictures"]

# Panels that are several small ones take the width of the page.
_WIDE = ("spectra_by_module", "angles_by_module", "worst")
# The page has maps of its own.
_NOT_SHOWN = ("lift_map",)
_COLOURS = {
    "#222222": "var(--ink)",
    "#6b6b6b": "var(--grey)",
    "#d9d9d9": "var(--line)",
    "#ffffff": "var(--paper)",
    "#000000": "var(--ink)",
    "#0072b2": "var(--c0)",
    "#d55e00": "var(--c1)",
    "#009e73": "var(--c2)",
    "#cc79a7": "var(--c3)",
    "#e69f00": "var(--c4)",
    "#56b4e9": "var(--c5)",
    "#8c510a": "var(--c6)",
}
_COLOUR = re.compile(r"(?<=: )(#[0-9a-f]{6})(?=[;\"])")
_PROLOGUE = re.compile(r"\A.*?(?=<svg)|<metadata>.*?</metadata>|<!--.*?-->", re.DOTALL)
_SIZE = re.compile(r' (?:width|height)="[\d.]+pt"')
_GROUP = re.compile(r'<g id="[a-z0-9_.]+_\d+">|<g id="(?:[a-z]+)">')
_FONT = re.compile(r"(?<=px )'[^;\"]*sans-serif")


@dataclass(frozen=True)
class Picture:
    """A panel: its name, what it shows in words, and its SVG."""

    name: str
    words: str
    svg: str
    is_wide: bool


def pictures(kind: Kind, parts: tuple[Section, ...]) -> list[Picture]:
    """The panels of a kind that have something to draw."""
    from geoscope.report.figures import panel_names, render_panel
    from geoscope.report.panels import PANELS

    made: list[Picture] = []
    for name in panel_names(kind):
        panel = PANELS[name]
        if name in _NOT_SHOWN or not panel.has_data(parts):
            continue
        svg = render_panel(parts, name, is_wide=name in _WIDE).decode("utf-8")
        made.append(Picture(name, panel.words, _inlined(svg, panel.words), name in _WIDE))
    return made


def _inlined(svg: str, words: str) -> str:
    """The SVG as a part of a page: named, without what a file of its own needs."""
    svg = _SIZE.sub("", _PROLOGUE.sub("", svg), count=2)
    svg = _FONT.sub("sans-serif", _GROUP.sub("<g>", svg))
    svg = _COLOUR.sub(lambda match: _COLOURS.get(match[1], match[1]), svg)
    svg = re.sub(r"\n\s*", "\n", svg)
    return svg.replace("<svg ", f'<svg role="img" aria-label="{words}" ', 1)
