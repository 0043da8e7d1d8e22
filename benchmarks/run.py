"""One command, one table: geoscope, the naive loop, the floor and the peers, on one machine.

Every line is measured in every round, one after the other, in a process of its own; medians and
spreads are over the rounds, and ratios are against the naive loop of the same round.

    python benchmarks/run.py --out table [--peers ENVIRONMENTS --make-peers]
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import synthetic
from environments import PEERS, make, why_absent
from machine import Run, child, facts, set_aside_variables, without_paths
from tables import markdown

HERE = Path(__file__).resolve().parent

# What of `geoscope compare` is measured: label → options, as the command and computing.py take them
COMPARE: dict[str, tuple[str, ...]] = {
    "compare": (),
    "compare --quick --k 8": ("--quick", "--k", "8"),
    "compare --quick --k 64": ("--quick", "--k", "64"),
    "compare --masks": ("--masks",),
    "compare --curves": ("--curves",),
}
NAIVE = "naive: svd of each"
FLOOR = "floor"


@dataclass(frozen=True)
class Line:
    """One line of the table.

    inner: the seconds are what the process says, not those of the process. ours: it runs with the
    variables that geoscope's command line sets. folder: where it is started.
    """

    label: str
    command: list[str]
    inner: bool = True
    ours: bool = False
    folder: Path | None = None


def lines(base: Path, tuned: Path, peers: Path | None) -> list[Line]:
    """Everything that is measured on a pair of folders."""
    pair = [str(base), str(tuned)]
    python = [sys.executable]
    found = []
    for label, options in COMPARE.items():
        command = [*python, "-m", "geoscope", "compare", *pair, "--no-resume", "--quiet"]
        command += ["--device", "cpu", *options]
        # The command finds out by itself what BLAS should know.
        found.append(Line(f"geoscope {label}, whole command", command, inner=False))
        inside = [*python, str(HERE / "computing.py"), *pair, *options]
        found.append(Line(f"geoscope {label}, computing", inside, ours=True))
    naive = [*python, str(HERE / "naive.py"), *pair]
    found.append(Line(NAIVE, naive))
    found.append(Line("naive: values only", [*naive, "--values-only"]))
    found.append(Line("naive: numpy, one thread", [*naive, "--numpy"]))
    found.append(Line(FLOOR, [*python, str(HERE / "floor.py"), *pair], ours=True))
    for name in PEERS if peers else ():
        assert peers is not None
        command = [str(peers / name / "bin" / "python"), "-m", f"peers.{name}", *pair]
        found.append(Line(f"peer: {name}", command, folder=HERE))
    return found


def measure(given: Sequence[Line], rounds: int) -> Iterator[dict[str, list[Run]]]:
    """Label → one run a round, as it grows: after every round."""
    found: dict[str, list[Run]] = {line.label: [] for line in given}
    for number in range(rounds):
        for line in given:
            run = _run(line)
            found[line.label].append(run)
            said = run.failure or f"{run.seconds:.1f} s"
            print(f"round {number + 1}/{rounds}  {line.label}: {said}", file=sys.stderr)
        yield found


def _run(line: Line) -> Run:
    python = Path(line.command[0])
    if not python.exists():
        place = python.parents[1]
        failure = without_paths(why_absent(place.parent, place.name))
        return Run(0.0, 0.0, 0, None, failure=failure)
    run = child(line.command, ours=line.ours, folder=line.folder)
    answer = run.answer if line.inner else None
    failure = run.failure
    if failure is None and line.inner:
        if answer is None:
            failure = "it printed no JSON"
        elif answer.get("seconds") is None:
            failure = without_paths(str(answer.get("failed", "no seconds")))
    seconds = answer["seconds"] if answer and failure is None else run.seconds
    return Run(seconds, run.cpu, run.memory, run.others, answer, failure)


def micro(rounds: int, shapes: str) -> dict[str, Any] | str:
    """The table of single matrices, or why there is none."""
    command = [sys.executable, str(HERE / "micro.py"), "--rounds", str(rounds), "--shapes", shapes]
    print(f"single matrices, {rounds} rounds: {shapes}", file=sys.stderr)
    run = child(command, ours=True)
    return run.answer or run.failure or "it printed no JSON"


def measured(given: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The run as plain data, after every round and at the end."""
    aside = {} if given.keep_variables else set_aside_variables()
    about = {**facts(), "family": given.family, "layers": given.layers, "rounds": given.rounds}
    about["shapes"] = {name: list(side) for name, side in synthetic.FAMILIES[given.family].items()}
    about["variables"]["set aside"] = aside
    before = os.getloadavg()
    found: dict[str, Any] = {"about": about, "lines": {}, "micro": None}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        # In a process of its own: a child's peak counts what its parent held when it forked.
        script, shape = str(Path(synthetic.__file__)), ["--family", given.family]
        made = [script, str(folder), *shape, "--layers", str(given.layers)]
        subprocess.run([sys.executable, *made], check=True)
        planned = [
            line
            for line in lines(folder / "base", folder / "tuned", given.peers)
            if line.label in (NAIVE, FLOOR) or re.search(given.lines, line.label)
        ]
        for runs in measure(planned, given.rounds):
            about["load average"] = {"before": before, "after": os.getloadavg()}
            found["lines"] = {label: [asdict(run) for run in some] for label, some in runs.items()}
            yield found
    if given.shapes:
        yield found | {"micro": micro(given.rounds, given.shapes)}


def save(found: dict[str, Any], out: Path) -> str:
    """Writes OUT.json and OUT.md; the Markdown."""
    out.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(found, indent=1, ensure_ascii=False)
    Path(f"{out}.json").write_text(text + "\n", encoding="utf-8")
    table = markdown(found, naive=NAIVE, floor=FLOOR)
    Path(f"{out}.md").write_text(table, encoding="utf-8")
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--family", choices=sorted(synthetic.FAMILIES), default="qwen2.5-1.5b")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("benchmark"), help="OUT.md and OUT.json")
    parser.add_argument("--lines", default="", help="only lines that match this expression")
    parser.add_argument("--peers", type=Path, help="folder of the peers' virtual environments")
    parser.add_argument("--make-peers", action="store_true", help="make those that are absent")
    parser.add_argument(
        "--shapes",
        default="1536x1536,8960x1536,4096x4096",
        help="of the single matrices; empty: none",
    )
    parser.add_argument(
        "--keep-variables",
        action="store_true",
        help="keep OMP_*, OPENBLAS_*, MKL_* of the environment; by default they are set aside",
    )
    given = parser.parse_args()
    peers: Path | None = given.peers
    if given.make_peers and peers is None:
        parser.error("--make-peers needs --peers DIR")
    given.peers = None if peers is None else peers.absolute()
    if given.make_peers and peers is not None:
        make(peers.absolute())
    table = ""
    for found in measured(given):
        table = save(found, given.out)
    print(table)


if __name__ == "__main__":
    main()
