"""Measures the rates from which geoscope chooses its methods; `--write` puts them into the package.

One BLAS thread on one core, best of three, at the shapes where the methods are closest to each
other: 4096×1536 and 1536×1536, entries in bf16.

    python benchmarks/rates.py [--write]
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from datetime import date

import torch
from machine import facts
from threadpoolctl import threadpool_limits

from geoscope.linalg import Operand, blas
from geoscope.linalg.choice import RATES_FILE, Rates, expected_dimension
from geoscope.linalg.leading import leading_triplets

LONG, SHORT, K = 4096, 1536, 32


def seconds(job: Callable[[], object]) -> float:
    best = float("inf")
    for _ in range(3):
        started = time.perf_counter()
        job()
        best = min(best, time.perf_counter() - started)
    return best


def heavy_headed(m: int, n: int) -> Operand:
    """A bulk with 64 outliers, whose Krylov space has the dimension the choice expects, or so."""
    generator = torch.Generator().manual_seed(0)
    bulk = torch.randn(m, n, generator=generator)
    left, right = (torch.randn(size, 64, generator=generator) for size in (m, n))
    heads = 3 * torch.arange(1, 65).float() ** -0.7 / max(m, n) ** 0.5
    return Operand((bulk + (left * heads) @ right.T).bfloat16()[None])


def measured() -> Rates:
    tall, square = heavy_headed(LONG, SHORT), heavy_headed(SHORT, SHORT)
    gram = square.gram()[0]

    def eigenvalues() -> None:
        d, e, _ = blas.tridiagonalise(gram.clone())
        blas.eigenvalues(d, e)

    def krylov(A: Operand, k: int, *, by_gram: bool) -> tuple[float, int]:
        found = leading_triplets(A, k, by_gram=by_gram)
        assert found.converged
        return seconds(lambda: leading_triplets(A, k, by_gram=by_gram)), found.dimension

    half = LONG * SHORT**2
    gram64, gram32 = seconds(tall.gram), seconds(tall.gram32)
    through, dimension = krylov(tall, K, by_gram=False)
    by_gram, dimension_gram = krylov(tall, K, by_gram=True)
    small = heavy_headed(256, 256)
    steps, dimension_small = krylov(small, 4, by_gram=False)
    return Rates(
        gram64=half / gram64 / 1e9,
        gram32=half / gram32 / 1e9,
        tridiagonal=4 / 3 * SHORT**3 / seconds(eigenvalues) / 1e9,
        narrow=4 * dimension * LONG * SHORT / through / 1e9,
        narrow_gram=2 * dimension_gram * SHORT**2 / (by_gram - gram32) / 1e9,
        step=steps / dimension_small,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--write", action="store_true", help=f"write {RATES_FILE.name}")
    given = parser.parse_args()
    torch.set_num_threads(1)
    with threadpool_limits(1, user_api="blas"):
        found = measured()
    table = {
        "what": "one core, 1e9 operations a second; step in seconds; see choice.py",
        "measured": f"{date.today()}, {facts()['cpu']}, by benchmarks/rates.py",
        "expected_dimension": {str(k): expected_dimension(k, values_only=False) for k in (8, 64)},
        "rates": {key: float(f"{value:.3g}") for key, value in vars(found).items()},
    }
    text = json.dumps(table, indent=2) + "\n"
    print(text, end="")
    if given.write:
        RATES_FILE.write_text(text, "utf-8")


if __name__ == "__main__":
    main()
