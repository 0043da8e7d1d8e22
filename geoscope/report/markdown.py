"""The report as GitHub Markdown: the content of the text, with full names and every column."""

from __future__ import annotations

import re

from geoscope.records import Report
from geoscope.report.answer import answer
from geoscope.report.content import page
from geoscope.report.page import Block, Cell, Grid, Head
from geoscope.report.plain import plain

__all__ = ["render_markdown"]


# An underscore inside a word is not a mark.
_MARKS = re.compile(r"[\\`*|<#~]|(?<!\w)_|_(?!\w)")


def render_markdown(report: Report) -> str:
    """The blocks of the page, the first as title; then the answer."""
    report = plain(report)
    first, *rest = page(report)
    rest = [*answer(report)[1:], *rest]
    parts = [f"# {_escaped(first.title)}", *_prose(first)]
    for block in rest:
        parts += [f"## {_escaped(block.title)}"] if block.title else []
        parts += _prose(block)
        parts += [_table(block.grid)] if block.grid is not None else []
    return "\n\n".join(parts) + "\n"


def _prose(block: Block) -> list[str]:
    return [_escaped(line) for line in block.lines]


def _table(grid: Grid) -> str:
    grid = grid.filled
    lines = [
        _row([_escaped(head.text) for head in grid.heads]),
        _row([":--" if head.is_words else "--:" for head in grid.heads]),
    ]
    for row in grid.rows:
        if len(row) != len(grid.heads):
            lines.append(_row([*_named(row), *([""] * (len(grid.heads) - len(row)))]))
        else:
            lines.append(_row([_cell(*each) for each in zip(grid.heads, row, strict=True)]))
    return "\n".join(lines)


def _named(row: tuple[Cell, ...]) -> list[str]:
    """The head of a group, or a name with words."""
    first, *words = (_escaped(cell.text) for cell in row)
    return [first, *words] if words else [f"**{first}**"]


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _cell(head: Head, cell: Cell) -> str:
    if head.is_name:
        return f"`{cell.text}`"
    return " ".join(_escaped(text) for text in (cell.text, cell.null) if text)


def _escaped(text: str) -> str:
    """Text that Markdown leaves as it is."""
    return _MARKS.sub(r"\\\g<0>", text)
