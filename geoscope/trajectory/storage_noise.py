"""What storing every checkpoint in a short format does to the increments, and how to undo it.

A checkpoint's rounding error e_i enters δ_i with plus and δ_{i+1} with minus. So ‖δ_i‖² grows by
N_i + N_{i−1}, and ⟨δ_i, δ_{i+1}⟩ falls by N_i: small steps in bf16 look driftless, and a walk looks
as if it undid its own steps (docs/methods.md#storage-noise). All `ours`. N_0 is that of the base; 0
where it is exact.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from geoscope.linalg.precision import CAUTION_ABOVE, UNRESOLVED_ABOVE
from geoscope.records import Status
from geoscope.trajectory.increments import Increments

__all__ = [
    "corrected_gram",
    "noise_state",
    "noise_status",
    "precision_ratio",
    "step_precision_ratio",
    "step_precision_ratios",
    "update_precision_ratios",
    "with_exact_base",
]


def with_exact_base(inc: Increments) -> Increments:
    """The same with N_0 = 0: training began from the base exactly as its file holds it."""
    return replace(inc, rounding=(0.0, *inc.rounding[1:]))


def step_precision_ratios(inc: Increments) -> tuple[float | None, ...]:
    """ν(δ_i) = √((N_i + N_{i−1})/H_ii) of each increment; None where δ_i = 0."""
    return _ratios(_step_noise(inc), inc.H.diagonal())


def update_precision_ratios(inc: Increments) -> tuple[float | None, ...]:
    """ν(Δ_i) = √((N_i + N_0)/G_ii) of each update; None where Δ_i = 0."""
    return _ratios(_noise(inc)[1:] + inc.rounding[0], inc.G.diagonal())


def step_precision_ratio(inc: Increments) -> float | None:
    """ν(δ) of the series, √(Σ(N_i + N_{i−1})/ΣH_ii); None where nothing moved."""
    return _ratios(_step_noise(inc).sum()[None], inc.H.diagonal().sum()[None])[0]


def precision_ratio(inc: Increments) -> float | None:
    """ν of the updates of the series, √(Σ(N_i + N_0)/ΣG_ii); None where all are zero."""
    noise = (_noise(inc)[1:] + inc.rounding[0]).sum()
    return _ratios(noise[None], inc.G.diagonal().sum()[None])[0]


def noise_status(ratio: float | None) -> Status:
    """OK, CAUTION or BELOW_RESOLUTION at ν; OK where ν is undefined, for then more is."""
    if ratio is None or ratio <= CAUTION_ABOVE:
        return Status.OK
    return Status.CAUTION if ratio <= UNRESOLVED_ABOVE else Status.BELOW_RESOLUTION


def noise_state(inc: Increments, *, base_exact: bool) -> Status:
    """The status of a number about the updates: `noise_status` of their ν."""
    return noise_status(precision_ratio(with_exact_base(inc) if base_exact else inc))


def corrected_gram(inc: Increments) -> Tensor:
    """H without the expected rounding: H_ii − N_i − N_{i−1}, H_{i,i+1} + N_i. (T, T).

    A diagonal entry may come out negative where rounding is all there is.
    """
    between = _noise(inc)[1:-1]
    H = inc.H - _step_noise(inc).diag()
    return H + between.diag(1) + between.diag(-1)


def _noise(inc: Increments) -> Tensor:
    return torch.tensor(inc.rounding, dtype=torch.float64)


def _step_noise(inc: Increments) -> Tensor:
    noise = _noise(inc)
    return noise[1:] + noise[:-1]


def _ratios(noise: Tensor, energy: Tensor) -> tuple[float | None, ...]:
    pairs = zip(noise.tolist(), energy.tolist(), strict=True)
    return tuple(math.sqrt(one / two) if two > 0 else None for one, two in pairs)
