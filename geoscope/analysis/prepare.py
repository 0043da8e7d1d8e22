"""A pair of models before any heavy work: opened, matched, planned."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from geoscope.analysis.options import Options, Progress
from geoscope.checkpoints import Checkpoint, open_checkpoint, pair
from geoscope.checkpoints.pairing import common_rows, is_resized
from geoscope.checkpoints.split import common_config, split
from geoscope.engine import (
    Batch,
    default_memory,
    device_memory,
    estimate_seconds,
    free_memory,
    parse_memory,
    plan,
    resolve_devices,
    resolve_dtype,
)
from geoscope.metrics import Rounding
from geoscope.names import NameMap
from geoscope.records import Pairing, WeightPair
from geoscope.report.survey import Survey

__all__ = ["Prepared", "batches_a_shape", "prepare", "survey"]


# With --masks: the rank-64 part in fp32, its sizes, and the copy in which their quantile is found.
_MASK_BYTES = 3 * 4
# With --curves: the longer side's whole basis in fp64, the update seen from it, and what the exact
# method copies.
_CURVE_BYTES = 4 * 8


@dataclass(frozen=True)
class Prepared:
    """A pair of checkpoints before any heavy work: opened, matched, planned.

    Fused and stacked tensors of both are in parts. notes: remarks on the pair.
    """

    base: Checkpoint
    tuned: Checkpoint
    pairing: Pairing
    batches: tuple[Batch, ...]
    memory: int
    workers: int
    devices: tuple[torch.device, ...]
    bytes_to_fetch: int
    notes: tuple[str, ...] = ()

    def rounding(self, one: WeightPair) -> Rounding:
        """What FP8 blocks rounded away on both sides of a pair."""
        return self.base.rounding(one.base.name), self.tuned.rounding(one.tuned.name)

    @property
    def device(self) -> str:
        """The devices by name, as reports show them."""
        return ", ".join(str(one) for one in self.devices)


def prepare(base: str, tuned: str, options: Options, progress: Progress | None = None) -> Prepared:
    """Headers, pairing and plan of one pair of models; decomposes and downloads nothing."""
    progress = progress or Progress()
    devices = resolve_devices(options.device)
    resolve_dtype(options.dtype, devices[0])
    left = open_checkpoint(base, on_progress=progress.on_download)
    right = open_checkpoint(tuned, on_progress=progress.on_download)
    left, right, pairing, notes = _matched(left, right, options)
    memory = _memory(pairing, options, devices)
    on_cpu = devices[0].type == "cpu"
    workers = options.jobs or (_cores() if on_cpu else len(devices))
    names = [(one.base.name, one.tuned.name) for one in (*pairing.matrices, *pairing.vectors)]
    return Prepared(
        base=left,
        tuned=right,
        pairing=pairing,
        batches=plan(
            pairing.matrices,
            memory=memory,
            stack=not on_cpu,
            parts=batches_a_shape(devices),
            entry_bytes=_MASK_BYTES * options.masks + _CURVE_BYTES * options.curves,
        ),
        memory=memory,
        workers=workers,
        devices=devices,
        notes=notes,
        bytes_to_fetch=left.bytes_to_fetch([a for a, _ in names])
        + right.bytes_to_fetch([b for _, b in names]),
    )


def _matched(
    base: Checkpoint, tuned: Checkpoint, options: Options
) -> tuple[Checkpoint, Checkpoint, Pairing, tuple[str, ...]]:
    """Both sides in the parts that are compared, their correspondence, and remarks on it."""
    config = common_config(base, tuned)
    parts = [(one.notes, split(one, config)) for one in (base, tuned)]
    # What both were taken apart into is said once, of the pair.
    base, tuned = (replace(one, notes=whole) for whole, one in parts)
    names = NameMap(options.map_name)
    notes = tuple(dict.fromkeys(note for whole, one in parts for note in one.notes[len(whole) :]))
    notes += tuple(
        f"--map-name {rule}: changes no name of either model"
        for rule in names.unused([*base.tensors, *tuned.tensors])
    )
    if options.allow_vocab_resize:
        base, tuned, resized = common_rows(base, tuned, names)
        notes += resized
    pairing = pair(base, tuned, options.selection, names)
    notes += tuple(
        f"{one.name}: {one.base[0]} rows in base, {one.tuned[0]} in tuned; --allow-vocab-resize "
        "compares the rows that both have"
        for one in pairing.shape_mismatch
        if one.name in pairing.missing and is_resized(one.name, one.base, one.tuned)
    )
    return base, tuned, pairing, notes


def survey(prepared: Prepared, *, paired: bool) -> Survey:
    """What `inspect` shows: the models, their pairing, and what the work would take."""
    sides = (prepared.base, prepared.tuned) if paired else (prepared.base,)
    return Survey(
        models=tuple(
            {
                **side.ref.to_json(),
                "tensors": side.stored,
                "parameters": sum(math.prod(one.shape) for one in side.tensors.values()),
                "bytes": sum(one.nbytes for one in side.tensors.values()),
                "model_type": side.config.get("model_type"),
            }
            for side in sides
        ),
        pairing=prepared.pairing,
        notes=tuple(
            dict.fromkeys([*(note for side in sides for note in side.notes), *prepared.notes])
        ),
        bytes_to_fetch=prepared.bytes_to_fetch,
        memory=prepared.memory,
        workers=prepared.workers,
        device=prepared.device,
        seconds=estimate_seconds(prepared.pairing.matrices, workers=prepared.workers),
    )


def batches_a_shape(devices: Sequence[torch.device]) -> int:
    """Into how many batches a shape is cut: two a device, one computed while the other is read."""
    return 2 * len(devices)


def _memory(pairing: Pairing, options: Options, devices: Sequence[torch.device]) -> int:
    """Bound on the process, or on each of the devices."""
    if options.max_memory is not None:
        return parse_memory(options.max_memory)
    if devices[0].type == "cuda":
        return device_memory(free_memory(one) for one in devices)
    return default_memory(pairing.matrices)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
