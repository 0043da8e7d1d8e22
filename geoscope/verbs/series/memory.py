"""How much memory a pass over a series takes, and how it is held below a bound."""

from __future__ import annotations

import math
from heapq import nlargest

from geoscope.arguments import bytes_of
from geoscope.engine import BASELINE, available_memory, room_for_batches
from geoscope.verbs.series.options import FollowOptions
from geoscope.verbs.series.tensors import AdapterTensor, MatchedSeries, ModelTensor, SeriesTensor

__all__ = ["room_for_tensors", "working_bytes"]

# Blocks of all checkpoints, as read and in fp64, their differences, and what is small.
_BLOCKS = 128 << 20
# Where weights are made of an adapter and its base, a part costs more to make than to hold.
_MADE = 2 << 30
# Of two pairs of vectors a step and matrix, in fp64.
_PAIR_BYTES = 2 * 8


def working_bytes(tensor: SeriesTensor) -> int:
    """Peak bytes of one tensor in work: base, the one before and this one as stored, and in fp32
    an update and a step; of an adapter every step's factors twice, and a weight of the base."""
    entries = math.prod(tensor.shape)
    if isinstance(tensor, ModelTensor):
        stored = max(checkpoint.tensors[name].memory_bytes for checkpoint, name in tensor.places)
        made = min(_MADE, 32 * entries * len(tensor.places)) if tensor.is_made else 0
        return 3 * stored + 8 * entries + min(_BLOCKS, 32 * entries * len(tensor.places)) + made
    assert isinstance(tensor, AdapterTensor)
    factors = sum(
        math.prod(info.shape)
        for adapter in tensor.adapters
        for info in adapter.modules[tensor.module].stored
    )
    base = sum(checkpoint.tensors[name].memory_bytes for checkpoint, name in tensor.base)
    return 32 * factors + base


def room_for_tensors(found: MatchedSeries, options: FollowOptions, workers: int) -> int:
    """Bytes for the tensors in work under `max_memory`; one is always let in.

    What is kept of every tensor until the end, leading pairs above all, is taken off first. By
    default each worker has its largest tensor, within half of the memory that is free; `min` lets
    tensors in one at a time. Raises OptionError.
    """
    if options.max_memory == "min":
        return 0
    kept = _kept_bytes(found) if options.directions else 0
    if options.max_memory is not None:
        return max(
            0,
            room_for_batches(bytes_of(options.max_memory, "max_memory", others=", or min")) - kept,
        )
    wanted = sum(nlargest(workers, map(working_bytes, found.tensors.values())))
    return min(wanted, max(0, available_memory() // 2 - BASELINE - kept))


def _kept_bytes(found: MatchedSeries) -> int:
    sides = sum(sum(tensor.shape) for tensor in found.tensors.values())
    return _PAIR_BYTES * (len(found.steps) - 1) * sides
