"""An adapter without its base: what its factors tell by themselves."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from geoscope.adapters.peft_names import expert_name
from geoscope.engine import plan
from geoscope.errors import CheckpointError, OptionError, PairingError
from geoscope.formats.container import Container
from geoscope.formats.disk import Room
from geoscope.models.checkpoint import Checkpoint
from geoscope.models.pairing import pair
from geoscope.names import NameMap
from geoscope.peft.adapted import AdaptedCheckpoint, Change
from geoscope.peft.adapter import Adapter
from geoscope.records import ModelRef, Skipped, TensorInfo
from geoscope.sources.memory import Opened
from geoscope.verbs.adapted_model import adapter_notes, started_from
from geoscope.verbs.models import adapter_at
from geoscope.verbs.options import Options, Progress
from geoscope.verbs.pairs.prepare import Prepared, devices_of, planned_memory, workers_of

__all__ = ["prepare_alone"]


def prepare_alone(
    reference: Opened, options: Options, progress: Progress | None = None
) -> Prepared:
    """As `prepare`, of the adapter's modules that are products of two factors."""
    progress = progress or Progress()
    devices = devices_of(options)
    adapter = adapter_at(reference, alpha=options.lora_alpha, on_progress=progress.on_download)
    start = started_from(adapter, options.initial_adapter)
    tuned, skipped = _alone(adapter, start)
    if not tuned.changes:
        raise PairingError(f"{adapter.given}: {skipped[0].reason}; give BASE {adapter.given}")
    pairing = pair(tuned.base, tuned, options.selection, NameMap(options.map_name))
    pairing = replace(
        pairing,
        skipped=(*pairing.skipped, *skipped),
        missing=(*pairing.missing, *(one.name for one in skipped if one.missing)),
    )
    workers = workers_of(options, devices)
    memory = planned_memory(pairing, options, devices, workers)
    return Prepared(
        base=tuned.base,
        tuned=tuned,
        pairing=pairing,
        batches=plan(pairing.matrices, memory=memory, stack=False),
        memory=memory,
        workers=workers,
        devices=devices,
        bytes_to_fetch=0,
        free_disk=None,
        has_base=False,
        given=(None, reference) if isinstance(reference, str) else None,
    )


def _alone(adapter: Adapter, start: Adapter | None) -> tuple[AdaptedCheckpoint, list[Skipped]]:
    tensors: dict[str, TensorInfo] = {}
    changes: dict[str, Change] = {}
    skipped: list[Skipped] = []
    if start is not None:
        _check_start(adapter, start)
    for name, module in adapter.modules.items():
        if module.kind != "factors":
            reason = f"the update of {module.called} cannot be computed without the base"
            skipped.append(Skipped(name, reason, missing=True))
            continue
        nbytes = sum(one.nbytes for one in module.stored) // module.experts
        for expert, tensor in enumerate(_names(name, module.experts if module.is_stack else None)):
            dtype = module.stored[0].dtype
            tensors[tensor] = TensorInfo(tensor, module.shape, dtype, nbytes, "")
            changes[tensor] = Change(name, module, expert=expert)
    for name in (*adapter.replaced, *adapter.rows, *adapter.vectors):
        skipped.append(Skipped(name, "replaced or changed whole: it needs the base"))
    base = Checkpoint(
        ref=ModelRef.not_read(adapter.base),
        config={},
        tensors={name: replace(info, nbytes=0) for name, info in tensors.items()},
        notes=(),
        tied_to={},
        source=_NoFiles(),
    )
    tuned = AdaptedCheckpoint(
        ref=adapter.ref,
        config={},
        tensors=tensors,
        notes=(
            *(() if start is None else (f"the start {start.given} is taken off",)),
            *adapter_notes(adapter, start),
        ),
        tied_to={},
        source=base.source,
        base=base,
        whole=base,
        adapter=adapter,
        changes=changes,
        start=start,
        start_changes={} if start is None else changes,
        is_doubled=adapter.layout == "mirror",
    )
    return tuned, skipped


def _check_start(adapter: Adapter, start: Adapter) -> None:
    """Raises OptionError for a start that cannot be taken off this adapter."""
    for name, module in adapter.modules.items():
        other = start.modules.get(name)
        if other is None or (other.shape, other.experts) != (module.shape, module.experts):
            raise OptionError(
                f"{start.given}: {name} is not adapted there, or in another shape; give the "
                f"adapter that {adapter.given} began as"
            )


def _names(module: str, experts: int | None) -> Iterator[str]:
    """Names of the weights of a module: of a stack one for each expert."""
    if experts is None:
        yield f"{module}.weight"
        return
    for expert in range(experts):
        yield f"{expert_name(module, expert)}.weight"


@dataclass(frozen=True)
class _NoFiles:
    """The source of a base that is not read."""

    def room(self, wanted: Mapping[str, Collection[str]]) -> Room:
        return {}

    def fetch(self, wanted: Mapping[str, Collection[str]]) -> None:
        return None

    def open(self, file: str) -> Container:
        raise CheckpointError("the base is not read here; give it, too")

    def travelling(self) -> tuple[dict[str, Path], tuple[str, ...]]:
        return {}, ()
