"""A report in a notebook: the blocks of the page as tables of HTML, without scripts or styles."""

from __future__ import annotations

from html import escape

from geoscope.records import Report
from geoscope.report.content import page
from geoscope.report.page import Block, Cell, Grid

__all__ = ["render_notebook"]


def render_notebook(report: Report) -> str:
    """The page of the report; the first block is its title."""
    first, *rest = page(report)
    parts = [f"<h4>{escape(first.title)}</h4>", *_lines(first)]
    return "\n".join([*parts, *(_block(block) for block in rest)])


def _block(block: Block) -> str:
    title = [f"<strong>{escape(block.title)}</strong>"] if block.title else []
    table = [_table(block.grid)] if block.grid is not None else []
    return "\n".join([*title, *_lines(block), *table])


def _lines(block: Block) -> list[str]:
    return [f"<p>{escape(line)}</p>" for line in block.lines]


def _table(grid: Grid) -> str:
    heads = "".join(f"<th>{escape(head.text)}</th>" for head in grid.heads)
    rows = "".join(f"<tr>{_row(row, len(grid.heads))}</tr>" for row in grid.rows)
    return f"<table><thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table>"


def _row(row: tuple[Cell, ...], width: int) -> str:
    if len(row) == 1:
        return f'<th colspan="{width}">{escape(row[0].text)}</th>'
    texts = (" ".join(filter(None, (cell.text, cell.null))) for cell in row)
    return "".join(f"<td>{escape(text)}</td>" for text in texts)
