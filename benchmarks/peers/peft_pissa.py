"""PEFT's PiSSA initialisation: the leading 64 triplets of each base weight.

`get_peft_model` on modules of nn.Linear that hold the same weights, by full SVD (`pissa`) and by
its randomised one (`pissa_niter_16`).

    cd benchmarks && ENVIRONMENT/bin/python -m peers.peft_pissa BASE TUNED
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from peft import LoraConfig, get_peft_model

from peers.folders import linear_model, report

RANK = 64
MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def initialised(how: str) -> Callable[[Path, Path], float]:
    def initialise(base: Path, tuned: Path) -> float:
        """Puts adapters on the base; returns the seconds of building the modules."""
        started = time.perf_counter()
        model = linear_model(base)
        prepared = time.perf_counter() - started
        config = LoraConfig(r=RANK, init_lora_weights=how, target_modules=MODULES)  # pyright: ignore
        get_peft_model(model, config)  # pyright: ignore
        return prepared

    return initialise


if __name__ == "__main__":
    report(
        "peft",
        {how: initialised(how) for how in ("pissa", "pissa_niter_16")},
        computes=f"leading {RANK} triplets of the base (full fp32 SVD; niter_16: a sketch), "
        "split off as an adapter",
        omits="tuned and update altogether, spectra, angles, every metric, nulls, precision "
        "floor, error bounds, verdict",
    )
