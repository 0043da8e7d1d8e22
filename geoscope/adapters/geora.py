"""GeoRA: start from the principal triplets of the entries that RLVR moves (2601.09361).

The steps are those of docs/methods.md#starts-of-adapters, which several re-implementations agree
on; there is no official code. Weights only: no data, no gradients.
"""

from __future__ import annotations

from torch import Tensor

from geoscope.adapters.factors import LoraFactors, checked, scaling_of, split
from geoscope.adapters.facts import captured, completed, gap_note, mask_facts
from geoscope.errors import NumericsError, OptionError
from geoscope.linalg.head import Head, head_triplets
from geoscope.linalg.iid import iid_top_share
from geoscope.linalg.masked import Masked, keep_small

__all__ = ["SCALE_CONVENTIONS", "geora"]

SCALE_CONVENTIONS = ("geora", "pissa")


def geora(
    W: Tensor,
    rank: int,
    *,
    alpha: float | None = None,
    rho: float = 0.2,
    spec_rank: int | None = None,
    scale_convention: str = "geora",
    solver: str = "auto",
    seed: int = 0,
) -> LoraFactors:
    """B0 = U_g√S_g and A0 = √S_g·V_gᵀ of W_geo, the entries of W that are small in W or in W_r.

    W: (m, n) = (out, in), of any float storage dtype. alpha: default 2·rank. rho: quantile of both
    masks, in (0, 1). spec_rank: rank of W_r, default `rank`. scale_convention: "geora" keeps S_g,
    "pissa" divides it by alpha/rank. solver: "exact" forces LAPACK's SVD. seed: of the null of
    captured energy; nothing else is random. Raises OptionError and NumericsError.
    """
    if not 0 < rho < 1:
        raise OptionError(f"rho is {rho:g}; it has to lie between 0 and 1, such as 0.2")
    if scale_convention not in SCALE_CONVENTIONS:
        raise OptionError(f"scale convention {scale_convention!r} is not geora or pissa")
    s = scaling_of(rank, alpha)  # 1
    norm = checked(W, rank)
    spectral_rank = rank if spec_rank is None else spec_rank
    _check_spec_rank(W, spectral_rank)
    base = head_triplets(W, max(rank, spectral_rank), solver=solver)
    k = spectral_rank
    mask = keep_small(W, base.U[:, :k], base.S[:k], base.Vh[:k], rho)  # 2 to 5
    if mask.energy == 0:
        raise NumericsError(
            f"the entries that rho = {rho:g} keeps of a {W.shape[0]}×{W.shape[1]} matrix are all "
            "zero; use a larger `rho` or `method` pissa, or leave it out with `exclude`"
        )
    geo = head_triplets(mask.kept, rank, solver=solver)  # 6
    size = geo.S[:-1] if scale_convention == "geora" else geo.S[:-1] / s
    B, A = split(geo.U, size, geo.Vh)  # 7
    energy = float(geo.S[:-1].square().sum())
    facts, status = completed(
        {
            **mask_facts(mask, norm),
            "captured_energy": energy / mask.energy,
            "gap": geo.gap,
            "head_energy": captured(size, geo.Vh, base.Vh[:rank]),
            "relative_norm": s * float(size.norm()) / norm,
        }
    )
    nulls = {
        "density_intersection": rho**2,
        "jaccard": rho / (2 - rho),
        "captured_energy": iid_top_share(W.shape[0], W.shape[1], rank, seed),
        "head_energy": rank / W.shape[1],
    }
    return LoraFactors(
        B, A, s, facts, status, nulls,
        method={"spectral": base.method, "masked": geo.method},
        notes=_notes(geo, mask, rho),
    )  # fmt: skip


def _check_spec_rank(W: Tensor, spec_rank: int) -> None:
    if not 1 <= spec_rank <= min(W.shape):
        raise OptionError(
            f"spec-rank {spec_rank} does not fit a {W.shape[0]}×{W.shape[1]} matrix; use at most "
            f"{min(W.shape)}"
        )


def _notes(geo: Head, mask: Masked, rho: float) -> tuple[str, ...]:
    zero = [
        f"the {rho:g}-quantile of |{what}| is 0: more than that part of it is exactly zero"
        for what, one in (("W", mask.euc), ("W_r", mask.spec))
        if one.tau == 0
    ]
    return (*zero, *gap_note(geo.gap))
