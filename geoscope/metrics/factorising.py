"""The factorisation of each role: as deep as is asked, and recalled where factors are kept."""

from __future__ import annotations

from dataclasses import asdict

import torch
from torch import Tensor

from geoscope.linalg import Factors, Operand, concatenate, factorise, factorise_leading
from geoscope.linalg.product import Product, factorise_product
from geoscope.metrics.kept import Recall, values_of_updates
from geoscope.metrics.providers import Depth, Methods, Settings

__all__ = ["base_factors", "factorised", "update_factors"]


def factorised(
    A: Operand | Product, depth: Depth, settings: Settings, near: Factors | None = None
) -> tuple[Factors, Tensor, Methods]:
    """The factors of A: its whole spectrum, or the leading triplets where these do.

    Leading values alone are exact to rounding; leading vectors come from an fp32 space, so that
    angles are good to 1e-5 and not to 1e-8: they do with `quick` only. The values, and how they
    were got, stand behind.
    """
    vectors, cuts = depth.vectors, depth.cuts
    values_do = not ((depth.whole and not settings.quick) or vectors)
    asked = settings.solver == "exact" or settings.dtype != "float64"
    if isinstance(A, Product):
        factors = factorise_product(A, vectors=vectors, cuts=cuts)
    elif (settings.quick or values_do) and not asked:
        # One more than is taken, for the gap behind the last.
        values = max(depth.values, vectors) + 1
        factors = factorise_leading(
            A,
            min(values, min(A.shape)),
            cuts=cuts,
            seed=settings.seed,
            near=near,
            certified=vectors,
        )
    else:
        dtype = torch.float64 if settings.dtype == "float64" else torch.float32
        factors = factorise(A, vectors=vectors, cuts=cuts, solver=settings.solver, dtype=dtype)
    return factors, factors.S, factors.methods


def base_factors(
    W0: Operand, depth: Depth, settings: Settings, recall: Recall | None = None
) -> tuple[Factors, Tensor, Methods]:
    """As `factorised`; where factors are kept, those of each matrix are recalled or kept."""
    if recall is None:
        return factorised(W0, depth, settings)
    asked = {name: getattr(settings, name) for name in ("solver", "dtype", "quick", "seed")}
    facts = {"depth": asdict(depth), **asked}
    rows = [
        recall(i, facts, lambda i=i: factorised(W0.row(i), depth, settings)[0])
        for i in range(len(W0))
    ]
    factors = rows[0] if len(rows) == 1 else concatenate(rows)
    return factors, factors.S, factors.methods


def update_factors(
    update: Operand | Product, depth: Depth, settings: Settings, recall: Recall | None = None
) -> tuple[Factors, Tensor, Methods]:
    """As `factorised`; where overlaps will be asked for, vectors are made and kept for them."""
    by_gram = settings.solver == "auto" and settings.dtype == "float64" and not settings.quick
    values_alone = depth.whole and not depth.vectors
    if recall is not None and by_gram and values_alone and isinstance(update, Operand):
        factors = values_of_updates(update, settings.ks, recall)
        if factors is not None:
            return factors, factors.S, factors.methods
    return factorised(update, depth, settings)
