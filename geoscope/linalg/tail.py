"""The last k triplets of a matrix, exact where an error relative to σ1 is not good enough.

The fp64 Gram matrix gives the tail's subspace to eps·σ1²/gap; the triplets are then taken from the
images A·v, whose QR and small SVD know nothing of σ1². Where the bound on the subspace is not met
(an ill-conditioned matrix), the exact SVD is taken.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from geoscope.errors import NumericsError
from geoscope.linalg import blas
from geoscope.linalg.operand import Operand
from geoscope.linalg.precision import EPS
from geoscope.linalg.scale import outside
from geoscope.linalg.stacked import LAST, eigenpairs
from geoscope.linalg.svd import factorise
from geoscope.profile import stage

__all__ = ["Tail", "tail_triplets"]

# Sine of the subspace's error up to which the Gram route serves, if nothing else is asked for.
_TOLERANCE = 1e-9
_GRAM_ERROR = 8  # as in svd.py
_MOST_OF_Q = 1 / 8  # beyond it inverse iteration and its orthogonalisation cost as much as all


@dataclass(frozen=True)
class Tail:
    """Last k triplets in fp64: S (k,) descending, U (m, k), Vh (k, n).

    spectrum: all singular values (q,), those of the tail included. method: as in `Factors.methods`.
    """

    S: Tensor
    U: Tensor
    Vh: Tensor
    spectrum: Tensor
    method: dict[str, Any]


@stage("tail triplets")
def tail_triplets(
    W: Tensor, k: int, *, solver: str = "auto", tolerance: float = _TOLERANCE
) -> Tail:
    """The last k triplets of W (m, n), finite and of any storage dtype, 1 ≤ k ≤ min(m, n).

    σ to eps·σ1 and the subspace to `tolerance`, the sine of its error, or by LAPACK's SVD in fp64.
    Raises NumericsError when no driver converges.
    """
    q, reason = min(W.shape), None
    most = min(_MOST_OF_Q * q, math.inf if W.device.type == "cpu" else LAST)
    if solver == "auto" and k <= most:
        found = _through_gram(Operand(W[None]), k, tolerance)
        if isinstance(found, Tail):
            return found
        reason = found
    factors = factorise(Operand(W[None]), vectors=q, solver="exact")
    assert factors.U is not None and factors.Vh is not None
    last = slice(q - k, q)
    method = {**factors.methods[0], "fallback": reason}
    S = factors.S[0]
    return Tail(S[last], factors.U[0][:, last], factors.Vh[0][last], S, method)


def _through_gram(A: Operand, k: int, tolerance: float) -> Tail | str:
    """The tail, or why it is not good enough; at another scale where squares leave fp64."""
    gram = A.gram()[0]
    if outside(gram.diagonal().sum(), torch.float64) and bool(A.moved()):
        unit, scale = A.scaled()
        found = _through_gram(unit, k, tolerance)
        if isinstance(found, str):
            return found
        return replace(found, S=found.S * scale, spectrum=found.spectrum * scale)
    try:
        energies, rows, misfit = _last_eigenpairs(gram, k)
    except NumericsError as error:
        return str(error)
    q = len(energies)
    gap = float(energies[q - k - 1] - energies[q - k])
    error = float(torch.linalg.vector_norm(misfit)) + _GRAM_ERROR * EPS * float(energies[0])
    sine = error / gap if gap > 0 else math.inf
    if sine > tolerance:
        return f"subspace bound {sine:.1e} above {tolerance:g}"
    rows = torch.linalg.qr(rows.T).Q.T
    images = (A.right(rows[None]) if A.is_tall else A.left(rows[None]))[0]
    basis, core = torch.linalg.qr(images.T)  # A·rowsᵀ = basis·core
    U, S, Vh = torch.linalg.svd(core)
    long, short = basis @ U, Vh @ rows
    method = {"how": "gram-tail", "bound": 8 * EPS, "subspace_bound": sine, "fallback": None}
    spectrum = energies.clamp_min(0).sqrt()
    spectrum[q - k :] = S
    if A.is_tall:
        return Tail(S, long, short, spectrum, method)
    return Tail(S, short.T, long.T, spectrum, method)


def _last_eigenpairs(gram: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """All eigenvalues, the last k vectors as rows and their residuals; overwrites `gram`."""
    q = len(gram)
    if gram.device.type != "cpu":
        found = eigenpairs(gram[None], 1)
        if found.faults[0] is not None:
            raise NumericsError(found.faults[0])
        assert found.last is not None
        values, rows = found.values[0], found.last[0, -k:]
        return values, rows, rows @ gram - values[q - k :, None] * rows
    diagonal = gram.diagonal().clone()
    d, e, tau = blas.tridiagonalise(gram)
    energies = blas.eigenvalues(d, e)
    rows = blas.eigenvectors(gram, d, e, tau, energies, range(q - k, q))
    gram.diagonal().copy_(diagonal)
    return energies, rows, blas.symmetric_times(gram, rows) - energies[q - k :, None] * rows
