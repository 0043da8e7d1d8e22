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
from geoscope.linalg.operand import Operand
from geoscope.profile import stage

__all__ = ["Leading", "leading_triplets"]

# Rows of a Krylov block by the number of triplets wanted: more rows share one pass over the
# matrix, fewer need a smaller space. One row is a matrix-vector product.
_BLOCK_ROWS = ((1, 1), (16, 8), (math.inf, 16))
# Aspect from which the fp32 Gram matrix of the shorter side is cheaper than products with A.
_GRAM_ASPECT = 3.0
_GRAM_FROM = 4
# Part of q that the Krylov space may fill before the exact method is the better choice.
_MOST_OF_Q = 0.45
# Residual of the Gram eigenproblem, relative to the k-th eigenvalue, that ends the iteration: what
# fp32 products can reach.
_TOLERANCE = 5e-7
# Relative move of the leading Ritz values between two checks below which they stand still.
_STILL = 1e-9
# A new direction shorter than this, relative to what was taken out of it, is cleaned once more.
_LOST = 1e-4
# From this many triplets on, a space of 4k dimensions in which fewer than k/16 have converged is
# given up: the spectrum is flat, and the exact method is cheaper than a space that large.
_HOPE_FROM = 32


@dataclass(frozen=True)
class Leading:
    """Leading k triplets of one matrix, or the news that they were not found.

    S: (k,), U: (k, m) and Vh: (k, n), rows, leading first; fp64. residual: largest ‖Aᵀu − σv‖/σ1,
    measured in fp64; |δσ| ≤ residual·σ1 (Weyl). gaps: (σ_k − σ_{k+1})/σ1 for each cut asked for,
    σ_{k+1} taken from the Krylov space; sine: largest bound residual/gap over the cuts.
    dimension: of the Krylov space. converged: whether the tolerance was met within the budget.
    """

    S: Tensor
    U: Tensor
    Vh: Tensor
    residual: float
    sine: float
    dimension: int
    converged: bool


@stage("lanczos")
def leading_triplets(
    A: Operand, k: int, *, seed: int = 0, start: Tensor | None = None, budget: int | None = None
) -> Leading:
    """The leading k triplets of one matrix on the CPU.

    A: a stack of one. start: rows (b, q) of the shorter side that are near the answer, such as the
    vectors of a neighbouring checkpoint. budget: largest Krylov dimension, default .45·q. A budget
    that is too small gives `converged` False and a residual that says so; take the exact method.
    """
    apply = _operator(A, k)
    q = min(A.shape)
    limit = min(q, max(int(_MOST_OF_Q * q), 4 * k) if budget is None else budget)
    basis, dimension, converged = _krylov(apply, q, k, limit, seed=seed, start=start)
    return _rayleigh_ritz(A, basis, k, dimension=dimension, converged=converged)


def _rows(k: int) -> int:
    return next(rows for most, rows in _BLOCK_ROWS if k <= most)


# --- products in fp32 ---------------------------------------------------------------------------


def _operator(A: Operand, k: int) -> Callable[[Tensor], Tensor]:
    """X ↦ X·G for rows X (b, q) and the Gram matrix G of the shorter side, in fp32."""
    short, long = min(A.shape), max(A.shape)
    if long >= _GRAM_ASPECT * short and k >= _GRAM_FROM:
        gram = A.gram32()

        def apply(X: Tensor) -> Tensor:
            return blas.gemm(X, gram, torch.empty_like(X))

        return apply
    dense = A.single()
    tall = A.is_tall

    def through(X: Tensor) -> Tensor:
        image = X.new_empty(len(X), long)
        blas.gemm(X, dense, image, Bt=tall)
        return blas.gemm(image, dense, torch.empty_like(X), Bt=not tall)

    def vector(X: Tensor) -> Tensor:
        A = dense if tall else dense.T
        return (A.T @ (A @ X[0]))[None]

    return vector if _rows(k) == 1 else through


# --- the Krylov space ---------------------------------------------------------------------------


