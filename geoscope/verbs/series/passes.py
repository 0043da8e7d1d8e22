"""What the pass over a series keeps of one tensor: increments, leading pairs, counts of R²."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from geoscope.engine import matrix_boundary
from geoscope.linalg import Factors, Operand, factorise_leading
from geoscope.linalg.product import factorise_product
from geoscope.trajectory.changed import ChangedEntries
from geoscope.trajectory.factor_series import FactorSeries
from geoscope.trajectory.increments import Increments
from geoscope.trajectory.rank1 import Rank1Path
from geoscope.trajectory.scalar_r2 import ScalarR2Counts
from geoscope.verbs.series.options import FollowOptions
from geoscope.verbs.series.tensors import AdapterTensor, Change, ModelTensor, SeriesTensor

__all__ = ["Kept", "measured"]

# "updates" (Δ) and "steps" (δ) → how their pairs were found, as in `Factors.methods`.
Methods = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Kept:
    """Of one tensor. path, local: pairs of Δ_i, of δ_i. products: u_iᵀ·Δ_τ·v_j, (T, T, T).
    changed: stored entries from step to step; None of adapters.
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
        return _through_changes(tensor, steps, options)


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


def _through_changes(tensor: SeriesTensor, steps: Sequence[float], options: FollowOptions) -> Kept:
    """From every Δ_i and δ_i, one after the other."""
    increments, changed = _increments(tensor, steps)
    counts = None
    if options.scalar_r2 is not None and isinstance(tensor, ModelTensor) and len(steps) > 3:
        counts = tensor.scalar_r2(steps, published_filter=options.scalar_r2 == "published")
    if not options.directions:
        return Kept(increments, scalar_r2=counts, changed=changed)
    path, local, method = _paths(tensor, increments, options.seed)
    # of all τ, i, j: what backtests of rank-1 predictions take
    products = torch.stack(
        [path.u @ whole.right(path.v[None])[0].T for whole, _ in tensor.changes()]
    )
    return Kept(increments, path, local, products, method, counts, changed)


def _increments(
    tensor: SeriesTensor, steps: Sequence[float]
) -> tuple[Increments, ChangedEntries | None]:
    if isinstance(tensor, ModelTensor):
        return tensor.increments_and_changes(steps)
    return tensor.increments(steps), None


def _paths(
    tensor: SeriesTensor, increments: Increments, seed: int
) -> tuple[Rank1Path, Rank1Path, Methods]:
    """Leading pairs of every Δ_i and δ_i; each search starts where the last one ended."""
    updates: list[Factors] = []
    steps: list[Factors] = []
    room = torch.empty(max(tensor.shape), min(tensor.shape), dtype=torch.float32)
    for whole, step in tensor.changes():
        updates.append(_leading(whole, updates[-1] if updates else None, seed, room))
        # the first update is the first step
        steps.append(_leading(step, steps[-1], seed, room) if steps else updates[0])
    return (
        _path(updates, increments.G.diagonal()),
        _path(steps, increments.H.diagonal()),
        {"updates": _method(updates), "steps": _method(steps)},
    )


def _leading(change: Change, near: Factors | None, seed: int, room: torch.Tensor) -> Factors:
    """σ1 with its vectors, and σ2."""
    k = min(2, *change.shape)
    if isinstance(change, Operand):
        return factorise_leading(change, k, cuts=(1,), seed=seed, near=near, certified=1, room=room)
    return factorise_product(change, vectors=k, cuts=(1,))


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
