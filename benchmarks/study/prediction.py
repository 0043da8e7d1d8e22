"""Which statistic tells the outcome, and what it adds to ρ, to method and rate, and to logs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from benchmarks.study.outcomes import Study
from benchmarks.study.resampling import (
    Estimate,
    difference,
    estimate,
    largest_by_chance,
    left_out,
    predicted,
    ranks,
    resamples,
)

__all__ = [
    "BASELINES",
    "Baselines",
    "Line",
    "baseline_aucs",
    "baselines",
    "chance_bar",
    "history",
    "lines",
]

Floats = NDArray[np.float64]
BASELINES = ("ρ", "method and rate", "logs")


@dataclass(frozen=True)
class Line:
    """A statistic: its AUC, that from resampling configurations, and what it adds to a baseline."""

    name: str
    auc: Estimate
    by_cell: Estimate
    adds: Mapping[str, Estimate]


@dataclass(frozen=True)
class Baselines:
    """Scores of the baselines left out by group, and their inputs; all of the same runs.

    history: the share of failed among other training runs of the same method and rate, as an input
    for each block that is left out (its row), for every run.
    """

    inputs: Mapping[str, Floats]
    history: Mapping[str, Floats]
    scores: Mapping[str, Floats]


def history(study: Study, failed: NDArray[np.bool_], away: NDArray[np.bool_]) -> Floats:
    """Share of failed among the runs of the same method and rate, but for those away and itself.

    The share of all training runs where there is no other.
    """
    shares = np.zeros(len(failed))
    for place, cell in enumerate(study.cell):
        others = (study.cell == cell) & ~away
        others[place] = False
        shares[place] = failed[others].mean() if others.any() else failed[~away].mean()
    return shares


def logs(study: Study, step: int) -> Floats:
    """(n, 2): ranks of accuracy change and of entropy over that of the base."""
    change = study.numbers(f"accuracy_{step}") - study.numbers("accuracy_0")
    entropy = study.numbers(f"entropy_{step}") / study.numbers("entropy_0")
    return np.column_stack([ranks(change), ranks(entropy)])


def _by_block(
    study: Study, failed: NDArray[np.bool_], shares: Mapping[str, Floats], statistic: Floats | None
) -> Floats:
    """Log-odds from method and rate, and perhaps a statistic, each block left out."""
    scores = np.zeros(len(failed))
    for block, share in shares.items():
        inputs = (share[:, None],) if statistic is None else (share[:, None], statistic[:, None])
        away = study.block == block
        scores[away] = predicted(np.hstack(inputs), failed, away)
    return scores


def baselines(study: Study, failed: NDArray[np.bool_], step: int) -> Baselines:
    """The three baselines at a step."""
    inputs = {"ρ": ranks(study.statistic("relative_update", step))[:, None]}
    inputs |= {"logs": logs(study, step)}
    shares = {b: history(study, failed, study.block == b) for b in np.unique(study.block)}
    scores = {name: left_out(values, failed, study.method) for name, values in inputs.items()}
    scores["method and rate"] = _by_block(study, failed, shares, None)
    return Baselines(inputs, shares, scores)


def _with(
    study: Study, failed: NDArray[np.bool_], ground: Baselines, name: str, statistic: Floats
) -> Floats:
    if name == "method and rate":
        return _by_block(study, failed, ground.history, statistic)
    return left_out(np.column_stack([ground.inputs[name], statistic]), failed, study.method)


def lines(study: Study, step: int, target: str = "failed", *, adds: bool = True) -> list[Line]:
    """Every statistic at a step: AUC for the target, and what it adds."""
    failed = getattr(study, target)
    counts = resamples(range(len(failed)))
    cells = resamples(list(study.cell))
    ground = baselines(study, failed, step) if adds else None
    table = []
    for name in study.names:
        values = study.statistic(name, step)
        gains = {}
        if ground is not None and np.isfinite(values).any():
            statistic = ranks(values)
            for each in BASELINES:
                both = _with(study, failed, ground, each, statistic)
                gains[each] = difference(both, ground.scores[each], failed, counts)
        known = estimate(values, failed, counts), estimate(values, failed, cells)
        table.append(Line(name, *known, gains))
    return table


def baseline_aucs(study: Study, step: int, target: str = "failed") -> dict[str, Estimate]:
    """AUC of what needs no weights, of ρ and of the baselines left out by group."""
    failed = getattr(study, target)
    counts = resamples(range(len(failed)))
    scores = {
        f"{name}, left out": each for name, each in baselines(study, failed, step).scores.items()
    }
    change = study.numbers(f"accuracy_{step}") - study.numbers("accuracy_0")
    plain = {
        "ρ": study.statistic("relative_update", step),
        "rate": study.numbers("rate"),
        "level of the rate": study.level.astype(float),
        "accuracy change": change,
        "entropy over the base's": study.numbers(f"entropy_{step}") / study.numbers("entropy_0"),
    }
    return {name: estimate(values, failed, counts) for name, values in (plain | scores).items()}


def chance_bar(study: Study, step: int, target: str = "failed") -> float:
    """The |AUC − ½| that the best of all statistics exceeds by chance in one case of twenty."""
    table = [study.statistic(name, step) for name in study.names]
    table = [values for values in table if np.isfinite(values).any()]
    return largest_by_chance(table, getattr(study, target), study.block)
