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

from geoscope.errors import NumericsError
from geoscope.linalg import blas, stacked
from geoscope.linalg.differences import BLOCK, Differences
from geoscope.linalg.scale import outside, power_of_two
from geoscope.profile import stage

__all__ = ["Operand"]

# Rows that are mirrored at a time, to stay in the cache.
_MIRROR = 256
# Stacks of matrices up to this shorter side and of so many entries are multiplied all at once on
# the CPU, too: there a call costs more than its operations.
_SMALL_SIDE, _SMALL = 96, 1 << 16


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

    @property
    def in_stacks(self) -> bool:
        """Whether products take the whole stack: on other devices, and where matrices are small."""
        m, n = self.shape
        small = min(m, n) <= _SMALL_SIDE and m * n <= _SMALL
        return small or self.plus.device.type != "cpu"

    def __len__(self) -> int:
        return len(self.plus)

    def row(self, i: int) -> Operand:
        """The i-th matrix, as a stack of one."""
        minus = None if self.minus is None else self.minus[i : i + 1]
        return Operand(self.plus[i : i + 1], minus)

    def rows(self, which: Tensor | list[int]) -> Operand:
        """Some of the matrices, by number or by mask."""
        return Operand(self.plus[which], None if self.minus is None else self.minus[which])

    def dense(self) -> Tensor:
        """The stack in fp64, (b, m, n)."""
        whole = self.plus.to(torch.float64, copy=True)
        return whole if self.minus is None else whole.sub_(self.minus)

    def moved(self) -> Tensor:
        """Which matrices have an entry that is not zero, (b,) bool; exact at any scale."""
        other = torch.zeros((), device=self.plus.device) if self.minus is None else self.minus
        return (self.plus != other).flatten(1).any(-1)

    def scaled(self) -> tuple[Operand, Tensor]:
        """A/s in fp64 with entries near 1, and s, (b,), powers of two: nothing is rounded.

        It holds a copy in fp64, so it is for matrices whose squares leave a format's range.
        """
        whole = self.dense()
        scale = power_of_two(whole.abs().amax((-2, -1)))
        return Operand(whole.div_(scale[:, None, None])), scale

    def norm(self) -> Tensor:
        """Frobenius norms, (b,). Raises NumericsError where one overflows."""
        found = self._norm()
        if outside(found.square(), torch.float64) and bool(self.moved().any()):
            unit, scale = self.scaled()
            found = unit._norm() * scale
        if not bool(torch.isfinite(found).all()):
            raise NumericsError("its Frobenius norm overflows fp64")
        return found

    @stage("entries")
    def _norm(self) -> Tensor:
        """Frobenius norms as long as no square leaves fp64."""
        if self.in_stacks:
            return stacked.norm(self.plus, self.minus)
        squares = [
            sum(float(torch.linalg.vector_norm(block)) ** 2 for _, block in self.blocks(i))
            for i in range(len(self))
        ]
        return torch.tensor(squares, dtype=torch.float64).sqrt()

    @stage("gram")
    def gram(self) -> Tensor:
        """Gram matrices of the shorter side, (b, q, q): AᵀA if tall, AAᵀ if wide."""
        if self.in_stacks:
            return stacked.gram(self.plus, self.minus)
        if len(self) == 1:
            return self._gram(0)[None]
        return torch.stack([self._gram(i) for i in range(len(self))])

    def _gram(self, i: int, dtype: torch.dtype = torch.float64) -> Tensor:
        q = min(self.shape)
        gram = torch.zeros(q, q, dtype=dtype)
        for _, block in self.blocks(i, dtype):
            blas.syrk(block, gram, add=True, At=self.is_tall)
        for start in range(0, q, _MIRROR):  # only what stands on and above the diagonal was set
            stop = min(start + _MIRROR, q)
            gram[stop:, start:stop] = gram[start:stop, stop:].T
            square = gram[start:stop, start:stop]
            square.copy_(square.triu() + square.triu(1).T)
        return gram

    @stage("gram")
    def gram32(self) -> Tensor:
        """The Gram matrix of the shorter side of one matrix in fp32 (q, q), on the CPU.

        Good to 1e-7·σ1² or so: for a Krylov space, never for values.
        """
        return self._gram(0, dtype=torch.float32)

    def upright(self) -> tuple[Tensor, Tensor]:
        """One matrix in fp32, its longer side first (long, q), rounded once: after the subtraction;
        and its ‖·‖².
        """
        return self._differences(0).upright()[0]

    @stage("products")
    def right(self, X: Tensor) -> Tensor:
        """X·Aᵀ for rows X (b, k, n): the images A·x as rows, (b, k, m)."""
        return self._images(X, None)[0]

    @stage("products")
    def left(self, Y: Tensor) -> Tensor:
        """Y·A for rows Y (b, k, m): the images Aᵀ·y as rows, (b, k, n)."""
        return self._images(None, Y)[1]

    @stage("products")
    def both(self, X: Tensor, Y: Tensor) -> tuple[Tensor, Tensor]:
        """`right(X)` and `left(Y)` in one pass over the entries."""
        return self._images(X, Y)

    def there_and_back(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Images of rows (k, q) of the shorter side, (k, long), and the images of these, (k, q).

        Of one matrix on the CPU, in one pass over its entries; see `Differences.there_and_back`.
        """
        return self._differences(0).there_and_back(rows)

    def _images(self, X: Tensor | None, Y: Tensor | None) -> tuple[Tensor, Tensor]:
        """The images of rows X and of rows Y; empty where there are none."""
        (m, n), given = self.shape, X if Y is None else Y
        assert given is not None
        if self.in_stacks:
            pair, empty = (self.plus, self.minus), given.new_empty(0)
            return (
                empty if X is None else stacked.right(*pair, X),
                empty if Y is None else stacked.left(*pair, Y),
            )
        right = given.new_zeros(*given.shape[:-1], 0 if X is None else m)
        left = given.new_zeros(*given.shape[:-1], 0 if Y is None else n)
        for i in range(len(self)):
            length = self._differences(i).length(given.shape[-2])
            for part, block in self.blocks(i, length=length):  # rows of A if tall, columns if wide
                if X is not None and self.is_tall:
                    blas.gemm(X[i], block, right[i][:, part], Bt=True)
                elif X is not None:
                    blas.gemm(X[i][:, part], block, right[i], add=True, Bt=True)
                if Y is not None and self.is_tall:
                    blas.gemm(Y[i][:, part], block, left[i], add=True)
                elif Y is not None:
                    blas.gemm(Y[i], block, left[i][:, part])
        return right, left

    def blocks(
        self, i: int, dtype: torch.dtype = torch.float64, *, length: int = BLOCK
    ) -> Iterator[tuple[slice, Tensor]]:
        """Blocks of the i-th matrix along the longer side, see `Differences.blocks`."""
        return (
            (part, block) for part, (block,) in self._differences(i).blocks(dtype, length=length)
        )

    def _differences(self, i: int) -> Differences:
        """The i-th matrix, which is one of them."""
        return Differences(self.plus[i], () if self.minus is None else (self.minus[i],))
