"""A matrix as it is stored, multiplied in fp64 without ever being held in fp64 as a whole.

`Operand(base)` is W0, `Operand(tuned, base)` the update W1 − W0: upcast first, subtracted second,
block by block, so that a pair in work costs its stored bytes and little more. Stacks on other
devices go through `stacked`, all matrices at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from geoscope.linalg import blas, stacked
from geoscope.profile import stage

__all__ = ["Operand"]

# Rows or columns of the longer side in one fp64 block: long enough for the products to run at
# full speed, short enough to stay near the cache.
_BLOCK = 512
# Column blocks of the Gram matrix; only those on and above the diagonal are computed.
_GRAM_BLOCK = 256


@dataclass(frozen=True)
class Operand:
    """plus − minus, or plus alone: a stack (b, m, n) of stored matrices of one shape."""

    plus: Tensor
    minus: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        return self.plus.shape[-2], self.plus.shape[-1]

    @property
    def is_tall(self) -> bool:
        """Whether rows are at least as many as columns; the Gram matrix is of the shorter side."""
        return self.plus.shape[-2] >= self.plus.shape[-1]

    def __len__(self) -> int:
        return len(self.plus)

    def row(self, i: int) -> Operand:
        """The i-th matrix, as a stack of one."""
        minus = None if self.minus is None else self.minus[i : i + 1]
        return Operand(self.plus[i : i + 1], minus)

    def dense(self) -> Tensor:
        """The stack in fp64, (b, m, n)."""
        whole = self.plus.to(torch.float64, copy=True)
        return whole if self.minus is None else whole.sub_(self.minus)

    @stage("entries")
    def norm(self) -> Tensor:
        """Frobenius norms, (b,)."""
        if self.plus.device.type != "cpu":
            return stacked.norm(self.plus, self.minus)
        squares = [
            sum(float(torch.linalg.vector_norm(block)) ** 2 for _, block in self.blocks(i))
            for i in range(len(self))
        ]
        return torch.tensor(squares, dtype=torch.float64).sqrt()

    @stage("gram")
    def gram(self) -> Tensor:
        """Gram matrices of the shorter side, (b, q, q): AᵀA if tall, AAᵀ if wide."""
        if self.plus.device.type != "cpu":
            return stacked.gram(self.plus, self.minus)
        if len(self) == 1:
            return self._gram(0)[None]
        return torch.stack([self._gram(i) for i in range(len(self))])

    def _gram(self, i: int, dtype: torch.dtype = torch.float64) -> Tensor:
        q = min(self.shape)
        gram = torch.zeros(q, q, dtype=dtype)
        for _, block in self.blocks(i, dtype):
            for start in range(0, q, _GRAM_BLOCK):
                stop = min(start + _GRAM_BLOCK, q)
                out = gram[start:stop, start:]
                if self.is_tall:
                    blas.gemm(block[:, start:stop], block[:, start:], out, add=True, At=True)
                else:
                    blas.gemm(block[start:stop], block[start:], out, add=True, Bt=True)
        for start in range(0, q, _GRAM_BLOCK):  # mirror what stands right of each diagonal block
            stop = min(start + _GRAM_BLOCK, q)
            gram[stop:, start:stop] = gram[start:stop, stop:].T
        return gram

    @stage("gram")
    def gram32(self) -> Tensor:
        """The Gram matrix of the shorter side of one matrix in fp32 (q, q), on the CPU.

        Good to 1e-7·σ1² or so: for a Krylov space, never for values.
        """
        return self._gram(0, dtype=torch.float32)

    def single(self) -> Tensor:
        """One matrix in fp32 (m, n): upcast (or subtracted in fp64) first, rounded second."""
        if self.minus is None:
            return self.plus[0].to(torch.float32)
        whole = torch.empty(self.shape, dtype=torch.float32)
        axis = 0 if self.is_tall else 1
        for part, block in self.blocks(0):
            whole.narrow(axis, part.start, part.stop - part.start).copy_(block)
        return whole

    @stage("products")
    def right(self, X: Tensor) -> Tensor:
        """X·Aᵀ for rows X (b, k, n): the images A·x as rows, (b, k, m)."""
        if self.plus.device.type != "cpu":
            return stacked.right(self.plus, self.minus, X)
        out = X.new_zeros(*X.shape[:-1], self.shape[0])
        for i, rows in enumerate(X):
            for part, block in self.blocks(i):
                if self.is_tall:  # block holds rows of A
                    blas.gemm(rows, block, out[i][:, part], Bt=True)
                else:  # block holds columns of A
                    blas.gemm(rows[:, part], block, out[i], add=True, Bt=True)
        return out

    @stage("products")
    def left(self, Y: Tensor) -> Tensor:
        """Y·A for rows Y (b, k, m): the images Aᵀ·y as rows, (b, k, n)."""
        if self.plus.device.type != "cpu":
            return stacked.left(self.plus, self.minus, Y)
        out = Y.new_zeros(*Y.shape[:-1], self.shape[1])
        for i, rows in enumerate(Y):
            for part, block in self.blocks(i):
                if self.is_tall:
                    blas.gemm(rows[:, part], block, out[i], add=True)
                else:
                    blas.gemm(rows, block, out[i][:, part])
        return out

    def blocks(self, i: int, dtype: torch.dtype = torch.float64) -> Iterator[tuple[slice, Tensor]]:
        """Blocks along the longer side in fp64: rows (c, n) if tall, columns (m, c) if wide.

        With another dtype they are rounded to it after the subtraction.
        """
        plus, minus = self.plus[i], None if self.minus is None else self.minus[i]
        axis = 0 if self.is_tall else 1
        length = plus.shape[axis]
        size = (_BLOCK, plus.shape[1]) if self.is_tall else (plus.shape[0], _BLOCK)
        buffer = torch.empty(size, dtype=torch.float64)
        scratch = torch.empty_like(buffer) if minus is not None else None
        rounded = None if dtype == torch.float64 else torch.empty(size, dtype=dtype)
        for start in range(0, length, _BLOCK):
            count = min(_BLOCK, length - start)
            block = buffer.narrow(axis, 0, count)
            with stage("upcast"):
                block.copy_(plus.narrow(axis, start, count))
                if minus is not None and scratch is not None:
                    other = scratch.narrow(axis, 0, count)
                    block.sub_(other.copy_(minus.narrow(axis, start, count)))
            part = slice(start, start + count)
            if rounded is None:
                yield part, block
            else:
                yield part, rounded.narrow(axis, 0, count).copy_(block)
