"""The computing part of `geoscope compare` alone: the Python API, without imports or a cache.

Prints one line of JSON: seconds and the number of weight matrices.

    python benchmarks/computing.py BASE TUNED [--k 8,64] [--quick] [--masks] [--curves] [--stages]
"""

from __future__ import annotations

import argparse
import json
import os
import time

from geoscope.__main__ import steer_process

steer_process()  # before torch is imported, as the command does

from geoscope.profile import Profile, profiling  # noqa: E402
from geoscope.verbs.options import Options  # noqa: E402
from geoscope.verbs.pairs.compare import compare  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("base")
    parser.add_argument("tuned")
    parser.add_argument("--k", default="8,64", help="subspace dimensions")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--masks", action="store_true")
    parser.add_argument("--curves", action="store_true")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--stages", action="store_true", help="seconds by stage, all threads")
    given = parser.parse_args()
    if given.stages:  # read when CUDA starts: a stage then ends when its kernels have
        os.environ["CUDA_LAUNCH_BLOCKING"] = "1"
    options = Options(
        ks=tuple(int(k) for k in given.k.split(",")),
        quick=given.quick,
        masks=given.masks,
        curves=given.curves,
        device=given.device,
        cache=None,
    )
    started = time.perf_counter()
    with profiling(Profile()) as profile:
        report = compare(given.base, given.tuned, options=options)
    seconds = time.perf_counter() - started
    answer = {"seconds": seconds, "matrices": len(report.coverage.matched)}
    print(json.dumps({**answer, "stages": profile.seconds} if given.stages else answer))


if __name__ == "__main__":
    main()
