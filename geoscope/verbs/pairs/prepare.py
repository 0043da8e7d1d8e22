"""A pair of models before any heavy work: opened, matched, planned."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from geoscope.engine import (
    BASELINE,
    Batch,
    asked_memory,
    available_memory,
    cores,
    default_memory,
    device_memory,
    estimate_seconds,
    free_memory,
    is_small,
    needed_memory,
    plan,
    resolve_devices,
    resolve_dtype,
    slowness,
)
from geoscope.engine.processes import can_start
from geoscope.formats.disk import free_bytes
from geoscope.metrics import Rounding
from geoscope.models.checkpoint import Checkpoint
from geoscope.names import NameMap
from geoscope.records import Pairing, Survey, WeightPair, encode
from geoscope.sources.memory import Opened
from geoscope.verbs.models import open_model, open_tuned
from geoscope.verbs.options import Options, Planned, Progress
from geoscope.verbs.pairs.matching import match_models
from geoscope.verbs.pairs.shares import fitting, shares

__all__ = [
    "Prepared",
    "batches_a_shape",
    "devices_of",
    "entry_bytes",
    "planned_memory",
    "prepare",
    "share_memory",
    "survey",
    "within",
    "workers_of",
]


# Seconds until torch is imported and the headers are read, and to write the report.
_START = 2.5
# Seconds of the workers in small matrices from which on processes take them: they start in two.
_WORTH_PROCESSES = 6.0
# With --masks: the rank-64 part in fp32, its sizes, and the copy in which their quantile is found.
_MASK_BYTES = 3 * 4
# With --curves: the longer side's whole basis in fp64, the update seen from it, and what the exact
# method copies.
_CURVE_BYTES = 4 * 8


@dataclass(frozen=True)
class Prepared:
    """A pair of checkpoints before any heavy work: opened, matched, planned.

    Fused and stacked tensors of both are in parts.
    notes: remarks on the pair.
    given: base and tuned model as they were named, None where one of them is in memory.
    processes: how many share the work; 0 for threads of this one.
    is_one_of_several: the overlaps with other tuned models are asked for, too.
    """

    base: Checkpoint
    tuned: Checkpoint
    pairing: Pairing
    batches: tuple[Batch, ...]
    memory: int
    workers: int
    devices: tuple[torch.device, ...]
    bytes_to_fetch: int
    free_disk: int | None  # where they go; None where nothing is to be fetched
    notes: tuple[str, ...] = ()
    has_base: bool = True
    given: tuple[str | None, str] | None = None
    processes: int = 0
    is_one_of_several: bool = False

    @property
    def wanted(self) -> tuple[tuple[Checkpoint, list[str]], ...]:
        """Both models, and the names of the tensors that are read of them."""
        return _wanted(self.base, self.tuned, self.pairing)

    @property
    def stacks(self) -> bool:
        """Whether several pairs are computed together."""
        return _stacks(self.devices, self.tuned)

    @property
    def planned(self) -> Planned:
        """What is going to be computed, for who watches."""
        sides = (self.base, self.tuned)
        notes = [f"{side.ref.given}: {note}" for side in sides for note in side.notes]
        return Planned(
            base=self.base.ref.given if self.has_base else None,
            tuned=self.tuned.ref.given,
            matrices=len(self.pairing.matrices),
            device=self.device,
            bytes_to_fetch=self.bytes_to_fetch,
            free_disk=self.free_disk,
            notes=(*notes, *self.notes),
        )

    def rounding(self, one: WeightPair) -> Rounding:
        """What storing codes rounded away on both sides of a pair."""
        return self.base.rounding(one.base.name), self.tuned.rounding(one.tuned.name)

    @property
    def device(self) -> str:
        """The devices by name, as reports show them."""
        return ", ".join(str(one) for one in self.devices)


def prepare(
    base: Opened, tuned: Opened, options: Options, progress: Progress | None = None
) -> Prepared:
    """Headers, pairing and plan of one pair of models; decomposes and downloads nothing."""
    progress = progress or Progress()
    devices = devices_of(options)
    names, alpha = NameMap(options.map_name), options.lora_alpha
    left = open_model(base, alpha=alpha, names=names, on_progress=progress.on_download)
    right = open_tuned(
        tuned,
        left,
        initial=options.initial_adapter,
        alpha=alpha,
        names=names,
        on_progress=progress.on_download,
    )
    left, right, pairing, notes = match_models(left, right, options)
    workers = workers_of(options, devices)
    memory = planned_memory(pairing, options, devices, workers)
    given = (base, tuned) if isinstance(base, str) and isinstance(tuned, str) else None
    count = 0
    if given is not None and devices[0].type == "cpu":
        count, memory = _processes(pairing, options, workers, memory)
    rooms = [one.room(names) for one, names in _wanted(left, right, pairing)]
    return Prepared(
        base=left,
        tuned=right,
        pairing=pairing,
        batches=plan(
            pairing.matrices,
            memory=memory,
            stack=_stacks(devices, right),
            parts=batches_a_shape(devices),
            workers=0 if right.is_adapted else workers,
            entry_bytes=entry_bytes(options),
        ),
        memory=memory,
        workers=workers,
        devices=devices,
        notes=notes,
        bytes_to_fetch=sum(nbytes for room in rooms for nbytes in room.values()),
        free_disk=free_bytes(rooms),
        given=given,
        processes=count,
    )


def _processes(pairing: Pairing, options: Options, workers: int, memory: int) -> tuple[int, int]:
    """How many processes take the work, 0 where threads of this one do, and the memory then.

    Processes pay where many matrices are small, and where there is room for each.
    """
    named = options.initial_adapter is None or isinstance(options.initial_adapter, str)
    if options.ray is not None or workers < 2 or not named or not can_start():
        return 0, memory
    small = [pair for pair in pairing.matrices if is_small(pair)]
    if estimate_seconds(small, workers=workers) < _WORTH_PROCESSES:
        return 0, memory
    each = share_memory(pairing.matrices, entry_bytes(options))
    limit = available_memory() // 2
    if options.max_memory is not None:
        limit = asked_memory(pairing.matrices, options.max_memory)
    count = min(workers, (limit - BASELINE) // each)
    return (count, BASELINE + count * each) if count > 1 else (0, memory)


def share_memory(pairs: Sequence[WeightPair], beside: int) -> int:
    """Bytes of a process that takes shares of the work, on one core."""
    parts = shares(pairs, fitting(pairs))
    return max(needed_memory(part, workers=1, entry_bytes=beside) for part in parts)


def within(
    prepared: Prepared,
    matrices: tuple[WeightPair, ...],
    vectors: tuple[WeightPair, ...],
    options: Options,
) -> Prepared:
    """The same, where only these matrices, and norms and biases, are read and computed."""
    pairing = replace(prepared.pairing, matrices=matrices, vectors=vectors)
    batches = plan(
        matrices,
        memory=prepared.memory,
        stack=prepared.stacks,
        parts=batches_a_shape(prepared.devices),
        workers=0 if prepared.tuned.is_adapted else prepared.workers,
        entry_bytes=entry_bytes(options),
    )
    return replace(prepared, pairing=pairing, batches=batches)


def _stacks(devices: Sequence[torch.device], tuned: Checkpoint) -> bool:
    """On other devices than the CPU; but the factors of an adapter may differ in rank."""
    return devices[0].type != "cpu" and not tuned.is_adapted


def _wanted(
    base: Checkpoint, tuned: Checkpoint, pairing: Pairing
) -> tuple[tuple[Checkpoint, list[str]], ...]:
    pairs = (*pairing.matrices, *pairing.vectors)
    if tuned.lies_over(base):
        return ((base, [pair.base.name for pair in pairs]),)
    return (base, [pair.base.name for pair in pairs]), (tuned, [pair.tuned.name for pair in pairs])


def survey(prepared: Prepared, *, paired: bool) -> Survey:
    """What `inspect` shows: the models, their pairing, and what the work would take."""
    alone = prepared.base if prepared.has_base else prepared.tuned
    sides = (prepared.base, prepared.tuned) if paired else (alone,)
    return Survey(
        models=tuple(
            {
                **encode(side.ref),
                "tensors": side.stored,
                "parameters": sum(math.prod(tensor.shape) for tensor in side.tensors.values()),
                "bytes": sum(tensor.nbytes for tensor in side.tensors.values()),
                "model_type": side.config.get("model_type"),
            }
            for side in sides
        ),
        pairing=prepared.pairing,
        notes=tuple(
            dict.fromkeys([*(note for side in sides for note in side.notes), *prepared.notes])
        ),
        bytes_to_fetch=prepared.bytes_to_fetch,
        free_disk=prepared.free_disk,
        memory=prepared.memory,
        workers=prepared.workers,
        device=prepared.device,
        seconds=here_seconds(prepared.pairing.matrices, prepared.workers) if paired else 0.0,
    )


def devices_of(options: Options) -> tuple[torch.device, ...]:
    """Where this process computes, in a precision that is there. Raises OptionError."""
    devices = resolve_devices("cpu" if options.ray is not None else options.device)
    resolve_dtype(options.dtype, devices[0])
    return devices


def here_seconds(pairs: Sequence[WeightPair], workers: int) -> float:
    """Rough time of a whole command on this machine, with what else runs on it now."""
    return slowness(workers) * (_START + estimate_seconds(pairs, workers=workers))


def batches_a_shape(devices: Sequence[torch.device]) -> int:
    """Into how many batches a shape is cut: two a device, one computed while the other is read."""
    return 2 * len(devices)


def planned_memory(
    pairing: Pairing, options: Options, devices: Sequence[torch.device], workers: int
) -> int:
    """Bound on the process, or on each of the devices."""
    if options.max_memory is not None:
        return asked_memory(pairing.matrices, options.max_memory)
    if devices[0].type == "cuda":
        return device_memory(free_memory(one) for one in devices)
    return default_memory(
        pairing.matrices,
        workers=workers,
        available=available_memory(),
        entry_bytes=entry_bytes(options),
    )


def entry_bytes(options: Options) -> int:
    """What masks and curves hold beside each entry of a matrix."""
    return _MASK_BYTES * options.masks + _CURVE_BYTES * options.curves


def workers_of(options: Options, devices: Sequence[torch.device]) -> int:
    """Threads that compute: as many as were asked for, one a core, or one a device."""
    return options.jobs or (cores() if devices[0].type == "cpu" else len(devices))
