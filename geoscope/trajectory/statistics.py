"""Every statistic of a series beside its value for a random walk with the same step norms.

The definitions are in docs/methods.md#drift. The table says for each how many checkpoints it needs,
and whose rounding it bears: that of the increments δ_i or that of the updates Δ_i.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from geoscope.profile import stage
from geoscope.records import Collected, Numbers, Status
from geoscope.trajectory import storage_noise, temporal
from geoscope.trajectory.increments import Increments
from geoscope.trajectory.walk import sign_flip_p, walk

__all__ = ["SERIES", "STATISTICS", "Statistic", "Statistics", "statistics"]

Series = tuple[float | None, ...]


@dataclass(frozen=True)
class Statistic:
    """One line of the table.

    needs: least T. noise: "step" (ν of the increments decides on its status), "update" (ν of the
    updates) or None (it has no floor). null: whether the walk's value says anything.
    """

    fn: Callable[[Increments], float | None]
    needs: int = 1
    noise: str | None = None
    null: bool = True


@dataclass(frozen=True, kw_only=True)
class Statistics(Numbers):
    """Of one tensor, or of a sum of tensors.

    nulls: the same code on diag(H).
    steps: t_1 … t_T.
    series, null_series: id → one number per step, or per pair of neighbours, None where it is 0/0.
    step_status, update_status: whether rounding is below δ_i, Δ_i.
    """

    steps: tuple[float, ...]
    series: Mapping[str, Series] = field(default_factory=dict)
    null_series: Mapping[str, Series] = field(default_factory=dict)
    step_status: tuple[Status, ...]
    update_status: tuple[Status, ...]


def _corrected_drift(inc: Increments) -> float | None:
    """φ of H without its expected rounding."""
    return temporal.drift_fraction(storage_noise.corrected_gram(inc), inc.gaps)


def _corrected_cosine(inc: Increments) -> float | None:
    """Mean cosine of successive increments of H without its expected rounding.

    Over the pairs of which neither step is below resolution: what is left of such a step's energy
    is a small difference, and one of them would decide the mean.
    """
    cosines = temporal.step_cosines(storage_noise.corrected_gram(inc))
    lost = [
        storage_noise.noise_status(ratio) is Status.BELOW_RESOLUTION
        for ratio in storage_noise.step_precision_ratios(inc)
    ]
    kept = [
        one for i, one in enumerate(cosines) if one is not None and not (lost[i] or lost[i + 1])
    ]
    return math.fsum(kept) / len(kept) if kept else None


def _drift_p(inc: Increments) -> float | None:
    """Sign-flip p-value against drift.

    From T = 4 on, of increments that are not neighbours: these share no checkpoint, so that no
    rounding correlates them, nor does what the correction misses (a stored walk at ν(δ) = .58 is
    else called drift every time), nor an optimizer's memory of the last step.
    """
    rates = temporal.rates_gram(storage_noise.corrected_gram(inc), inc.gaps)
    return sign_flip_p(rates, apart=2 if len(inc) >= 4 else 1)


def _drift_to_noise(inc: Increments) -> float | None:
    """√(φ/(1 − φ)) of the corrected φ; None outside [0, 1)."""
    share = _corrected_drift(inc)
    return math.sqrt(share / (1 - share)) if share is not None and 0 <= share < 1 else None


def _relative(energy: float, inc: Increments) -> float | None:
    return math.sqrt(energy / inc.base_energy) if inc.base_energy > 0 else None


def _columns(curve: Callable[[Tensor], Tensor]) -> Callable[[Increments], float | None]:
    """Nonlinearity index of X = [1, curve(t)]."""
    return lambda inc: temporal.nonlinearity(inc, lambda t: temporal.line(curve(t)))


def _quadratic(t: Tensor) -> Tensor:
    t = t / t[-1]
    return torch.stack([torch.ones_like(t), t, t.square()], 1)


STATISTICS: Mapping[str, Statistic] = {
    "drift_fraction": Statistic(
        lambda inc: temporal.drift_fraction(inc.H, inc.gaps), needs=2, noise="step"
    ),
    "increment_cosine": Statistic(
        lambda inc: temporal.increment_cosine(inc.H), needs=2, noise="step"
    ),
    "drift_fraction_corrected": Statistic(_corrected_drift, needs=2, noise="step"),
    "increment_cosine_corrected": Statistic(_corrected_cosine, needs=2, noise="step"),
    "drift_to_noise": Statistic(_drift_to_noise, needs=2, noise="step"),
    "drift_p": Statistic(_drift_p, needs=2, noise="step", null=False),
    "straightness": Statistic(temporal.straightness, needs=2, noise="step"),
    "curvature": Statistic(temporal.curvature, needs=2, noise="step"),
    "temporal_pc1": Statistic(temporal.temporal_pc1, needs=2, noise="update"),
    "temporal_pc1_centred": Statistic(temporal.temporal_pc1_centred, needs=2, noise="update"),
    "temporal_participation_ratio": Statistic(
        temporal.participation_ratio, needs=2, noise="update"
    ),
    "rank1_coefficient_r2": Statistic(temporal.rank1_coefficient_r2, needs=3, noise="update"),
    "linear_r2": Statistic(temporal.linear_r2, needs=3, noise="update"),
    "linear_r2_origin": Statistic(temporal.linear_r2_origin, needs=2, noise="update"),
    "nonlinearity@quadratic": Statistic(
        lambda inc: temporal.nonlinearity(inc, _quadratic), needs=4, noise="update"
    ),
    "nonlinearity@sqrt": Statistic(_columns(torch.sqrt), needs=3, noise="update"),
    "nonlinearity@log": Statistic(_columns(torch.log), needs=3, noise="update"),
    "subspace_drift": Statistic(temporal.subspace_drift, needs=2, noise="update"),
    "residual_share": Statistic(
        lambda inc: temporal.residual_share(inc)[-1], needs=2, noise="update"
    ),
    "update_norm": Statistic(lambda inc: math.sqrt(max(0.0, float(inc.H.sum())))),
    "path_length": Statistic(lambda inc: float(inc.H.diagonal().sqrt().sum()), null=False),
    "relative_update": Statistic(lambda inc: _relative(max(0.0, float(inc.H.sum())), inc)),
    "step_precision_ratio": Statistic(storage_noise.step_precision_ratio, null=False),
    "precision_ratio": Statistic(storage_noise.precision_ratio, null=False),
}

# One number per checkpoint after the base, or per pair of neighbours.
SERIES: Mapping[str, Callable[[Increments], Series]] = {
    "update_norm": lambda inc: tuple(inc.G.diagonal().clamp_min(0).sqrt().tolist()),
    "step_norm": lambda inc: tuple(inc.H.diagonal().sqrt().tolist()),
    "relative_update": lambda inc: tuple(
        _relative(max(0.0, one), inc) for one in inc.G.diagonal().tolist()
    ),
    "relative_step": lambda inc: tuple(_relative(one, inc) for one in inc.H.diagonal().tolist()),
    "cos_to_final": temporal.cos_to_final,
    "update_cosine": temporal.update_cosines,
    "increment_cosine": lambda inc: temporal.step_cosines(inc.H),
    "curvature": temporal.step_curvatures,
    "rank1_coefficient": lambda inc: tuple(temporal.rank1_coefficients(inc).tolist()),
    "residual_share": temporal.residual_share,
    "step_precision_ratio": storage_noise.step_precision_ratios,
    "precision_ratio": storage_noise.update_precision_ratios,
}
_WITHOUT_NULL = ("step_precision_ratio", "precision_ratio")
# What stays a number for a series that never moves.
_OF_ZERO = ("update_norm", "path_length", "relative_update")


@stage("statistics")
def statistics(inc: Increments, *, base_exact: bool = True) -> Statistics:
    """All of STATISTICS and SERIES.

    base_exact: training began from the base exactly as its file holds it, so that N_0 = 0. False
    for a base that is itself a rounded checkpoint of the run.
    """
    steps = inc.steps[1:]
    if not bool(torch.isfinite(inc.H).all()):
        states = (Status.NON_FINITE,) * len(inc)
        return Statistics(
            steps=steps,
            values=dict.fromkeys(STATISTICS),
            status=dict.fromkeys(STATISTICS, Status.NON_FINITE),
            step_status=states,
            update_status=states,
        )
    if base_exact:
        inc = storage_noise.with_exact_base(inc)
    null = walk(inc)
    numbers = Collected()
    for key, statistic in STATISTICS.items():
        numbers.put(key, *_measure(key, statistic, inc))
    nulls = {
        key: value
        for key, one in STATISTICS.items()
        if one.null and len(inc) >= one.needs and (value := one.fn(null)) is not None
    }
    return Statistics(
        steps=steps,
        values=numbers.values,
        nulls=nulls,
        status=numbers.status,
        raw=numbers.raw,
        series={key: fn(inc) for key, fn in SERIES.items()},
        null_series={key: fn(null) for key, fn in SERIES.items() if key not in _WITHOUT_NULL},
        step_status=_per_step(inc.H, storage_noise.step_precision_ratios(inc)),
        update_status=_per_step(inc.G, storage_noise.update_precision_ratios(inc)),
    )


def _measure(key: str, one: Statistic, inc: Increments) -> tuple[float | None, Status]:
    """The number and its status, the first that applies (docs/methods.md#statuses)."""
    if float(inc.H.trace()) == 0 and key not in _OF_ZERO:
        return None, Status.ZERO_UPDATE
    value = one.fn(inc) if len(inc) >= one.needs else None
    if value is None:
        unresolved = one.noise == "step" and len(inc) >= one.needs
        status = _noise_of(one, inc)
        null = unresolved and status is Status.BELOW_RESOLUTION
        return None, status if null else Status.NOT_APPLICABLE
    return value, _noise_of(one, inc)


def _noise_of(one: Statistic, inc: Increments) -> Status:
    if one.noise is None:
        return Status.OK
    of_step = one.noise == "step"
    ratio = storage_noise.step_precision_ratio if of_step else storage_noise.precision_ratio
    return storage_noise.noise_status(ratio(inc))


def _per_step(gram: Tensor, ratios: Series) -> tuple[Status, ...]:
    return tuple(
        Status.ZERO_UPDATE if float(energy) <= 0 else storage_noise.noise_status(ratio)
        for energy, ratio in zip(gram.diagonal(), ratios, strict=True)
    )
