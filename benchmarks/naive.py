"""The loop everybody writes: three SVDs a weight matrix, one after the other.

Every 2-D weight of both models through torch.linalg.svd in fp32, base, tuned and update, wide
matrices as they are, torch's default threads. Prints one line of JSON: seconds of the loop without
imports, and the number of weight matrices.

    python benchmarks/naive.py BASE TUNED [--values-only] [--numpy]

With `--numpy` it is numpy's loop on one thread, which is faster where matrices are small.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

if "--numpy" in sys.argv:  # before numpy is imported
    os.environ["OPENBLAS_NUM_THREADS"] = "1"

import numpy as np
import torch
from safetensors import safe_open


def svd_of(*, values_only: bool, with_numpy: bool) -> Callable[[torch.Tensor], object]:
    """The decomposition of one matrix."""
    if with_numpy:
        return lambda A: np.linalg.svd(A.numpy(), full_matrices=False, compute_uv=not values_only)
    if values_only:
        return torch.linalg.svdvals
    return lambda A: torch.linalg.svd(A, full_matrices=False)


def loop(base: Path, tuned: Path, svd: Callable[[torch.Tensor], object]) -> int:
    """Decomposes base, tuned and update of every 2-D weight; how many weights there were."""
    matrices = 0
    for file in sorted(base.glob("*.safetensors")):
        with ExitStack() as stack:
            before = stack.enter_context(safe_open(file, framework="pt"))
            after = stack.enter_context(safe_open(tuned / file.name, framework="pt"))
            for name in before.keys():
                W0 = before.get_tensor(name).float()
                W1 = after.get_tensor(name).float()
                if W0.ndim != 2:
                    continue
                for A in (W0, W1, W1 - W0):
                    svd(A)
                matrices += 1
    return matrices


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("base", type=Path)
    parser.add_argument("tuned", type=Path)
    parser.add_argument("--values-only", action="store_true", help="svdvals in place of svd")
    parser.add_argument("--numpy", action="store_true", help="numpy on one thread")
    given = parser.parse_args()
    svd = svd_of(values_only=given.values_only, with_numpy=given.numpy)
    started = time.perf_counter()
    matrices = loop(given.base, given.tuned, svd)
    seconds = time.perf_counter() - started
    threads = 1 if given.numpy else torch.get_num_threads()
    print(json.dumps({"seconds": seconds, "matrices": matrices, "threads": threads}))


if __name__ == "__main__":
    main()
