"""The nouns between content and rendering: a page is blocks of lines and tables."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Block", "Cell", "Grid", "Head"]


@dataclass(frozen=True)
class Cell:
    """Text of a table, with the null that stands beside a number. `code` asks for a colour."""

    text: str = ""
    null: str = ""
    code: str = ""


@dataclass(frozen=True)
class Head:
    """Head of a column. Words stand left, numbers right; a name may be cut in the middle.

    Long words stand in the last column, and wrap there or below their row. What is extra goes
    first where the columns do not fit.
    """

    text: str
    is_words: bool = False
    is_name: bool = False
    is_long: bool = False
    is_extra: bool = False


@dataclass(frozen=True)
class Grid:
    """A table; columns are in order of importance.

    A row of one cell heads a group; one of two, in a wider table, is a name with words beside it.
    """

    heads: tuple[Head, ...]
    rows: tuple[tuple[Cell, ...], ...]

    @property
    def filled(self) -> Grid:
        """Without the columns that hold nothing; rows of one cell or two stay as they are."""
        whole = [row for row in self.rows if len(row) == len(self.heads)]
        kept = [i for i in range(len(self.heads)) if any(row[i].text for row in whole)]
        rows = tuple(
            tuple(row[i] for i in kept) if len(row) == len(self.heads) else row for row in self.rows
        )
        return Grid(tuple(self.heads[i] for i in kept), rows)


@dataclass(frozen=True)
class Block:
    """A titled part of the page: lines of prose, then a table. `code` colours the title."""

    title: str
    lines: tuple[str, ...] = ()
    grid: Grid | None = None
    code: str = ""
