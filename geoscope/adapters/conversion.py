"""A trained adapter as a plain LoRA on the original base; arithmetic on factors alone.

residual, anchor, PiSSA and their kind start at s·B0·A0, which the base was relieved of, so that
training changed the model by s·(B·A − B0·A0) = s·[B, −B0]·[A; A0]: a LoRA of rank 2r with the same
s, exactly. Its best approximation of rank k takes the leading k triplets [Eckart & Young 1936].
A mirror adapter is compressed as it is stored; that its halves mirror each other holds at the start
alone, so it is never assumed.

Shapes are those of a stack: B (E, m, r), A (E, r, n), E = 1 for one matrix.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from geoscope.errors import NumericsError
from geoscope.linalg import Product, factorise_product

__all__ = [
    "Compressed",
    "alpha_for",
    "compressed",
    "concatenated",
    "fused_experts",
]


@dataclass(frozen=True)
class Compressed:
    """B (E, m, k) and A (E, k, n) in fp32, and what they leave out.

    energy: ‖P‖_F² of the product that was compressed, over all of the stack; discarded: the part of
    it beyond the leading k triplets, Σ_{i>k} σ_i².
    """

    B: Tensor
    A: Tensor
    energy: float
    discarded: float


def concatenated(B: Tensor, A: Tensor, B0: Tensor, A0: Tensor) -> tuple[Tensor, Tensor]:
    """[B, −B0] (E, m, 2r) and [A; A0] (E, 2r, n) in fp32: their product is B·A − B0·A0, exactly."""
    wide = torch.cat([B.float(), -B0.float()], -1)
    tall = torch.cat([A.float(), A0.float()], -2)
    _refuse_overflow(wide, tall)
    return wide, tall


def _refuse_overflow(*factors: Tensor) -> None:
    for factor in factors:
        bad = int((~torch.isfinite(factor)).sum())
        if bad:
            raise NumericsError(
                f"{bad} of {factor.numel()} entries of a factor are NaN or infinite; "
                "the training run diverged, take an earlier step"
            )


def compressed(P: Product, rank: int, scaling: float) -> Compressed:
    """The best approximation of rank k of P as scaling·B·A, B = U√(S/s), A = √(S/s)·Vh.

    Thin QR of both sides and the SVD of the core, in fp64; nothing dense. Where P has rank below k,
    columns of B and rows of A are zero from there on, so that the rank is the same in all modules.
    Raises NumericsError where factors are not finite.
    """
    kept = min(rank, P.rank)
    found = factorise_product(P, vectors=kept)
    S, U, Vh = found.S, found.U, found.Vh
    assert U is not None and Vh is not None
    root = (S[:, :kept] / scaling).sqrt()
    B = S.new_zeros(len(P), P.shape[0], rank)
    A = S.new_zeros(len(P), rank, P.shape[1])
    B[..., :kept] = U * root[:, None, :]
    A[:, :kept] = root[..., None] * Vh
    energies = S.square()
    return Compressed(B.float(), A.float(), float(energies.sum()), float(energies[:, kept:].sum()))


def alpha_for(scaling: float, rank: int, *, use_rslora: bool) -> float:
    """lora_alpha that gives `scaling` at `rank`: s·r, with rsLoRA s·√r."""
    return scaling * (math.sqrt(rank) if use_rslora else rank)


def fused_experts(parts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """One product for weights that are stored on top of one another, [B_1·A_1; B_2·A_2; …].

    A = [A_1; A_2; …], B block diagonal: as PEFT joins gate_proj and up_proj to gate_up_proj.
    """
    if len(parts) == 1:
        return parts[0]
    A = torch.cat([A for _, A in parts], -2)
    m, r = (sum(B.shape[i] for B, _ in parts) for i in (-2, -1))
    joined = parts[0][0].new_zeros(len(parts[0][0]), m, r)
    row = column = 0
    for B, _ in parts:
        joined[:, row : row + B.shape[-2], column : column + B.shape[-1]] = B
        row, column = row + B.shape[-2], column + B.shape[-1]
    return joined, A
