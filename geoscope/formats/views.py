"""Which entries of a stored tensor make up one weight, and in what order are they read?

A stored tensor is a stack of row-major matrices (R, C); a plain matrix is a stack of one, a vector
a stack of columns. A view is some rows, or some columns, of one of these matrices:

    blocks of `count` rows (or columns), the first at `start`, `repeats` of them, `stride` apart

That is one expert of a stack, the q of a fused qkv_proj (one block), the q of a fused
query_key_value (a block for each head) and the gate of interleaved experts (blocks of one column).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

__all__ = ["Blocks", "View", "gather"]

# Shorter runs of columns are read together with what lies between them.
_SHORT_RUN = 4096  # bytes


@dataclass(frozen=True)
class Blocks:
    """`repeats` blocks of `count` rows or columns, `stride` apart, the first at `start`."""

    start: int
    count: int
    stride: int = 0
    repeats: int = 1

    @property
    def total(self) -> int:
        """Rows or columns in all blocks."""
        return self.count * self.repeats

    def fits(self, length: int) -> bool:
        """Whether all blocks lie within `length` rows or columns."""
        last = self.start + (self.repeats - 1) * self.stride + self.count
        return self.count > 0 and self.start >= 0 and last <= length


@dataclass(frozen=True)
class View:
    """Some rows (`axis` 0) or columns (1) of matrix number `matrix` of a stored tensor.

    stored: name of that tensor. rows, columns: sides of each of its matrices, as stored.
    """

    stored: str
    rows: int
    columns: int
    blocks: Blocks
    axis: int = 0
    matrix: int = 0

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the view, as stored."""
        if self.axis == 0:
            return self.blocks.total, self.columns
        return self.rows, self.blocks.total

    @property
    def run(self) -> int:
        """Entries of the view that lie side by side in the file."""
        if self.axis == 1 and self.blocks.count == self.columns:
            return self.rows * self.columns
        return self.blocks.count * (self.columns if self.axis == 0 else 1)

    def place(self, number: int) -> int:
        """Where run `number` begins, in entries of the stored tensor."""
        blocks = self.blocks
        row, block = (0, number) if self.axis == 0 else divmod(number, blocks.repeats)
        first = blocks.start + block * blocks.stride
        offset = first * self.columns if self.axis == 0 else row * self.columns + first
        return self.matrix * self.rows * self.columns + offset

    def runs(self, begin: int, end: int) -> Iterator[tuple[int, int]]:
        """Entries begin … end − 1 of the view as (begin, end) of the stored tensor."""
        while begin < end:
            number, inside = divmod(begin, self.run)
            length = min(self.run - inside, end - begin)
            place = self.place(number) + inside
            yield place, place + length
            begin += length


def gather(
    view: View, begin: int, end: int, entries: Callable[[int, int], torch.Tensor], *, itemsize: int
) -> torch.Tensor:
    """Entries begin … end − 1 of a view in the order of the file, 1-D.

    entries(begin, end): those of the stored tensor; itemsize: bytes of one of them in the file.
    """
    import torch

    if view.axis == 1 and view.run < view.columns and view.run * itemsize < _SHORT_RUN:
        return _from_whole_rows(view, begin, end, entries)
    parts = [entries(*run) for run in view.runs(begin, end)]
    if len(parts) == 1:
        return parts[0]
    return torch.cat(parts) if parts else entries(0, 0)


def _from_whole_rows(
    view: View, begin: int, end: int, entries: Callable[[int, int], torch.Tensor]
) -> torch.Tensor:
    import torch

    width = view.blocks.total
    first, last = begin // width, math.ceil(end / width)
    offset = view.matrix * view.rows
    rows = entries((offset + first) * view.columns, (offset + last) * view.columns)
    starts = view.blocks.start + view.blocks.stride * torch.arange(view.blocks.repeats)
    chosen = (starts[:, None] + torch.arange(view.blocks.count)).reshape(-1)
    taken = rows.reshape(-1, view.columns).index_select(1, chosen).reshape(-1)
    return taken[begin - first * width : end - first * width]
