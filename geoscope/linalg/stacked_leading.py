"""Leading triplets of a stack of equal shape: `leading`'s method on all matrices at once.

A block Krylov space with full orthogonalisation in fp32 for each matrix, Rayleigh-Ritz and
residuals on the stored weights in fp64, and the same certificate. All matrices take the same steps;
one that has converged leaves the stack. The answer for a matrix does not depend on the others but
for the rounding of batched products.
[Golub, Luk & Overton 1981; Parlett 1998, ch. 11 and 13; CholeskyQR2: Yamamoto et al. 2015]
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

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
from geoscope.linalg.operand import Operand
from geoscope.linalg.precision import full_precision
from geoscope.linalg.scale import outside
from geoscope.linalg.stacked import eigenpairs, gram, left, right, single
from geoscope.profile import stage

__all__ = ["stacked_leading"]

# Rows of a Krylov block by the number of triplets wanted. A pass over the stack costs the same
# for a few rows as for one.
_BLOCK_ROWS = ((1, 4), (16, 8), (math.inf, 16))
# Aspect from which products with the Gram matrix (fp64, rounded to fp32) are cheaper than with A.
_GRAM_ASPECT = 3.0
_GRAM_FROM = 4
# A triangular factor of CholeskyQR's second pass further than this from I: the first pass lost the
# rows, and Householder's QR takes over.
_NEAR_UNIT = 0.1


@stage("lanczos")
def stacked_leading(
    A: Operand,
    k: int,
    *,
    seed: int = 0,
    start: Tensor | None = None,
    budget: int | None = None,
    certified: int | None = None,
) -> list[Leading]:
    """The leading k triplets of each matrix of A, with the certificate of `leading_triplets`.

    k + 1 and a block of rows have to fit into q. start: rows (b, ·, q) of the shorter
    sides that are near the answers. budget: largest Krylov dimension, default .45·q. certified: how
    many of the leading vectors have to be right, default all k; of the others the values are.
    """
    certified = k if certified is None else min(certified, k)
    q = min(A.shape)
    rows = next(rows for most, rows in _BLOCK_ROWS if k <= most)
    if k + 1 + rows > q:
        raise ValueError(
            f"{k} of {q} triplets are too many for this method; compute the whole spectrum"
        )
    limit = max(int(MOST_OF_Q * q), 4 * k) if budget is None else budget
    limit = min(q, max(limit, k + 1 + rows))
    moved = A.moved()  # a zero matrix needs no space
    whole = bool(moved.all())
    some = A if whole else A.rows(moved)
    starts = start if start is None or whole else start[moved]
    found = iter(_searched(some, k, starts, rows, limit, seed, certified) if len(some) else ())
    return [next(found) if one else Leading.of_zero(A, k) for one in moved.tolist()]


def _searched(
    A: Operand,
    k: int,
    start: Tensor | None,
    rows: int,
    limit: int,
    seed: int,
    certified: int,
) -> list[Leading]:
    """Of a stack without zero matrices; at another scale where squares leave fp32."""
    scale = None
    if outside(A.norm().square(), torch.float32):
        A, scale = A.scaled()
    q = min(A.shape)
    with full_precision():
        # Drawn on the CPU: the same on every device, and the same for every matrix.
        blocks = [
            first_block(q, None if start is None else start[i], seed, rows=rows)
            for i in range(1 if start is None else len(A))
        ]
        block = torch.stack(blocks).to(A.plus.device).expand(len(A), rows, q)
        found = _krylov(_Products(A, k), block, k, limit, certified, warm=start is not None)
    leading = _rayleigh_ritz(A, found, k, certified=certified)
    if scale is None:
        return leading
    return [one.times(size) for one, size in zip(leading, scale, strict=True)]


# --- products in fp32 ---------------------------------------------------------------------------


class _Products:
    """X·G for rows X (a, r, q) and the Gram matrices G of the shorter side, in fp32."""

    def __init__(self, A: Operand, k: int) -> None:
        short, long = min(A.shape), max(A.shape)
        self._through_gram = long >= _GRAM_ASPECT * short and k >= _GRAM_FROM
        if self._through_gram:
            self._stack = gram(A.plus, A.minus).float()
        else:
            dense = single(A.plus, A.minus)
            self._stack = dense if A.is_tall else dense.mT

    def __call__(self, X: Tensor) -> Tensor:
        if self._through_gram:
            return X @ self._stack
        return (X @ self._stack.mT) @ self._stack

    def keep(self, which: Tensor) -> None:
        """Drops all matrices but `which` (a,)."""
        self._stack = self._stack[which]


# --- the Krylov spaces --------------------------------------------------------------------------


@dataclass(frozen=True)
class _Found:
    """Of each matrix: Ritz vectors (b, k + 1, q) in fp32, dimensions of the spaces, convergence."""

    vectors: Tensor
    dimensions: list[int]
    converged: list[bool]


def _krylov(
    products: _Products, start: Tensor, k: int, limit: int, certified: int, *, warm: bool
) -> _Found:
    """Spaces that grow together, until each matrix has converged, has no hope, or is full."""
    (count, rows, q), device = start.shape, start.device
    spaces = _Spaces(start, limit)
    vectors = torch.empty(count, k + 1, q, dtype=torch.float32, device=device)
    dimensions, converged = [0] * count, [False] * count
    which = torch.arange(count, device=device)
    before: Tensor | None = None
    check = min(4 * k, limit)
    while len(which):
        spaces.grow(products)
        if spaces.filled < max(check, k + 1) and not spaces.is_full:
            continue
        ritz = eigenpairs(spaces.projected, k + 1)
        assert ritz.rows is not None
        wanted = ritz.values[:, :k]
        scale = wanted[:, -1:].clamp_min(torch.finfo(wanted.dtype).tiny)
        misfit = spaces.misfit(ritz.rows[:, :k])
        hits = (excess_of(misfit, ritz.values, k, certified=certified) <= 1).sum(-1)
        first = before is None and k >= HOPE_FROM and not warm
        moved = scale.new_full((len(which),), torch.inf)
        if before is not None:
            moved = ((wanted - before).abs() / scale).amax(-1)
        sound = torch.tensor([fault is None for fault in ritz.faults], device=device)
        still = moved <= STILL if k >= HOPE_FROM else torch.ones_like(sound)
        good = (hits == k) & sound & (still | first | spaces.is_full)
        done = good | spaces.is_full | (first & (hits < k / 16))
        check = spaces.filled + max(rows, spaces.filled // 5)
        if bool(done.any()):
            vectors[which[done]] = spaces.combine(ritz.rows, done)
            for i, fine in zip(which[done].tolist(), good[done].tolist(), strict=True):
                dimensions[i], converged[i] = spaces.filled, fine
            which, wanted = which[~done], wanted[~done]
            spaces.keep(~done)
            products.keep(~done)
        before = wanted
    return _Found(vectors, dimensions, converged)


class _Spaces:
    """Block Krylov spaces of one dimension: bases in fp32, projections of G in fp64."""

    def __init__(self, start: Tensor, limit: int) -> None:
        count, rows, q = start.shape
        self._following = _split(start)[0].float()  # the next block of each basis
        self.filled = 0
        self._limit = limit
        self._basis = start.new_empty(count, limit + rows, q, dtype=torch.float32)
        self._projection = start.new_zeros(count, limit + rows, limit + rows)
        self._remainder = start.new_empty(count, rows, rows)

    def grow(self, products: Callable[[Tensor], Tensor]) -> None:
        """Takes the next block into each basis, and finds the one after it."""
        size, begin = self._following.shape[1], self.filled
        self._basis[:, begin : begin + size] = self._following
        self.filled += size
        image, coefficients = self._orthogonalised(products(self._following))
        self._projection[:, begin : self.filled, : self.filled] = coefficients
        following, self._remainder = _split(image.double())
        shortest = self._remainder.diagonal(dim1=-2, dim2=-1).abs().amin(-1)
        lost = shortest < LOST * torch.linalg.vector_norm(coefficients, dim=(-2, -1))
        self._following = following.float()
        if bool(lost.any()):
            # Little more than the rounding of the subtraction: of unit length, what such a row
            # kept of the basis is no longer small.
            cleaned = _split(self._orthogonalised(self._following)[0].double())[0].float()
            self._following = torch.where(lost[:, None, None], cleaned, self._following)

    def _orthogonalised(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """`rows` without what lies in the basis, and that part as coordinates."""
        basis = self._basis[:, : self.filled]
        first = rows @ basis.mT
        rows = rows - first @ basis
        second = rows @ basis.mT  # twice is enough (Parlett 1998, §6.9)
        return rows - second @ basis, first + second

    @property
    def is_full(self) -> bool:
        return self.filled + self._following.shape[1] > self._limit

    @property
    def projected(self) -> Tensor:
        """QGQᵀ (a, filled, filled)."""
        lower = self._projection[:, : self.filled, : self.filled].tril()
        return lower + lower.tril(-1).mT

    def misfit(self, vectors: Tensor) -> Tensor:
        """‖Gv − λv‖ of each Ritz vector: only its last coordinates lead out of the space."""
        last = vectors[..., self.filled - self._following.shape[1] :]
        return torch.linalg.vector_norm(last @ self._remainder, dim=-1)

    def combine(self, vectors: Tensor, which: Tensor) -> Tensor:
        """Coordinates (a, c, filled) of the matrices `which` (a,) as rows of length q, fp32."""
        return vectors[which].float() @ self._basis[which, : self.filled]

    def keep(self, which: Tensor) -> None:
        """Drops all matrices but `which` (a,)."""
        self._following, self._basis = self._following[which], self._basis[which]
        self._projection, self._remainder = self._projection[which], self._remainder[which]


def _split(Y: Tensor) -> tuple[Tensor, Tensor]:
    """Y = R·X with orthonormal rows X and lower triangular R (b, r, r); Y: (b, r, q), fp64.

    CholeskyQR twice: a few batched kernels, where a batched QR is a loop over its matrices. Rows
    that are nearly dependent go through Householder's QR, one matrix after the other.
    """
    R, X = _cholesky_step(Y)
    second, X = _cholesky_step(X)
    unit = torch.eye(R.shape[-1], dtype=R.dtype, device=R.device)
    near = (second - unit).abs().amax((-2, -1)) <= _NEAR_UNIT  # False for NaN
    R = R @ second
    for i in (~near).nonzero().flatten().tolist():
        Q, upper = torch.linalg.qr(Y[i].mT)
        X[i], R[i] = Q.mT, upper.mT
    return X, R


def _cholesky_step(Y: Tensor) -> tuple[Tensor, Tensor]:
    """(R, X) with Y = R·X, YYᵀ = RRᵀ; NaN where that is not positive definite."""
    R, failed = torch.linalg.cholesky_ex(Y @ Y.mT)
    R = torch.where((failed != 0)[:, None, None], torch.nan, R)
    return R, torch.linalg.solve_triangular(R, Y, upper=False).contiguous()


# --- the answer in fp64 -------------------------------------------------------------------------


def _rayleigh_ritz(A: Operand, found: _Found, k: int, *, certified: int) -> list[Leading]:
    """Triplets from the span of each matrix's Ritz vectors, and their residuals, in fp64."""
    short, _ = _split(found.vectors.double())
    to_long, to_short = (right, left) if A.is_tall else (left, right)
    long = to_long(A.plus, A.minus, short)
    small = eigenpairs(long @ long.mT, k + 1)
    assert small.rows is not None
    S = small.values.clamp_min(0).sqrt()
    short, long = small.rows @ short, small.rows @ long
    long /= S[..., None].clamp_min(torch.finfo(S.dtype).tiny)
    back = to_short(A.plus, A.minus, long[:, :k])
    misfits = torch.linalg.vector_norm(back - S[:, :k, None] * short[:, :k], dim=-1)
    excess = excess_of(S[:, :k] * misfits, S.square(), k, certified=certified).amax(-1).tolist()
    U, Vh = (long, short) if A.is_tall else (short, long)
    answers = []
    for i, (values, misfit) in enumerate(zip(S.cpu(), misfits.cpu(), strict=True)):
        fine = found.converged[i] and small.faults[i] is None and excess[i] <= SLACK
        one = Leading(
            S=S[i, :k],
            U=U[i, :k],
            Vh=Vh[i, :k],
            **bounds_of(misfit, values, k, certified=certified),
            dimension=found.dimensions[i],
            converged=fine,
        )
        answers.append(one)
    return answers
