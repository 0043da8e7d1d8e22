"""What should an initialisation be? Straight from the methods reference (§5), in plain numpy.

Dense, in fp64, with a quantile and an SVD of its own; it shares no code with the package.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.float64]


def quantile(values: Matrix, level: float) -> float:
    """h = (N−1)·level, lo = ⌊h⌋, τ = x_lo + (h−lo)(x_hi−x_lo)."""
    x = np.sort(values.ravel())
    h = (x.size - 1) * level
    low = math.floor(h)
    high = min(low + 1, x.size - 1)
    return float(x[low] + (h - low) * (x[high] - x[low]))


@dataclass(frozen=True)
class Geora:
    """B0·A0 and everything that is reported about it."""

    product: Matrix
    W_geo: Matrix
    facts: dict[str, float]


def geora(
    W: Matrix,
    r: int,
    *,
    s: float = 2.0,
    rho: float = 0.2,
    spec_rank: int | None = None,
    divided: bool = False,
    strict: bool = False,
) -> Geora:
    """Steps 1 to 7. divided: the other scale convention. strict: "<", which is wrong."""
    k = r if spec_rank is None else spec_rank
    U, S, Vh = np.linalg.svd(W, full_matrices=False)
    Wr = np.abs((U[:, :k] * S[:k]) @ Vh[:k])
    tau_spec, tau_euc = quantile(Wr, rho), quantile(np.abs(W), rho)
    below = np.less if strict else np.less_equal
    spec, euc = below(Wr, tau_spec), below(np.abs(W), tau_euc)
    W_geo = np.where(spec | euc, W, 0.0)
    Ug, Sg, Vg = np.linalg.svd(W_geo, full_matrices=False)
    size = Sg[:r] / s if divided else Sg[:r]
    product = (Ug[:, :r] * size) @ Vg[:r]
    following = float(Sg[r]) if r < len(Sg) else 0.0
    energy, whole = float((W_geo**2).sum()), float((W**2).sum())
    facts = {
        "tau_spec": tau_spec,
        "tau_euc": tau_euc,
        "density_spec": float(spec.mean()),
        "density_euc": float(euc.mean()),
        "density_union": float((spec | euc).mean()),
        "density_intersection": float((spec & euc).mean()),
        "jaccard": float((spec & euc).sum() / (spec | euc).sum()),
        "masked_energy": energy / whole,
        "captured_energy": float((Sg[:r] ** 2).sum()) / energy,
        "gap": float((Sg[r - 1] - following) / Sg[r - 1]) if Sg[r - 1] > 0 else math.nan,
        "head_energy": float(((product @ Vh[:r].T) ** 2).sum() / (product**2).sum()),
        "relative_norm": s * math.sqrt(float((product**2).sum()) / whole),
    }
    return Geora(product, W_geo, facts)


def part(W: Matrix, which: slice) -> Matrix:
    """U·S·Vᵀ over some of the triplets."""
    U, S, Vh = np.linalg.svd(W, full_matrices=False)
    return (U[:, which] * S[which]) @ Vh[which]


def qr_part(W: Matrix, r: int) -> Matrix:
    """Q_r·R_r."""
    Q, R = np.linalg.qr(W)
    return Q[:, :r] @ R[:r]
