"""Entries that are small in a matrix or in its leading part: thresholds, mask, what is kept.

The leading part U·diag(S)·Vh is never held: it is made block by block in fp64, once for its
quantile and, with the same bits, once for the mask. What is kept are stored numbers or zeros, so
the masked matrix is exact in the storage dtype.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from geoscope.linalg import blas
from geoscope.profile import stage

__all__ = ["Masked", "Threshold", "keep_small", "part_threshold", "threshold"]

# Entries of one block: it stays in the cache.
_ENTRIES = 1 << 17
# Entries that are drawn to bracket a quantile, and the width of the bracket in standard deviations
# of the drawn rank. A bracket that misses is replaced by all entries, so neither moves the result.
_DRAWN = 1 << 14
_DEVIATIONS = 6.0
# Integers as wide as a dtype. Without the sign bit they ascend as the sizes do.
_CODES = {
    torch.bfloat16: torch.int16,
    torch.float16: torch.int16,
    torch.float32: torch.int32,
    torch.float64: torch.int64,
}


@dataclass(frozen=True)
class Threshold:
    """A quantile τ of sizes, and `edge`, the largest size that is ≤ τ: no size lies between them.

    Comparing with `edge` is comparing with τ, in whatever dtype the sizes are.
    """

    tau: float
    edge: float


@dataclass(frozen=True)
class Masked:
    """W where it, or its leading part, is small; 0 elsewhere.

    kept: (m, n) in W's dtype. spec, euc: thresholds of the leading part and of W. counts: entries
    at or below `spec`, at or below `euc`, and of either. energy: ‖kept‖_F².
    """

    kept: Tensor
    spec: Threshold
    euc: Threshold
    count_spec: int
    count_euc: int
    count_union: int
    energy: float


@stage("mask")
def keep_small(W: Tensor, U: Tensor, S: Tensor, Vh: Tensor, rho: float) -> Masked:
    """W where |U·diag(S)·Vh| ≤ τ_spec or |W| ≤ τ_euc, the rho-quantiles of the two; ties kept.

    W: (m, n) of a 16-, 32- or 64-bit float dtype; U: (m, k), S: (k,), Vh: (k, n) in fp64.
    """
    left, right = (U * S).contiguous(), Vh.contiguous()
    euc, spec = threshold(W, rho), part_threshold(left, right, rho)
    codes = W.contiguous().view(_CODES[W.dtype])
    edge = int(torch.tensor([euc.edge], dtype=torch.float64).to(W.dtype).view(codes.dtype))
    kept = torch.empty_like(codes)
    counts, energy = [0, 0, 0], 0.0
    for part, block in _sizes(left, right):
        small = _at_most(block, spec.edge)
        low = _at_most(_unsigned(codes[part]), edge)
        either = small | low
        for i, mask in enumerate((small, low, either)):
            counts[i] += _count(mask)
        torch.mul(codes[part], either, out=kept[part])
        block.copy_(kept[part].view(W.dtype))
        energy += float(torch.linalg.vector_norm(block)) ** 2
    return Masked(kept.view(W.dtype), spec, euc, counts[0], counts[1], counts[2], energy)


@stage("quantiles")
def threshold(A: Tensor, level: float) -> Threshold:
    """The quantile of |A|, by linear interpolation: h = (N−1)·level, between x_⌊h⌋ and x_⌊h⌋+1.

    Exact at any length, in fp64; selection, not sorting. A: of a 16-, 32- or 64-bit float dtype.
    """
    codes = _unsigned(A.contiguous().view(_CODES[A.dtype])).view(-1)
    position = (codes.numel() - 1) * level
    pair = _neighbours(codes, math.floor(position)).view(A.dtype)
    return _between(pair, position)


@stage("quantiles")
def part_threshold(left: Tensor, right: Tensor, level: float) -> Threshold:
    """`threshold` of left·right without holding it; left (m, k) and right (k, n) in fp64.

    Entries drawn at random bracket the quantile, one pass counts what is below the bracket and
    takes what is inside, and the two neighbours are selected among these.
    """
    number = len(left) * right.shape[1]
    position = (number - 1) * level
    low = math.floor(position)
    for bracket in (_bracket(left, right, level), (-math.inf, math.inf)):
        below, parts = 0, []
        for _, block in _sizes(left, right):
            beyond = _at_most(block, bracket[1])
            before = _at_most(block, bracket[0])
            below += _count(before)
            parts.append(_chosen(block, beyond ^ before))
        inside = torch.cat(parts)
        if below <= low and min(low + 1, number - 1) < below + len(inside):
            codes = inside.view(torch.int64)
            return _between(_neighbours(codes, low - below).view(torch.float64), position)
    raise AssertionError("every entry is inside the last bracket")


def _bracket(left: Tensor, right: Tensor, level: float) -> tuple[float, float]:
    """Two sizes between which the quantile most likely lies."""
    m, n = len(left), right.shape[1]
    if m * n <= 4 * _DRAWN:
        return -math.inf, math.inf
    generator = torch.Generator().manual_seed(0)
    rows, columns = (
        torch.randint(side, (_DRAWN,), generator=generator).to(left.device) for side in (m, n)
    )
    drawn = (left[rows] * right.T[columns]).sum(-1).abs().sort().values
    width = _DEVIATIONS * math.sqrt(level * (1 - level) / _DRAWN)
    first, last = (int(one * _DRAWN) for one in (level - width, level + width))
    return (
        float(drawn[min(first, _DRAWN - 1)]) if first >= 0 else -math.inf,
        float(drawn[last]) if last < _DRAWN else math.inf,
    )


def _sizes(left: Tensor, right: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """|left·right| in blocks of rows, in one buffer; the same bits each time."""
    rows = max(1, _ENTRIES // right.shape[1])
    buffer = left.new_empty(min(rows, len(left)), right.shape[1])
    for start in range(0, len(left), rows):
        part = slice(start, min(start + rows, len(left)))
        block = buffer[: part.stop - start]
        if block.device.type == "cpu":
            blas.gemm(left[part], right, block)
        else:
            torch.mm(left[part], right, out=block)
        yield part, block.abs_()


def _between(pair: Tensor, position: float) -> Threshold:
    """pair: the two sizes around `position`, as stored."""
    below, above = pair.double().tolist()
    tau = below + (position - math.floor(position)) * (above - below)
    return Threshold(tau, above if above <= tau else below)


def _neighbours(codes: Tensor, low: int) -> Tensor:
    """The (low + 1)-th smallest and the one after it (itself, if it is the last), (2,).

    `codes` is put in another order on the CPU.
    """
    if codes.device.type != "cpu":
        after = min(low + 2, codes.numel())
        return torch.stack([torch.kthvalue(codes, one).values for one in (low + 1, after)]).cpu()
    values = codes.numpy()
    values.partition(low)  # one pivot: numpy takes vector instructions for one and not for two
    rest = values[low + 1 :]
    return torch.from_numpy(np.array([values[low], rest.min() if len(rest) else values[low]]))


# --- entries; on the CPU numpy is several times faster than torch where bytes come out ----------


def _unsigned(codes: Tensor) -> Tensor:
    return codes & torch.iinfo(codes.dtype).max


def _at_most(values: Tensor, edge: float) -> Tensor:
    """values ≤ edge, as booleans; edge in the dtype of the values."""
    if values.device.type != "cpu":
        return values <= edge
    return torch.from_numpy(values.numpy() <= values.numpy().dtype.type(edge))


def _chosen(values: Tensor, mask: Tensor) -> Tensor:
    if values.device.type != "cpu":
        return values[mask]
    return torch.from_numpy(values.numpy()[mask.numpy()])


def _count(mask: Tensor) -> int:
    return int(np.count_nonzero(mask.numpy())) if mask.device.type == "cpu" else int(mask.sum())
