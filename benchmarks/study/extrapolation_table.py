"""What predicted models gain over the last checkpoint, from extrapolation.csv."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from benchmarks.study.claims import mean_of
from benchmarks.study.resampling import Estimate

__all__ = ["Gain", "extrapolation_rows", "next_rows"]

Rows = Sequence[Mapping[str, str]]
_CLEAR = 0.02


@dataclass(frozen=True)
class Gain:
    """way: the method. gain: accuracy less that of the last checkpoint. sides: how many runs are
    better and worse by .02. skill: in weight space."""

    way: str
    gain: Estimate
    sides: str
    skill: Estimate


def _by_run(rows: Rows, column: str) -> dict[str, dict[str, float]]:
    """Way → run → number."""
    table: dict[str, dict[str, float]] = {}
    for row in rows:
        table.setdefault(row["way"], {})[row["name"]] = float(row[column])
    return table


def extrapolation_rows(rows: Rows) -> list[Gain]:
    """Every method, the trained target among them."""
    accuracy, skill = _by_run(rows, "accuracy"), _by_run(rows, "skill")
    gains = []
    for way, numbers in accuracy.items():
        if way != "hold":
            change = np.array([numbers[run] - accuracy["hold"][run] for run in numbers])
            sides = f"{int((change > _CLEAR).sum())} / {int((change < -_CLEAR).sum())}"
            skills = np.array(list(skill[way].values()))
            gains.append(Gain(way, mean_of(change), sides, mean_of(skills)))
    return gains


def next_rows(rows: Rows) -> dict[str, Estimate]:
    """NExt less damped(linear), of the runs that have both."""
    found = {}
    for column in ("accuracy", "skill"):
        table = _by_run(rows, column)
        both = [run for run in table.get("next", {}) if run in table.get("damped(linear)", {})]
        change = [table["next"][run] - table["damped(linear)"][run] for run in both]
        found[column] = mean_of(np.array(change, dtype=float))
    return found
