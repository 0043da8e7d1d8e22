"""What a sample of matrices tells of a model and its candidates: distances, angles, growth.

Weights are points: 0 is the model, 1 … n are candidates. Updates that know nothing of one another
are at right angles, so squared distances add up along a line of descent, and the angle at what
lies between is 90°. See docs/methods.md#lineage.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from geoscope.linalg.displacements import squared_distances

__all__ = ["Estimate", "Kin"]


class Estimate(NamedTuple):
    """A number of the pooled matrices, and its standard error over them."""

    value: float
    error: float


@dataclass(frozen=True)
class Kin:
    """T matrices of a model and n candidates.

    gram: (T, n + 1, n + 1), G of `linalg.displacements`.
    noise: (T, n + 1), squared rounding of each weight.
    coarser: (2, T, n), squared rounding of the model where its values are coarser than the
    candidate's, and of the candidate where its are; 0 elsewhere.
    parameters: (T,) entries.
    same: (U, n), whether other tensors of the model, such as embeddings, are equal in a candidate.
    """

    gram: Tensor
    noise: Tensor
    coarser: Tensor
    parameters: Tensor
    same: Tensor

    @property
    def candidates(self) -> range:
        """Numbers of the candidates."""
        return range(1, self.gram.shape[-1])

    @cached_property
    def by_matrix(self) -> Tensor:
        """Squared distances (T, n + 1, n + 1)."""
        return squared_distances(self.gram)

    @cached_property
    def squared(self) -> Tensor:
        """Squared distances of all matrices together (n + 1, n + 1)."""
        return self.by_matrix.sum(0)

    @cached_property
    def energies(self) -> Tensor:
        """Squared norms of the weights (T, n + 1)."""
        own = self.gram.diagonal(dim1=-2, dim2=-1)
        whole = own[:, :1] + 2 * self.gram[:, 0] + own
        return torch.cat([own[:, :1], whole[:, 1:]], 1)

    @cached_property
    def equal(self) -> Tensor:
        """Whether a tensor of the model is the candidate's, entry by entry (T + U, n)."""
        return torch.cat([self.by_matrix[:, 0, 1:] == 0, self.same])

    def is_passed_over(self, i: int, j: int) -> bool:
        """Whether the model has a tensor of candidate j that i has not: i cannot lie between."""
        return bool((self.equal[:, j - 1] & ~self.equal[:, i - 1]).any())

    def cosine(self, i: int) -> Estimate:
        """c of model and candidate, with 1/√N, its standard deviation for unrelated weights."""
        model, other = self.energies[:, 0], self.energies[:, i]
        inner = model.sum() + self.gram[:, 0, i].sum()
        scale = float((model.sum() * other.sum()).sqrt())
        if not scale:
            return Estimate(math.nan, math.nan)
        variance = float((model * other / self.parameters).sum())
        return Estimate(float(inner) / scale, math.sqrt(variance) / scale)

    def distance(self, i: int, j: int = 0) -> float:
        """‖W_i − W_j‖."""
        return float(self.squared[i, j]) ** 0.5

    def vertex(self, at: int, a: int, b: int) -> Estimate:
        """Cosine of the angle at a weight between the ways to two others."""

        def cosine(squared: Tensor) -> Tensor:
            left, right = squared[..., at, a], squared[..., at, b]
            return (left + right - squared[..., a, b]) / (2 * (left * right).sqrt())

        return self._estimate(cosine, float(self.parameters.sum()) ** -0.5)

    def growth(self, old: int, new: int) -> Estimate:
        """(‖W_new‖² − ‖W_old‖²)/‖W_new − W_old‖²: 1 of an update that knows nothing of the old."""
        gained = self.energies[:, new] - self.energies[:, old]
        taken = self.by_matrix[:, old, new]
        length = float(taken.sum() * self.parameters.sum()) ** 0.5
        chance = 2 * float(self.energies[:, old].sum()) ** 0.5 / length if length else math.inf

        def ratio(pairs: Tensor) -> Tensor:
            return pairs[..., 0] / pairs[..., 1]

        return self._estimate(ratio, chance, torch.stack([gained, taken], -1))

    def _estimate(
        self, number: Callable[[Tensor], Tensor], chance: float, rows: Tensor | None = None
    ) -> Estimate:
        """A function of sums over matrices; its error by leaving out each, `chance` at least."""
        rows = self.by_matrix if rows is None else rows
        total, count = rows.sum(0), len(rows)
        value = float(number(total))
        if count < 2:
            return Estimate(value, chance)
        without = number(total - rows)
        spread = float((without - without.mean()).square().sum() * (count - 1) / count) ** 0.5
        return Estimate(value, max(spread, chance) if math.isfinite(spread) else chance)
