"""What the pass over a series keeps of one tensor: increments, leading pairs, counts of R²."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from geoscope.engine import matrix_boundary
from geoscope.linalg import Factors, Operand, factorise_leading
from geoscope.linalg.certificate import Leading
from geoscope.linalg.choice import products_pay
from geoscope.linalg.differences import Differences
from geoscope.linalg.product import factorise_product
from geoscope.linalg.series_leading import SeriesBasis, SeriesPass, search
from geoscope.linalg.svd_leading import completed, factors_of
from geoscope.trajectory.changed import ChangedEntries
from geoscope.trajectory.factor_series import FactorSeries
from geoscope.trajectory.increments import Increments, increments_of_inner
from geoscope.trajectory.rank1 import Rank1Path
from geoscope.trajectory.scalar_r2 import ScalarR2Counts
from geoscope.verbs.series.options import FollowOptions
from geoscope.verbs.series.tensors import AdapterTensor, AsStored, Change, ModelTensor, SeriesTensor

__all__ = ["Kept", "measured"]

# Triplets of every Δ and δ: the second for the gap behind the first.
_PAIRS = 2
# "updates" (Δ) and "steps" (δ) → how their pairs were found, as in `Factors.methods`.
Methods = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Kept:
    """Of one tensor. path, local: pairs of Δ_i, of δ_i. products: u_iᵀ·Δ_τ·v_j by τ, i and j,
    (T, T, T), of i, j ≤ τ at least. changed: stored entries from step to step; None of adapters.
    """

    increments: Increments
    path: Rank1Path | None = None
    local: Rank1Path | None = None
    products: torch.Tensor | None = None
    method: Methods | None = None
    scalar_r2: ScalarR2Counts | None = None
    changed: ChangedEntries | None = None


def measured(tensor: SeriesTensor, steps: Sequence[float], options: FollowOptions) -> Kept:
    """Raises NumericsError, whatever the computation raised."""
    with matrix_boundary():
        if isinstance(tensor, AdapterTensor):
            grams = tensor.grams()
            found = None if grams is None else _through_grams(tensor, grams, steps, options)
            return _through_changes(tensor, steps, options) if found is None else found
        assert isinstance(tensor, ModelTensor)
        if not options.directions or tensor.is_made or not products_pay(tensor.shape, _PAIRS):
            return _through_changes(tensor, steps, options)
        return _together(tensor, steps, options)


def _through_grams(
    tensor: AdapterTensor, grams: FactorSeries, steps: Sequence[float], options: FollowOptions
) -> Kept | None:
    """From the Gram matrices of the factors; None where these are not exact enough."""
    H = grams.H
    if H is None:
        return None
    increments = Increments(tuple(map(float, steps)), H, tensor.rounding(), tensor.base_energy())
    if not options.directions:
        return Kept(increments)
    found = grams.paths()
    if found is None:
        return None
    path, local, method = found
    return Kept(increments, path, local, grams.pair_products(path), method)


def _together(tensor: ModelTensor, steps: Sequence[float], options: FollowOptions) -> Kept:
    """From searches for the pairs of every Δ_i and δ_i, and one pass that certifies them all."""
    stored = AsStored()
    bases = _bases(tensor, stored, options.seed)
    m, n = tensor.shape
    together = SeriesPass((n, m) if tensor.is_turned else (m, n), bases)
    for rows in tensor.stored_rows():
        together.add(rows)
    unrounded = (0.0,) * len(steps)
    increments = increments_of_inner(steps, together.inner, unrounded, is_finite=tensor.is_finite)
    leading, products = together.leading(_PAIRS, certified=1)
    del together  # of many steps it is large
    if tensor.is_turned:
        leading = [[None if one is None else one.turned() for one in row] for row in leading]
        products = None if products is None else products.mT
    found = _completed(tensor, leading, options.seed)
    paths = _paths([row[0] for row in found], [row[-1] for row in found], increments)
    if not all(row[0] is not None and row[0].converged for row in leading):
        products = None  # before as much memory is taken anew
    if products is None:
        products = _pair_products(tensor, paths["path"])
    increments, changed = stored.told(increments, math.prod(tensor.shape))
    counts = _scalar_r2(tensor, steps, options)
    return Kept(increments, **paths, products=products, scalar_r2=counts, changed=changed)


def _bases(tensor: ModelTensor, stored: AsStored, seed: int) -> list[list[SeriesBasis | None]]:
    """Of every Δ_i and δ_i, the first of which are one; each search starts where the last one
    ended."""
    found: list[list[SeriesBasis | None]] = []
    rooms: list[torch.Tensor] = []
    for whole, step in tensor.changes(stored):
        assert isinstance(whole, Operand) and isinstance(step, Operand)
        weights = [whole.plus, whole.minus, *([step.minus] if found else [])]
        plus, *minus = (
            one[0].T if tensor.is_turned else one[0] for one in weights if one is not None
        )
        A = Differences(plus, tuple(minus))
        if not rooms:
            sides = max(tensor.shape), min(tensor.shape)
            rooms = [torch.empty(sides, dtype=torch.float32) for _ in range(2)]
        starts = [*found[-1], found[-1][0]][:2] if found else [None]
        lent = rooms[: len(A)]
        found.append(search(A, _PAIRS, starts=starts, certified=1, seed=seed, rooms=lent))
    return found


def _completed(
    tensor: ModelTensor, leading: Sequence[Sequence[Leading | None]], seed: int
) -> list[list[Factors]]:
    """Factors of every Δ_i and δ_i; where a search found nothing, from the weights read again."""
    if all(one is not None and one.converged for row in leading for one in row):
        return [[factors_of(one) for one in row if one is not None] for row in leading]
    return [
        [
            _leading(A, None, seed) if one is None else completed(A, _PAIRS, one, cuts=(1,))
            for one, A in zip(row, changes, strict=False)
            if isinstance(A, Operand)
        ]
        for row, changes in zip(leading, tensor.changes(), strict=True)
    ]


def _scalar_r2(
    tensor: SeriesTensor, steps: Sequence[float], options: FollowOptions
) -> ScalarR2Counts | None:
    if options.scalar_r2 is None or not isinstance(tensor, ModelTensor) or len(steps) <= 3:
        return None
    return tensor.scalar_r2(steps, published_filter=options.scalar_r2 == "published")


def _through_changes(tensor: SeriesTensor, steps: Sequence[float], options: FollowOptions) -> Kept:
    """From every Δ_i and δ_i, one after the other."""
    increments = tensor.increments(steps)
    kept = Kept(increments, scalar_r2=_scalar_r2(tensor, steps, options))
    changes, stored = tensor.changes(), None
    if isinstance(tensor, ModelTensor) and not tensor.is_made:
        stored = AsStored()
        changes = tensor.changes(stored)
    if options.directions:
        updates: list[Factors] = []
        local: list[Factors] = []
        for whole, step in changes:
            updates.append(_leading(whole, updates[-1] if updates else None, options.seed))
            # the first update is the first step
            local.append(_leading(step, local[-1], options.seed) if local else updates[0])
        paths = _paths(updates, local, increments)
        kept = replace(kept, **paths, products=_pair_products(tensor, paths["path"]))
    elif stored is not None:
        deque(changes, maxlen=0)  # is shown to `stored`
    if stored is None:
        return kept
    increments, changed = stored.told(increments, math.prod(tensor.shape))
    return replace(kept, increments=increments, changed=changed)


def _leading(change: Change, near: Factors | None, seed: int) -> Factors:
    """σ1 with its vectors, and σ2."""
    k = min(_PAIRS, *change.shape)
    if isinstance(change, Operand):
        return factorise_leading(change, k, cuts=(1,), seed=seed, near=near, certified=1)
    return factorise_product(change, vectors=k, cuts=(1,))


def _pair_products(tensor: SeriesTensor, path: Rank1Path) -> torch.Tensor:
    """u_iᵀ·Δ_τ·v_j by τ, i and j, (T, T, T)."""
    images = (whole.right(path.v[None])[0] for whole, _ in tensor.changes())
    return torch.stack([path.u @ one.T for one in images])


def _paths(
    updates: Sequence[Factors], local: Sequence[Factors], increments: Increments
) -> dict[str, Any]:
    """Of `Kept`: the pairs of every Δ_i and of every δ_i."""
    return {
        "path": _path(updates, increments.G.diagonal()),
        "local": _path(local, increments.H.diagonal()),
        "method": {"updates": _method(updates), "steps": _method(local)},
    }


def _method(factors: Sequence[Factors]) -> dict[str, Any]:
    """All of them together: every way that was taken, and the largest bounds."""
    found = [factor.methods[0] for factor in factors]

    def largest(key: str) -> float | None:
        return max((one[key] for one in found if one.get(key) is not None), default=None)

    return {
        "how": ", ".join(dict.fromkeys(str(one["how"]) for one in found)),
        "bound": largest("bound"),
        "subspace_bound": largest("subspace_bound"),
        "fallback": next((one["fallback"] for one in found if one["fallback"]), None),
    }


def _path(factors: Iterable[Factors], energy: torch.Tensor) -> Rank1Path:
    rows = list(factors)
    u, v = (torch.stack([_first(row, side) for row in rows]) for side in ("left", "right"))
    return Rank1Path(
        sigma=torch.stack([row.S[0, 0] for row in rows]),
        second=torch.stack(
            [row.S[0, 1] if row.S.shape[1] > 1 else row.S[0, 0] * 0 for row in rows]
        ),
        norm=energy.clamp_min(0).sqrt(),
        u=u,
        v=v,
    )


def _first(one: Factors, side: str) -> torch.Tensor:
    """u_1 or v_1; a zero update has none, and gets zeros."""
    assert one.U is not None and one.Vh is not None
    rows = one.U[0].T if side == "left" else one.Vh[0]
    return rows[0] if len(rows) else rows.new_zeros(rows.shape[1])
