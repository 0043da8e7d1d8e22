"""What no method of this kind can undercut: the arithmetic at the machine's peak, and the reading.

Peak: fp64 matrix products of OpenBLAS (as geoscope calls it) and of torch, one thread and all
cores. Arithmetic: Gram matrix by symmetry (m·n² flops) and tridiagonalisation (4/3·n³) of base,
tuned and update. Prints one line of JSON.

    python benchmarks/floor.py BASE TUNED
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
from machine import cores
from safetensors import safe_open
from threadpoolctl import threadpool_limits

from geoscope.linalg import blas

SIDE = 2048
REPEATS = 4
ROLES = 3  # base, tuned, update


def peak(multiply: Callable[[], object]) -> float:
    """Flops a second of the fastest of some products of SIDE."""
    multiply()  # threads and buffers
    best = float("inf")
    for _ in range(REPEATS):
        started = time.perf_counter()
        multiply()
        best = min(best, time.perf_counter() - started)
    return 2 * SIDE**3 / best


def peaks() -> dict[str, dict[str, float]]:
    """Library → threads → flops a second in fp64."""
    generator = torch.Generator().manual_seed(0)
    A, B = (torch.randn(SIDE, SIDE, dtype=torch.float64, generator=generator) for _ in range(2))
    out = torch.empty_like(A)
    found = {"openblas": {"all": peak(lambda: blas.gemm(A, B, out))}}
    with threadpool_limits(1, user_api="blas"):
        found["openblas"]["one"] = peak(lambda: blas.gemm(A, B, out))
    found["torch"] = {"all": peak(lambda: torch.mm(A, B, out=out))}
    torch.set_num_threads(1)
    found["torch"]["one"] = peak(lambda: torch.mm(A, B, out=out))
    return found


def shapes(folder: Path) -> list[tuple[int, int]]:
    """(long, short) sides of every 2-D weight, from the headers."""
    found = []
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as handle:
            for name in handle.keys():
                sides = handle.get_slice(name).get_shape()
                if len(sides) == 2:
                    found.append((max(sides), min(sides)))
    return found


def arithmetic(sides: list[tuple[int, int]]) -> dict[str, float]:
    """Flops of the three roles: Gram matrices, and their tridiagonal forms."""
    return {
        "gram": float(ROLES * sum(m * n * n for m, n in sides)),
        "tridiagonal": float(ROLES * sum(4 * n**3 / 3 for _, n in sides)),
    }


def reading(*folders: Path) -> dict[str, float]:
    """Bytes of all shards and the seconds to read them into a buffer that is used again."""
    files = [file for folder in folders for file in sorted(folder.glob("*.safetensors"))]
    buffer = memoryview(bytearray(1 << 24))
    total, started = 0, time.perf_counter()
    for file in files:
        with file.open("rb", buffering=0) as handle:
            while count := handle.readinto(buffer):
                total += count
    return {"bytes": float(total), "seconds": time.perf_counter() - started}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("base", type=Path)
    parser.add_argument("tuned", type=Path)
    given = parser.parse_args()
    found, flops = peaks(), arithmetic(shapes(given.base))
    best = max(rate for rates in found.values() for rate in rates.values())
    print(
        json.dumps(
            {
                "seconds": sum(flops.values()) / best,
                "peaks": found,
                "cores": cores(),
                "flops": flops,
                "reading": reading(given.base, given.tuned),
            }
        )
    )


if __name__ == "__main__":
    main()
