"""Exact quantiles of any size; `torch.quantile` refuses more than 2²⁴ entries."""

from __future__ import annotations

import math

import numpy as np
from torch import Tensor

__all__ = ["quantile"]


def quantile(values: Tensor, level: float) -> float:
    """Linear-interpolation quantile: h = (N−1)·level, x_⌊h⌋ + (h−⌊h⌋)(x_⌊h⌋+1 − x_⌊h⌋), in fp64.

    Any shape, any size; selection (not sorting) on the CPU. The value at level 0 is the minimum,
    at level 1 the maximum.
    """
    flat = values.detach().reshape(-1).double().cpu().numpy()
    position = (flat.size - 1) * level
    low = math.floor(position)
    high = min(low + 1, flat.size - 1)
    chosen = np.partition(flat, (low, high))
    return float(chosen[low] + (position - low) * (chosen[high] - chosen[low]))
