"""Simulated series: walks, drifts, lines and curves, with or without rounding."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from geoscope.trajectory.increments import Increments


def simulated(
    steps: Sequence[float],
    *,
    drift: float = 0.0,
    noise: float = 1.0,
    rho: float = 1e-2,
    entries: int = 200_000,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> list[Tensor]:
    """Weights N(0, 1), bf16 numbers at first; drift and noise per unit of t, relative to rho.

    Over a gap the noise grows as √Δt and the drift as Δt.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal() -> Tensor:
        return torch.randn(entries, generator=generator, dtype=torch.float64)

    W = normal().to(torch.bfloat16).to(torch.float64)
    direction = normal()
    weights = [W.to(dtype)]
    for before, after in pairwise(steps):
        gap = after - before
        W = W + rho * (noise * gap**0.5 * normal() + drift * gap * direction)
        weights.append(W.to(dtype))
    return weights


def curve(steps: Sequence[float], at: Callable[[float], Sequence[float]]) -> Increments:
    """A path t ↦ at(t) − at(t_0) in a few dimensions."""
    points = torch.tensor([list(at(t)) for t in steps], dtype=torch.float64)
    taken = points.diff(dim=0)
    return Increments(tuple(map(float, steps)), taken @ taken.T, (0.0,) * len(steps), 1.0)


def from_steps(H: Tensor, steps: Sequence[float] | None = None) -> Increments:
    """Increments of this H, unrounded."""
    T = len(H)
    given = tuple(map(float, range(T + 1) if steps is None else steps))
    return Increments(given, H.to(torch.float64), (0.0,) * (T + 1), 1.0)


def number(value: float | None) -> float:
    """A value that must be there."""
    assert value is not None
    return value


def pair_products(u: Tensor, v: Tensor, updates: Tensor) -> Tensor:
    """u_iᵀ·Δ_τ·v_j by τ, i and j, of rows u (a, m) and v (b, n) and dense updates (T, m, n)."""
    return torch.einsum("im,tmn,jn->tij", u, updates, v)
