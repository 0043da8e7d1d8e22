"""A low-rank product B·diag(s)·A, such as an adapter's update, that is never made dense.

Thin QRs B = Q_B·R_B and Aᵀ = Q_A·R_A leave a core C = R_B·diag(s)·R_Aᵀ of at most r × r with
B·diag(s)·A = Q_B·C·Q_Aᵀ: its singular values, norms and inner products are those of the product.

The error is ‖E‖_F ≤ c·eps·Σ_k |s_k|·‖b_k‖·‖a_k‖ (b_k columns of B, a_k rows of A). Householder's QR
perturbs each column in proportion to that column alone [Higham 2002, §19.3], so it does not matter
how a size is shared between b_k and a_k, or that some columns are tiny beside others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from geoscope.errors import NumericsError
from geoscope.linalg.precision import EPS
from geoscope.linalg.scale import power_of_two
from geoscope.linalg.svd import LEAST_GAP, Factors, concatenate
from geoscope.profile import stage

__all__ = ["Product", "factorise_product"]

# c above is _ERROR + _ERROR_BY_LENGTH·(m + n). Sums along columns of equal entries round to one
# side, so that c grows with their length: .015·(m + n) is the most seen there, 4 on random columns
# up to 1000 long. Both leave room.
_ERROR, _ERROR_BY_LENGTH = 8, 1 / 32


@dataclass(frozen=True)
class Product:
    """B·diag(scale)·A for a stack: B (b, m, r), scale (b, r), A (b, r, n), all fp64.

    Made by `Product.of`. P + Q and P − Q are products too, of rank ≤ r_P + r_Q.
    """

    B: Tensor
    scale: Tensor
    A: Tensor

    @classmethod
    def of(cls, B: Tensor, A: Tensor, scale: float | Tensor = 1.0) -> Product:
        """scale·B·A, upcast first. B: (m, r) or (b, m, r), A: (r, n) or (b, r, n), of any dtype.

        One matrix is a stack of one. scale: a number, or what broadcasts to (b, r).
        """
        B, A = (X[None] if X.ndim == 2 else X for X in (B, A))
        if B.shape[0] != A.shape[0] or B.shape[-1] != A.shape[-2]:
            shapes = " and ".join("×".join(map(str, X.shape)) for X in (B, A))
            raise NumericsError(f"factors of {shapes} do not multiply: their ranks differ")
        scale = torch.as_tensor(scale, dtype=torch.float64, device=B.device)
        return cls(
            B.to(torch.float64),
            scale.expand(B.shape[0], B.shape[-1]),
            A.to(torch.float64),
        )

    @property
    def shape(self) -> tuple[int, int]:
        return self.B.shape[-2], self.A.shape[-1]

    @property
    def rank(self) -> int:
        """The largest rank the product can have, min(r, m, n)."""
        return min(self.B.shape[-1], *self.shape)

    def __len__(self) -> int:
        return len(self.B)

    def row(self, i: int) -> Product:
        """The i-th matrix, as a stack of one."""
        part = slice(i, i + 1)
        return Product(self.B[part], self.scale[part], self.A[part])

    def __neg__(self) -> Product:
        return Product(self.B, -self.scale, self.A)

    def __add__(self, other: Product) -> Product:
        """[B, B']·diag(s, s')·[A; A']."""
        return Product(
            torch.cat([self.B, other.B], -1),
            torch.cat([self.scale, other.scale], -1),
            torch.cat([self.A, other.A], -2),
        )

    def __sub__(self, other: Product) -> Product:
        """The difference, without cancellation where the two are close and equally scaled.

        B·s·A − B'·s·A' = (B − B')·s·A + B'·s·(A − A'): the differences of stored numbers are
        exact or nearly so, and equal products give zeros. Taken, matrix by matrix, where its terms
        are smaller than those of P + (−Q).
        """
        plain = self + -other
        if self.B.shape != other.B.shape or self.A.shape != other.A.shape:
            return plain
        near = Product(
            torch.cat([self.B - other.B, other.B], -1),
            torch.cat([self.scale, self.scale], -1),
            torch.cat([self.A, self.A - other.A], -2),
        )
        equal = (self.scale == other.scale).all(-1)
        closer = equal & (near.terms() < plain.terms())
        return Product(
            torch.where(closer[:, None, None], near.B, plain.B),
            torch.where(closer[:, None], near.scale, plain.scale),
            torch.where(closer[:, None, None], near.A, plain.A),
        )

    def terms(self) -> Tensor:
        """Σ_k |s_k|·‖b_k‖·‖a_k‖, (b,): what the rounding error is relative to."""
        B, scale, A, size = _balanced(self)
        lengths = torch.linalg.vector_norm(B, dim=-2) * torch.linalg.vector_norm(A, dim=-1)
        return size * (scale.abs() * lengths).sum(-1)

    @cached_property
    def thin(self) -> tuple[_Thin, ...]:
        """Q_B, C and Q_A of each matrix; kept, for norms, values and inner products take them."""
        B, scale, A, size = _balanced(self)
        return tuple(_Thin.of(*one) for one in zip(B, scale, A, size, strict=True))

    def norm(self) -> Tensor:
        """Frobenius norms ‖C‖_F, (b,)."""
        return torch.stack([one.size * torch.linalg.vector_norm(one.core) for one in self.thin])

    @stage("products")
    def right(self, X: Tensor) -> Tensor:
        """The images of rows X (b, k, n): X·Aᵀ·diag(s)·Bᵀ, (b, k, m)."""
        return (X @ self.A.mT * self.scale[:, None, :]) @ self.B.mT

    @stage("products")
    def left(self, Y: Tensor) -> Tensor:
        """The images of rows Y (b, k, m) under the transpose: Y·B·diag(s)·A, (b, k, n)."""
        return (Y @ self.B * self.scale[:, None, :]) @ self.A

    def both(self, X: Tensor, Y: Tensor) -> tuple[Tensor, Tensor]:
        """`right` of X and `left` of Y."""
        return self.right(X), self.left(Y)

    @stage("products")
    def inner(self, other: Product) -> Tensor:
        """⟨P, Q⟩_F = ⟨(Q_B'ᵀQ_B)·C·(Q_AᵀQ_A'), C'⟩, (b,).

        The sum of (BᵀB')∘(AA'ᵀ) is the same number, but where terms cancel (a sum of products) its
        error is relative to the square of their size; here it is to the size itself.
        """
        return torch.stack([one.inner(two) for one, two in zip(self.thin, other.thin, strict=True)])


@dataclass(frozen=True)
class _Thin:
    """size·left·core·rightᵀ, one matrix: left (m, p) and right (n, p') with orthonormal columns.

    core: (p, p') with p = min(r, m), p' = min(r, n). error: the bound on ‖E‖_F, in units of size.
    """

    left: Tensor
    core: Tensor
    right: Tensor
    size: Tensor
    error: float

    @classmethod
    @stage("thin qr")
    def of(cls, B: Tensor, scale: Tensor, A: Tensor, size: Tensor) -> _Thin:
        """Of size·B·diag(scale)·A with B (m, r) and A (r, n); zero where terms cancel."""
        left, R_B = torch.linalg.qr(B)
        right, R_A = torch.linalg.qr(A.T)
        core = (R_B * scale) @ R_A.T
        lengths = torch.linalg.vector_norm(R_B, dim=0) * torch.linalg.vector_norm(R_A, dim=0)
        c = _ERROR + _ERROR_BY_LENGTH * (len(left) + len(right))
        error = c * EPS * float(scale.abs() @ lengths)
        if float(torch.linalg.vector_norm(core)) <= error:
            core = torch.zeros_like(core)
        return cls(left, core, right, size, error)

    def inner(self, other: _Thin) -> Tensor:
        """⟨self, other⟩_F, ()."""
        moved = (other.left.T @ self.left) @ self.core @ (self.right.T @ other.right)
        return self.size * other.size * (moved * other.core).sum()


def factorise_product(P: Product, *, vectors: int = 0, cuts: Sequence[int] = ()) -> Factors:
    """All singular values of P, and its leading min(vectors, P.rank) triplets.

    S (b, q) has exact zeros beyond P.rank; vectors there would be arbitrary, so none are given.
    Within the rank, a σ below bound·σ1 is rounding. `cuts` are the subspace dimensions that
    will be used, for `subspace_bound`. A product whose terms cancel to within the error bound is
    zero, and says so in `fallback`. Raises NumericsError for factors that are not finite.
    """
    return concatenate([_factors(one, vectors, cuts) for one in P.thin])


def _factors(thin: _Thin, vectors: int, cuts: Sequence[int]) -> Factors:
    """Of one matrix, as a stack of one."""
    m, n = len(thin.left), len(thin.right)
    U, values, Vh = (part.to(thin.core.device) for part in _core_svd(thin.core.cpu()))
    S = values.new_zeros(min(m, n))
    S[: len(values)] = values
    method = _method(S, thin.error, cuts if vectors else ())
    S = thin.size * S
    if not bool(torch.isfinite(S).all()):
        raise NumericsError(f"the {m}×{n} product overflows fp64")
    if not vectors:
        return Factors(S[None], None, None, (method,))
    left, right = thin.left @ U[:, :vectors], Vh[:vectors] @ thin.right.T
    return Factors(S[None], left[None], right[None], (method,))


def _balanced(P: Product) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(B', s', A', size): size·B'·diag(s')·A' = P, with entries near 1, by powers of two.

    Raises NumericsError where an entry is not finite.
    """
    if P.B.shape[-1] == 0:
        return P.B, P.scale, P.A, torch.ones(len(P), dtype=torch.float64, device=P.B.device)
    columns, rows = P.B.abs().amax(-2), P.A.abs().amax(-1)
    by_column, by_row = power_of_two(columns), power_of_two(rows)
    scale = P.scale * by_column * by_row
    size = power_of_two(scale.abs().amax(-1))
    if not all(bool(torch.isfinite(one).all()) for one in (columns, rows, scale)):
        m, n = P.shape
        raise NumericsError(f"the factors of the {m}×{n} product hold NaN or infinity, or overflow")
    return P.B / by_column[:, None, :], scale / size[:, None], P.A / by_row[..., None], size


@stage("exact svd")
def _core_svd(core: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """LAPACK's, on the CPU: the core is too small to be work for another device."""
    if 0 in core.shape:
        return core, core.new_zeros(0), core.mT
    try:
        return torch.linalg.svd(core, full_matrices=False)
    except RuntimeError as error:  # torch.linalg.LinAlgError is one
        p, r = core.shape
        raise NumericsError(f"the SVD of a {p}×{r} core did not converge") from error


def _method(S: Tensor, error: float, cuts: Sequence[int]) -> dict[str, Any]:
    """How, and how well. S and error in the same unit."""
    largest = float(S[0]) if len(S) else 0.0
    if largest == 0:
        reason = "terms cancel to within rounding" if error > 0 else None
        return {"how": "zero", "bound": 0.0, "subspace_bound": None, "fallback": reason}
    return {
        "how": "product-qr",
        "bound": error / largest,
        "subspace_bound": max((_sine(S, k, error) for k in cuts), default=None),
        "fallback": None,
    }


def _sine(S: Tensor, k: int, error: float) -> float:
    """Bound on the sine of the error angle of the leading k, e/(σ_k − σ_{k+1} − e) [Wedin 1972].

    0 for a cut that is too ill-defined for any method (see LEAST_GAP), 1 where it says nothing.
    """
    kept = float(S[k - 1])
    gap = kept - (float(S[k]) if k < len(S) else 0.0)
    if gap < LEAST_GAP * kept:
        return 0.0
    return min(1.0, error / (gap - error)) if gap > error else 1.0
