"""A pair of models before any heavy work: opened, matched, planned."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from geoscope.engine import (
    Batch,
    available_memory,
    default_memory,
    device_memory,
    estimate_seconds,
    free_memory,
    least_memory,
    parse_memory,
    plan,
    resolve_devices,
    resolve_dtype,
)
from geoscope.errors import PairingError, first_names
from geoscope.formats.disk import free_bytes
from geoscope.metrics import Rounding
from geoscope.models.checkpoint import Checkpoint
from geoscope.models.pairing import common_rows, is_resized, pair
from geoscope.models.scope import Scope
from geoscope.models.split import common_config
from geoscope.names import NameMap
from geoscope.peft.adapted import AdaptedCheckpoint
from geoscope.records import Pairing, Skipped, WeightPair
from geoscope.report.survey import Survey
from geoscope.verbs.models import in_parts, open_model, open_tuned, over
from geoscope.verbs.options import Options, Progress

__all__ = [
    "Prepared",
    "batches_a_shape",
    "cores",
    "planned_memory",
    "prepare",
    "survey",
    "workers_of",
]


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
    free_disk: int | None  # where they go; None where nothing is to be fetched
    notes: tuple[str, ...] = ()
    has_base: bool = True

    @property
    def wanted(self) -> tuple[tuple[Checkpoint, list[str]], ...]:
        """Both models, and the names of the tensors that are read of them."""
        return _wanted(self.base, self.tuned, self.pairing)

    @property
    def stacks(self) -> bool:
        """Whether several pairs are computed together."""
        return _stacks(self.devices, self.tuned)

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
    left, right, pairing, notes = _matched(left, right, options)
    workers = workers_of(options, devices)
    memory = planned_memory(pairing, options, devices, workers)
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
            entry_bytes=_entry_bytes(options),
        ),
        memory=memory,
        workers=workers,
        devices=devices,
        notes=notes,
        bytes_to_fetch=sum(nbytes for room in rooms for nbytes in room.values()),
        free_disk=free_bytes(rooms),
    )


def _stacks(devices: Sequence[torch.device], tuned: Checkpoint) -> bool:
    """On other devices than the CPU; but the factors of an adapter may differ in rank."""
    return devices[0].type != "cpu" and not isinstance(tuned, AdaptedCheckpoint)


def _wanted(
    base: Checkpoint, tuned: Checkpoint, pairing: Pairing
) -> tuple[tuple[Checkpoint, list[str]], ...]:
    pairs = (*pairing.matrices, *pairing.vectors)
    if isinstance(tuned, AdaptedCheckpoint) and tuned.base is base:
        return ((base, [one.base.name for one in pairs]),)
    return (base, [one.base.name for one in pairs]), (tuned, [one.tuned.name for one in pairs])


def _matched(
    base: Checkpoint, tuned: Checkpoint, options: Options
) -> tuple[Checkpoint, Checkpoint, Pairing, tuple[str, ...]]:
    """Both sides in the parts that are compared, their correspondence, and remarks on it."""
    config = common_config(base, tuned)
    # What both were taken apart into is said once, of the pair.
    whole, base, told = base, *_apart(base, config)
    if isinstance(tuned, AdaptedCheckpoint) and tuned.whole is whole:
        tuned = over(tuned, base)
        base = tuned.base
    else:
        tuned, more = _apart(tuned, config)
        told += more
    names = NameMap(options.map_name)
    notes = tuple(dict.fromkeys(told))
    notes += names.notes([*base.tensors, *tuned.tensors, *_own_names(base), *_own_names(tuned)])
    if options.allow_vocab_resize:
        base, tuned, resized = _common_rows(base, tuned, names)
        notes += resized
    if isinstance(tuned, AdaptedCheckpoint) and tuned.base is base:
        # what the adapter changes is compared, though the base has it as a copy
        pairing = pair(replace(base, tied_to=tuned.tied_to), tuned, options.selection, names)
        pairing = _adapted_only(pairing, tuned, options)
    else:
        pairing = pair(base, tuned, options.selection, names)
    notes += tuple(
        f"{one.name}: {one.base[0]} rows in base, {one.tuned[0]} in tuned; --allow-vocab-resize "
        "compares the rows that both have"
        for one in pairing.shape_mismatch
        if one.name in pairing.missing and is_resized(one.name, one.base, one.tuned)
    )
    return base, tuned, pairing, notes


def _own_names(checkpoint: Checkpoint) -> tuple[str, ...]:
    """What the keys of an adapter call its modules, before they get the names of the base."""
    if not isinstance(checkpoint, AdaptedCheckpoint):
        return ()
    return tuple(f"{one.path}.weight" for one in checkpoint.adapter.modules.values())


def _common_rows(
    base: Checkpoint, tuned: Checkpoint, names: NameMap
) -> tuple[Checkpoint, Checkpoint, tuple[str, ...]]:
    """As `common_rows`, of an adapter over the base, too."""
    before, (base, narrow, notes) = base, common_rows(base, tuned, names)
    if isinstance(narrow, AdaptedCheckpoint) and narrow.base is before:
        cut = {name: view.blocks for name, view in narrow.views.items() if name not in tuned.views}
        changes = narrow.changes.items()
        rows = {name: replace(one, rows=cut.get(name, one.rows)) for name, one in changes}
        narrow = replace(narrow, base=base, changes=rows)
    return base, narrow, notes


def _apart(checkpoint: Checkpoint, config: Mapping[str, Any]) -> tuple[Checkpoint, tuple[str, ...]]:
    """The checkpoint in parts, and the remarks on these."""
    found = in_parts(checkpoint, config)
    if isinstance(checkpoint, AdaptedCheckpoint):
        return found, ()
    own = len(checkpoint.notes)
    return replace(found, notes=checkpoint.notes), found.notes[own:]


def _adapted_only(pairing: Pairing, tuned: AdaptedCheckpoint, options: Options) -> Pairing:
    """Without what the adapter leaves as it is. Raises PairingError where nothing is left."""
    left_out = [
        Skipped(one.name, "the adapter leaves it as it is")
        for one in (*pairing.matrices, *pairing.vectors)
        if one.tuned.name not in tuned.changes
    ]
    names = {one.name for one in left_out}
    matrices = tuple(one for one in pairing.matrices if one.name not in names)
    vectors = tuple(one for one in pairing.vectors if one.name not in names)
    lacking = _lacking(tuned, options)
    missing = (*pairing.missing, *(one.name for one in lacking if one.missing))
    if not matrices and not (options.include and vectors):
        found = first_names([*tuned.changes]) or "none"
        raise PairingError(
            f"{tuned.ref.given}: changes no matrix in scope; it changes {found}; see `include`"
        )
    return replace(
        pairing,
        matrices=matrices,
        vectors=vectors,
        skipped=(*pairing.skipped, *left_out, *lacking),
        renamed=(*pairing.renamed, *tuned.renamed),
        missing=missing,
    )


def _lacking(tuned: AdaptedCheckpoint, options: Options) -> tuple[Skipped, ...]:
    """What the adapter brings and the base has no tensor of; missing where it is in scope."""
    scope = Scope.of(options.selection, tuned.tensors.values())
    return tuple(
        Skipped(info.name, reason, missing=scope.wants_matrix(info))
        for info, reason in tuned.uncompared
    )


def survey(prepared: Prepared, *, paired: bool) -> Survey:
    """What `inspect` shows: the models, their pairing, and what the work would take."""
    alone = prepared.base if prepared.has_base else prepared.tuned
    sides = (prepared.base, prepared.tuned) if paired else (alone,)
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
        free_disk=prepared.free_disk,
        memory=prepared.memory,
        workers=prepared.workers,
        device=prepared.device,
        seconds=estimate_seconds(prepared.pairing.matrices, workers=prepared.workers),
    )


def batches_a_shape(devices: Sequence[torch.device]) -> int:
    """Into how many batches a shape is cut: two a device, one computed while the other is read."""
    return 2 * len(devices)


def planned_memory(
    pairing: Pairing, options: Options, devices: Sequence[torch.device], workers: int
) -> int:
    """Bound on the process, or on each of the devices."""
    if options.max_memory == "min":
        return least_memory(pairing.matrices)
    if options.max_memory is not None:
        return parse_memory(options.max_memory)
    if devices[0].type == "cuda":
        return device_memory(free_memory(one) for one in devices)
    return default_memory(
        pairing.matrices,
        workers=workers,
        available=available_memory(),
        entry_bytes=_entry_bytes(options),
    )


def _entry_bytes(options: Options) -> int:
    """What masks and curves hold beside each entry of a matrix."""
    return _MASK_BYTES * options.masks + _CURVE_BYTES * options.curves


def workers_of(options: Options, devices: Sequence[torch.device]) -> int:
    """Threads that compute: as many as were asked for, one a core, or one a device."""
    return options.jobs or (cores() if devices[0].type == "cpu" else len(devices))


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
