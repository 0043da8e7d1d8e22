"""weightwatcher: spectra of base, tuned and update with a power-law fit of each.

Its `analyze` with default settings on modules of nn.Linear that hold the same weights.

    cd benchmarks && ENVIRONMENT/bin/python -m peers.weightwatcher BASE TUNED
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path

import weightwatcher  # pyright: ignore

from peers.folders import linear_model, report, weights

logging.getLogger("weightwatcher").setLevel(logging.ERROR)


def analysed(role: str) -> Callable[[Path, Path], float]:
    def analyse(base: Path, tuned: Path) -> float:
        """Analyses one role; returns the seconds of building the modules."""
        started = time.perf_counter()
        model = linear_model(base if role == "base" else tuned)
        reference = linear_model(base) if role == "update" else None
        prepared = time.perf_counter() - started
        watcher = weightwatcher.WeightWatcher(model=model)  # pyright: ignore
        details = watcher.analyze(model=model, base_model=reference)
        assert len(details) == sum(1 for _ in weights(base)), f"{len(details)} layers were analysed"
        return prepared

    return analyse


if __name__ == "__main__":
    roles = ("base", "tuned", "update")
    report(
        "weightwatcher",
        {role: analysed(role) for role in roles},
        counted=roles,
        computes="all singular values (fp64) of base, tuned and update, power-law exponent of "
        "each, norms, stable rank",
        omits="singular vectors, angles, captured energy, intruders, sparsity, nulls, precision "
        "floor, error bounds, verdict; its fit drops every σ² below 1e-5, which is most of an "
        "RLVR update",
    )
