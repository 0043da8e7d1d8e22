"""All of geoscope's statistics on the runs that are complete; what is measured already is kept.

    python -m benchmarks.study.measure --out RUNS [--steps 30 120] [--table benchmarks/study]

Each run gets `measured.json`: at the quarters of the run the numbers of the model in `compare`,
`capacity` and `trajectory`, with `/null` those over their null, and `beyond.LIMIT`, the share of
matrices beyond a limit of the verdict. --table collects them in `runs.csv` and `statistics.csv`.
"""

from __future__ import annotations

import argparse
import csv
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

import torch

import geoscope
from benchmarks.study.design import Run, design
from benchmarks.study.limits import beyond
from benchmarks.study.methods import METHODS
from benchmarks.study.training import Settings, write_json
from geoscope.records import LayerRecord, Report

__all__ = ["QUARTERS", "measured", "numbers_of", "row_of_run"]

QUARTERS = (30, 60, 90, 120)
K = 8
Numbers = dict[str, float | str | None]


def _with_nulls(
    values: Mapping[str, float | None], nulls: Mapping[str, float | None], prefix: str = ""
) -> Numbers:
    """Numbers, and those that have a null over it; that of tuned weights is one of the shape."""
    numbers: Numbers = {}
    for key, value in values.items():
        if key.startswith("base.") or key in ("nominal_rank", "gap@8"):
            continue
        numbers[prefix + key] = value
        if (null := nulls.get(key)) and not key.startswith("tuned."):
            numbers[f"{prefix}{key}/null"] = None if value is None else value / null
    return numbers


def _compared(report: Report) -> Numbers:
    model, nulls = dict(report.summary.model), dict(report.summary.nulls)
    sides = [f"angle_{side}_mean@{K}" for side in ("left", "right")]
    if all(model.get(side) is not None for side in sides):
        model["angle@8"] = max(model[side] or 0.0 for side in sides)
        nulls["angle@8"] = max(nulls[side] for side in sides)
    return _with_nulls(model, nulls) | beyond(report.layers, "compare")


def _capacity(report: Report) -> Numbers:
    names = ("effective_rank_share", "entropy_rank_share", "k90_share", "k99_share", "tail_ratio")
    values = {name: report.summary.model.get(name) for name in (*names, "suggested_rank")}
    return _with_nulls(values, {}, "capacity.") | beyond(report.layers, "capacity")


def _trajectory(report: Report) -> Numbers:
    """Of the model, and medians over matrices of what each matrix alone has."""
    values, nulls = dict(report.summary.model), dict(report.summary.nulls)
    for key in report.layers[0].values if report.layers else ():
        if key not in values:
            values[key] = _median(report.layers, lambda layer, key=key: layer.values.get(key))
            if null := _median(report.layers, lambda layer, key=key: layer.nulls.get(key)):
                nulls[key] = null
    return _with_nulls(values, nulls, "trajectory.")


def _median(
    layers: Iterable[LayerRecord], get: Callable[[LayerRecord], float | None]
) -> float | None:
    numbers = [number for layer in layers if (number := get(layer)) is not None]
    return median(numbers) if numbers else None


def numbers_of(
    base: Path, checkpoints: list[Path], method: str, start: Path, *, steps: str
) -> Numbers:
    """Every number of the last checkpoint, and of the series up to it."""
    starts_elsewhere = METHODS[method].layout == "residual"
    initial: dict[str, Any] = {"initial_adapter": str(start)} if starts_elsewhere else {}
    last, numbers = str(checkpoints[-1]), Numbers()
    kinds = {
        "compare": (_compared, lambda: geoscope.compare(base, last, ks=K, jobs=1, **initial)),
        "capacity": (_capacity, lambda: geoscope.capacity(base, last, ks=K, jobs=1, **initial)),
        "trajectory": (
            _trajectory,
            lambda: geoscope.follow(
                [str(each) for each in checkpoints], base=str(base), steps=steps, jobs=1, **initial
            ),
        ),
    }
    for kind, (collect, call) in kinds.items():
        try:
            report = call()
        except geoscope.GeoscopeError as error:
            numbers[f"verdict.{kind}"] = f"error: {error}"
            continue
        verdict = report.summary.verdict
        numbers |= {f"verdict.{kind}": verdict.code if verdict else None} | collect(report)
    return numbers


def measured(run: Run, root: Path, quarters: Iterable[int] = QUARTERS) -> dict[str, Numbers]:
    """Step → its numbers; a checkpoint that was not reached has those of the last one before."""
    folder, every = root / "runs" / run.name, Settings().save_steps
    file, rows = folder / "measured.json", {}
    if file.exists():
        rows = json.loads(file.read_text(encoding="utf-8"))
    for quarter in quarters:
        if str(quarter) not in rows:
            steps = [step for step in range(every, quarter + 1, every) if _stored(folder, step)]
            rows[str(quarter)] = _numbers_to(run, root, steps)
            write_json(file, rows)
    return rows


def _stored(folder: Path, step: int) -> bool:
    return any((folder / f"checkpoint-{step}").glob("*.safetensors"))


def _numbers_to(run: Run, root: Path, steps: list[int]) -> Numbers:
    if not steps:
        return {}
    folder = root / "runs" / run.name
    checkpoints = [folder / f"checkpoint-{step}" for step in steps]
    base = root / "bases" / run.base
    return numbers_of(
        base, checkpoints, run.method, folder / "start", steps=",".join(map(str, steps))
    )


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return str(int(value))
    if isinstance(value, float):
        return f"{value:.4g}"
    return "" if value is None else str(value)


def row_of_run(run: Run, record: Mapping[str, Any]) -> dict[str, Any]:
    """Facts, base, and at each checkpoint accuracy, reward and entropy."""
    row = {**run.facts, "finite": record["finite"], "seconds": record["seconds"]}
    row |= {f"{key}_0": record["base"][key] for key in ("accuracy", "reward", "entropy")}
    points = {point["step"]: point for point in record["curve"]}
    last = dict(record["base"])
    for step in range(10, QUARTERS[-1] + 1, 10):
        last = points.get(step, last)
        row |= {f"{key}_{step}": last[key] for key in ("accuracy", "reward", "entropy")}
    return row


def _write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    names = list(dict.fromkeys(name for row in rows for name in row))
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(names)
        writer.writerows([_cell(row.get(name)) for name in names] for row in rows)


def write_tables(complete: list[Run], root: Path, out: Path) -> None:
    """`runs.csv`, a row a run, and `statistics.csv`, a row a run and quarter."""
    runs, statistics = [], []
    for run in complete:
        record = json.loads((root / "runs" / run.name / "record.json").read_text(encoding="utf-8"))
        runs.append(row_of_run(run, record))
        for step, numbers in sorted(measured(run, root, ()).items(), key=lambda item: int(item[0])):
            statistics.append({"name": run.name, "step": step} | numbers)
    _write_csv(out / "runs.csv", runs)
    _write_csv(out / "statistics.csv", statistics)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of bases and runs")
    parser.add_argument("--steps", type=int, nargs="*", default=QUARTERS, help="at which quarters")
    parser.add_argument("--table", type=Path, help="folder to write the tables into")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    root = arguments.out
    complete = [run for run in design() if (root / "runs" / run.name / "record.json").exists()]
    for place, run in enumerate(complete, 1):
        measured(run, root, arguments.steps)
        print(f"{place}/{len(complete)} {run.name}", flush=True)
    if arguments.table:
        write_tables(complete, root, arguments.table)


if __name__ == "__main__":
    main()
