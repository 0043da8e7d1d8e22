"""What a Krylov space of leading triplets is asked for, and what its answer is certified to.

Shared by the CPU's search (`leading`) and that over stacks (`stacked_leading`): one tolerance, one
certificate, one way to start.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from geoscope.linalg.operand import Operand

__all__ = [
    "HOPE_FROM",
    "LOST",
    "MOST_OF_Q",
    "ROWS",
    "SLACK",
    "STILL",
    "Leading",
    "bounds_of",
    "excess_of",
    "first_block",
]

# Rows of a Krylov block: more share one pass over the matrix, fewer need a smaller space.
ROWS = 4
# Part of a warm start that is random.
_STRANGE = 0.1
# Part of q that the Krylov space may fill before the exact method is the better choice.
MOST_OF_Q = 0.45
# Residual of the Gram eigenproblem, relative to the k-th eigenvalue, that ends the iteration: what
# fp32 products can reach.
_TOLERANCE = 5e-7
# Or this part of the gap behind the last: the sine of a subspace is off by no more.
_SINE_TOLERANCE = 3e-6
# Relative error of an eigenvalue where values alone are wanted: half of it is that of σ.
_VALUE_TOLERANCE = 1e-7
# A residual in fp64 may be this many times what the fp32 space was asked for; beyond it fp32 did
# not carry far enough.
SLACK = 10
# Relative move of the leading Ritz values between two checks below which they stand still.
STILL = 1e-9
# A new direction shorter than this, relative to what was taken out of it, is cleaned once more.
LOST = 1e-4
# From this many triplets on, a space of 4k dimensions in which fewer than k/16 have converged is
# given up: the spectrum is flat, and the exact method is cheaper than a space that large.
HOPE_FROM = 32


@dataclass(frozen=True)
class Leading:
    """Leading k triplets of one matrix, or the news that they were not found.

    S: (k,), U: (k, m) and Vh: (k, n), rows, leading first; fp64. residual: largest ‖Aᵀu − σv‖/σ1,
    measured in fp64. With the gap (σ_k − σ_{k+1})/σ1, σ_{k+1} taken from the Krylov space, bound:
    on the error of every σ relative to σ1, the residual (Weyl) or ‖residuals‖²/gap. sine: bound on
    the error of the subspace of the vectors that are certified, ‖residuals‖/gap behind the last of
    them (Wedin). dimension: of the Krylov space. converged: whether the tolerance was met within
    the budget.
    """

    S: Tensor
    U: Tensor
    Vh: Tensor
    residual: float
    bound: float
    sine: float
    dimension: int
    converged: bool

    @classmethod
    def of_zero(cls, A: Operand, k: int) -> Leading:
        """Of a zero matrix: zeros and any orthonormal vectors, from a space of dimension 0."""
        (m, n), device = A.shape, A.plus.device
        U, Vh = (torch.eye(k, size, dtype=torch.float64, device=device) for size in (m, n))
        bounds = bounds_of(U[:, 0], U.new_zeros(k + 1), k, certified=k)
        return cls(U.new_zeros(k), U, Vh, **bounds, dimension=0, converged=True)

    def turned(self) -> Leading:
        """Of the transposed matrix."""
        return replace(self, U=self.Vh, Vh=self.U)

    def times(self, scale: Tensor) -> Leading:
        """Of the matrix that is `scale` times as large."""
        return replace(self, S=self.S * scale)


def first_block(q: int, start: Tensor | None, seed: int, *, rows: int = ROWS) -> Tensor:
    """Random rows (rows, q); rows near the answer beside some of these, or mixtures with them.

    Of as many rows near the answer as the block has, or more, a mixture holds every direction in a
    block that stays narrow. What is random keeps the space from being closed to directions that
    `start` has nothing of.
    """
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(rows, q, generator=generator, dtype=torch.float64)
    if start is None:
        return noise
    if len(start) < rows:
        return torch.cat([start.cpu(), noise[len(start) :] / q**0.5])
    mixing = torch.randn(rows, len(start), generator=generator, dtype=torch.float64)
    mixture = mixing @ start.cpu()
    return mixture + _STRANGE * mixture.norm() / noise.norm() * noise


def excess_of(misfit: Tensor, values: Tensor, k: int, *, certified: int) -> Tensor:
    """How many times too large the residual of each of the leading k Ritz pairs is, (..., k).

    misfit: ‖Gv − λv‖, (..., k). values: Ritz values (..., k + 1 or more), of which the (k + 1)-th
    stands for the gap behind the last. certified: how many of the leading vectors have to be
    right; of the others the values do. An eigenvalue is off by ‖misfit‖²/gap at most, a vector by
    misfit/gap.
    """
    parts = []
    if certified:
        last, gap = _last_and_gap(values, certified)
        allowed = torch.maximum(_TOLERANCE * last, _SINE_TOLERANCE * gap)
        parts.append(misfit[..., :certified] / allowed)
    if certified < k:
        last, gap = _last_and_gap(values, k)
        others = misfit[..., certified:]
        together = others.square().sum(-1, keepdim=True)
        error = torch.minimum(others, together / gap.clamp_min(torch.finfo(gap.dtype).tiny))
        parts.append(error / (_VALUE_TOLERANCE * last))
    return torch.cat(parts, -1)


def _last_and_gap(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k-th of values (..., s), and how far the next one is from it; (..., 1) each."""
    last = values[..., min(k, values.shape[-1]) - 1, None]
    return last, last - values[..., k, None] if k < values.shape[-1] else last


def bounds_of(misfit: Tensor, S: Tensor, k: int, *, certified: int) -> dict[str, float]:
    """residual, bound and sine of `Leading`. misfit: ‖Aᵀu − σv‖ of the leading k, S: (k + 1,)."""
    largest = float(S[0])
    if largest == 0:
        return {"residual": 0.0, "bound": 0.0, "sine": math.inf}
    gap = float(_last_and_gap(S, k)[1]) / largest
    residual = float(misfit.max()) / largest
    together = float(torch.linalg.vector_norm(misfit)) / largest
    bound = residual if gap <= 0 else min(residual, together**2 / gap)
    if 0 < certified < k:  # the next value may be as much larger as its own residual tells
        gap = float(_last_and_gap(S, certified)[1] - misfit[certified]) / largest
        together = float(torch.linalg.vector_norm(misfit[:certified])) / largest
    return {
        "residual": residual,
        "bound": max(bound, torch.finfo(S.dtype).eps),
        "sine": together / gap if gap > 0 else math.inf,
    }
