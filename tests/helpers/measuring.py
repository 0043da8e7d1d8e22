"""Every number of METRICS on a pair or a stack of pairs, in memory."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from geoscope.engine import one_blas_thread
from geoscope.metrics import (
    METRICS,
    Instance,
    MatrixVerdict,
    Measured,
    Settings,
    instances,
    judge,
    measure,
    pair_factors,
    takes_of,
    verdict_dimension,
)

__all__ = ["all_instances", "judged", "numbers", "row", "rows", "stored"]

KS = (2, 8)


def all_instances(ks: Sequence[int] = KS) -> list[Instance]:
    """Every id of METRICS, those behind an option too."""
    return [one for metric in METRICS for one in instances(metric, ks)]


def rows(
    base: Tensor,
    tuned: Tensor,
    *,
    ks: Sequence[int] = KS,
    seed: int = 0,
    dtype: str = "float64",
    solver: str = "auto",
    quick: bool = False,
    only: Iterable[str] | None = None,
) -> list[Measured]:
    """One row a pair of the stacks (b, m, n). only: these ids and what they take.

    quick: leading directions only, and so without the ids of --curves.
    """
    wanted = None if only is None else set(only)
    selected = [
        one
        for one in all_instances(ks)
        if (wanted is None or one.id in wanted) and not (quick and one.metric.option == "curves")
    ]
    chosen = Settings(
        ks=tuple(ks),
        quick=quick,
        solver=solver,
        dtype=dtype,
        curves=not quick,
        masks=True,
        seed=seed,
    )
    inside = [k for k in ks if k <= min(base.shape[-2:])]
    with one_blas_thread():  # as in the engine
        factors = pair_factors(base, tuned, takes=takes_of(selected), ks=inside, settings=chosen)
        return measure(factors, selected, seed=seed)


def row(
    base: Tensor,
    tuned: Tensor,
    *,
    ks: Sequence[int] = KS,
    seed: int = 0,
    only: Iterable[str] | None = None,
) -> Measured:
    """The numbers of one pair (m, n)."""
    (found,) = rows(base[None], tuned[None], ks=ks, seed=seed, only=only)
    return found


def judged(base: Tensor, tuned: Tensor) -> tuple[Measured, MatrixVerdict]:
    """The numbers of one pair at the verdict's own dimension, and the verdict."""
    k = verdict_dimension((base.shape[0], base.shape[1]))
    found = row(base, tuned, ks=(k,))
    return found, judge(found, k)


def numbers(found: Measured, *ids: str) -> list[float]:
    """Values that have to be there."""
    values = [found.values[key] for key in ids]
    assert None not in values, {key: found.status.get(key) for key in ids}
    return [float(value) for value in values if value is not None]


def stored(dtype: torch.dtype, *matrices: Tensor) -> list[Tensor]:
    """The matrices as a file of this dtype holds them."""
    return [one.to(dtype) for one in matrices]
