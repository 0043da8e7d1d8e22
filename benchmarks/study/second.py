"""A second analysis of the CSV files, from what docs/study.md says and with numpy alone.

    python -m benchmarks.study.second [--table benchmarks/study] [--page docs/study.md]

It shares no code with the first. It computes outcomes, the AUC of every statistic at both
checkpoints with intervals of its own resamples, what ρ, the logs, method and rate tell, and what
predicted models gain, and compares them with the tables of the page. It prints each disagreement
and ends with 1 where there is one: a value by more than its last digit, an end of an interval by
more than .05.
"""

from __future__ import annotations

import argparse
import csv
import re
import sys
from pathlib import Path

import numpy as np

__all__ = ["disagreements"]

_END_TOLERANCE = 0.05
MIDDLE = {"full": 4e-4, "zero": 3.2e-3} | dict.fromkeys(
    ("pissa", "milora", "olora", "geora-residual", "geora-mirror"), 6.4e-4
)
_INTERVAL = re.compile(r"^(−?\d*\.\d+) \[(−?\d*\.\d+), (−?\d*\.\d+)\]$")
Runs = list[dict[str, str]]


def read(path: Path) -> Runs:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def table_of(page: str, name: str) -> list[list[str]]:
    """Rows of a table of the page, cells as text."""
    block = page.split(f"<!-- table: {name} -->")[1].split("<!-- end -->")[0]
    rows = [line.strip("| ").split(" | ") for line in block.strip().splitlines()]
    return [[cell.strip(" `|") for cell in row] for row in rows[2:]]


def outcome(run: dict[str, str]) -> str:
    curve = np.array([float(run[f"accuracy_{10 * i}"]) for i in range(13)])
    ratio = float(run["entropy_120"]) / float(run["entropy_0"])
    change = curve[-1] - curve[0]
    broken = run["finite"] == "0" or not np.isfinite(change + ratio)
    if broken or change < -0.1 or (ratio < 0.05 and change < 0.1):
        return "collapsed"
    if curve[-1] < curve.max() - 0.1 or ratio > 2:
        return "unstable"
    return "learned" if change >= 0.1 else "idle"


def column(rows: Runs, name: str) -> np.ndarray:
    return np.array([float(row[name]) if row.get(name) else np.nan for row in rows])


def area(x: np.ndarray, y: np.ndarray) -> float:
    """AUC by the places of failed runs among the others."""
    others, failed = np.sort(x[y == 0]), x[y == 1]
    below = np.searchsorted(others, failed, "left") + np.searchsorted(others, failed, "right")
    return float(below.mean() / (2 * len(others))) if len(failed) and len(others) else np.nan


def with_interval(x: np.ndarray, y: np.ndarray, draws: int = 600) -> tuple[float, float, float]:
    known = ~np.isnan(x)
    generator, areas = np.random.default_rng(99), []
    if not 5 <= y[known].sum() <= known.sum() - 5:
        return np.nan, np.nan, np.nan
    for _ in range(draws):
        drawn = generator.choice(len(x), len(x))
        drawn = drawn[known[drawn]]
        areas.append(area(x[drawn], y[drawn]))
    areas = [each for each in areas if not np.isnan(each)]
    low, high = np.quantile(areas, [0.025, 0.975])
    return area(x[known], y[known]), float(low), float(high)


def standard_ranks(x: np.ndarray) -> np.ndarray:
    known = ~np.isnan(x)
    place = np.array([(x[known] < v).sum() + ((x[known] == v).sum() + 1) / 2 for v in x[known]])
    ranks = np.zeros(len(x))
    ranks[known] = (place - place.mean()) / (place.std() or 1.0)
    return ranks


