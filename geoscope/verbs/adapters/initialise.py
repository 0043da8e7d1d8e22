"""An adapter's initial weights for a whole model: chosen, computed, written, told.

One matrix at a time goes from the base's files into the output, with workers that compute ahead as
far as the memory allows.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from geoscope._version import __version__
from geoscope.adapters.peft_config import max_lora_rank, rank_advice
from geoscope.arguments import Place, bytes_of, path_of, path_text
from geoscope.engine import (
    available_memory,
    cores,
    one_blas_thread,
    resolve_devices,
    room_for_batches,
)
from geoscope.engine.cache import ResultCache
from geoscope.errors import CheckpointError, OptionError
from geoscope.files import encoded
from geoscope.foreign import exists, local_path
from geoscope.formats.container import files_of
from geoscope.formats.hashes import file_sha256
from geoscope.models.checkpoint import Checkpoint
from geoscope.models.opening import storage_dtype
from geoscope.models.writable import refuse_unwritable
from geoscope.outputs.model_folder import ModelPlan, write_model
from geoscope.outputs.output import Output, output_of
from geoscope.peft.adapter import Adapter
from geoscope.peft.folder import RECORD_SCHEMA, refuse_as_base
from geoscope.records import IN_MEMORY, ModelRef
from geoscope.records.card import UNNAMED, AdapterCard, adapter_card
from geoscope.sources.memory import LiveAdapter, Model, Opened, as_model_or_reference
from geoscope.sources.open import open_checkpoint
from geoscope.verbs.adapters.initialised import Initialised, parts_in_memory
from geoscope.verbs.adapters.nodes import begin_on_nodes
from geoscope.verbs.adapters.options import InitOptions
from geoscope.verbs.adapters.output import (
    AdapterFiles,
    Spool,
    plan_files,
    write_configs,
    write_record,
)
from geoscope.verbs.adapters.report import adapter_report
from geoscope.verbs.adapters.starts import (
    COPIES_IN_WORK,
    TRAINER,
    Made,
    Making,
    Start,
    computed,
)
from geoscope.verbs.adapters.targets import Target, Targets, choose_targets
from geoscope.verbs.choices import chosen
from geoscope.verbs.fetching import fetch
from geoscope.verbs.nodes import in_memory
from geoscope.verbs.options import Progress

__all__ = ["Initialised", "default_output", "initialise", "model_here"]

# fp32 copies of the largest matrix that may always be in memory in all where no bound is given.
_LEAST_COPIES = 6


def model_here() -> str:
    """The current folder, by its whole path. Raises OptionError where it holds no model."""
    try:
        open_checkpoint(".")
    except CheckpointError as error:
        raise OptionError(
            f"no MODEL given, and the current folder is none ({error}); name a folder or a Hub id"
        ) from None
    return str(Path.cwd())


def default_output(model: Place, options: InitOptions) -> Path:
    """A name made of model, method and rank, in the current folder."""
    model = path_text(model, "model")
    last = model.rstrip("/").partition("@")[0].rpartition("/")[2]
    name = last if last not in ("", ".", "..") else Path(model).resolve().name
    return Path(f"{name}-{options.method}-r{options.rank}")


def initialise(
    model: Model,
    out: Place | None = None,
    options: InitOptions | None = None,
    *,
    command: Sequence[str] = (),
    argv: Sequence[str] = (),
    progress: Progress | None = None,
    on_start: Callable[[int], None] | None = None,
    **named: Any,
) -> Initialised:
    """The initial adapter of a model, and a report on it.

    model: folder or Hub id, open checkpoint, state dict or module. out: a folder to write; without
    one the tensors stay in memory. command: the words to repeat it with, for the card. argv: those
    of this call, for the report. on_start(matrices) is called once everything is checked. named:
    fields of `InitOptions`, in place of those in `options`. Raises GeoscopeError; then nothing
    loadable is left in `out`.

    >>> made = initialise(model, method="pissa", rank=8)  # doctest: +SKIP
    >>> set_peft_model_state_dict(peft_model, dict(made.tensors))  # doctest: +SKIP
    """
    options, progress = chosen(InitOptions, options, named), progress or Progress()
    place = None if out is None else path_of(out, "out")
    started = time.perf_counter()
    device = resolve_devices("cpu" if options.ray is not None else options.device)[0]
    checkpoint = _opened(as_model_or_reference(model, "model"), progress)
    if options.ray is not None and checkpoint.ref.is_in_memory:
        raise in_memory()
    refuse_unwritable(checkpoint, "init-adapter")
    targets = choose_targets(checkpoint, options)
    files = plan_files(checkpoint, targets, options)
    folder = output_of(
        place,
        files.sizes(len(targets.shapes) + len(targets.weights)),
        force=options.force,
        inputs=_inputs(checkpoint),
        meanwhile=files.spool_bytes,
    )
    if on_start is not None:
        on_start(len(targets.shapes))
    fetch([(checkpoint, _read_names(checkpoint, files, targets))], progress)
    with ExitStack() as stack:
        output = stack.enter_context(folder)
        spool = stack.enter_context(Spool(place, options.chosen_layout))
        stack.enter_context(one_blas_thread())
        work = _Work(checkpoint, targets, files, options, spool, progress)
        used = work.write(output, device)
        kept = work.in_order()
        _tell_recalled(kept, progress)
        spool.write(output, files)
        base, revision = _base_of(checkpoint, place, options)
        config = write_configs(output, files, base, revision, targets, options)
        notes = (*targets.notes, *(files.notes if place else ()), *_advice(options))
        card = _card(checkpoint, place, options, kept, command, notes)
        output.write(files.card, encoded(adapter_card(card)))
        record = _record(checkpoint, options, kept, work.hashes, card)
        write_record(output, record)
    report = adapter_report(
        checkpoint.ref, _written(place, files), targets, options,
        {name: (one.factors, one.errors) for name, one in kept.items()},
        device=used, notes=notes, argv=tuple(argv),
        seconds=time.perf_counter() - started,
    )  # fmt: skip
    parts = parts_in_memory(output)
    return Initialised(report, card, config, record, place, place and place / files.card, **parts)


def _opened(model: Opened, progress: Progress) -> Checkpoint:
    """The whole model that an adapter is made for. Raises CheckpointError for any other."""
    if isinstance(model, str):
        refuse_as_base(model)
        return open_checkpoint(model, on_progress=progress.on_download)
    if isinstance(model, (Adapter, LiveAdapter)) or model.is_adapted:
        given = model.adapter if isinstance(model, LiveAdapter) else model
        label = given.given if isinstance(given, Adapter) else given.ref.given
        raise CheckpointError(
            f"{label}: has an adapter, but init-adapter needs a whole model; give its base, of a "
            "PEFT model get_base_model() before it is wrapped"
        )
    if not model.ref.is_in_memory and model.ref.commit is None:
        refuse_as_base(model.ref.resolved)
    return model


@dataclass(frozen=True, eq=False)
class _Work:
    """The weights on their way from the base's files to the output.

    kept: name of each matrix → its start, without tensors.
    hashes: name of each weight → those of its factors.
    """

    checkpoint: Checkpoint
    targets: Targets
    files: AdapterFiles
    options: InitOptions
    spool: Spool
    progress: Progress
    kept: dict[str, Start] = field(default_factory=dict[str, Start])
    hashes: dict[str, dict[str, str]] = field(default_factory=dict[str, dict[str, str]])

    def write(self, output: Output, device: torch.device) -> str:
        """Factors into the spool, and the rewritten base into the output; where it was computed."""
        options, used = self.options, str(device)
        cache = None if options.cache is None else ResultCache(options.cache)
        making = Making(self.checkpoint, options, device, cache)
        if options.ray is not None:
            used = begin_on_nodes(self.checkpoint, self.targets, options, self._keep)
            making = replace(making, begun=self._begun)
        if self.files.model is not None:
            self._write_model(output, self.files.model, self._computed(making))
        elif making.begun is None:
            for target, made in self._computed(making):
                self._keep(target, made)
        return used

    def in_order(self) -> dict[str, Start]:
        """The starts in the order of the output, whoever made them."""
        names = [name for target in self._order() for name in target.names]
        return {name: self.kept[name] for name in names}

    def _order(self) -> list[Target]:
        """The targets in the order in which they are written."""
        weights, model = self.targets.weights, self.files.model
        names = model.order if model is not None else weights
        return [weights[name] for name in names if name in weights]

    def _computed(self, making: Making) -> Iterator[tuple[Target, Made]]:
        order, device = self._order(), making.device
        workers = self.options.jobs or (cores() if device.type == "cpu" else 1)
        largest = max(math.prod(target.info.shape) for target in order)
        room = _room(self.options, largest, workers)
        return zip(order, computed(making, order, workers=workers, room=room), strict=True)

    def _write_model(
        self, output: Output, model: ModelPlan, starts: Iterator[tuple[Target, Made]]
    ) -> None:
        def replacement(name: str) -> Tensor | None:
            if name not in self.targets.weights:
                return None
            target, made = next(starts)
            if name in self.hashes:  # nodes began it
                self._tell(target, made)
            else:
                self._keep(target, made)
            return _rewritten(target, made)

        write_model(output, "residual", self.checkpoint, model, replacement)
        for name, path in self.files.travelling.items():
            output.copy(f"residual/{name}", path)

    def _keep(self, target: Target, made: Made) -> None:
        self.hashes[target.info.name] = self.spool.keep(target, [start.factors for start in made])
        self._tell(target, made)
        self.progress.on_pair(len(self.kept), len(self.targets.shapes), target.info.name)

    def _tell(self, target: Target, made: Made) -> None:
        told = [start.without_tensors for start in made]
        self.kept.update(zip(target.names, told, strict=True))

    def _begun(self, target: Target) -> Made:
        """What nodes made of a weight, with its factors."""
        return tuple(
            replace(self.kept[name], factors=replace(self.kept[name].factors, A=A, B=B))
            for name, (A, B) in zip(target.names, self.spool.factors(target), strict=True)
        )


def _rewritten(target: Target, starts: Sequence[Start]) -> Tensor | None:
    """The residual that takes a weight's place, of a stack of experts a stack; None without one."""
    residuals = [start.residual for start in starts if start.residual is not None]
    if target.experts is None or not residuals:
        return residuals[0] if residuals else None
    return torch.stack(residuals)


