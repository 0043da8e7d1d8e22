"""Differences of one stored matrix from others of its shape, by blocks: each entry is upcast once.

Upcast first, subtracted second, block by block, so that nothing is ever held in fp64 as a whole.
On the CPU.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from geoscope.linalg import blas
from geoscope.profile import stage

__all__ = ["BLOCK", "Differences"]

# Rows or columns of the longer side in one fp64 block: long enough for large products to run at
# full speed, short enough to stay near the cache.
BLOCK = 1024
# Few rows are multiplied by blocks of so many entries, which the cache of one core holds; smaller
# ones cost two workers more in waits for Python's lock. (Columns of a wide matrix would be read
# with short strides.)
_FEW_ROWS, _CACHED = 12, 1 << 18
# Entries of the minuend that are upcast at a time; of whole matrices in fp32.
_UPCAST, _UPCAST32 = 1 << 17, 1 << 18
_WITHIN_FP32 = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class Differences:
    """plus − each of `minus`, (m, n); or plus alone, where there are none."""

    plus: Tensor
    minus: tuple[Tensor, ...] = ()

    @property
    def is_tall(self) -> bool:
        return self.plus.shape[0] >= self.plus.shape[1]

    def __len__(self) -> int:
        """How many differences."""
        return max(1, len(self.minus))

    def upright(self, rooms: Sequence[Tensor] | None = None) -> list[tuple[Tensor, Tensor]]:
        """Each in fp32, its longer side first (long, q), rounded once: after the subtraction; and
        its ‖·‖² in fp32.

        rooms: memory of that shape to hold them.
        """
        (m, n), tall = self.plus.shape, self.is_tall
        if rooms is None:
            shape = (m, n) if tall else (n, m)
            rooms = [torch.empty(shape, dtype=torch.float32) for _ in range(len(self))]
        work = self._work_dtype(torch.float32)
        head = torch.empty(min(m, max(16, _UPCAST32 // n)), n, dtype=work)
        blocks = [torch.empty_like(head) for _ in rooms]
        squares = torch.zeros(len(self))
        for start in range(0, m, len(head)):
            rows = slice(start, start + len(head))
            places = [room[rows] if tall else room[:, rows].T for room in rooms]
            is_direct = tall and work == torch.float32
            out = places if is_direct else [block[: len(places[0])] for block in blocks]
            self._subtract(rows, 0, out, head)
            for i, (place, block) in enumerate(zip(places, out, strict=True)):
                flat = block.reshape(-1)
                squares[i] += torch.dot(flat, flat)
                if not is_direct:
                    place.copy_(block)
        return list(zip(rooms, squares, strict=True))

    @stage("products")
    def there_and_back(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Images of rows (k, q) of the shorter side under the first difference A, (k, long), and
        the images of these, (k, q), in one pass over the entries, fp64.

        X·Aᵀ and X·AᵀA if tall, X·A and X·AAᵀ if wide.
        """
        there = rows.new_empty(len(rows), max(self.plus.shape))
        back = torch.zeros_like(rows)
        for part, (block, *_) in self.blocks(length=self.length(len(rows))):
            image = there[:, part]
            blas.gemm(rows, block, image, Bt=self.is_tall)
            blas.gemm(image, block, back, add=True, Bt=not self.is_tall)
        return there, back

    def length(self, rows: int) -> int:
        """Of the blocks that products with so many rows take along the longer side."""
        if rows > _FEW_ROWS or not self.is_tall:
            return BLOCK
        return max(1, min(BLOCK, _CACHED // self.plus.shape[1]))

    def blocks(
        self, dtype: torch.dtype = torch.float64, *, length: int = BLOCK
    ) -> Iterator[tuple[slice, list[Tensor]]]:
        """Blocks of every difference along the longer side: rows (c, n) if tall, columns (m, c) if
        wide.

        c: `length`, fewer in the last. In fp32 they are rounded once, after the subtraction. The
        next block overwrites them.
        """
        axis, shape = 0 if self.is_tall else 1, [*self.plus.shape]
        long, shape[axis] = shape[axis], min(length, shape[axis])
        work = self._work_dtype(dtype)
        rooms = [torch.empty(shape, dtype=work) for _ in range(len(self))]
        head = torch.empty(max(1, min(shape[0], _UPCAST // shape[1])), shape[1], dtype=work)
        rounded = None if work == dtype else [room.to(dtype) for room in rooms]
        for start in range(0, long, length):
            count = min(length, long - start)
            blocks = [room.narrow(axis, 0, count) for room in rooms]
            with stage("upcast"):
                self._subtract(slice(start, start + count), axis, blocks, head)
                if rounded is not None:
                    pairs = zip(rounded, blocks, strict=True)
                    blocks = [room.narrow(axis, 0, count).copy_(block) for room, block in pairs]
            yield slice(start, start + count), blocks

    def _subtract(self, part: slice, axis: int, out: Sequence[Tensor], head: Tensor) -> None:
        """The differences in part of an axis into `out`, some rows at a time: they stay in a cache.

        head: memory for these rows of the minuend.
        """
        plus, *minus = (
            one[part] if axis == 0 else one[:, part] for one in (self.plus, *self.minus)
        )
        if not minus:
            out[0].copy_(plus)
            return
        for first in range(0, len(plus), len(head)):
            rows = slice(first, first + len(head))
            minuend = head[: len(plus[rows]), : plus.shape[1]].copy_(plus[rows])
            for one, block in zip(minus, out, strict=True):
                difference = block[rows].copy_(one[rows])
                torch.sub(minuend, difference, out=difference)

    def _work_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Of a difference: fp32 holds every operand of a narrower format, and rounds once."""
        narrow = all(one.dtype in _WITHIN_FP32 for one in (self.plus, *self.minus))
        return dtype if narrow else torch.float64
