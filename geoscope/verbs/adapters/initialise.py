"""An adapter's initial weights for a whole model: chosen, computed, written, told.

One matrix at a time goes from the base's files into the output, with workers that compute ahead as
far as the memory allows.
"""

from __future__ import annotations

import math
import time
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from contextvars import copy_context
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from geoscope._version import __version__
from geoscope.adapters.factors import LoraFactors
from geoscope.adapters.layouts import residual, start_error
from geoscope.adapters.peft_config import max_lora_rank, rank_advice
from geoscope.arguments import Place, bytes_of, path_of, path_text
from geoscope.engine import (
    matrix_boundary,
    one_blas_thread,
    resolve_devices,
    room_for_batches,
)
from geoscope.errors import CheckpointError, NumericsError, OptionError
from geoscope.foreign import exists, local_path
from geoscope.formats.container import files_of
from geoscope.formats.hashes import file_sha256
from geoscope.models.checkpoint import Checkpoint
from geoscope.models.opening import storage_dtype
from geoscope.models.writable import refuse_unwritable
from geoscope.outputs.model_folder import write_model
from geoscope.outputs.output import output_of
from geoscope.peft.adapter import Adapter
from geoscope.peft.folder import RECORD_SCHEMA, refuse_as_base
from geoscope.records import IN_MEMORY, ModelRef
from geoscope.records.card import UNNAMED, AdapterCard, adapter_card
from geoscope.sources.memory import LiveAdapter, Model, Opened, as_model_or_reference
from geoscope.sources.open import open_checkpoint
from geoscope.verbs.adapters.initialised import Initialised, parts_in_memory
from geoscope.verbs.adapters.options import InitOptions
from geoscope.verbs.adapters.output import (
    AdapterFiles,
    Spool,
    plan_files,
    write_configs,
    write_record,
)
from geoscope.verbs.adapters.recall import recalled_or_made
from geoscope.verbs.adapters.report import adapter_report
from geoscope.verbs.adapters.targets import Target, Targets, choose_targets
from geoscope.verbs.choices import chosen
from geoscope.verbs.fetching import fetch
from geoscope.verbs.options import Progress

__all__ = ["Initialised", "default_output", "initialise", "model_here"]

# dtypes in which a trainer may hold the base: the start error is measured for each.
_TRAINER = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# fp32 copies of a matrix that work on it takes, the rewritten matrix among them, and how many of
# the largest may be in memory in all where no bound is given.
_COPIES_IN_WORK, _COPIES_IN_ALL = 3, 6


@dataclass(frozen=True)
class _Start:
    """One matrix: its factors, the rewritten matrix as its file holds it, and the start errors.

    is_recalled: whether its factors come from the cache.
    """

    factors: LoraFactors
    residual: Tensor | None
    errors: Mapping[str, float]
    is_recalled: bool = False


