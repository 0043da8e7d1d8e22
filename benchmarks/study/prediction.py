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
    ranks,
    resamples,
)

__all__ = [
    "BASELINES",
    "Baseline",
    "Line",
    "baseline_aucs",
    "baselines",
    "chance_bar",
    "counted",
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
class Baseline:
    """inputs: (n, features), of the same runs. groups: what is left out together."""

    inputs: Floats
    groups: NDArray[np.str_]

    def scores(self, failed: NDArray[np.bool_], statistic: Floats | None = None) -> Floats:
        """Log-odds of failure, left out by group, perhaps with a statistic beside the inputs."""
        more = () if statistic is None else (statistic[:, None],)
        return left_out(np.hstack([self.inputs, *more]), failed, self.groups)


def baselines(study: Study, step: int) -> dict[str, Baseline]:
    """ρ, method and rate, and logs: what a statistic of the weights has to add to.

    The rate is its level among those of its method; of logs, ranks of the change of accuracy and of
    entropy over that of the base.
    """
    change = study.numbers(f"accuracy_{step}") - study.numbers("accuracy_0")
    entropy = study.numbers(f"entropy_{step}") / study.numbers("entropy_0")
    methods = [(study.method == method).astype(float) for method in np.unique(study.method)]
    columns = {
        "ρ": ([ranks(study.statistic("relative_update", step))], study.method),
        "method and rate": ([ranks(study.level), *methods], study.block),
        "logs": ([ranks(change), ranks(entropy)], study.method),
    }
    return {name: Baseline(np.column_stack(c), groups) for name, (c, groups) in columns.items()}


def lines(study: Study, step: int, target: str = "failed", *, adds: bool = True) -> list[Line]:
    """Every statistic at a step: AUC for the target, and what it adds."""
    failed = getattr(study, target)
    counts = resamples(range(len(failed)))
    cells = resamples(list(study.cell))
    grounds = baselines(study, step) if adds else {}
    alone = {name: ground.scores(failed) for name, ground in grounds.items()}
    table = []
    for name in study.names:
        values, gains = study.statistic(name, step), {}
        if np.isfinite(values).any():
            for each, ground in grounds.items():
                both = ground.scores(failed, ranks(values))
                gains[each] = difference(both, alone[each], failed, counts)
        known = estimate(values, failed, counts), estimate(values, failed, cells)
        table.append(Line(name, *known, gains))
    return table


def baseline_aucs(study: Study, step: int, target: str = "failed") -> dict[str, Estimate]:
    """AUC of what needs no weights, of ρ and of the baselines left out by group."""
    failed = getattr(study, target)
    counts = resamples(range(len(failed)))
    scores = {
        f"{name}, left out": each.scores(failed) for name, each in baselines(study, step).items()
    }
    change = study.numbers(f"accuracy_{step}") - study.numbers("accuracy_0")
    plain = {
        "ρ": study.statistic("relative_update", step),
        "rate": study.numbers("rate"),
        "level of the rate": study.level,
        "accuracy change": change,
        "entropy over the base's": study.numbers(f"entropy_{step}") / study.numbers("entropy_0"),
    }
    return {name: estimate(values, failed, counts) for name, values in (plain | scores).items()}


def counted(study: Study, step: int) -> list[str]:
    """Statistics that are defined on half of the runs or more."""
    names = study.names
    return [n for n in names if np.isfinite(study.statistic(n, step)).mean() >= 0.5]


def chance_bar(study: Study, step: int, target: str = "failed") -> float:
    """The |AUC − ½| that the best of all statistics exceeds by chance in one case of twenty."""
    table = [study.statistic(name, step) for name in counted(study, step)]
    return largest_by_chance(table, getattr(study, target), study.block)
