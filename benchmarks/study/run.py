"""Train the runs of the study, in the order of the design; what is there already is kept.

    python -m benchmarks.study.run --out RUNS [--blocks 4] [--only REGEX] [--device cuda]

One process, one thread. Kill it and start it again: it goes on from the last checkpoint. RULES.md
says what the runs are for.
"""

from __future__ import annotations

import argparse
import re
import time
from pathlib import Path

import torch

from benchmarks.study.design import BLOCKS, Run, design
from benchmarks.study.training import Settings, make_base, trained_run

__all__ = ["run_all"]


def run_all(runs: list[Run], root: Path, settings: Settings) -> None:
    """Bases and runs that are not there yet; a line for each."""
    for place, run in enumerate(runs, 1):
        began = time.perf_counter()
        make_base(root / "bases" / run.base, run.task, run.seed, settings)
        trained_run(run, root, settings)
        print(f"{place}/{len(runs)} {run.name} {time.perf_counter() - began:.1f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of bases and runs")
    parser.add_argument("--blocks", type=int, default=len(BLOCKS), help="as many blocks only")
    parser.add_argument("--only", default="", metavar="REGEX", help="runs whose name matches")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N (default cpu)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    runs = [run for run in design(arguments.blocks) if re.search(arguments.only, run.name)]
    run_all(runs, arguments.out, Settings(device=arguments.device))


if __name__ == "__main__":
    main()
