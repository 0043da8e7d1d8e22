"""The loop everybody writes: three SVDs a weight matrix, one after the other.

Every 2-D weight of both models through torch.linalg.svd in fp32, base, tuned and update, wide
matrices as they are, torch's default threads. Prints one line of JSON: seconds of the loop without
imports, and the number of weight matrices.

    python benchmarks/naive.py BASE TUNED [--values-only]
"""

from __future__ import annotations

import argparse
import json
import time
from contextlib import ExitStack
from pathlib import Path

import torch
from safetensors import safe_open


def loop(base: Path, tuned: Path, *, values_only: bool) -> int:
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
                    if values_only:
                        torch.linalg.svdvals(A)
                    else:
                        torch.linalg.svd(A, full_matrices=False)
                matrices += 1
    return matrices


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("base", type=Path)
    parser.add_argument("tuned", type=Path)
    parser.add_argument("--values-only", action="store_true", help="svdvals in place of svd")
    given = parser.parse_args()
    started = time.perf_counter()
    matrices = loop(given.base, given.tuned, values_only=given.values_only)
    seconds = time.perf_counter() - started
    threads = torch.get_num_threads()
    print(json.dumps({"seconds": seconds, "matrices": matrices, "threads": threads}))


if __name__ == "__main__":
    main()