def logistic(X: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Reweighted least squares with a ridge of 1 on slopes."""
    design = np.hstack([X, np.ones((len(X), 1))])
    penalty = np.eye(design.shape[1])
    penalty[-1, -1] = 1e-9
    w = np.zeros(design.shape[1])
    for _ in range(40):
        p = 1 / (1 + np.exp(-design @ w))
        weight = np.maximum(p * (1 - p), 1e-12)
        working = design @ w + (y - p) / weight
        gram = (design * weight[:, None]).T @ design + penalty
        w = np.linalg.lstsq(gram, design.T @ (weight * working), rcond=None)[0]
    return w


def held_out(X: np.ndarray, y: np.ndarray, groups: list[str]) -> np.ndarray:
    scores, names = np.full(len(y), np.nan), np.array(groups)
    for name in set(groups):
        w = logistic(X[names != name], y[names != name])
        scores[names == name] = X[names == name] @ w[:-1] + w[-1]
    return scores


def number(text: str) -> float:
    return float(text.replace("−", "-"))


def differs(cell: str, ours: tuple[float, float, float], digits: int = 2) -> bool:
    """Whether a cell of the page says something else."""
    place = _INTERVAL.match(cell)
    if place is None:
        return cell != "–" or not np.isnan(ours[0])
    theirs = [number(text) for text in place.groups()]
    if abs(theirs[0] - ours[0]) > 0.51 * 10**-digits:
        return True
    return any(abs(a - b) > _END_TOLERANCE for a, b in zip(theirs[1:], ours[1:], strict=True))


def baseline_scores(runs: Runs, rows: Runs, y: np.ndarray, step: int) -> dict[str, np.ndarray]:
    """Scores of what the table of baselines lists."""
    rates, methods = column(runs, "rate"), [run["method"] for run in runs]
    middle = np.array([MIDDLE.get(method, MIDDLE["zero"]) for method in methods])
    level = np.round(4 * np.log2(rates / middle) / 2) / 4
    change = column(runs, f"accuracy_{step}") - column(runs, "accuracy_0")
    entropy = column(runs, f"entropy_{step}") / column(runs, "entropy_0")
    blocks = [f"{run['task']} {run['seed']}" for run in runs]
    dummies = [np.array([m == each for m in methods], dtype=float) for each in sorted(set(methods))]
    rho = column(rows, "relative_update")
    logs = np.column_stack([standard_ranks(change), standard_ranks(entropy)])
    both = np.column_stack([standard_ranks(level), *dummies])
    return {
        "ρ": rho,
        "rate": rates,
        "level of the rate": level,
        "accuracy change": change,
        "entropy over the base's": entropy,
        "ρ, left out": held_out(standard_ranks(rho)[:, None], y, methods),
        "logs, left out": held_out(logs, y, methods),
        "method and rate, left out": held_out(both, y, blocks),
    }


def _gains(rows: Runs) -> dict[str, np.ndarray]:
    """Method → accuracy less that of the last checkpoint, run by run."""
    hold = {row["name"]: float(row["accuracy"]) for row in rows if row["way"] == "hold"}
    gains: dict[str, list[float]] = {}
    for row in rows:
        if row["way"] != "hold":
            gains.setdefault(row["way"], []).append(float(row["accuracy"]) - hold[row["name"]])
    return {way: np.array(values) for way, values in gains.items()}


def _mean(values: np.ndarray) -> tuple[float, float, float]:
    generator = np.random.default_rng(99)
    draws = [generator.choice(values, len(values)).mean() for _ in range(2000)]
    low, high = np.quantile(draws, [0.025, 0.975])
    return float(values.mean()), float(low), float(high)


def disagreements(folder: Path, page: str) -> list[str]:
    """One line for each cell of the page that this analysis does not find."""
    runs, statistics = read(folder / "runs.csv"), read(folder / "statistics.csv")
    by_key = {(row["name"], int(row["step"])): row for row in statistics}
    y = np.array([outcome(run) in ("collapsed", "unstable") for run in runs], dtype=float)
    said: list[str] = []
    counts = [
        str(sum(outcome(run) == each for run in runs))
        for each in ("collapsed", "unstable", "learned", "idle")
    ]
    if table_of(page, "runs")[-1][3:7] != counts:
        said.append(f"runs: {counts}")
    risk = column(runs, "accuracy_30") >= column(runs, "accuracy_0") - 0.1
    for step, place in ((30, 1), (120, 3)):
        rows = [by_key[run["name"], step] for run in runs]
        scores = baseline_scores(runs, rows, y, step)
        for cells in table_of(page, "baselines"):
            if differs(cells[place], with_interval(scores[cells[0]], y)):
                said.append(f"baselines, step {step}: {cells[0]} {cells[place]}")
        for cells in table_of(page, "all"):
            values = column(rows, cells[0])
            if differs(cells[place], with_interval(values, y)):
                said.append(f"all, step {step}: {cells[0]} {cells[place]}")
            if step == 30 and differs(cells[2], with_interval(values[risk], y[risk])):
                said.append(f"all, at risk: {cells[0]} {cells[2]}")
    gains = _gains(read(folder / "extrapolation.csv"))
    for cells in table_of(page, "extrapolation"):
        if differs(cells[2], _mean(gains[cells[0]]), digits=3):
            said.append(f"extrapolation: {cells[0]} {cells[2]}")
    return said


def main() -> None:
    here = Path(__file__).parent
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--table", type=Path, default=here, help="folder of the CSV files")
    page = here.parents[1] / "docs" / "study.md"
    parser.add_argument("--page", type=Path, default=page, help="the page (default docs/study.md)")
    arguments = parser.parse_args()
    said = disagreements(arguments.table, arguments.page.read_text(encoding="utf-8"))
    print("\n".join(said) or "both analyses agree")
    sys.exit(bool(said))


if __name__ == "__main__":
    main()
