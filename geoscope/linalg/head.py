"""The leading triplets of one matrix to fp64, at little more than the price of fp32.

The Gram matrix and its tridiagonalisation are done in fp32, which gives every leading direction to
1e-4 or so and, as a by-product, a near-perfect preconditioner: (T − θ)⁻¹ costs nothing. A pass over
the stored weights in fp64 then measures the residuals, and one correction squares the error
(iterative refinement of invariant subspaces). Two or three passes reach 4e-9, even where
σ_k/σ_{k+1} is 1.00x. The last pass certifies the result; without a certificate the whole spectrum
is taken in fp64 instead. [Dongarra, Moler & Wilkinson 1983; Davis & Kahan 1970]
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from scipy.linalg import LinAlgError, eigh_tridiagonal
from torch import Tensor

from geoscope.errors import NumericsError
from geoscope.linalg import blas
from geoscope.linalg.operand import Operand
from geoscope.linalg.precision import EPS
from geoscope.linalg.scale import outside
from geoscope.linalg.svd import SUBSPACE_TOLERANCE, Factors, factorise
from geoscope.profile import stage

__all__ = ["Head", "head_triplets"]

# Sine of the subspace's error below which the passes end, as for angles. In 14 million entries of a
# rank-k part it moves one across a quantile once in a score of matrices, at the most.
TOLERANCE = SUBSPACE_TOLERANCE
_PASSES = 4
# Directions beyond the k-th that are refined along: a near tie at the cut may fall either way.
_BESIDE = 4
# fp32 Gram matrix and tridiagonalisation: error of an eigenvalue relative to the largest. 4e-7 is
# the most seen; 3e-6 leaves room.
_ERROR32 = 3e-6
# Below this shorter side, or above this part of it (twice that of a square matrix, where the passes
# are short), the whole spectrum in fp64 is as cheap.
_LEAST_SIDE = 512
# Entries of a unit vector that are zero in fp32: their products stay above its subnormal numbers.
_NEGLIGIBLE = 1e-18
_MOST_OF_Q = 1 / 24


@dataclass(frozen=True)
class Head:
    """Leading k triplets of one matrix in fp64.

    S: (k + 1,) descending, σ_{k+1} = 0 where k is the shorter side. U: (m, k), Vh: (k, n). method:
    as in `Factors.methods`.
    """

    S: Tensor
    U: Tensor
    Vh: Tensor
    method: dict[str, Any]

    @property
    def gap(self) -> float | None:
        """(σ_k − σ_{k+1})/σ_k, in [0, 1]; None where σ_k = 0."""
        kept, dropped = float(self.S[-2]), float(self.S[-1])
        return (kept - dropped) / kept if kept > 0 else None


@stage("leading triplets")
def head_triplets(W: Tensor, k: int, *, solver: str = "auto") -> Head:
    """The leading k triplets of W (m, n), finite and of any storage dtype, 1 ≤ k ≤ min(m, n).

    The subspaces are exact to 4e-9 rad, unless the cut is a tie to 1e-6. solver="exact" forces
    LAPACK's or cuSOLVER's SVD in fp64. Raises NumericsError when no driver converges.
    """
    A, (q, M) = Operand(W[None]), sorted(W.shape)
    few = k + _BESIDE <= _MOST_OF_Q * q * (1 + q / M)
    worth = W.device.type == "cpu" and q >= _LEAST_SIDE and few
    reason = None
    if solver == "auto" and worth:
        try:
            found = _refined(A, k)
        except (NumericsError, RuntimeError, LinAlgError) as error:
            found = f"refinement failed: {error}"
        if isinstance(found, Head):
            return found
        reason = found
    factors = factorise(A, vectors=k, cuts=(k,), solver=solver)
    return _of_factors(factors, k, reason)


def _of_factors(factors: Factors, k: int, reason: str | None) -> Head:
    assert factors.U is not None and factors.Vh is not None
    (method,) = factors.methods
    S = factors.S[0]
    S = torch.cat([S[:k], S[k : k + 1] if len(S) > k else S.new_zeros(1)])
    fallback = method["fallback"] or reason
    return Head(S, factors.U[0], factors.Vh[0], {**method, "fallback": fallback})


# --- fp32 search, fp64 refinement ---------------------------------------------------------------


def _refined(A: Operand, k: int) -> Head | str:
    """The head, or why it could not be certified; at another scale where squares leave fp32."""
    gram = A.gram32()
    if outside(gram.diagonal().sum(), torch.float32):
        if not bool(A.moved()):
            return "the matrix is zero"
        A, scale = A.scaled()
        found = _refined(A, k)
        return found if isinstance(found, str) else replace(found, S=found.S * scale)
    reduced = _Reduced.of(gram, k + _BESIDE)
    pairs = _Pairs.of(A, reduced.back(reduced.vectors), k, reduced.following)
    passes = 1
    while pairs.sine > TOLERANCE:
        if passes == _PASSES or pairs.gap < 1e3 * EPS * pairs.top:
            return f"refinement stopped at a subspace bound of {pairs.sine:.1e}"
        top = pairs.top
        step = reduced.correction(pairs.misfit / top, pairs.energies / top, top)
        pairs = _Pairs.of(A, pairs.short + step, k, reduced.following)
        passes += 1
    return pairs.head(A, k, passes)


@dataclass(frozen=True)
class _Pairs:
    """Ritz pairs of the Gram matrix of the shorter side, from one pass over the stored weights.

    short: (p, q) orthonormal rows, long: their images (p, M), energies: θ (p,) descending, misfit:
    G·x − θ·x (p, q), orthogonal to all rows. gap: θ_k − θ_{k+1}. sine: bound on the error of the
    leading k.
    """

    short: Tensor
    long: Tensor
    energies: Tensor
    misfit: Tensor
    gap: float
    sine: float

    @classmethod
    def of(cls, A: Operand, rows: Tensor, k: int, following: float) -> _Pairs:
        """following: the (p + 1)-th eigenvalue of the fp32 Gram matrix."""
        X = torch.linalg.qr(rows.T).Q.T.contiguous()
        long, back = A.there_and_back(X)
        energies, rotation = torch.linalg.eigh(long @ long.T)
        rotation = rotation.flip(-1).T.contiguous()
        energies = energies.flip(0).clamp_min(0)
        X, long, back = rotation @ X, rotation @ long, rotation @ back
        misfit = back - energies[:, None] * X
        gap = float(energies[k - 1] - energies[k])
        return cls(X, long, energies, misfit, gap, _sine(energies, misfit, k, following))

    @property
    def top(self) -> float:
        return float(self.energies[0])

    def head(self, A: Operand, k: int, passes: int) -> Head:
        S = self.energies[: k + 1].sqrt()
        short, long = self.short[:k], self.long[:k] / S[:k, None]
        # the error of θ is the residual's square over the gap; that of σ relative to σ1:
        together = float(torch.linalg.vector_norm(self.misfit[:k]))
        error = together**2 / self.gap / (2 * float(S[k - 1]) * float(S[0]))
        method = {
            "how": f"gram32-refined-{passes}",
            "bound": error + 8 * EPS,
            "subspace_bound": self.sine,
            "fallback": None,
        }
        U, Vh = (long.T, short) if A.is_tall else (short.T, long)
        return Head(S, U, Vh, method)


def _sine(energies: Tensor, misfit: Tensor, k: int, following: float) -> float:
    """Bound on the sine of the error angle of the leading k of p Ritz rows, inf where unknown.

    Residuals are orthogonal to all p rows, so they turn the leading k out of these over the gap to
    what is left outside, and towards the other rows to second order only; rounding does so over
    the gap at the cut. What is outside lies below `following` and the errors of fp32, so that the
    bound also says that no direction was missed. [Davis & Kahan 1970; Stewart 1973]
    """
    top, gap = float(energies[0]), float(energies[k - 1] - energies[k])
    leading, whole = (float(torch.linalg.vector_norm(one)) for one in (misfit[:k], misfit))
    outside = float(energies[k - 1]) - (following + _ERROR32 * top + whole)
    if gap <= 0 or outside <= 0:
        return math.inf
    return leading / outside + whole**2 / (gap * outside) + 8 * EPS * top / gap


# --- the fp32 tridiagonal form ------------------------------------------------------------------


@dataclass(frozen=True)
class _Reduced:
    """QᵀGQ = T: reflectors of Q in fp32, T in fp64, and T's leading eigenvectors.

    vectors: (p, q), rows by descending eigenvalue. following: the (p + 1)-th eigenvalue.
    """

    reflectors: Tensor
    tau: Tensor
    d: Tensor
    e: Tensor
    vectors: Tensor
    following: float

    @classmethod
    @stage("tridiagonal32")
    def of(cls, gram: Tensor, p: int) -> _Reduced:
        """gram (q, q) in fp32 is overwritten."""
        q = len(gram)
        d, e, tau = blas.tridiagonalise(gram)
        d, e = d.double(), e.double()
        values, vectors = eigh_tridiagonal(
            d.numpy(), e.numpy(), select="i", select_range=(q - p - 1, q - 1),
            lapack_driver="stebz", check_finite=False,
        )  # fmt: skip
        rows = torch.from_numpy(vectors.T.copy()).flip(0)[:p].contiguous()
        return cls(gram, tau, d, e, rows, float(values[0]))

    def back(self, coordinates: Tensor) -> Tensor:
        """Q·c for rows (c, q), fp64 → fp64 through fp32."""
        return self._reflect(coordinates)

    def _reflect(self, rows: Tensor, *, transpose: bool = False) -> Tensor:
        out = rows.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
        # Eigenvectors of T die away to subnormal numbers, which cost ten times a product's time.
        out[out.abs() < _NEGLIGIBLE] = 0.0
        blas.reflect(self.reflectors, self.tau, out, transpose=transpose)
        return out.double()

    def correction(self, misfit: Tensor, energies: Tensor, scale: float) -> Tensor:
        """−(G − θ)⁻¹·r outside the leading space, for each residual r; all relative to `scale`.

        misfit: (p, q), energies: θ (p,). Inside the space a correction only mixes the rows, and
        there G − θ is nearly singular: it is left out before and after the division.
        """
        C = self._reflect(misfit, transpose=True)
        C -= (C @ self.vectors.T) @ self.vectors
        d, e = self.d / scale, self.e / scale
        for row, energy in zip(C, energies, strict=True):
            blas.solve_tridiagonal(d - energy, e, row)
        C -= (C @ self.vectors.T) @ self.vectors
        return -self.back(C)
