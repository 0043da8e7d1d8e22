"""Singular values and leading triplets through the fp64 Gram matrix, with bounds and a way back.

The Gram matrix of the shorter side is faster than an SVD and, in fp64, as good wherever σ_i/σ_1 is
not tiny: |δσ_i| ≤ c·eps·σ_1²/(2σ_i). One tridiagonalisation of it serves all values and the few
vectors that are taken. A subspace cut between σ_k and σ_{k+1} carries a bound from its residual
and from the rounding of the Gram matrix, both over the gap (Davis & Kahan 1970). Singular values
below the floor are computed again from the matrix itself, on the subspace of the tail; where that
does not serve, or a bound is not met, the exact SVD is taken and the result says why.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from geoscope.errors import NumericsError
from geoscope.linalg import blas
from geoscope.linalg.operand import Operand
from geoscope.linalg.precision import EPS
from geoscope.linalg.scale import outside
from geoscope.linalg.stacked import LAST, Eigenpairs, eigenpairs
from geoscope.profile import stage

__all__ = ["LEAST_GAP", "SUBSPACE_TOLERANCE", "Factors", "concatenate", "factorise", "take"]

# The eigenvalues of the computed Gram matrix are off by at most this many eps·σ1². 1 is the most
# seen over Gaussian, decaying and repeated spectra up to n = 4096; 8 leaves room.
_GRAM_ERROR = 8

# A σ below this part of σ1 is worse than 1e-6 relative through the Gram matrix and is mended.
TAIL_FLOOR = 3e-5
# The mended part of the spectrum starts here, and may hold this many values at most.
_MEND_FROM = 1e-4
_MEND_AT_MOST = 64
# What is left of the leading directions in the tail's vectors moves σ by so many σ1²/σ, σ the last
# one before the tail; twice the rounding is the most seen.
_MEND_ERROR = 2 * EPS
# Relative error up to which a mended σ serves where the storage, fp64, holds it better.
_MEND_TOLERANCE = 1e-6

# A subspace is kept when its bound (radians) is below this; angles are promised to 1e-8.
SUBSPACE_TOLERANCE = 4e-9

# A cut between singular values closer than this (relative) is too ill-defined to pay for an exact
# SVD; such a subspace is flagged by its gap instead.
LEAST_GAP = 1e-6


@dataclass(frozen=True)
class Factors:
    """Part of a thin SVD of a stack of matrices, and how it was got.

    S: (b, q) all singular values, descending. U: (b, m, k) and Vh: (b, k, n), the leading k
    vectors, or None. Vectors lie in memory one after the other, so that products with them round
    alike in stacks of any height. methods: one mapping a matrix, {"how", "bound", "subspace_bound",
    "fallback"}: `bound` limits the error of every σ relative to σ1, `subspace_bound` the sine of
    the error angle of the worst cut that was asked for (None without vectors), `fallback` says why
    another method than the first was taken (None: it was not).
    """

    S: Tensor
    U: Tensor | None
    Vh: Tensor | None
    methods: tuple[dict[str, Any], ...]


def factorise(
    A: Operand,
    *,
    vectors: int = 0,
    cuts: Sequence[int] = (),
    solver: str = "auto",
    dtype: torch.dtype = torch.float64,
) -> Factors:
    """All singular values of A and its leading `vectors` triplets.

    A: a stack of finite matrices. `cuts` are the subspace dimensions that will be used, each exact
    to 4e-9 rad unless the gap (σ_k − σ_{k+1})/σ_k is below 1e-6. solver="exact" forces LAPACK's
    SVD, as does dtype float32, in which it is then done. Raises NumericsError when no driver
    converges.
    """
    if solver == "exact" or dtype != torch.float64:
        return _exact(A, vectors, dtype, reason=None)
    if A.plus.device.type == "cpu":
        if A.in_stacks:
            return _small(A, vectors, cuts)
        parts = [_one_on_cpu(A.row(i), vectors, cuts) for i in range(len(A))]
        return parts[0] if len(parts) == 1 else concatenate(parts)
    return _factorise_stacked(A, vectors, cuts)


# --- small matrices on the CPU ------------------------------------------------------------------


def _small(A: Operand, vectors: int, cuts: Sequence[int]) -> Factors:
    """All eigenpairs of the Gram matrices of a stack in one call; a matrix on which they do not
    suffice goes on by itself."""
    gram = A.gram()
    energy = gram.diagonal(dim1=-2, dim2=-1).sum(-1)
    alone = [i for i, one in enumerate(energy) if outside(one, torch.float64)]
    gram[alone] = 0
    try:
        # Vectors or not: values are those of the same call.
        with stage("eigenvectors" if vectors else "eigenvalues"):
            energies, columns = torch.linalg.eigh(gram)
    except RuntimeError:  # one that does not converge fails the call for all
        return concatenate([_one_on_cpu(A.row(i), vectors, cuts) for i in range(len(A))])
    rows = columns[..., -vectors:].mT.flip(-2).contiguous() if vectors else None
    energies = energies.flip(-1)
    residuals = None
    if rows is not None:
        misfit = rows @ gram - energies[:, :vectors, None] * rows
        residuals = torch.linalg.vector_norm(misfit, dim=-1)
    del gram
    S = energies.clamp_min(0).sqrt()
    methods = []
    for i, row in enumerate(S):
        of_row = None if residuals is None else residuals[i]
        methods.append(_method(row, cuts, "gram-eigh", of_row, mended=False))
        if _reason_against(row, methods[i], cuts, A, mended=False):
            alone.append(i)
    found = _with_long_side(A, S, rows, tuple(methods))
    if not alone:
        return found
    return concatenate(
        [
            _one_on_cpu(A.row(i), vectors, cuts) if i in alone else take(found, i)
            for i in range(len(A))
        ]
    )


# --- one matrix on the CPU ----------------------------------------------------------------------


def _one_on_cpu(A: Operand, vectors: int, cuts: Sequence[int]) -> Factors:
    """Gram matrix, one tridiagonalisation, all values, the vectors asked for. A: one matrix."""
    gram = A.gram()[0]
    if outside(gram.diagonal().sum(), torch.float64):
        if not bool(A.moved()):
            return _of_zero(A, vectors)
        return _at_scale(A, lambda unit: _one_on_cpu(unit, vectors, cuts))
    diagonal = gram.diagonal().clone()
    short = residuals = None
    try:
        with stage("eigenvalues"):
            d, e, tau = blas.tridiagonalise(gram)
            energies = blas.eigenvalues(d, e)
        S = energies.clamp_min(0).sqrt()
        mended = _mend_tail(A, (gram, d, e, tau, energies), S)
        if vectors:
            with stage("eigenvectors"):
                short = blas.eigenvectors(gram, d, e, tau, energies, range(vectors))
                gram.diagonal().copy_(diagonal)
                images = blas.symmetric_times(gram, short)
            residuals = torch.linalg.vector_norm(images - energies[:vectors, None] * short, dim=-1)
    except (NumericsError, RuntimeError) as error:
        return _exact(A, vectors, torch.float64, reason=str(error))
    del gram
    how = "gram-tridiagonal" + ("-mended-tail" if mended else "")
    method = _method(S, cuts, how, residuals, mended=mended)
    reason = _reason_against(S, method, cuts, A, mended=mended)
    if reason:
        return _exact(A, vectors, torch.float64, reason=reason)
    return _with_long_side(A, S[None], None if short is None else short[None], (method,))


def _mend_tail(
    A: Operand, reduced: tuple[Tensor, Tensor, Tensor, Tensor, Tensor], S: Tensor
) -> bool:
    """Computes a short tail of S again, in place, from A on the tail's subspace.

    reduced: what `eigenvectors` takes.
    The tail's vectors carry eps of the leading ones, so σ is then good to eps·σ1. False where the
    tail needs no mending, or is too long for it.
    """
    if float(S[-1]) >= TAIL_FLOOR * float(S[0]):
        return False
    first = int((S >= _MEND_FROM * S[0]).sum())
    if len(S) - first > _MEND_AT_MOST:
        return False
    rows = blas.eigenvectors(*reduced, range(first, len(S)))[None]
    images = (A.right(rows) if A.is_tall else A.left(rows))[0]
    triangle = torch.linalg.qr(images.T, mode="r").R
    S[first:] = torch.linalg.svdvals(triangle)
    return True


def _with_long_side(
    A: Operand, S: Tensor, short: Tensor | None, methods: tuple[dict[str, Any], ...]
) -> Factors:
    """Adds the vectors of the longer side, A·v/σ. short: (b, k, q) rows of the shorter side."""
    if short is None:
        return Factors(S, None, None, methods)
    images = A.right(short) if A.is_tall else A.left(short)
    scale = S[:, : short.shape[1], None].clamp_min(torch.finfo(S.dtype).tiny)
    long = images.div_(scale)
    return Factors(S, long.mT, short, methods) if A.is_tall else Factors(S, short.mT, long, methods)


def _at_scale(A: Operand, solve: Callable[[Operand], Factors]) -> Factors:
    """Factors of a stack whose squares leave the range of fp64, by those of A/s."""
    unit, scale = A.scaled()
    found = solve(unit)
    return replace(found, S=found.S * scale[:, None])


def _of_zero(A: Operand, vectors: int) -> Factors:
    """The zero matrix: zeros and any orthonormal vectors."""
    (m, n), device = A.shape, A.plus.device
    method = {"how": "zero", "bound": 0.0, "subspace_bound": None, "fallback": None}
    S = torch.zeros(1, min(m, n), dtype=torch.float64, device=device)
    if not vectors:
        return Factors(S, None, None, (method,))
    U = torch.eye(m, vectors, dtype=torch.float64, device=device)[None]
    return Factors(S, U, torch.eye(vectors, n, dtype=torch.float64, device=device)[None], (method,))


# --- a stack on another device ------------------------------------------------------------------


def _factorise_stacked(A: Operand, vectors: int, cuts: Sequence[int]) -> Factors:
    """The batched route, and the exact method for each matrix on which it does not suffice."""
    gram = A.gram()
    if outside(gram.diagonal(dim1=-2, dim2=-1).sum(-1)[A.moved()], torch.float64):
        return _at_scale(A, lambda unit: _factorise_stacked(unit, vectors, cuts))
    with stage("eigenvectors" if vectors else "eigenvalues"):
        found = eigenpairs(gram, vectors)
        S = found.values.clamp_min(0).sqrt()
        mended = _mend_tails(A, gram, S, found)
    del gram
    residuals = [None] * len(A) if found.residuals is None else list(found.residuals.cpu())
    methods, reasons = [], []
    for i, row in enumerate(S.cpu()):
        how = "gram-eigh" + ("-mended-tail" if i in mended else "")
        method = _method(row, cuts, how, residuals[i], mended=i in mended)
        methods.append(method)
        reasons.append(found.faults[i] or _reason_against(row, method, cuts, A, mended=i in mended))
    quick = _with_long_side(A, S, found.rows, tuple(methods))
    if not any(reasons):
        return quick
    return concatenate(
        [
            _exact(A.row(i), vectors, torch.float64, reason=reason) if reason else take(quick, i)
            for i, reason in enumerate(reasons)
        ]
    )


def _mend_tails(A: Operand, gram: Tensor, S: Tensor, found: Eigenpairs) -> set[int]:
    """`_mend_tail` for the matrices of a stack that want it; their numbers."""
    short = S[:, -1] < TAIL_FLOOR * S[:, 0]
    short &= (S < _MEND_FROM * S[:, :1]).sum(-1) <= min(_MEND_AT_MOST, LAST)
    which = [i for i in short.nonzero().flatten().tolist() if found.faults[i] is None]
    if not which:
        return set()
    last, faults = found.last, (None,) * len(which)
    if last is None:
        again = eigenpairs(gram[which], 1)
        last, faults = again.last, again.faults
    else:
        last = last[which]
    assert last is not None
    some = A.rows(which)
    images = some.right(last) if A.is_tall else some.left(last)
    values = torch.linalg.svdvals(torch.linalg.qr(images.mT, mode="r").R)
    mended = {i: values[n] for n, i in enumerate(which) if faults[n] is None}
    for i, tail in mended.items():
        below = int((S[i] < _MEND_FROM * S[i, 0]).sum())
        S[i, -below:] = tail[-below:]
    return set(mended)


# --- bounds -------------------------------------------------------------------------------------


def _method(
    S: Tensor, cuts: Sequence[int], how: str, residuals: Tensor | None, *, mended: bool
) -> dict[str, Any]:
    largest, least = float(S[0]), float(S[-1])
    if mended:
        least = max(least, _MEND_FROM * largest)  # below it σ is good to eps·σ1
    bound = math.sqrt(_GRAM_ERROR * EPS)
    if largest > 0 and least > 0:
        bound = min(bound, _GRAM_ERROR * EPS * largest / (2 * least))
    subspace = None
    if residuals is not None:
        subspace = max((_subspace_bound(S, k, residuals) for k in cuts), default=None)
    return {"how": how, "bound": bound, "subspace_bound": subspace, "fallback": None}


def _subspace_bound(S: Tensor, k: int, residuals: Tensor) -> float:
    """Bound on the sine of the error angle of the leading k: (residual + rounding)/gap, in σ².

    0 for a cut that is too ill-defined for any method (see LEAST_GAP), infinity where σ_k vanishes.
    """
    kept = float(S[k - 1])
    dropped = float(S[k]) if k < len(S) else 0.0
    if kept - dropped < LEAST_GAP * kept:
        return 0.0
    error = float(torch.linalg.vector_norm(residuals[:k])) + _GRAM_ERROR * EPS * float(S[0]) ** 2
    gap = kept**2 - dropped**2
    return error / gap if gap > 0 else math.inf


def _reason_against(
    S: Tensor, method: dict[str, Any], cuts: Sequence[int], A: Operand, *, mended: bool
) -> str | None:
    """Why the Gram route does not suffice for this spectrum, or None."""
    largest, least = float(S[0]), float(S[-1])
    if largest == 0:
        return None
    if mended and A.plus.dtype == torch.float64:
        last = float(S[S >= _MEND_FROM * largest][-1])
        if least * _MEND_TOLERANCE < _MEND_ERROR * largest**2 / last:
            return "tail: fp64 weights with a singular value too small to be mended"
    if least < TAIL_FLOOR * largest and not mended:
        return f"tail: least singular value below {TAIL_FLOOR:g} of the largest"
    bound = method["subspace_bound"]
    if bound is not None and bound > SUBSPACE_TOLERANCE:
        return f"subspace bound {bound:.1e} above {SUBSPACE_TOLERANCE:g} at k in {list(cuts)}"
    return None


# --- the exact method ---------------------------------------------------------------------------


def _exact(A: Operand, vectors: int, dtype: torch.dtype, *, reason: str | None) -> Factors:
    """The SVD of LAPACK (or cuSOLVER), matrix by matrix."""
    rows = [_exact_one(A.row(i), vectors, dtype) for i in range(len(A))]
    method = {
        "how": "svd" if vectors else "svdvals",
        "bound": torch.finfo(dtype).eps * 8,
        "subspace_bound": None,
        "fallback": reason,
    }
    left = _stack([None if U is None else U.mT for _, U, _ in rows])
    return Factors(
        S=torch.stack([S for S, _, _ in rows]),
        U=None if left is None else left.mT,
        Vh=_stack([Vh for _, _, Vh in rows]),
        methods=tuple(dict(method) for _ in rows),
    )


@stage("exact svd")
def _exact_one(
    A: Operand, vectors: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """One exact SVD in fp64 results: the default driver, then gesvd on CUDA, then the CPU in fp64.

    In fp32 CUDA's default, Jacobi's method, leaves vectors 8e-5 from orthonormal; gesvd goes first.
    A wide matrix is turned first: its SVD is several times slower than that of its transpose. Every
    matrix is taken at entries near 1, which fp32 holds, too.
    """
    unit, scale = A.scaled()
    dense = unit.plus[0]
    tall = dense if A.is_tall else dense.T
    attempts: list[tuple[torch.device, torch.dtype, str | None]] = [(dense.device, dtype, None)]
    if dense.is_cuda:
        attempts.append((dense.device, dtype, "gesvd"))
    if dtype == torch.float32:
        attempts.reverse()
    if dense.device.type != "cpu" or dtype != torch.float64:
        attempts.append((torch.device("cpu"), torch.float64, None))
    for device, precision, driver in attempts:
        try:
            found = _svd(tall.to(device, precision), vectors, driver)
        except RuntimeError:  # torch.linalg.LinAlgError is one
            continue
        S, U, Vh = (part.to(dense.device, torch.float64) for part in found)
        S = S * scale
        if not vectors:
            return S, None, None
        return (S, U, Vh) if A.is_tall else (S, Vh.T, U.T)
    raise NumericsError(f"no SVD driver converged on a {A.shape[0]}×{A.shape[1]} matrix")


def _svd(tall: Tensor, vectors: int, driver: str | None) -> tuple[Tensor, Tensor, Tensor]:
    if vectors == 0:
        S = torch.linalg.svdvals(tall, driver=driver)
        return S, S, S
    U, S, Vh = torch.linalg.svd(tall, full_matrices=False, driver=driver)
    return S, U[:, :vectors], Vh[:vectors]


# --- stacks -------------------------------------------------------------------------------------


def take(factors: Factors, i: int) -> Factors:
    part = slice(i, i + 1)
    return replace(
        factors,
        S=factors.S[part],
        U=None if factors.U is None else factors.U[part],
        Vh=None if factors.Vh is None else factors.Vh[part],
        methods=factors.methods[part],
    )


def concatenate(parts: Sequence[Factors]) -> Factors:
    """The factors of several stacks of one shape, as those of one stack."""

    def joined(tensors: Sequence[Tensor | None]) -> Tensor | None:
        present = [tensor for tensor in tensors if tensor is not None]
        return torch.cat(present) if present else None

    left = joined([None if part.U is None else part.U.mT for part in parts])
    return Factors(
        S=torch.cat([part.S for part in parts]),
        U=None if left is None else left.mT,
        Vh=joined([part.Vh for part in parts]),
        methods=tuple(method for part in parts for method in part.methods),
    )


def _stack(parts: Sequence[Tensor | None]) -> Tensor | None:
    present = [part for part in parts if part is not None]
    return torch.stack(present) if present else None