# What is made of one weight: a start for each of its matrices.
_Made = tuple[_Start, ...]


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
    device = resolve_devices(options.device)[0]
    checkpoint = _opened(as_model_or_reference(model, "model"), progress)
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
    order = _order(files, targets)
    with ExitStack() as stack:
        output = stack.enter_context(folder)
        spool = stack.enter_context(Spool(place, options.chosen_layout))
        stack.enter_context(one_blas_thread())
        made = _computed(checkpoint, targets, order, options, device)
        kept: dict[str, _Start] = {}
        hashes: dict[str, dict[str, str]] = {}

        def replacement(name: str) -> Tensor | None:
            if name not in targets.weights:
                return None
            target, starts = targets.weights[name], next(made)
            hashes[name] = spool.keep(target, [start.factors for start in starts])
            kept.update(zip(target.names, map(_without_tensors, starts), strict=True))
            progress.on_pair(len(kept), len(targets.shapes), name)
            return _rewritten(target, starts)

        if files.model is not None:
            write_model(output, "residual", checkpoint, files.model, replacement)
            for name, path in files.travelling.items():
                output.copy(f"residual/{name}", path)
        else:
            for name in order:
                replacement(name)
        _tell_recalled(kept, progress)
        spool.write(output, files)
        base, revision = _base_of(checkpoint, place, options)
        config = write_configs(output, files, base, revision, targets, options)
        notes = (*targets.notes, *(files.notes if place else ()), *_advice(options))
        card = _card(checkpoint, place, options, kept, command, notes)
        output.write(files.card, adapter_card(card).encode())
        record = _record(checkpoint, options, kept, hashes, card)
        write_record(output, record)
    report = adapter_report(
        checkpoint.ref, _written(place, files), targets, options,
        {name: (one.factors, one.errors) for name, one in kept.items()},
        device=str(device), notes=notes, argv=tuple(argv),
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


def _rewritten(target: Target, starts: Sequence[_Start]) -> Tensor | None:
    """The residual that takes a weight's place, of a stack of experts a stack; None without one."""
    residuals = [start.residual for start in starts if start.residual is not None]
    if target.experts is None or not residuals:
        return residuals[0] if residuals else None
    return torch.stack(residuals)


def _read_names(checkpoint: Checkpoint, files: AdapterFiles, targets: Targets) -> list[str]:
    """Tensors that are read: all of a model that is written anew, else the targets."""
    return [*checkpoint.tensors] if files.model is not None else [*targets.weights]


def _order(files: AdapterFiles, targets: Targets) -> list[str]:
    """The targets in the order in which they are written."""
    names = files.model.order if files.model is not None else [*targets.weights]
    return [name for name in names if name in targets.weights]


# --- the matrices, computed ahead -----------------------------------------------------------------


def _computed(
    checkpoint: Checkpoint,
    targets: Targets,
    order: Sequence[str],
    options: InitOptions,
    device: torch.device,
) -> Iterator[_Made]:
    """The matrices in this order. Workers compute ahead while what they hold fits."""
    workers = options.jobs or (torch.get_num_threads() if device.type == "cpu" else 1)
    entries = {name: math.prod(targets.weights[name].info.shape) for name in order}
    room = _room(options, max(entries.values()))
    waiting = deque(order)
    running: deque[tuple[int, Future[_Made]]] = deque()

    def job(name: str) -> Callable[[], _Made]:
        context = copy_context()
        target = targets.weights[name]
        return lambda: context.run(_make, checkpoint, target, options, device)

    with ThreadPoolExecutor(max(1, workers)) as pool:
        try:
            while waiting or running:
                used = sum(cost for cost, _ in running)
                while waiting and len(running) <= workers:
                    cost = _COPIES_IN_WORK * entries[waiting[0]]
                    if running and used + cost > room:
                        break
                    running.append((cost, pool.submit(job(waiting.popleft()))))
                    used += cost
                yield running.popleft()[1].result()
        finally:
            for _, future in running:
                future.cancel()


def _room(options: InitOptions, largest: int) -> int:
    """Entries in fp32 that may be in work or waiting; one matrix is always let in.

    Raises OptionError.
    """
    if options.max_memory == "min":
        return 0
    if options.max_memory is None:
        return _COPIES_IN_ALL * largest
    return room_for_batches(bytes_of(options.max_memory, "max_memory", others=", or min")) // 4


def _make(
    checkpoint: Checkpoint, target: Target, options: InitOptions, device: torch.device
) -> _Made:
    """The starts of the matrices of one weight.

    A matrix without a start ends the whole: a start that leaves modules out is another training.
    """
    stored = checkpoint.read(target.info.name)
    matrices = [stored] if target.experts is None else [*stored]
    turned = target.info.transposed or target.is_turned
    return tuple(
        _make_one(W.T if target.is_turned else W, name, turned, target, options, device)
        for name, W in zip(target.names, matrices, strict=True)
    )


def _make_one(
    W: Tensor, name: str, turned: bool, target: Target, options: InitOptions, device: torch.device
) -> _Start:
    try:
        with matrix_boundary(name):
            return _started(W.to(device), name, options, is_turned=turned)
    except OptionError as error:
        raise OptionError(f"{name}: {error}") from None
    except NumericsError as error:
        if "`exclude`" in str(error):
            raise
        way_out = f"leave it out with `exclude` '{target.info.name}'"
        raise NumericsError(f"{error}; nothing is written, {way_out}") from error


def _started(W: Tensor, name: str, options: InitOptions, *, is_turned: bool) -> _Start:
    """The start of W (out, in), whose file holds it (in, out) where it `is_turned`."""
    chosen = options.method_options
    if options.initialisation.is_drawn:
        # Each matrix draws its own A; the seed of a null is shared by equal shapes.
        # 32 bits: the CPU's generator looks at no more.
        chosen["seed"] = zlib.crc32(f"{options.seed}:{name}".encode())
    factors, is_recalled = recalled_or_made(W, options, chosen)
    _refuse_overflow(factors.facts.values(), factors.A, factors.B)
    layout = options.chosen_layout
    if not layout:
        return _Start(factors, None, dict.fromkeys(_TRAINER, 0.0), is_recalled)
    rewritten, errors = None, {}
    if layout == "residual":
        dtype = getattr(torch, options.residual_dtype or "float32")
        written = residual(W, factors, dtype=dtype, transposed=is_turned)
        rewritten, errors = written.weight.cpu(), {"written": written.error}
        _refuse_overflow((), rewritten)
    for trainer, dtype in _TRAINER.items():
        errors[trainer] = start_error(W, factors, layout, dtype=dtype)
    _refuse_overflow(errors.values())
    return _Start(factors, rewritten, errors, is_recalled)


def _refuse_overflow(numbers: Iterable[float | None], *tensors: Tensor) -> None:
    """Raises NumericsError for what is written and is not finite."""
    finite = all(number is None or math.isfinite(number) for number in numbers)
    if not (finite and all(bool(torch.isfinite(tensor).all()) for tensor in tensors)):
        raise NumericsError(
            "the weights are too large or too small for factors in float32, or for the residual"
        )


def _without_tensors(one: _Start) -> _Start:
    """The facts alone, which are small."""
    empty = torch.empty(0)
    return replace(one, factors=replace(one.factors, A=empty, B=empty), residual=None)


def _tell_recalled(kept: Mapping[str, _Start], progress: Progress) -> None:
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
    kept: Mapping[str, _Start],
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
        start_errors={dtype: max(one.errors[dtype] for one in kept.values()) for dtype in _TRAINER},
        notes=notes,
    )


def _record(
    checkpoint: Checkpoint,
    options: InitOptions,
    kept: Mapping[str, _Start],
    hashes: Mapping[str, Mapping[str, str]],
    card: AdapterCard,
) -> dict[str, Any]:
    """geoscope.json: enough to make the folder again, and to tell whether it was changed."""
    chosen = options.method_options
    return {
        "schema": RECORD_SCHEMA,
        "geoscope_version": __version__,
        "method": options.method,
        "layout": options.chosen_layout or None,
        "rank": options.rank,
        "alpha": options.chosen_alpha,
        "rho": chosen.get("rho"),
        "spec_rank": chosen.get("spec_rank") or (options.rank if "spec_rank" in chosen else None),
        "scale_convention": chosen.get("scale_convention"),
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
            for dtype in _TRAINER
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
