"""Is a predicted model better than the last checkpoint? Of every run that learned.

    python -m benchmarks.study.extrapolation --out RUNS [--next COUNT] [--table benchmarks/study]

From the checkpoints to step 80 geoscope predicts step 120 by each method, and the predicted model
is evaluated on the held-out problems. The checkpoints are written whole, adapters added to their
base, so that one path serves all methods. --next also trains NExt's networks for the first learned
run of as many methods. Each run gets `extrapolated.json`; --table writes `extrapolation.csv`.
"""

from __future__ import annotations

import argparse
import csv
import json
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import geoscope
from benchmarks.study.design import Run, design
from benchmarks.study.measure import row_of_run
from benchmarks.study.methods import stored_weights
from benchmarks.study.model import matrix_names
from benchmarks.study.outcomes import outcome
from benchmarks.study.tasks import Problems
from benchmarks.study.training import Settings, evaluate, write_json

__all__ = ["SEEN", "TARGET", "WAYS", "extrapolated"]

SEEN, TARGET = 80, 120
WAYS = ("two_point", "linear", "damped(linear)", "relex_pinned", "auto")
Weights = Mapping[str, Tensor]


def _whole(run: Run, root: Path, step: int) -> dict[str, Tensor]:
    folder = root / "runs" / run.name
    base = load_file(root / "bases" / run.base / "model.safetensors")
    weights = stored_weights(run.method, base, folder / "start", folder / f"checkpoint-{step}")
    return {name: each.detach() for name, each in weights.items()}


def _skill(predicted: Weights, last: Weights, target: Weights) -> float:
    """1 − ‖predicted − target‖²/‖last − target‖², over the matrices in blocks."""
    names = [f"{name}.weight" for name in matrix_names(Settings().size)]
    errors = [
        sum(float((weights[name] - target[name]).square().sum()) for name in names)
        for weights in (predicted, last)
    ]
    return 1 - errors[0] / errors[1]


def extrapolated(run: Run, root: Path, ways: tuple[str, ...]) -> dict[str, dict[str, float]]:
    """Method → accuracy, reward, entropy and skill of what it predicts; what is there is kept."""
    file = root / "runs" / run.name / "extrapolated.json"
    rows = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    missing = [way for way in ways if way not in rows]
    if not missing:
        return rows
    problems = Problems(run.task, run.seed)
    last, target = _whole(run, root, SEEN), _whole(run, root, TARGET)

    def judged(weights: Weights) -> dict[str, float]:
        figures = evaluate(weights, problems, problems.test, Settings().size)
        return figures | {"skill": _skill(weights, last, target)}

    rows |= {"hold": judged(last), "trained": judged(target)}
    with TemporaryDirectory() as scratch:
        folders = _written(run, root, Path(scratch))
        for way in missing:
            rows[way] = judged(_predicted(run, root, folders, Path(scratch) / "out", way))
            write_json(file, rows)
    return rows


def _written(run: Run, root: Path, scratch: Path) -> list[Path]:
    """The checkpoints to step SEEN as whole models."""
    folders = []
    for step in range(10, SEEN + 1, 10):
        folders.append(scratch / f"checkpoint-{step}")
        folders[-1].mkdir()
        save_file(
            {name: each.contiguous() for name, each in _whole(run, root, step).items()},
            folders[-1] / "model.safetensors",
        )
    return folders


def _predicted(run: Run, root: Path, folders: list[Path], out: Path, way: str) -> Weights:
    options = geoscope.FollowOptions(base=str(root / "bases" / run.base), jobs=1)
    geoscope.extrapolate(folders, TARGET, out, method=way, options=options, force=True)
    return load_file(next(out.rglob("model.safetensors")))


def _learned(root: Path) -> list[Run]:
    runs = []
    for run in design():
        file = root / "runs" / run.name / "record.json"
        if file.exists():
            record = json.loads(file.read_text(encoding="utf-8"))
            row = {key: str(value) for key, value in row_of_run(run, record).items()}
            if outcome(row | {"finite": str(int(record["finite"]))}) == "learned":
                runs.append(run)
    return runs


def _write_table(runs: list[Run], root: Path, out: Path) -> None:
    """A row a run and method."""
    names = ("name", "way", "accuracy", "reward", "entropy", "skill")
    with (out / "extrapolation.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(names)
        for run in runs:
            for way, row in extrapolated(run, root, ()).items():
                writer.writerow([run.name, way, *(f"{row[name]:.4g}" for name in names[2:])])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of bases and runs")
    parser.add_argument("--next", type=int, default=0, metavar="COUNT", help="methods with NExt")
    parser.add_argument("--table", type=Path, help="folder to write the table into")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    root, learned = arguments.out, _learned(arguments.out)
    first = {run.method: run for run in reversed(learned)}
    with_next = [run for run in learned if first[run.method] == run][: arguments.next]
    for place, run in enumerate(learned, 1):
        extrapolated(run, root, (*WAYS, "next") if run in with_next else WAYS)
        print(f"{place}/{len(learned)} {run.name}", flush=True)
    if arguments.table:
        _write_table(learned, root, arguments.table)


if __name__ == "__main__":
    main()
