"""PiSSA: start from the principal triplets of W (2404.02948), in PEFT's scaling."""

from __future__ import annotations

from torch import Tensor

from geoscope.adapters.factors import LoraFactors, checked, scaling_of, split
from geoscope.adapters.facts import completed, gap_note
from geoscope.linalg.head import head_triplets

__all__ = ["pissa"]


def pissa(W: Tensor, rank: int, *, alpha: float | None = None, solver: str = "auto") -> LoraFactors:
    """B0 = U_r√(S_r/s) and A0 = √(S_r/s)·V_rᵀ, so that s·B0·A0 = U_r·S_r·V_rᵀ.

    W: (m, n), of any float storage dtype; alpha: default 2·rank. Nothing is random.
    """
    s = scaling_of(rank, alpha)
    norm = checked(W, rank)
    head = head_triplets(W, rank, solver=solver)
    B, A = split(head.U, head.S[:-1] / s, head.Vh)
    facts, status = completed(
        {
            "gap": head.gap,
            "head_energy": 1.0,  # the leading directions themselves
            "relative_norm": float(head.S[:-1].norm()) / norm,
        }
    )
    return LoraFactors(
        B, A, s, facts, status,
        nulls={"head_energy": rank / W.shape[1]},
        method={"spectral": head.method},
        notes=gap_note(head.gap),
    )  # fmt: skip
