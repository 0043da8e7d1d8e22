"""Is a model a candidate in other numbers, or a combination of several?"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import torch

from geoscope.linalg.displacements import affine_weights
from geoscope.metrics.kin import Kin

__all__ = ["Copy", "Merge", "merge_of", "narrowed"]

_MOST = 3  # candidates in a merge
# Without a member the residual is so many times the limit; else the member is not needed.
_NEEDED = 2.0


@dataclass(frozen=True)
class Copy:
    """Rounding of the coarser side over the distance, 1 of a copy.

    of_model: whether the candidate is the coarser side.
    """

    share: float
    of_model: bool


@dataclass(frozen=True)
class Merge:
    """The model as a combination of candidates.

    weights: candidate → weight over the matrices, all sum to 1.
    spread: the largest standard deviation of a weight over matrices.
    noise: residual over the rounding of the model.
    share: residual over the distance from the nearest member.
    """

    weights: Mapping[int, float]
    spread: float
    noise: float
    share: float


def narrowed(kin: Kin, i: int) -> Copy | None:
    """How much of the distance from a candidate rounding explains; None where none is coarser."""
    apart = kin.by_matrix[:, 0, i]
    changed = apart > 0
    distance = float(apart[changed].sum())
    energies = [float(side[changed, i - 1].sum()) for side in kin.coarser]
    if not distance or not max(energies):
        return None
    return Copy(math.sqrt(max(energies) / distance), of_model=energies[1] > energies[0])


def merge_of(kin: Kin, related: Sequence[int], limits: Mapping[str, float]) -> Merge | None:
    """The smallest combination that leaves no more than rounding; None where none does.

    Weights are fitted matrix by matrix. A member stays only where nothing smaller does as well.
    """
    apart = [
        i
        for i in related
        if kin.distance(i) > _NEEDED * limits["lineage.merge_noise"] * _rounding(kin)
    ]
    if len(apart) < len(related):  # within rounding of one of them: nothing is left to explain
        return None
    for size in range(2, _MOST + 1):
        made = [_fit(kin, members) for members in combinations(apart, size)]
        held = [merge for merge in made if _holds(merge, limits)]
        if held:
            return min(held, key=lambda merge: merge.noise)
    return None


def _rounding(kin: Kin) -> float:
    return float(kin.noise[:, 0].sum()) ** 0.5


def _holds(merge: Merge, limits: Mapping[str, float]) -> bool:
    is_within = merge.noise <= limits["lineage.merge_noise"]
    return is_within and merge.share <= limits["lineage.merge_share"]


def _fit(kin: Kin, members: Sequence[int]) -> Merge:
    at = torch.tensor(members)
    inner = kin.gram[:, at][:, :, at]
    # A scale of the model itself is free: what interpolates along an arc has one.
    along, own = kin.gram[:, 0, at], kin.gram[:, 0, 0].clamp_min(1e-300)
    weights, left = affine_weights(inner - along[:, :, None] * along[:, None] / own[:, None, None])
    energy = inner.diagonal(dim1=-2, dim2=-1).sum(-1)
    shares = (energy / energy.sum().clamp_min(1e-300))[:, None]
    mean = (shares * weights).sum(0)
    spread = (shares * (weights - mean).square()).sum(0).sqrt()
    squares = mean.square()
    beyond = kin.noise[:, at].sum(0) * squares * ((mean < 0) | (mean > 1))
    # Each product and each sum is rounded; of what goes beyond its members theirs counts, too.
    noise = kin.noise[:, 0].sum() * (len(members) - 1 + squares.sum()) + beyond.sum()
    residual = float(left.sum()) ** 0.5
    nearest = min(kin.distance(i) for i in members)
    return Merge(
        weights={i: float(weight) for i, weight in zip(members, mean, strict=True)},
        spread=float(spread.max()),
        noise=residual / float(noise) ** 0.5 if noise > 0 else math.inf,
        share=residual / nearest if nearest else math.inf,
    )
