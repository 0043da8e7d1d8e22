"""Initial factors of one matrix: what every initialisation returns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from geoscope.errors import NumericsError, OptionError
from geoscope.linalg import Operand
from geoscope.records import Status

__all__ = ["LoraFactors", "checked", "largest_positive", "scaling_of", "split"]

_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


@dataclass(frozen=True)
class LoraFactors:
    """B (m, r) and A (r, n), fp32 and contiguous, on the device of W; scaling·B·A at the start.

    facts: id → number, None exactly where `status[id]` is a null status (see facts.py). nulls: id →
    what chance gives. method: factorisation → {"how", "bound", "subspace_bound", "fallback"}.
    notes: one line each, on what the user should know about this matrix.
    """

    B: Tensor
    A: Tensor
    scaling: float
    facts: Mapping[str, float | None]
    status: Mapping[str, Status]
    nulls: Mapping[str, float]
    method: Mapping[str, Mapping[str, Any]]
    notes: tuple[str, ...] = ()

    @property
    def rank(self) -> int:
        return len(self.A)


def scaling_of(rank: int, alpha: float | None) -> float:
    """s = alpha/rank, alpha = 2·rank where it is None. Raises OptionError unless s > 0."""
    if alpha is None:
        return 2.0
    if not 0 < alpha < float("inf"):
        raise OptionError(f"alpha is {alpha:g}; it has to be a positive number, such as {2 * rank}")
    return alpha / rank


def _norm(W: Tensor) -> float:
    """‖W‖_F, which is finite where every entry is: these are counted only where it is not."""
    try:
        return float(Operand(W[None]).norm())
    except NumericsError:
        if bad := W.numel() - int(torch.isfinite(W).sum()):
            raise NumericsError(
                f"{bad} of {W.numel()} entries are NaN or infinite in a {W.shape[0]}×{W.shape[1]} "
                "matrix; repair the checkpoint, or `exclude` it"
            ) from None
        raise


def checked(W: Tensor, rank: int, *, zero: bool = False) -> float:
    """‖W‖_F of a matrix (m, n) that can be initialised at this rank.

    zero: whether an all-zero matrix will do. Raises OptionError for the rank and NumericsError for
    the entries; the caller, who knows the tensor's name, puts it in front.
    """
    if W.ndim != 2 or W.dtype not in _DTYPES:
        raise NumericsError(
            f"a {W.dtype} tensor of shape {tuple(W.shape)} is not a matrix of 16-, 32- or 64-bit "
            "floats; dequantise it, or leave it out with `exclude`"
        )
    m, n = W.shape
    if not 1 <= rank <= min(m, n):
        raise OptionError(
            f"rank {rank} does not fit a {m}×{n} matrix, whose rank is at most {min(m, n)}; "
            "use a smaller `rank`, or leave the matrix out with `exclude`"
        )
    norm = _norm(W)
    if norm == 0 and not zero:
        raise NumericsError(
            f"every entry of a {m}×{n} matrix is zero, so it has no directions to start from; "
            "leave it out with `exclude`, or use `method` lora"
        )
    return norm


def largest_positive(U: Tensor, Vh: Tensor) -> tuple[Tensor, Tensor]:
    """The signs of a start: the largest |.| of each u is positive, the first one on ties."""
    at = U.abs().argmax(0)
    signs = torch.where(U.gather(0, at[None]) < 0, -1.0, 1.0).to(U.dtype)  # (1, k)
    return U * signs, Vh * signs.T


def split(U: Tensor, S: Tensor, Vh: Tensor) -> tuple[Tensor, Tensor]:
    """U·√S (m, r) and √S·Vh (r, n), signed, fp32 and contiguous."""
    U, Vh = largest_positive(U, Vh)
    root = S.clamp_min(0).sqrt()
    return (U * root).float().contiguous(), (root[:, None] * Vh).float().contiguous()
