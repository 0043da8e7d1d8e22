"""LoRA: start from nothing (2106.09685), as PEFT does by default."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from geoscope.adapters.factors import LoraFactors, checked, scaling_of
from geoscope.adapters.facts import completed
from geoscope.records import Status

__all__ = ["lora"]


def lora(W: Tensor, rank: int, *, alpha: float | None = None, seed: int = 0) -> LoraFactors:
    """A0 ~ U(−1/√n, 1/√n) (Kaiming's with a = √5) and B0 = 0: nothing is taken from W (m, n).

    alpha: default 2·rank. Drawn on the CPU from the seed alone, so the factors are the same on
    every device, and matrices of one shape need seeds of their own to start differently.
    """
    s = scaling_of(rank, alpha)
    norm = checked(W, rank, zero=True)
    m, n = W.shape
    generator = torch.Generator().manual_seed(seed)
    A = (2 * torch.rand(rank, n, generator=generator, dtype=torch.float32) - 1) / math.sqrt(n)
    facts, status = completed({"relative_norm": 0.0 if norm > 0 else None})
    status["head_energy"] = Status.ZERO_UPDATE
    B = torch.zeros(m, rank, dtype=torch.float32, device=W.device)
    return LoraFactors(B, A.to(W.device), s, facts, status, nulls={}, method={})
