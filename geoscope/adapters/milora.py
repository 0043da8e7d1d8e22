"""MiLoRA: start from the last triplets of W (2406.09044), in PEFT's scaling.

PEFT does not have it; public code often fixes alpha = rank.
"""

from __future__ import annotations

from torch import Tensor

from geoscope.adapters.factors import LoraFactors, checked, scaling_of, split
from geoscope.adapters.facts import completed
from geoscope.linalg.tail import tail_triplets

__all__ = ["milora"]


def milora(
    W: Tensor, rank: int, *, alpha: float | None = None, solver: str = "auto"
) -> LoraFactors:
    """B0 = U√(S/s) and A0 = √(S/s)·Vᵀ of the last `rank` triplets; s·B0·A0 is that part of W.

    W: (m, n), of any float storage dtype; alpha: default 2·rank. Nothing is random. Where the tail
    is zero (a matrix of lower rank) so are the factors, and a note says so.
    """
    s = scaling_of(rank, alpha)
    norm = checked(W, rank)
    tail = tail_triplets(W, rank, solver=solver)
    B, A = split(tail.U, tail.S / s, tail.Vh)
    energy = tail.S.square()
    total = float(energy.sum())
    # the tail begins at q − rank: of its directions these stand among the leading `rank` ones
    shared = max(0, 2 * rank - len(tail.spectrum))
    facts, status = completed(
        {
            "head_energy": float(energy[:shared].sum()) / total if total > 0 else None,
            "relative_norm": float(tail.S.norm()) / norm,
        }
    )
    return LoraFactors(
        B, A, s, facts, status,
        nulls={"head_energy": rank / W.shape[1]},
        method={"tail": tail.method},
        notes=_notes(tail.S, float(tail.spectrum[0])),
    )  # fmt: skip


def _notes(S: Tensor, largest: float) -> tuple[str, ...]:
    vanished = int((S <= 1e-14 * largest).sum())
    if not vanished:
        return ()
    return (f"{vanished} of the last {len(S)} singular values are zero to rounding",)
