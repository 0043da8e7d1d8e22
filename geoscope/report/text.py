"""A report for people at a terminal: aligned columns, no box drawing, colour only where asked for.

Columns stand in order of importance; those that do not fit the width are left out from the right.
A last column of long words is never left out: it wraps.
"""

from __future__ import annotations

import io
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from geoscope.records import Report
from geoscope.report.answer import answer, headlines
from geoscope.report.content import page
from geoscope.report.explain import explain_blocks
from geoscope.report.numbers import shorten_all
from geoscope.report.page import Block, Cell, Grid, Head
from geoscope.report.plain import plain
from geoscope.report.sections import answering

if TYPE_CHECKING:
    from rich.text import Text

__all__ = ["render_headline", "render_text"]

_NARROWEST = 40
_ANSWER_WIDTH, _ANSWER_LINES, _FEWEST_ROWS = 80, 20, 1
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
    "good": "green",
    "open": "yellow",
    "bad": "red",
}


def render_text(
    report: Report,
    *,
    width: int,
    colour: bool,
    details: bool = False,
    verbose: bool = False,
    explain: bool = False,
) -> str:
    """The report as text within `width` columns (40 at least), ending in a newline.

    The answer in at most 20 lines of 80 columns; all numbers with `details` or `verbose`; rules,
    limits and what met them with `explain`.
    """
    width = max(width, _NARROWEST)
    report = plain(report)
    if details or verbose:
        blocks = page(report, verbose=verbose, explain=explain)
        first, *others = headlines(report)
        blocks[1:1] = [Block(first, tuple(others))]
        return _printed(_lines(blocks, width), width, colour=colour)
    lines = _answer_lines(report, min(width, _ANSWER_WIDTH))
    if explain:
        blocks = [block for part in answering(report) for block in explain_blocks(part)]
        lines += [_empty(), *_lines(blocks, width)] if blocks else []
    return _printed(lines, width, colour=colour)


def render_headline(report: Report) -> str:
    """The headline alone, whatever its width, ending in a newline."""
    return "\n".join(headlines(plain(report))) + "\n"


def _answer_lines(report: Report, width: int) -> list[Text]:
    """The answer; where it is too long the last facts are left out."""
    lines = _lines(answer(report), width)
    if len(lines) <= _ANSWER_LINES:
        return lines
    grid = answer(report)[1].grid
    count = 0 if grid is None else len(grid.rows)
    rows = max(_FEWEST_ROWS, count - (len(lines) - _ANSWER_LINES))
    return _lines(answer(report, rows=rows), width)


def _lines(blocks: Sequence[Block], width: int) -> list[Text]:
    return [line for block in blocks for line in _block_lines(block, width)][:-1]


def _empty() -> Text:
    from rich.text import Text

    return Text("")


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
        if len(row) != len(grid.heads):
            lines += _across(row, columns, width)
            continue
        cells = _line([_set_cell(column, column.cells[at]) for column in columns])
        words = "" if long is None else long.cells[at].text
        lines += _beside(cells, words, start, width) if is_beside else _over(cells, words, width)
        at += 1
    return lines


def _across(row: tuple[Cell, ...], columns: list[_Column], width: int) -> list[Text]:
    """The head of a group, or a name in the first column with words over the others."""
    from rich.text import Text

    if len(row) == 1:
        return [Text(row[0].text, style="italic")]
    start = columns[0].width if columns else 0
    return _beside(Text(row[0].text.ljust(start)), row[1].text, start + _GAP, width)


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
    rows = [row for row in grid.rows if len(row) == len(grid.heads)]
    has_groups = any(len(row) == 1 for row in grid.rows)
    columns: list[_Column] = []
    for index, head in enumerate(grid.heads):
        cells = [row[index] for row in rows]
        if head.is_name:
            names = shorten_all([cell.text for cell in cells], max(20, width * 2 // 5))
            cells = [Cell(name) for name in names]
        if index == 0 and has_groups:
            cells = [Cell(f"  {cell.text}") for cell in cells]  # below the heads of their groups
        columns.append(_Column(head, _marked(cells)))
    return [column for column in columns if not column.is_empty]


def _marked(cells: list[Cell]) -> tuple[Cell, ...]:
    """Where a number carries a mark behind it, the others get a space: digits stay aligned."""
    marks = ("~", "*")
    if not any(cell.text.endswith(marks) for cell in cells):
        return tuple(cells)
    return tuple(
        cell if cell.text.endswith(marks) else Cell(f"{cell.text} ", cell.null) for cell in cells
    )


def _width(columns: list[_Column]) -> int:
    return sum(column.width for column in columns) + _GAP * max(len(columns) - 1, 0)


def _fitting(columns: list[_Column], width: int) -> list[_Column]:
    """Those that fit: without what is extra where not all do, and then from the left."""
    if _width(columns) > width:
        columns = [column for column in columns if not column.head.is_extra]
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
