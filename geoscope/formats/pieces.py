"""How is a tensor read that lies on disk in pieces? Its rows come from the boxes that hold them.

    weight (7, 3) = rows 0–1 of rank 0 · rows 2–3 of rank 1 · rows 4–5 of rank 2 · row 6 of rank 3

A piece is a box: the index where it begins in the whole and its size, in each dimension. The pieces
of a tensor fill it exactly, which is checked before anything is allocated. Reading goes straight
into the caller's buffer, and a part of a tensor touches the pieces that it needs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise
from typing import TYPE_CHECKING, Generic, TypeVar

from geoscope.formats.container import byte_view
from geoscope.records import TensorInfo

if TYPE_CHECKING:
    import torch

__all__ = ["Fill", "Piece", "Pieced", "flattened", "flaw", "read_part", "read_whole"]

P = TypeVar("P")


@dataclass(frozen=True)
class Piece(Generic[P]):
    """A box of a tensor, and where it is stored. A scalar counts as a tensor of one row."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    place: P


@dataclass(frozen=True)
class Pieced(Generic[P]):
    """A tensor and the pieces that fill it. `dtype` is spelled as torch does."""

    shape: tuple[int, ...]
    dtype: str
    pieces: tuple[Piece[P], ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * _dtype(self.dtype).itemsize

    @property
    def rows(self) -> tuple[int, ...]:
        """The shape with at least one dimension."""
        return self.shape or (1,)

    def info(self, name: str, source: str) -> TensorInfo:
        return TensorInfo(name, self.shape, self.dtype, self.nbytes, source)


def flattened(stored: Pieced[P]) -> Pieced[P]:
    """A stack (…, R, C) as one matrix (…·R, C), so that the rows of one of its matrices are read
    alone; the same where a piece holds rows of several matrices."""
    *lead, rows, columns = stored.shape if len(stored.shape) > 2 else (0, 0)
    if not lead or any(math.prod(piece.sizes[:-2]) != 1 for piece in stored.pieces):
        return stored
    return Pieced(
        (math.prod(lead) * rows, columns),
        stored.dtype,
        tuple(
            Piece(
                (_place(piece.offsets[:-2], lead) * rows + piece.offsets[-2], piece.offsets[-1]),
                piece.sizes[-2:],
                piece.place,
            )
            for piece in stored.pieces
        ),
    )


def _place(offsets: Sequence[int], sides: Sequence[int]) -> int:
    """The number of a matrix in a stack, row by row."""
    number = 0
    for offset, side in zip(offsets, sides, strict=True):
        number = number * side + offset
    return number


def _dtype(name: str) -> torch.dtype:
    import torch

    return getattr(torch, name)


# Copies rows begin … end − 1 of a piece into a tensor of their shape.
Fill = Callable[["torch.Tensor", Piece[P], int, int], None]


def read_whole(stored: Pieced[P], fill: Fill[P], buffer: torch.Tensor | None) -> torch.Tensor:
    """The tensor, inside `buffer` when one is given."""
    raw = byte_view(stored.nbytes, buffer)
    whole = raw.view(_dtype(stored.dtype)).reshape(stored.rows)
    _gather(stored, fill, 0, stored.rows[0], whole)
    return whole.reshape(stored.shape)


def read_part(stored: Pieced[P], fill: Fill[P], begin: int, end: int) -> torch.Tensor:
    """Entries begin … end − 1 in row-major order, 1-D. Whole rows are read, one at each end more
    than asked for at most."""
    width = math.prod(stored.rows[1:])
    if begin >= end:
        return byte_view(0, None).view(_dtype(stored.dtype))
    first, last = begin // width, -(-end // width)
    raw = byte_view((last - first) * width * _dtype(stored.dtype).itemsize, None)
    rows = raw.view(_dtype(stored.dtype)).reshape(last - first, *stored.rows[1:])
    _gather(stored, fill, first, last, rows)
    return rows.reshape(-1)[begin - first * width : end - first * width]


def _gather(stored: Pieced[P], fill: Fill[P], begin: int, end: int, out: torch.Tensor) -> None:
    """Rows begin … end − 1 into `out`."""
    for piece in stored.pieces:
        top = piece.offsets[0]
        low, high = max(begin, top), min(end, top + piece.sizes[0])
        if low >= high or not math.prod(piece.sizes):
            continue
        target = out[low - begin : high - begin]
        for dim in range(1, len(stored.rows)):
            target = target.narrow(dim, piece.offsets[dim], piece.sizes[dim])
        fill(target, piece, low - top, high - top)


def flaw(shape: Sequence[int], pieces: Sequence[Piece[P]]) -> str | None:
    """Why the pieces do not fill a tensor of this shape exactly; None when they do."""
    shape = tuple(shape) or (1,)
    for piece in pieces:
        ends = [a + n for a, n in zip(piece.offsets, piece.sizes, strict=True)]
        if any(end > size for end, size in zip(ends, shape, strict=True)):
            return f"a piece at {list(piece.offsets)} of size {list(piece.sizes)} sticks out"
    filled = [piece for piece in pieces if math.prod(piece.sizes)]
    entries = sum(math.prod(piece.sizes) for piece in filled)
    if entries != math.prod(shape):
        return f"the pieces hold {entries} entries, the tensor {math.prod(shape)}"
    if _overlap(shape, filled):
        return "two pieces overlap"
    return None


def _overlap(shape: tuple[int, ...], pieces: Sequence[Piece[P]]) -> bool:
    split = [
        dim for dim, size in enumerate(shape) if any(piece.sizes[dim] != size for piece in pieces)
    ]
    if len(split) > 1:
        return any(_meet(one, other) for one, other in combinations(pieces, 2))
    dim = split[0] if split else 0
    ordered = sorted(pieces, key=lambda piece: piece.offsets[dim])
    return any(
        one.offsets[dim] + one.sizes[dim] > other.offsets[dim] for one, other in pairwise(ordered)
    )


def _meet(one: Piece[P], other: Piece[P]) -> bool:
    return all(
        a < b + n and b < a + m
        for a, m, b, n in zip(one.offsets, one.sizes, other.offsets, other.sizes, strict=True)
    )