def _krylov(
    apply: Callable[[Tensor], Tensor],
    q: int,
    k: int,
    limit: int,
    *,
    seed: int,
    start: Tensor | None,
) -> tuple[Tensor, int, bool]:
    """Ritz vectors (k + 1 rows, fewer if q is smaller), the dimension, whether they converged."""
    if start is None:
        generator = torch.Generator().manual_seed(seed)
        start = torch.randn(_rows(k), q, generator=generator, dtype=torch.float64)
    space = _Space(start, limit)
    check, before = min(4 * k, limit), None
    while True:
        space.grow(apply)
        if space.filled < check and not space.is_full:
            continue
        ritz = _Ritz(space.projected)
        wanted = ritz.values[: min(k, space.filled)]
        # Ritz values converge twice as fast as vectors: these are worth computing only when those
        # stand still, and once at the start, to see whether there is any hope.
        first = before is None and k >= _HOPE_FROM
        moved = torch.inf if before is None else float((wanted - before).abs().max() / wanted[-1])
        check, before = space.filled + max(len(space.following), space.filled // 5), wanted
        if moved > _STILL and not (first or space.is_full):
            continue
        vectors = ritz.vectors(min(k + 1, space.filled))
        found = (space.misfit(vectors[:k]) <= _TOLERANCE * wanted[-1]).sum()
        hopeless = first and found < k / 16
        if found == k or space.is_full or hopeless:
            return space.combine(vectors), space.filled, bool(found == k)


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
        self._projection[begin : self.filled, : self.filled] = coefficients
        self.following, self._remainder = _split(image)
        if float(self._remainder.diagonal().abs().min()) < _LOST * float(coefficients.norm()):
            # Some direction is little more than the rounding of the subtraction: once it has unit
            # length, what it kept of the basis is no longer small.
            self._orthogonalise(self.following)
            self.following = _orthonormal_rows(self.following.double())

    def _orthogonalise(self, rows: Tensor) -> Tensor:
        """Takes the basis out of `rows`, in place; returns what was taken out, as coordinates."""
        basis = self._basis[: self.filled]
        coefficients = torch.zeros(len(rows), self.filled)
        for _ in range(2):  # twice is enough (Parlett 1998, §6.9)
            part = blas.gemm(rows, basis, torch.empty_like(coefficients), Bt=True)
            rows -= blas.gemm(part, basis, torch.empty_like(rows))
            coefficients += part
        return coefficients

    @property
    def is_full(self) -> bool:
        return self.filled + len(self.following) > self._limit

    @property
    def projected(self) -> Tensor:
        """QGQᵀ, of which the lower triangle is set."""
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
    """Eigenpairs of the projected matrix, of which the lower triangle is given."""

    def __init__(self, T: Tensor) -> None:
        lower = torch.tril(T)
        self._reflectors = (lower + torch.tril(lower, -1).T).contiguous()
        self._tridiagonal = blas.tridiagonalise(self._reflectors)
        self.values = blas.eigenvalues(*self._tridiagonal[:2])

    def vectors(self, count: int) -> Tensor:
        """Of the leading `count` values, as rows."""
        return blas.eigenvectors(
            self._reflectors, *self._tridiagonal, self.values, range(count)
        )


# --- the answer in fp64 -------------------------------------------------------------------------


def _rayleigh_ritz(
    A: Operand, basis: Tensor, k: int, *, dimension: int, converged: bool
) -> Leading:
    """Triplets from span(basis), and their residuals, from the stored weights in fp64."""
    short = torch.linalg.qr(basis.T).Q.T.contiguous()
    long = _images(A, short)
    energies, rotation = torch.linalg.eigh(long @ long.T)
    rotation = rotation.flip(-1).T.contiguous()
    S = energies.flip(0).clamp_min(0).sqrt()
    short, long = rotation @ short, rotation @ long
    long /= S[:, None].clamp_min(torch.finfo(S.dtype).tiny)
    back = _images(A, long[:k], back=True)
    misfit = torch.linalg.vector_norm(back - S[:k, None] * short[:k], dim=-1)
    largest = float(S[0])
    residual = float(misfit.max()) / largest if largest > 0 else 0.0
    following = float(S[k]) if len(S) > k else 0.0
    gap = (float(S[k - 1]) - following) / largest if largest > 0 else 0.0
    sine = float(torch.linalg.vector_norm(misfit)) / largest / gap if gap > 0 else math.inf
    U, Vh = (long, short) if A.is_tall else (short, long)
    return Leading(S[:k], U[:k], Vh[:k], residual, sine, dimension, converged)


def _images(A: Operand, rows: Tensor, *, back: bool = False) -> Tensor:
    """A·x of rows of the shorter side, or Aᵀ·y of the longer side with `back`."""
    to_left = A.is_tall != back
    return (A.right(rows[None]) if to_left else A.left(rows[None]))[0]
