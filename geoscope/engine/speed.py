"""How fast is the machine at hand, beside the one whose rates are committed?"""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import torch

from geoscope.engine.stream import one_blas_thread
from geoscope.linalg.choice import rates

__all__ = ["slowness"]

_SIDE, _ROUNDS = 1024, 3
# A plain product beside a Gram product, in operations a second, on the machine of the rates.
_PLAIN = 0.93


def slowness(workers: int) -> float:
    """How many times longer a core takes here and now than one of the committed rates.

    From some fp64 products on as many threads as compute side by side; less than a second on a
    quiet machine, and what else runs counts, too.
    """
    block = torch.ones(_SIDE, _SIDE, dtype=torch.float64, device="cpu")
    with one_blas_thread(), ThreadPoolExecutor(workers) as pool:
        started = time.perf_counter()
        list(pool.map(lambda _: block @ block, range(_ROUNDS * workers)))
        seconds = (time.perf_counter() - started) / _ROUNDS
    return seconds * _PLAIN * rates().gram64 * 1e9 / (2 * _SIDE**3)
