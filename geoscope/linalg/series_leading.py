"""Leading pairs of all updates Δ_i = W_i − W_0 and steps δ_i = W_i − W_{i−1} of a series, together.

Each is searched for in fp32, from where the one before ended. Then one pass over the stored entries
of all checkpoints, row by row, upcasts each of them once and gives everything in fp64: the inner
products of the steps, the residuals that certify every pair, and the products of pairs with each
other's updates. On the CPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import Tensor

from geoscope.errors import NumericsError
from geoscope.linalg import blas
from geoscope.linalg.certificate import Leading
from geoscope.linalg.differences import Differences
from geoscope.linalg.leading import RitzBasis, krylov_of_dense, rayleigh_ritz
from geoscope.linalg.scale import outside
from geoscope.profile import stage

__all__ = ["SeriesBasis", "SeriesPass", "search"]

# Entries of a block of one checkpoint that is multiplied: larger ones leave the cache, smaller ones
# cost two workers waits for Python's lock. And of the steps of all checkpoints, which are held.
_BLOCK, _HELD = 1 << 17, 1 << 22
# Up to so many rows are multiplied with a block; of more the block is multiplied with columns.
_FEW_ROWS = 3


@dataclass(frozen=True)
class SeriesBasis:
    """What a search found of one difference.

    short: Ritz vectors of the shorter side, (c, q), where the next search starts. right:
    orthonormal rows (c, n) in the order of their values, c = k + 1 or q, fp64.
    """

    short: RitzBasis
    right: Tensor


@stage("lanczos")
def search(
    A: Differences,
    k: int,
    *,
    starts: Sequence[SeriesBasis | None],
    certified: int,
    seed: int = 0,
    rooms: Sequence[Tensor] | None = None,
) -> list[SeriesBasis | None]:
    """A basis near the leading k right vectors of each difference, in fp32.

    certified: how many of them have to be right, see `leading_triplets`. starts: where each search
    begins. None for a difference that is zero, no number, or whose squares leave fp32, and where
    the search failed: `factorise_leading` takes each of these.
    """
    found: list[SeriesBasis | None] = []
    for (dense, squares), near in zip(A.upright(rooms), starts, strict=True):
        found.append(None)
        if outside(squares, torch.float32):
            continue
        start = None if near is None else near.short.rows[:k]
        with suppress(NumericsError, RuntimeError):
            basis = krylov_of_dense(dense, k, seed=seed, start=start, certified=certified)
            right = basis.rows if A.is_tall else _seen_from_the_left(basis.rows, dense)
            found[-1] = SeriesBasis(basis, right)
    return found


def _seen_from_the_left(rows: Tensor, dense: Tensor) -> Tensor:
    """Of left vectors (c, m) the right ones, orthonormal (c, n), through Aᵀ (n, m) in fp32."""
    images = torch.empty(len(rows), len(dense))
    blas.gemm(rows.float(), dense, images, Bt=True)
    return torch.linalg.qr(images.double().T).Q.T.contiguous()


class SeriesPass:
    """Takes the stored rows of all checkpoints, and has in fp64 what follows from them.

    shape: (m, n). bases: for each checkpoint after the first those of Δ and δ; of the first, whose
    δ is its Δ, one. inner: products of W_0, δ_1 … δ_T, (T + 1, T + 1).
    """

    def __init__(
        self, shape: tuple[int, int], bases: Sequence[Sequence[SeriesBasis | None]]
    ) -> None:
        (m, n), T = shape, len(bases)
        self._bases = [[None if one is None else one.right for one in both] for both in bases]
        self._found = bases
        self.inner = torch.zeros(T + 1, T + 1, dtype=torch.float64)
        self._length = max(1, min(m, min(_BLOCK, _HELD // (T + 1)) // n))
        self._held = torch.empty(T + 1, self._length, n, dtype=torch.float64)
        self._rooms = torch.empty(3, self._length, n, dtype=torch.float64)
        self._there = [[_images(one, m) for one in both] for both in self._bases]
        self._back = [[_images(one, n).zero_() for one in both] for both in self._bases]
        self._at = 0
        # Of the updates alone, all bases after one another: where each ends; images in a block.
        updates = [both[0] for both in self._bases]
        self._ends = [0]
        for one in updates:
            self._ends.append(self._ends[-1] + (0 if one is None else len(one)))
        self._rights = torch.cat([one for one in updates if one is not None] or [torch.empty(0, n)])
        self._columns = self._rights.T.contiguous()
        self._own, self._seen = torch.empty(2, self._ends[-1], self._length, dtype=torch.float64)
        self._pairs = [torch.zeros(end, end, dtype=torch.float64) for end in self._ends[1:]]

    def add(self, stored: Sequence[Tensor]) -> None:
        """The next rows (c, n) of every checkpoint, the base first."""
        for start in range(0, len(stored[0]), self._length):
            self._add([one[start : start + self._length] for one in stored])

    def _add(self, stored: Sequence[Tensor]) -> None:
        count = len(stored[0])
        rows = slice(self._at, self._at + count)
        self._at = rows.stop
        held = self._held[:, :count]
        base = before = held[0].copy_(stored[0])
        update = self._rooms[2, :count]
        for i, one in enumerate(stored[1:]):
            with stage("upcast"):
                now = self._rooms[i % 2, :count].copy_(one)
                step = torch.sub(now, before, out=held[i + 1])
                whole = torch.sub(now, base, out=update) if i else step
            with stage("products"):
                self._multiply_update(i, whole, rows)
                if i and (basis := self._bases[i][1]) is not None:
                    image = blas.gemm(basis, step, self._there[i][1][:, rows], Bt=True)
                    blas.gemm(image, step, self._back[i][1], add=True)
            before = now
        with stage("increments"):
            flat = held.reshape(len(stored), -1)
            blas.gemm(flat, flat, self.inner, add=True, Bt=True)

    def _multiply_update(self, i: int, update: Tensor, rows: slice) -> None:
        """All bases of updates up to this one are seen through it, its own also back."""
        begin, end = self._ends[i], self._ends[i + 1]
        if begin == end:
            return
        own = self._own[:end, : len(update)]
        if end <= _FEW_ROWS:
            seen = blas.gemm(self._rights[:end], update, self._seen[:end, : len(update)], Bt=True)
        else:
            seen = torch.mm(update, self._columns[:, :end]).T
        image = self._there[i][0][:, rows]
        image.copy_(seen[begin:])
        own[begin:] = image
        blas.gemm(image, update, self._back[i][0], add=True)
        self._pairs[i].addmm_(own, seen.T)

    def leading(
        self, k: int, *, certified: int
    ) -> tuple[list[list[Leading | None]], Tensor | None]:
        """The leading k triplets of every Δ and δ, None where there is no basis; and u_iᵀ·Δ_τ·v_j
        by τ, i and j, (T, T, T), 0 beyond τ, None where an update has no basis."""
        found: list[list[Leading | None]] = []
        weights: list[Tensor] = []
        for i, both in enumerate(self._found):
            row: list[Leading | None] = []
            for place, basis in enumerate(both):
                if basis is None:
                    row.append(None)
                    continue
                there, back = self._there[i][place], self._back[i][place]
                short = RitzBasis(basis.right, basis.short.dimension, basis.short.converged)
                one, rotation = rayleigh_ritz(short, there, back, k, certified, tall=True)
                row.append(one)
                if place == 0:
                    weights.append(rotation[0])
            found.append(row)
        if any(row[0] is None for row in found):
            return found, None
        return found, self._products(weights, [row[0].S[0] for row in found if row[0] is not None])

    def _products(self, weights: Sequence[Tensor], values: Sequence[Tensor]) -> Tensor:
        """Of the images of bases those of the leading pairs, which are sums of their rows."""
        T = len(self._bases)
        sums = torch.zeros(T, self._ends[-1], dtype=torch.float64)
        for i, one in enumerate(weights):
            sums[i, self._ends[i] : self._ends[i + 1]] = one
        out = torch.zeros(T, T, T, dtype=torch.float64)
        scale = torch.stack([*values]).clamp_min(torch.finfo(torch.float64).tiny)
        for i, pairs in enumerate(self._pairs):
            seen, end = slice(0, i + 1), self._ends[i + 1]
            out[i, seen, seen] = sums[seen, :end] @ pairs @ sums[seen, :end].T / scale[seen, None]
        return out


def _images(basis: Tensor | None, size: int) -> Tensor:
    return torch.empty(0 if basis is None else len(basis), size, dtype=torch.float64)
