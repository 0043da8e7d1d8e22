"""OLoRA: start from the QR factorisation of W (2406.01775), as PEFT does."""

from __future__ import annotations

from torch import Tensor

from geoscope.adapters.factors import LoraFactors, checked, scaling_of
from geoscope.adapters.facts import captured, completed
from geoscope.linalg.head import head_triplets
from geoscope.linalg.product import Product, factorise_product
from geoscope.linalg.triangular import leading_qr

__all__ = ["olora"]


def olora(W: Tensor, rank: int, *, alpha: float | None = None, solver: str = "auto") -> LoraFactors:
    """B0 = Q[:, :r] and A0 = R[:r] of W = Q·R, without pivoting and without division by s.

    W: (m, n), of any float storage dtype; alpha: default 2·rank. Nothing is random.
    """
    s = scaling_of(rank, alpha)
    norm = checked(W, rank)
    Q, R = leading_qr(W, rank)
    head = head_triplets(W, rank, solver=solver)
    whole = factorise_product(Product.of(Q, R), vectors=rank)
    assert whole.Vh is not None
    size = float(whole.S[0].norm())
    S = whole.S[0][: whole.Vh.shape[1]]
    facts, status = completed(
        {
            "head_energy": captured(S, whole.Vh[0], head.Vh) if size > 0 else None,
            "relative_norm": s * size / norm,
        }
    )
    return LoraFactors(
        Q.float().contiguous(), R.float().contiguous(), s, facts, status,
        nulls={"head_energy": rank / W.shape[1]},
        method={"spectral": head.method},
    )  # fmt: skip
