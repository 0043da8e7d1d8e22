"""Does a product look like the start of a method that takes it out of the base?

Ours; see docs/methods.md#adapters-as-inputs. Many adapters that began so say nothing of it. s·B·A
of such a one on the original base counts its start twice, which looks like spectral collapse.
Positive if

    pissa, milora    C_LR > .9 and ‖diag(UᵀΔV) − σ‖ < .2·‖σ‖, (U, σ, V) the first or last r triplets
    olora, geora     ‖Δ − s·B0·A0‖ < .2·‖s·B0·A0‖; GeoRA at rho = .2, with s and without
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from geoscope.adapters.factors import LoraFactors
from geoscope.adapters.geora import geora
from geoscope.adapters.olora import olora
from geoscope.errors import NumericsError
from geoscope.linalg.head import head_triplets
from geoscope.linalg.product import Product
from geoscope.linalg.tail import tail_triplets

__all__ = ["blind_start"]

_NEAR, _ENERGY = 0.2, 0.9
# Sine of the error of the last triplets: far below what the answer depends on.
_SINE = 1e-4
# U (m, r), S (r,) and Vh (r, n) of W; None where W has no such triplets.
_Triplets = tuple[Tensor, Tensor, Tensor] | None


def blind_start(W: Tensor, update: Product, *, rank: int, scaling: float) -> str | None:
    """The method whose start `update` looks like, None for none.

    W: (m, n), the original base. update: s·B·A, a stack of one. rank, scaling: r and s.
    """
    if rank > min(W.shape) or float(update.norm()) == 0:
        return None
    alpha = scaling * rank
    for name, triplets in (("pissa", _first), ("milora", _last)):
        if _on_triplets(update, triplets(W, rank)):
            return name
    starts = {
        "olora": _start(olora, W, rank, alpha),
        "geora": _start(geora, W, rank, alpha),
    }
    for name, start in starts.items():
        unscaled = None if start is None else Product(start.B, start.scale / scaling, start.A)
        for one in (start, unscaled if name == "geora" else None):
            if one is not None and float((update - one).norm()) < _NEAR * float(one.norm()):
                return name
    return None


def _start(
    method: Callable[..., LoraFactors], W: Tensor, rank: int, alpha: float
) -> Product | None:
    """s·B0·A0 of a method; None where W has no such start."""
    try:
        made = method(W, rank, alpha=alpha)
    except (NumericsError, RuntimeError):
        return None
    return Product.of(made.B, made.A, made.scaling)


def _first(W: Tensor, rank: int) -> _Triplets:
    try:
        found = head_triplets(W, rank)
    except (NumericsError, RuntimeError):
        return None
    return found.U, found.S[:rank], found.Vh


def _last(W: Tensor, rank: int) -> _Triplets:
    try:
        found = tail_triplets(W, rank, tolerance=_SINE)
    except (NumericsError, RuntimeError):
        return None
    return found.U, found.S, found.Vh


def _on_triplets(update: Product, triplets: _Triplets) -> bool:
    if triplets is None:
        return False
    U, S, Vh = triplets
    core = update.right(Vh[None]) @ U  # (VᵀΔᵀ)·U, (1, r, r)
    share = float(core.square().sum()) / float(update.norm().square())
    off = torch.diagonal(core[0]) - S
    return share > _ENERGY and float(off.norm()) < _NEAR * float(S.norm())