def _read_names(checkpoint: Checkpoint, files: AdapterFiles, targets: Targets) -> list[str]:
    """Tensors that are read: all of a model that is written anew, else the targets."""
    return [*checkpoint.tensors] if files.model is not None else [*targets.weights]


def _room(options: InitOptions, largest: int, workers: int) -> int:
    """Entries in fp32 that may be in work or waiting; by default those of every worker and one that
    waits, in half of the free memory. Raises OptionError."""
    if options.max_memory == "min":
        return 0
    if options.max_memory is None:
        wanted = (workers + 1) * COPIES_IN_WORK * largest
        return max(_LEAST_COPIES * largest, min(wanted, available_memory() // 2 // 4))
    return room_for_batches(bytes_of(options.max_memory, "max_memory", others=", or min")) // 4


def _tell_recalled(kept: Mapping[str, Start], progress: Progress) -> None:
    if recalled := sum(start.is_recalled for start in kept.values()):
        progress.on_recalled(recalled, len(kept))


# --- what is told ---------------------------------------------------------------------------------


def _advice(options: InitOptions) -> tuple[str, ...]:
    advice = rank_advice(options.written_rank)
    return () if advice is None else (advice,)


def _base_of(
    checkpoint: Checkpoint, out: Path | None, options: InitOptions
) -> tuple[str | None, str | None]:
    """What the adapter is loaded on, and its revision; None for a residual in memory."""
    if options.chosen_layout == "residual":
        return None if out is None else str((out / "residual").resolve()), None
    return _reference(checkpoint), checkpoint.ref.commit


def _reference(checkpoint: Checkpoint) -> str | None:
    """The base for the files: a folder by its whole path, a Hub id without its revision; of a
    model in memory the name that it was loaded by, None without one."""
    ref = checkpoint.ref
    if ref.is_in_memory:
        name = checkpoint.config.get("_name_or_path") or None
        return str(local_path(name).resolve()) if name and exists(local_path(name)) else name
    if ref.commit is None:
        return str(local_path(ref.given).resolve())
    return ref.given.removeprefix("hf://").partition("@")[0]


def _card(
    checkpoint: Checkpoint,
    out: Path | None,
    options: InitOptions,
    kept: Mapping[str, Start],
    command: Sequence[str],
    notes: tuple[str, ...],
) -> AdapterCard:
    return AdapterCard(
        folder=(out or Path()).as_posix(),
        base=_reference(checkpoint) or UNNAMED,
        commit=checkpoint.ref.commit,
        method=options.method,
        layout=options.chosen_layout,
        rank=options.written_rank,
        alpha=options.chosen_alpha,
        served_rank=max_lora_rank(options.written_rank),
        command=" ".join(command) or "(called as a library)",
        version=__version__,
        matrices=len(kept),
        start_errors={dtype: max(one.errors[dtype] for one in kept.values()) for dtype in TRAINER},
        notes=notes,
    )


def _record(
    checkpoint: Checkpoint,
    options: InitOptions,
    kept: Mapping[str, Start],
    hashes: Mapping[str, Mapping[str, str]],
    card: AdapterCard,
) -> dict[str, Any]:
    """geoscope.json: enough to make the folder again, and to tell whether it was changed."""
    own = options.method_options
    return {
        "schema": RECORD_SCHEMA,
        "geoscope_version": __version__,
        "method": options.method,
        "layout": options.chosen_layout or None,
        "rank": options.rank,
        "alpha": options.chosen_alpha,
        "rho": own.get("rho"),
        "spec_rank": own.get("spec_rank") or (options.rank if "spec_rank" in own else None),
        "scale_convention": own.get("scale_convention"),
        "residual_dtype": (options.residual_dtype or "float32")
        if options.chosen_layout == "residual"
        else None,
        "seed": options.seed,
        "base": {
            "reference": _reference(checkpoint),
            "commit": checkpoint.ref.commit,
            "sha256": {path.name: file_sha256(path) for path in _weight_files(checkpoint)},
        },
        "matrices": {
            name: {
                "facts": dict(one.factors.facts),
                "nulls": dict(one.factors.nulls),
                "status": {key: value.value for key, value in one.factors.status.items()},
                "method": {key: dict(value) for key, value in one.factors.method.items()},
                "errors": dict(one.errors),
                **hashes.get(name, {}),
            }
            for name, one in kept.items()
        }
        # of a stack of experts, whose facts stand under the names of its matrices
        | {name: dict(one) for name, one in hashes.items() if name not in kept},
        "start_error": {
            dtype: {
                "max": card.start_errors[dtype],
                "mean": sum(one.errors[dtype] for one in kept.values()) / len(kept),
            }
            for dtype in TRAINER
        },
        "command": card.command,
    }


def _weight_files(checkpoint: Checkpoint) -> list[Path]:
    """The files of the base that were read, where they lie on this disk."""
    containers = {
        info.source: checkpoint.source.open(info.source) for info in checkpoint.tensors.values()
    }
    return sorted({path for container in containers.values() for path in files_of(container)})


def _written(out: Path | None, files: AdapterFiles) -> ModelRef:
    """The output as a report names it: the rewritten base, or the adapter where there is none."""
    plans = [files.plan] if files.model is None else [*files.model.files.values()]
    dtype = storage_dtype([tensor for plan in plans for tensor in plan.tensors.values()])
    if out is None:
        return ModelRef("adapter", f"{IN_MEMORY}adapter", None, dtype)
    return ModelRef(str(out), str(out.resolve()), None, dtype)


def _inputs(checkpoint: Checkpoint) -> list[Path]:
    """Local folders that hold the base: the output may not be one of them."""
    ref, given = checkpoint.ref, local_path(checkpoint.ref.given)
    is_folder = ref.commit is None and not ref.is_in_memory and given.exists()
    return [given] if is_folder else []
