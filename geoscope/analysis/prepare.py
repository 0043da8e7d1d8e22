"""A pair of models before any heavy work: opened, matched, planned."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass

import torch

from geoscope.analysis.options import Options, Progress
from geoscope.checkpoints import Checkpoint, open_checkpoint, pair
from geoscope.engine import (
    Batch,
    default_memory,
    estimate_seconds,
    parse_memory,
    plan,
    resolve_device,
    resolve_dtype,
)
from geoscope.records import Pairing
from geoscope.report.survey import Survey

__all__ = ["Prepared", "prepare", "survey"]


# With --masks: the rank-64 part in fp32, its sizes, and the copy in which their quantile is found.
_MASK_BYTES = 3 * 4
# With --curves: the longer side's whole basis in fp64, the update seen from it, and what the exact
# method copies.
_CURVE_BYTES = 4 * 8


@dataclass(frozen=True)
class Prepared:
    """A pair of checkpoints before any heavy work: opened, matched, planned."""

    base: Checkpoint
    tuned: Checkpoint
    pairing: Pairing
    batches: tuple[Batch, ...]
    memory: int
    workers: int
    device: torch.device
    bytes_to_fetch: int


def prepare(base: str, tuned: str, options: Options, progress: Progress | None = None) -> Prepared:
    """Headers, pairing and plan of one pair of models; decomposes and downloads nothing."""
    progress = progress or Progress()
    device = resolve_device(options.device)
    resolve_dtype(options.dtype, device)
    left = open_checkpoint(base, on_progress=progress.on_download)
    right = open_checkpoint(tuned, on_progress=progress.on_download)
    pairing = pair(left, right, options.selection)
    memory = _memory(pairing, options, device)
    on_cpu = device.type == "cpu"
    workers = options.jobs or (_cores() if on_cpu else 1)
    names = [(one.base.name, one.tuned.name) for one in (*pairing.matrices, *pairing.vectors)]
    return Prepared(
        base=left,
        tuned=right,
        pairing=pairing,
        batches=plan(
            pairing.matrices,
            memory=memory,
            stack=not on_cpu,
            entry_bytes=_MASK_BYTES * options.masks + _CURVE_BYTES * options.curves,
        ),
        memory=memory,
        workers=workers,
        device=device,
        bytes_to_fetch=left.bytes_to_fetch([a for a, _ in names])
        + right.bytes_to_fetch([b for _, b in names]),
    )


def survey(prepared: Prepared, *, paired: bool) -> Survey:
    """What `inspect` shows: the models, their pairing, and what the work would take."""
    sides = (prepared.base, prepared.tuned) if paired else (prepared.base,)
    return Survey(
        models=tuple(
            {
                **side.ref.to_json(),
                "tensors": len(side.tensors),
                "parameters": sum(math.prod(one.shape) for one in side.tensors.values()),
                "bytes": sum(one.nbytes for one in side.tensors.values()),
                "model_type": side.config.get("model_type"),
            }
            for side in sides
        ),
        pairing=prepared.pairing,
        notes=tuple(dict.fromkeys(note for side in sides for note in side.notes)),
        bytes_to_fetch=prepared.bytes_to_fetch,
        memory=prepared.memory,
        workers=prepared.workers,
        device=str(prepared.device),
        seconds=estimate_seconds(prepared.pairing.matrices, workers=prepared.workers),
    )


def _memory(pairing: Pairing, options: Options, device: torch.device) -> int:
    if options.max_memory is not None:
        return parse_memory(options.max_memory)
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(0.8 * free)
    return default_memory(pairing.matrices)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
