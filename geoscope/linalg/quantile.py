"""Exact quantiles of any size; `torch.quantile` refuses more than 2²⁴ entries."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

__all__ = ["quantile"]


def quantile(values: Tensor, level: float) -> float:
    """Linear-interpolation quantile: h = (N−1)·level, x_⌊h⌋ + (h−⌊h⌋)(x_⌊h⌋+1 − x_⌊h⌋), in fp64.

    Any shape, any size; selection (not sorting) on the CPU. The value at level 0 is the minimum,
    at level 1 the maximum.
    """
    flat = values.detach().reshape(-1).cpu()
    if flat.dtype in (torch.bfloat16, torch.float16):  # numpy cannot sort bf16
        flat = flat.float()
    flat = flat.numpy()
    position = (flat.size - 1) * level
    low = math.floor(position)
    high = min(low + 1, flat.size - 1)
    chosen = np.partition(flat, (low, high))
    below, above = float(chosen[low]), float(chosen[high])
    return below + (position - low) * (above - below)
