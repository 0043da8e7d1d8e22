"""The leading triplets alone, certified: Krylov space in fp32, Rayleigh-Ritz and residuals in fp64.

Cheap sketches are wrong on the flat spectra of language models (σ_2k/σ_k ≈ .8: a PEFT-style sketch
of 64 directions misses some altogether). A Krylov space with full orthogonalisation finds them;
its basis needs only fp32, because a Rayleigh-Ritz step on the stored weights in fp64 follows, and
the residual ‖Aᵀu − σv‖ of that step says what was reached, whatever happened before.
[Golub, Luk & Overton 1981; Parlett 1998, ch. 11 and 13]
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from geoscope.linalg import blas
from geoscope.linalg.certificate import (
    HOPE_FROM,
    LOST,
    MOST_OF_Q,
    SLACK,
    STILL,
    Leading,
    bounds_of,
    excess_of,
    first_block,
)
from geoscope.linalg.choice import krylov_takes_gram
from geoscope.linalg.operand import Operand
from geoscope.linalg.scale import outside
from geoscope.profile import stage

__all__ = ["RitzBasis", "krylov_of_dense", "leading_triplets", "rayleigh_ritz"]

# Entries of a piece of the matrix that is multiplied there and back at once: it stays in the cache.
_PIECE = 1 << 18
# Dimension at which a space is looked at first, at the least.
_FIRST_CHECK = 8


@stage("lanczos")
def leading_triplets(
    A: Operand,
    k: int,
    *,
    seed: int = 0,
    start: Tensor | None = None,
    budget: int | None = None,
    certified: int | None = None,
    by_gram: bool | None = None,
) -> Leading:
    """The leading k triplets of one matrix on the CPU.

    A: a stack of one. start: rows (b, q) of the shorter side that are near the answer, such as the
    vectors of a neighbouring checkpoint. budget: largest Krylov dimension, default .45·q. A budget
    that is too small gives `converged` False and a residual that says so; take the exact method.
    Zero matrices need no space, and those whose squares leave fp32 are taken at another scale.
    certified: how many of the leading vectors have to be right, default all k; of the others the
    values are, to 1e-7, which is half way to the vectors. by_gram: whether the space grows by an
    fp32 Gram matrix, good to 1e-7·σ1²; default what is cheaper.
    """
    certified = k if certified is None else min(certified, k)
    if by_gram is None:
        by_gram = krylov_takes_gram(A.shape, k, values_only=certified == 0)
    scale: Tensor | None = None
    apply, squares = _by_gram(A) if by_gram else _by_products(A)
    if outside(squares, torch.float32):
        if not bool(A.moved()):
            return Leading.of_zero(A, k)
        unit, scale = A.scaled()
        A, (apply, _) = unit, _by_gram(unit) if by_gram else _by_products(unit)
    basis = _krylov(
        apply, min(A.shape), k, seed=seed, start=start, certified=certified, budget=budget
    )
    found, _ = rayleigh_ritz(basis, *A.there_and_back(basis.rows), k, certified, tall=A.is_tall)
    return found if scale is None else found.times(scale)


# --- products in fp32 ---------------------------------------------------------------------------


_Products = tuple[Callable[[Tensor], Tensor], Tensor]


def _by_gram(A: Operand) -> _Products:
    """X ↦ X·G for rows X (b, q), by the Gram matrix G of the shorter side in fp32; ‖A‖²."""
    gram = A.gram32()
    return lambda X: blas.gemm(X, gram, torch.empty_like(X)), gram.diagonal().sum()


def _by_products(A: Operand) -> _Products:
    """X ↦ X·G for rows X (b, q), by products with A in fp32; ‖A‖²."""
    dense, squares = A.upright()
    return _there_and_back(dense), squares


def _there_and_back(dense: Tensor) -> Callable[[Tensor], Tensor]:
    """X ↦ X·AᵀA for rows X (b, q) and A (long, q), fp32."""
    pieces = dense.split(max(1, _PIECE // dense.shape[1]))

    def through(X: Tensor) -> Tensor:
        """Piece by piece there and back, so that each is read from memory once."""
        out = torch.zeros_like(X)
        for piece in pieces:
            image = X.new_empty(len(X), len(piece))
            blas.gemm(X, piece, image, Bt=True)
            blas.gemm(image, piece, out, add=True)
        return out

    return through


def krylov_of_dense(
    A: Tensor, k: int, *, seed: int, start: Tensor | None, certified: int
) -> RitzBasis:
    """A basis near the leading k right vectors of A (long, q), fp32; see `leading_triplets`."""
    return _krylov(_there_and_back(A), A.shape[1], k, seed=seed, start=start, certified=certified)


# --- the Krylov space ---------------------------------------------------------------------------


@dataclass(frozen=True)
class RitzBasis:
    """Orthonormal Ritz vectors in fp64 (k + 1 rows, fewer if q is smaller), of a space of that
    dimension; and whether they converged there."""

    rows: Tensor
    dimension: int
    converged: bool

    @classmethod
    def of(cls, space: _Space, vectors: Tensor, *, converged: bool) -> RitzBasis:
        rows = torch.linalg.qr(space.combine(vectors).T).Q.T.contiguous()
        return cls(rows, space.filled, converged)


def _krylov(
    apply: Callable[[Tensor], Tensor],
    q: int,
    k: int,
    *,
    seed: int,
    start: Tensor | None,
    certified: int,
    budget: int | None = None,
) -> RitzBasis:
    limit = min(q, max(int(MOST_OF_Q * q), 4 * k) if budget is None else budget)
    warm = start is not None
    space = _Space(first_block(q, start, seed), limit)
    cadence = _Cadence(min(max(4 * k, _FIRST_CHECK), limit))
    before: Tensor | None = None
    while True:
        space.grow(apply)
        if space.filled < cadence.at and not space.is_full:
            continue
        ritz = _Ritz(space.projected)
        wanted = ritz.values[: min(k, space.filled)]
        moved = math.inf if before is None else float((wanted - before).abs().max() / wanted[-1])
        # Of many vectors Ritz values tell when to look: they converge twice as fast, and cost
        # less. Once at the start vectors are worth it, to see whether there is any hope.
        first = before is None and k >= HOPE_FROM and not warm
        before = wanted
        if k >= HOPE_FROM and moved > STILL and not (first or space.is_full):
            cadence.missed("values", moved / STILL, space)
            continue
        vectors = ritz.vectors(min(k + 1, space.filled))
        excess = excess_of(space.misfit(vectors[:k]), ritz.values, k, certified=certified)
        found = int((excess <= 1).sum())
        if found == k or space.is_full or (first and found < k / 16):
            return RitzBasis.of(space, vectors, converged=found == k)
        cadence.missed("vectors", float(excess.max()), space)


class _Cadence:
    """When to look next at a growing space: where the last two looks say that it will do."""

    def __init__(self, first: int) -> None:
        self.at = first
        self._before: tuple[str, int, float] | None = None

    def missed(self, kind: str, excess: float, space: _Space) -> None:
        """A look at `space` found `excess` times what is allowed."""
        size, distance = space.filled, math.log(max(excess, 1.0))
        step = size / 5
        if self._before is not None and self._before[0] == kind:
            _, earlier, further = self._before
            slope = (further - distance) / (size - earlier)
            step = min(step, distance / slope) if slope > 0 else step
        self._before = (kind, size, distance) if math.isfinite(distance) else None
        self.at = size + max(len(space.following), math.ceil(step))


class _Space:
    """A block Krylov space: an orthonormal basis in fp32, the projection of G on it in fp64."""

    def __init__(self, start: Tensor, limit: int) -> None:
        rows, q = start.shape
        self.following = _orthonormal_rows(start.double())  # the next block of the basis
        self.filled = 0
        self._limit = limit
        self._basis = torch.empty(limit + rows, q)
        self._projection = torch.zeros(limit + rows, limit + rows, dtype=torch.float64)
        self._remainder = torch.empty(0)

    def grow(self, apply: Callable[[Tensor], Tensor]) -> None:
        """Takes the next block into the basis, and finds the one after it."""
        size, begin = len(self.following), self.filled
        self._basis[begin : begin + size] = self.following
        self.filled += size
        image = apply(self.following)
        coefficients = self._orthogonalise(image)
        self._projection[: self.filled, begin : self.filled] = coefficients.T
        self.following, self._remainder = _split(image)
        if float(self._remainder.diagonal().abs().min()) < LOST * float(coefficients.norm()):
            # Some direction is little more than the rounding of the subtraction: once it has unit
            # length, what it kept of the basis is no longer small.
            self._orthogonalise(self.following)
            self.following = _orthonormal_rows(self.following.double())

    def _orthogonalise(self, rows: Tensor) -> Tensor:
        """Takes the basis out of `rows`, in place; returns what was taken out, as coordinates.

        Twice is enough (Parlett 1998, §6.9), and the first time only the last two blocks: of the
        others an image holds little more than rounding, which the second time is small already.
        """
        coefficients = torch.zeros(len(rows), self.filled)
        for first in (max(0, self.filled - 2 * len(rows)), 0):
            basis = self._basis[first : self.filled]
            part = blas.gemm(rows, basis, rows.new_empty(len(rows), len(basis)), Bt=True)
            rows -= blas.gemm(part, basis, torch.empty_like(rows))
            coefficients[:, first:] += part
        return coefficients

    @property
    def is_full(self) -> bool:
        return self.filled + len(self.following) > self._limit

    @property
    def projected(self) -> Tensor:
        """QGQᵀ, of which the upper triangle is set."""
        return self._projection[: self.filled, : self.filled]

    def misfit(self, vectors: Tensor) -> Tensor:
        """‖Gv − λv‖ of each Ritz vector: only its last coordinates lead out of the space."""
        return torch.linalg.vector_norm(
            vectors[:, self.filled - len(self.following) :] @ self._remainder, dim=-1
        )

    def combine(self, vectors: Tensor) -> Tensor:
        """Coordinates (c, filled) as rows of length q, fp64."""
        out = torch.empty(len(vectors), self._basis.shape[1])
        return blas.gemm(vectors.float(), self._basis[: self.filled], out).double()


def _split(Y: Tensor) -> tuple[Tensor, Tensor]:
    """Y = remainder·X with orthonormal rows X (fp32); remainder (b, b) in fp64."""
    Qt, R = torch.linalg.qr(Y.double().T)
    return Qt.T.float().contiguous(), R.T


def _orthonormal_rows(X: Tensor) -> Tensor:
    return torch.linalg.qr(X.T).Q.T.float().contiguous()


class _Ritz:
    """Eigenpairs of the projected matrix, of which the upper triangle is given."""

    def __init__(self, T: Tensor) -> None:
        self._reflectors = T.clone(memory_format=torch.contiguous_format)
        self._tridiagonal = blas.tridiagonalise(self._reflectors)
        self.values = blas.eigenvalues(*self._tridiagonal[:2])

    def vectors(self, count: int) -> Tensor:
        """Of the leading `count` values, as rows."""
        return blas.eigenvectors(self._reflectors, *self._tridiagonal, self.values, range(count))


# --- the answer in fp64 -------------------------------------------------------------------------


def rayleigh_ritz(
    basis: RitzBasis, long: Tensor, back: Tensor, k: int, certified: int, *, tall: bool
) -> tuple[Leading, Tensor]:
    """Triplets from the span of a basis of right vectors (tall; else of left ones), and their
    residuals, from its images in fp64.

    long: A·x of the rows x of the basis, as rows; back: Aᵀ·A·x. Returns the rotation too, whose
    rows (k + 1, c) make the vectors of the rows of the basis.
    """
    energies, rotation = torch.linalg.eigh(long @ long.T)
    rotation = rotation.flip(-1).T.contiguous()
    S = energies.flip(0).clamp_min(0).sqrt()
    short, long, back = rotation @ basis.rows, rotation @ long, rotation[:k] @ back
    scale = S[:, None].clamp_min(torch.finfo(S.dtype).tiny)
    long /= scale
    back /= scale[:k]
    misfit = torch.linalg.vector_norm(back - S[:k, None] * short[:k], dim=-1)
    excess = excess_of(S[:k] * misfit, S.square(), k, certified=certified)
    U, Vh = (long, short) if tall else (short, long)
    found = Leading(
        S=S[:k],
        U=U[:k],
        Vh=Vh[:k],
        **bounds_of(misfit, S, k, certified=certified),
        dimension=basis.dimension,
        converged=basis.converged and bool(excess.max() <= SLACK),
    )
    return found, rotation
