"""What an extrapolator sees of a matrix, and what it predicts.

Every prediction here is ΔŴ = Σ_i w_i·Δ_i + Σ_j σ_j·u_j·v_jᵀ: weights on the observed updates, and a
few pairs. So models and adapters are written from the same few numbers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import reduce
from operator import add
from typing import Protocol

import torch
from torch import Tensor

from geoscope.linalg.product import Product
from geoscope.trajectory.increments import Increments
from geoscope.trajectory.rank1 import Rank1Path

__all__ = ["Method", "MethodInput", "Pair", "Prediction", "damp", "last_of"]


@dataclass(frozen=True)
class Pair:
    """σ·u·vᵀ: u (m,), v (n,) of unit length, fp64; a learned σ may be negative."""

    sigma: float
    u: Tensor
    v: Tensor

    def __mul__(self, factor: float) -> Pair:
        return replace(self, sigma=factor * self.sigma)

    def dense(self) -> Tensor:
        """(m, n)."""
        return self.sigma * torch.outer(self.u, self.v)

    def product(self) -> Product:
        """The same as a product of rank 1, a stack of one."""
        return Product.of(self.u[:, None], self.v[None], self.sigma)


@dataclass(frozen=True)
class MethodInput:
    """What is known of one matrix.

    increments: of all its checkpoints.
    path: leading pairs of Δ_1 … Δ_T, where they were taken.
    step: the step beyond W_T that trained networks predict, where there are any.
    factors: method → λ*, as `Backtest.factors` gives them.
    """

    increments: Increments
    path: Rank1Path | None = None
    step: Pair | None = None
    factors: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Prediction:
    """ΔŴ = Σ_i w_i·Δ_i + the sum of the pairs. weights: (T,)."""

    weights: Tensor
    pairs: tuple[Pair, ...] = ()

    def damped(self, factor: float) -> Prediction:
        """Δ_T + λ·(ΔŴ − Δ_T)."""
        return Prediction(damp(self.weights, factor), tuple(pair * factor for pair in self.pairs))

    def of(self, updates: Sequence[Product]) -> Product:
        """ΔŴ of updates in factors; never made dense."""
        parts = [
            Product(update.B, update.scale * weight, update.A)
            for update, weight in zip(updates, self.weights.tolist(), strict=True)
            if weight
        ]
        parts += [pair.product() for pair in self.pairs]
        zero = Product(updates[0].B, updates[0].scale * 0, updates[0].A)
        return reduce(add, parts) if parts else zero


class Method(Protocol):
    """A way to predict later weights."""

    @property
    def name(self) -> str: ...

    def predict(self, seen: MethodInput, target: float) -> Prediction:
        """ΔŴ at the step `target`. Raises OptionError where too little was seen."""
        ...


def last_of(count: int) -> Tensor:
    """e_T: the weights of holding the last of so many checkpoints."""
    weights = torch.zeros(count, dtype=torch.float64)
    weights[-1] = 1
    return weights


def damp(weights: Tensor, factor: float) -> Tensor:
    """e_T + λ(w − e_T) for weights (…, T)."""
    last = last_of(weights.shape[-1])
    return last + factor * (weights - last)
