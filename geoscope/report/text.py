"""A report for people at a terminal: aligned columns, no box drawing, colour only where asked for.

Columns stand in order of importance; those that do not fit the width are left out from the right.
A last column of long words is never left out: it wraps.
"""

from __future__ import annotations

import io
import textwrap
from dataclasses import dataclass
from typing import TYPE_CHECKING

from geoscope.records import Report
from geoscope.report.content import page
from geoscope.report.numbers import shorten_all
from geoscope.report.page import Block, Cell, Grid, Head
from geoscope.report.plain import plain

if TYPE_CHECKING:
    from rich.text import Text

__all__ = ["render_text"]

_NARROWEST = 40
_GAP = 2
_LEAST_ROOM = 20  # of a last column of long words; with less it goes below its row
_BELOW = "    "
_CODE_STYLES = {
    "OFF_PRINCIPAL": "green",
    "NO_UPDATE": "dim",
    "UNDETERMINED": "magenta",
    "MIXED": "yellow",
    "UNRELATED": "red",
    "TOO_FAR": "red",
    "SPECTRUM_DISTORTED": "yellow",
    "ON_PRINCIPAL": "red",
    "RANK_COLLAPSE": "red",
    "INIT_MISMATCH": "red",
    "PARTIAL": "red",
}


def render_text(
    report: Report, *, width: int, colour: bool, verbose: bool = False, explain: bool = False
) -> str:
    """The report as text within `width` columns (40 at least), ending in a newline."""
    width = max(width, _NARROWEST)
    lines: list[Text] = []
    for block in page(plain(report), verbose=verbose, explain=explain):
        lines += _block_lines(block, width)
    return _printed(lines[:-1], width, colour=colour)


def _printed(lines: list[Text], width: int, *, colour: bool) -> str:
    from rich.console import Console

    stream = io.StringIO()
    console = Console(
        file=stream,
        width=width,
        force_terminal=colour,
        color_system="standard" if colour else None,
        no_color=not colour,
        legacy_windows=False,
    )
    for line in lines:
        line.rstrip()
        console.print(line, soft_wrap=True)
    return stream.getvalue()


def _block_lines(block: Block, width: int) -> list[Text]:
    """Title, prose, table, and an empty line."""
    from rich.text import Text

    style = f"bold {_CODE_STYLES.get(block.code, '')}".strip()
    lines = [Text(line, style=style) for line in _wrapped(block.title, width, indent="  ")]
    for words in block.lines:
        lines += [Text(line) for line in _wrapped(words, width, indent="  ")]
    if block.grid is not None:
        lines += _grid_lines(block.grid, width)
    return [*lines, Text("")]


def _wrapped(words: str, width: int, indent: str = "") -> list[str]:
    """Lines within the width; names such as `geoscope-demo/base` are not parted at a hyphen."""
    return textwrap.wrap(words, width, subsequent_indent=indent, break_on_hyphens=False)


@dataclass(frozen=True)
class _Column:
    """A column whose cells are set: values end at one place, nulls begin at one place."""

    head: Head
    cells: tuple[Cell, ...]

    @property
    def value_width(self) -> int:
        return max((len(cell.text) for cell in self.cells), default=0)

    @property
    def null_width(self) -> int:
        return max((len(cell.null) for cell in self.cells), default=0)

    @property
    def width(self) -> int:
        beside = 1 + self.null_width if self.null_width else 0
        return max(len(self.head.text), self.value_width + beside)

    @property
    def longest_word(self) -> int:
        words = (word for cell in self.cells for word in cell.text.split())
        return max(map(len, words), default=0)

    @property
    def is_empty(self) -> bool:
        return not any(cell.text for cell in self.cells)


def _grid_lines(grid: Grid, width: int) -> list[Text]:
    from rich.text import Text

    columns = _columns(grid, width)
    long = columns.pop() if columns and columns[-1].head.is_long else None
    columns = _fitting(columns, width)
    start = _width(columns) + _GAP
    is_beside = long is not None and width - start >= max(_LEAST_ROOM, long.longest_word)
    heads = [*columns, *([long] if long is not None and is_beside else [])]
    lines: list[Text] = []
    if any(column.head.text for column in heads):
        lines.append(_line([_set_head(column) for column in heads]))
    at = 0
    for row in grid.rows:
        if len(row) == 1:
            lines.append(Text(row[0].text, style="italic"))
            continue
        cells = _line([_set_cell(column, column.cells[at]) for column in columns])
        words = "" if long is None else long.cells[at].text
        lines += _beside(cells, words, start, width) if is_beside else _over(cells, words, width)
        at += 1
    return lines


def _beside(row: Text, words: str, start: int, width: int) -> list[Text]:
    """A row with long words at its end, which go on below in the same column."""
    from rich.text import Text

    first, *others = _wrapped(words, width - start) or [""]
    margin = " " * start
    return [_line([row, Text(first)]), *(Text(margin + one) for one in others)]


def _over(row: Text, words: str, width: int) -> list[Text]:
    """A row with long words below it."""
    from rich.text import Text

    return [row, *(Text(_BELOW + one) for one in _wrapped(words, width - len(_BELOW)))]


def _columns(grid: Grid, width: int) -> list[_Column]:
    rows = [row for row in grid.rows if len(row) > 1]
    columns: list[_Column] = []
    for index, head in enumerate(grid.heads):
        cells = [row[index] for row in rows]
        if head.is_name:
            names = shorten_all([cell.text for cell in cells], max(20, width * 2 // 5))
            cells = [Cell(name) for name in names]
        if index == 0 and len(rows) < len(grid.rows):
            cells = [Cell(f"  {cell.text}") for cell in cells]  # below the heads of their groups
        columns.append(_Column(head, _marked(cells)))
    return [column for column in columns if not column.is_empty]


def _marked(cells: list[Cell]) -> tuple[Cell, ...]:
    """Where a number carries a mark behind it, the others get a space: digits stay aligned."""
    if not any(cell.text.endswith("~") for cell in cells):
        return tuple(cells)
    return tuple(
        cell if cell.text.endswith("~") else Cell(f"{cell.text} ", cell.null) for cell in cells
    )


def _width(columns: list[_Column]) -> int:
    return sum(column.width for column in columns) + _GAP * max(len(columns) - 1, 0)


def _fitting(columns: list[_Column], width: int) -> list[_Column]:
    used, kept = 0, []
    for column in columns:
        used += column.width + (_GAP if kept else 0)
        if used > width:
            break
        kept.append(column)
    return kept


def _set_head(column: _Column) -> Text:
    from rich.text import Text

    text = column.head.text
    text = text.ljust(column.width) if column.head.is_words else text.rjust(column.width)
    return Text(text, style="bold")


def _set_cell(column: _Column, cell: Cell) -> Text:
    from rich.text import Text

    if column.head.is_words:
        return Text(cell.text.ljust(column.width), style=_CODE_STYLES.get(cell.code, ""))
    text = Text(cell.text.rjust(column.value_width))
    if column.null_width:
        text.append(f" {cell.null.ljust(column.null_width)}", style="dim")
    text.pad_left(column.width - len(text))
    return text


def _line(parts: list[Text]) -> Text:
    from rich.text import Text

    return Text(" " * _GAP).join(parts)
