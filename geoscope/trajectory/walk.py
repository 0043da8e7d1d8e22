"""The random walk that a trajectory must be told apart from: the same step norms, no memory.

In many dimensions the increments of a walk are orthogonal, so its Gram matrix is diag(H) to within
1/√(mn) (`ours`, docs/methods.md#drift). The same code on it gives every statistic's null at this T,
this spacing and these norms.
"""

from __future__ import annotations

import torch
from torch import Tensor

from geoscope.trajectory.increments import Increments

__all__ = ["ALL_FLIPS", "sign_flip_p", "walk"]

# Sign patterns that are all taken, up to T = 13; beyond it this many, one of them the true one.
ALL_FLIPS = 1 << 12


def walk(inc: Increments) -> Increments:
    """The random walk with the step norms of `inc`, stored without rounding."""
    H = inc.H.diagonal().diag()
    return Increments(inc.steps, H, (0.0,) * len(inc.rounding), inc.base_energy)


def sign_flip_p(rates: Tensor, *, apart: int = 1, seed: int = 0) -> float:
    """How often Σ s_i·s_j·H̃_ij reaches ΣH̃_ij over signs s, i and j `apart` or more: in (0, 1].

    rates: H̃ (T, T), inner products of δ_i/Δt_i. The increments of a walk may each be turned around
    without a change of its distribution, so that the share is an exact p-value against drift,
    whatever the increments' shape and effective dimension; the least possible is 2^(1−T). All
    2^(T−1) patterns are taken up to 4096, else the true one and 4095 seeded draws.
    [randomisation test: Fisher 1935, §21]
    """
    T = len(rates)
    off = (rates.triu(apart) + rates.tril(-apart)).to(torch.float64)
    if 1 << (T - 1) <= ALL_FLIPS:
        codes = torch.arange(1 << (T - 1))
        bits = (codes[:, None] >> torch.arange(T)) & 1
    else:
        generator = torch.Generator().manual_seed(seed)
        bits = torch.randint(2, (ALL_FLIPS, T), generator=generator)
        bits[0] = 0
    signs = 1.0 - 2.0 * bits.to(torch.float64)
    sums = ((signs @ off) * signs).sum(-1)
    slack = 1e-12 * float(off.abs().sum())
    return float((sums >= sums[0] - slack).double().mean())
