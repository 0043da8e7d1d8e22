"""The table of runs, read back; and the outcome of each by the rules of RULES.md."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks.study.design import MIDDLE

__all__ = ["EARLY", "END", "OUTCOMES", "Study", "outcome", "study_of"]

EARLY, END = 30, 120
OUTCOMES = ("collapsed", "unstable", "learned", "idle")
MARGIN = 0.10
Floats = NDArray[np.float64]
Row = Mapping[str, str]


def outcome(row: Row) -> str:
    """collapsed, unstable, learned or idle, by held-out accuracy and entropy."""
    steps = range(0, END + 1, 10)
    accuracies = [float(row[f"accuracy_{step}"]) for step in steps]
    start, end, best = accuracies[0], accuracies[-1], max(accuracies)
    first, last = float(row["entropy_0"]), float(row[f"entropy_{END}"])
    if row["finite"] != "1" or not np.isfinite([end, last]).all() or end < start - MARGIN:
        return "collapsed"
    if last < 0.05 * first and end < start + MARGIN:
        return "collapsed"
    if end < best - MARGIN or last > 2 * first:
        return "unstable"
    return "learned" if end >= start + MARGIN else "idle"


def _number(text: str | None) -> float:
    try:
        return float(text or "nan")
    except ValueError:
        return np.nan


@dataclass(frozen=True)
class Study:
    """runs: rows of runs.csv. rows: (name, step) → row of statistics.csv."""

    runs: tuple[Row, ...]
    rows: Mapping[tuple[str, int], Row]

    def column(self, name: str) -> NDArray[np.str_]:
        """A column of the runs, as text."""
        return np.array([row[name] for row in self.runs])

    def numbers(self, name: str) -> Floats:
        """A column of the runs, as numbers."""
        return np.array([_number(row.get(name)) for row in self.runs])

    def statistic(self, name: str, step: int) -> Floats:
        """A statistic of every run at a step; NaN where it is undefined."""
        return np.array([_number(self.rows[row["name"], step].get(name)) for row in self.runs])

    def codes(self, name: str, step: int) -> NDArray[np.str_]:
        """A verdict of every run at a step."""
        return np.array([self.rows[row["name"], step].get(name) or "" for row in self.runs])

    @cached_property
    def outcomes(self) -> NDArray[np.str_]:
        return np.array([outcome(row) for row in self.runs])

    @cached_property
    def failed(self) -> NDArray[np.bool_]:
        return np.isin(self.outcomes, ("collapsed", "unstable"))

    @cached_property
    def learned(self) -> NDArray[np.bool_]:
        return self.outcomes == "learned"

    @cached_property
    def method(self) -> NDArray[np.str_]:
        return self.column("method")

    @cached_property
    def level(self) -> Floats:
        """log4 of the rate over the middle one of its method, + 2: 0 to 4, between at the boundary.

        Rates are written with two digits, so whole levels are rounded ones.
        """
        middle = np.array([MIDDLE[method] for method in self.method])
        return np.round(4 * (np.log(self.numbers("rate") / middle) / np.log(4) + 2)) / 4

    @cached_property
    def block(self) -> NDArray[np.str_]:
        """Task and seed: one base each."""
        return np.array([f"{row['task']} {row['seed']}" for row in self.runs])

    @cached_property
    def cell(self) -> NDArray[np.str_]:
        """Method and rate."""
        return np.array([f"{row['method']} {row['rate']}" for row in self.runs])

    @cached_property
    def at_risk(self) -> NDArray[np.bool_]:
        """Not failed yet at the early checkpoint."""
        return self.numbers(f"accuracy_{EARLY}") >= self.numbers("accuracy_0") - MARGIN

    @property
    def gain(self) -> Floats:
        """Accuracy at the end less that of the base."""
        return self.numbers(f"accuracy_{END}") - self.numbers("accuracy_0")

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Statistics that are defined at the end in a run and not the same in all."""
        columns = next(iter(self.rows.values()))
        names = [n for n in columns if n not in ("name", "step") and not n.startswith("verdict.")]
        ends = {name: self.statistic(name, END) for name in names}
        known = {name: values[np.isfinite(values)] for name, values in ends.items()}
        return tuple(name for name in names if len(np.unique(known[name])) > 1)

    def part(self, keep: NDArray[np.bool_]) -> Study:
        """The study of some runs."""
        kept = [row for row, is_kept in zip(self.runs, keep, strict=True) if is_kept]
        return Study(tuple(kept), self.rows)


def _rows(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def study_of(folder: Path) -> Study:
    """The study whose tables lie in a folder."""
    rows = {(row["name"], int(row["step"])): row for row in _rows(folder / "statistics.csv")}
    return Study(tuple(_rows(folder / "runs.csv")), rows)
