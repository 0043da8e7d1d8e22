"""What the pass over a series keeps of one tensor: increments, leading pairs, counts of R²."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from geoscope.engine import matrix_boundary
from geoscope.linalg import Factors, Operand, factorise_differences
from geoscope.linalg.differences import Differences
from geoscope.linalg.product import Product, factorise_product
from geoscope.trajectory.changed import ChangedEntries
from geoscope.trajectory.factor_series import FactorSeries
from geoscope.trajectory.increments import Increments
from geoscope.trajectory.rank1 import Rank1Path
from geoscope.trajectory.scalar_r2 import ScalarR2Counts
from geoscope.verbs.series.options import FollowOptions
from geoscope.verbs.series.tensors import AdapterTensor, AsStored, Change, ModelTensor, SeriesTensor

__all__ = ["Kept", "measured"]

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
    increments, counts = tensor.increments(steps), None
    if options.scalar_r2 is not None and isinstance(tensor, ModelTensor) and len(steps) > 3:
        counts = tensor.scalar_r2(steps, published_filter=options.scalar_r2 == "published")
    changes, stored = tensor.changes(), None
    if isinstance(tensor, ModelTensor) and not tensor.is_made:
        stored = AsStored()
        changes = tensor.changes(stored)
    kept = Kept(increments, scalar_r2=counts)
    if options.directions:
        kept = replace(kept, **_paths(changes, increments, options.seed))
    elif stored is not None:
        deque(changes, maxlen=0)  # is shown to `stored`
    if stored is None:
        return kept
    increments, changed = stored.told(increments, math.prod(tensor.shape))
    return replace(kept, increments=increments, changed=changed)


def _paths(
    changes: Iterable[tuple[Change, Change]], increments: Increments, seed: int
) -> dict[str, Any]:
    """Of `Kept`: leading pairs of every Δ_i and δ_i, and u_iᵀ·Δ_τ·v_j of those up to τ.

    Each search starts where the last one ended.
    """
    T, G, H = len(increments), increments.G.diagonal(), increments.H.diagonal()
    updates: list[Factors] = []
    steps: list[Factors] = []
    rooms: list[torch.Tensor] = []
    products = torch.zeros(T, T, T, dtype=torch.float64)
    for i, (whole, step) in enumerate(changes):
        if isinstance(whole, Operand) and not rooms:
            m, n = whole.shape
            rooms = [torch.empty(max(m, n), min(m, n), dtype=torch.float32) for _ in range(2)]
        both: tuple[Change, ...] = (whole, step) if i else (whole,)  # the first update is a step
        near = (updates[-1], steps[-1]) if i else (None,)
        energies = torch.stack([G[i], H[i]])[: len(both)]
        beside = [_first(one, "right") for one in updates]
        found, images = _leading(both, near, beside, energies, seed, rooms)
        updates.append(found[0])
        steps.append(found[-1])
        left = torch.stack([_first(one, "left") for one in updates])
        products[i, : i + 1, : i + 1] = left @ images.T
    return {
        "path": _path(updates, G),
        "local": _path(steps, H),
        "products": products,
        "method": {"updates": _method(updates), "steps": _method(steps)},
    }


def _leading(
    changes: Sequence[Change],
    near: Sequence[Factors | None],
    beside: Sequence[torch.Tensor],
    energies: torch.Tensor,
    seed: int,
    rooms: Sequence[torch.Tensor],
) -> tuple[list[Factors], torch.Tensor]:
    """σ1 with its vectors, and σ2, of each; and the images A·v under the first of those beside and
    of its own, (c + 1, m)."""
    first, k = changes[0], min(2, *changes[0].shape)
    rows = energies.new_empty(0, first.shape[1]) if not beside else torch.stack([*beside])
    if isinstance(first, Operand):
        minus = [
            one.minus[0] for one in changes if isinstance(one, Operand) and one.minus is not None
        ]
        return factorise_differences(
            Differences(first.plus[0], tuple(minus)),
            k,
            squares=energies,
            cuts=(1,),
            seed=seed,
            near=near,
            certified=1,
            beside=rows,
            rooms=rooms[: len(changes)],
        )
    found = [
        factorise_product(one, vectors=k, cuts=(1,)) for one in changes if isinstance(one, Product)
    ]
    return found, first.right(torch.cat([rows, _first(found[0], "right")[None]])[None])[0]


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
