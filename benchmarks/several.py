"""One base with several tuned models, beside one of them: CPU seconds side by side in one process.

    python benchmarks/several.py pair/base pair/tuned TUNED2 … [--include REGEX] [--kind collapse]

Each tuned model in a run of its own, one after another, with factors of the base kept between runs,
as the command line keeps them; then the last one again without anything kept.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import geoscope


def seconds(base: str, tuned: str, kind: str, **options: object) -> float:
    """CPU seconds of one comparison."""
    before = time.process_time()
    geoscope.compare(base, tuned, kind=kind, jobs=1, **options)
    return time.process_time() - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("base")
    parser.add_argument("tuned", nargs="+")
    parser.add_argument("--include", default="proj")
    parser.add_argument("--kind", default="compare")
    given = parser.parse_args()
    chosen = {"include": given.include}
    seconds(given.base, given.tuned[0], given.kind, **chosen)  # nulls of the shapes, once
    with tempfile.TemporaryDirectory() as kept:
        runs = [
            seconds(given.base, tuned, given.kind, cache=Path(kept), **chosen)
            for tuned in given.tuned
        ]
    plain = seconds(given.base, given.tuned[-1], given.kind, **chosen)
    ratio = sum(runs) / runs[0]
    print(json.dumps({"seconds": runs, "without": plain, "times one": ratio}))


if __name__ == "__main__":
    main()
