"""How much memory a pass over a series takes, and how it is held below a bound."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence
from heapq import nlargest

from geoscope.arguments import bytes_of
from geoscope.engine import BASELINE, available_memory, room_for_batches
from geoscope.verbs.series.options import FollowOptions
from geoscope.verbs.series.tensors import AdapterTensor, MatchedSeries, ModelTensor, SeriesTensor

__all__ = ["memory_of_share", "room_for_tensors", "room_of_share", "working_bytes"]

# Blocks of all checkpoints, as read and in fp64, their differences, and what is small.
_BLOCKS = 128 << 20
# Of three near vectors of Δ and of δ at every step, there and back, in fp64; and of those of every
# two updates their products at every later step.
_NEAR_BYTES, _PRODUCT_BYTES = 2 * 3 * 8, 3 * 3 * 8
# Where weights are made of an adapter and its base, a part costs more to make than to hold.
_MADE = 2 << 30
# Of two pairs of vectors a step and matrix, in fp64.
_PAIR_BYTES = 2 * 8
# What is kept lies on a node as it is, as JSON for the cache, and as it is sent.
_SENT = 4


def working_bytes(tensor: SeriesTensor) -> int:
    """Peak bytes of one tensor in work: base, the one before and this one as stored, in fp32 an
    update and a step, and what certifies the pairs of all steps; of an adapter every step's factors
    twice, and a weight of the base."""
    entries = math.prod(tensor.shape)
    if isinstance(tensor, ModelTensor):
        stored = max(checkpoint.tensors[name].memory_bytes for checkpoint, name in tensor.places)
        made = min(_MADE, 32 * entries * len(tensor.places)) if tensor.is_made else 0
        blocks, T = min(_BLOCKS, 32 * entries * len(tensor.places)), len(tensor.places) - 1
        near = _NEAR_BYTES * T * sum(tensor.shape)
        near += _PRODUCT_BYTES * sum(i * i for i in range(T + 1))
        return 3 * stored + 8 * entries + blocks + near + made
    assert isinstance(tensor, AdapterTensor)
    factors = sum(math.prod(info.shape) for info in tensor.factors)
    base = sum(checkpoint.tensors[name].memory_bytes for checkpoint, name in tensor.places)
    return 32 * factors + base


def room_for_tensors(found: MatchedSeries, options: FollowOptions, workers: int) -> int:
    """Bytes for the tensors in work under `max_memory`; one is always let in.

    What is kept of every tensor until the end, leading pairs above all, is taken off first. By
    default each worker has its largest tensor, within half of the memory that is free; `min` lets
    tensors in one at a time. Raises OptionError.
    """
    if options.max_memory == "min":
        return 0
    kept = _kept_bytes(found.tensors.values(), found.steps, options)
    if options.max_memory is not None:
        return max(
            0,
            room_for_batches(bytes_of(options.max_memory, "max_memory", others=", or min")) - kept,
        )
    wanted = sum(nlargest(workers, map(working_bytes, found.tensors.values())))
    return min(wanted, max(0, available_memory() // 2 - BASELINE - kept))


def memory_of_share(
    tensors: Collection[SeriesTensor], steps: Sequence[float], options: FollowOptions, workers: int
) -> int:
    """Bytes that a task of a cluster asks for: under `max_memory` that, or the least that works."""
    least = BASELINE + _SENT * _kept_bytes(tensors, steps, options)
    working = list(map(working_bytes, tensors))
    if options.max_memory == "min":
        return least + max(working, default=0)
    if options.max_memory is not None:
        return bytes_of(options.max_memory, "max_memory", others=", or min")
    return least + sum(nlargest(workers, working))


def room_of_share(
    tensors: Collection[SeriesTensor], steps: Sequence[float], options: FollowOptions, memory: int
) -> int:
    """What of that is for the tensors in work."""
    return max(0, memory - BASELINE - _SENT * _kept_bytes(tensors, steps, options))


def _kept_bytes(
    tensors: Iterable[SeriesTensor], steps: Sequence[float], options: FollowOptions
) -> int:
    """Leading pairs, and of all steps their products with each other's updates."""
    if not options.directions:
        return 0
    count = len(steps) - 1
    return sum(_PAIR_BYTES * count * sum(tensor.shape) + 8 * count**3 for tensor in tensors)
