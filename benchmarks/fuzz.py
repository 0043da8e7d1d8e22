"""Changed files through every door, for as long as is asked: no command may fall over.

A trial changes one valid file (JSON values of every odd kind, headers, bytes, cells, pickles) and
runs one command on it. A fault is an exit code other than 0 to 3, a traceback, a fault of
geoscope's, an error without its line, raw control letters, a changed input, or no end after 30 s.
Prints Markdown; faults with their seeds, by which they come again, also to --log as they are found.

    python -m benchmarks.fuzz [--minutes 60] [--first 0] [--log FILE]
"""

from __future__ import annotations

import argparse
import os
import resource
import sys
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path

from tests.bad.doors import DOORS, trial


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--first", type=int, default=0, help="first seed")
    parser.add_argument("--log", type=Path)
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    os.environ.pop("GEOSCOPE_CACHE", None)
    done, faults, slowest = Counter[str](), list[str](), 0.0
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["GEOSCOPE_CACHE"] = f"{scratch}/cache"
        targets = {}
        for name, door in DOORS.items():
            root = Path(scratch) / name.replace(" ", "-")
            root.mkdir()
            targets[name] = (root, door.make(root))
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        end, seed = time.monotonic() + 60 * given.minutes, given.first
        while time.monotonic() < end:
            for name, door in DOORS.items():
                started = time.monotonic()
                fault = trial(door, *targets[name], seed)
                slowest = max(slowest, time.monotonic() - started)
                done[name] += 1
                if fault is not None:
                    faults.append(f"{name}: {fault}")
                    if given.log is not None:
                        with given.log.open("a", encoding="utf-8") as file:
                            file.write(faults[-1] + "\n")
            seed += 1
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seeds = f"seeds {given.first} to {seed - 1}"
    print(f"{done.total()} trials in {given.minutes:g} minutes, {seeds}; slowest {slowest:.1f} s;")
    print(f"most memory {most / 1024:.0f} MB, {before / 1024:.0f} at first")
    print("\n| door | trials |\n|---|--:|")
    for name, count in done.items():
        print(f"| {name} | {count} |")
    print(f"\n{len(faults)} faults")
    for fault in faults:
        print(f"- {fault[:500]}")
    return bool(faults)


if __name__ == "__main__":
    sys.exit(main())
