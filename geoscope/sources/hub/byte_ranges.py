"""Which bytes of a file are asked for, and when is the whole file the better request?

Neighbours are joined, across small gaps too, because a request costs more than the bytes of a gap.
Gaps are at most `GAP` bytes each and, of a file, `SHARE` of the wanted bytes together. From
`WHOLE` of a file on, all of it is fetched: it can then be used by every other program.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

__all__ = ["GAP", "SHARE", "WHOLE", "Piece", "Run", "Span", "runs"]

GAP = 1 << 20
SHARE = 0.1
WHOLE = 0.6


class Span(NamedTuple):
    """Bytes begin … end − 1 of a file: one tensor."""

    begin: int
    end: int


class Piece(NamedTuple):
    """A span of which the bytes from `start` on are missing."""

    span: Span
    start: int


@dataclass(frozen=True)
class Run:
    """Pieces that one request brings, in the order of the file."""

    pieces: tuple[Piece, ...]

    @property
    def begin(self) -> int:
        return self.pieces[0].start

    @property
    def end(self) -> int:
        return self.pieces[-1].span.end

    @property
    def nbytes(self) -> int:
        """Bytes on the wire, gaps included."""
        return self.end - self.begin


def runs(pieces: Iterable[Piece], *, gap: int = GAP, share: float = SHARE) -> tuple[Run, ...]:
    """The requests for these pieces, which do not overlap. The smallest gaps are joined first."""
    ordered = sorted(pieces, key=lambda piece: piece.start)
    if not ordered:
        return ()
    gaps = [right.start - left.span.end for left, right in pairwise(ordered)]
    left_over = share * sum(piece.span.end - piece.start for piece in ordered)
    joined: set[int] = set()
    for place in sorted(range(len(gaps)), key=gaps.__getitem__):
        if gaps[place] > min(gap, left_over):
            break
        left_over -= gaps[place]
        joined.add(place)
    groups = [[ordered[0]]]
    for place, piece in enumerate(ordered[1:]):
        if place in joined:
            groups[-1].append(piece)
        else:
            groups.append([piece])
    return tuple(Run(tuple(group)) for group in groups)
