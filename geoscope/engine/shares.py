"""Work that is shared out among machines, by its files and its size: pure, from headers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

__all__ = ["Work", "fitting", "shared"]

T = TypeVar("T")

# Seconds that a byte takes to be read, beside those of computing: 1 GB/s.
_SECONDS_A_BYTE = 1e-9
# A share of a cluster has so much of these at most, or one matrix: a node is not long away with it,
# and not busier with starting than with work.
_SECONDS, _BYTES, _MATRICES = 10.0, 1e9, 256


@dataclass(frozen=True)
class Work:
    """What one matrix takes.

    files: that it is read from, the one that orders the work first.
    computing: seconds of one core.
    nbytes: that are read.
    """

    files: tuple[str, ...]
    computing: float
    nbytes: int

    @property
    def seconds(self) -> float:
        """With reading."""
        return self.computing + _SECONDS_A_BYTE * self.nbytes


def fitting(works: Sequence[Work]) -> int:
    """Into how many shares a cluster takes the matrices; it does not depend on the cluster."""
    seconds = sum(work.seconds for work in works)
    nbytes = sum(work.nbytes for work in works)
    most = max(seconds / _SECONDS, nbytes / _BYTES, len(works) / _MATRICES)
    return max(1, min(len(works), round(most + 0.5)))


def shared(items: Sequence[T], works: Sequence[Work], of: int) -> list[tuple[T, ...]]:
    """The items in so many shares, each in their order.

    In the order of the files, cut where the work is even: a machine reads few files.
    works: of each item.
    """
    by_file = sorted(range(len(items)), key=lambda i: works[i].files)
    total, before, owners = sum(works[i].seconds for i in by_file), 0.0, dict[int, int]()
    for i in by_file:
        owners[i] = min(int(of * (before + works[i].seconds / 2) / total), of - 1)
        before += works[i].seconds
    shares: list[list[T]] = [[] for _ in range(of)]
    for i, item in enumerate(items):
        shares[owners[i]].append(item)
    return [tuple(share) for share in shares]
