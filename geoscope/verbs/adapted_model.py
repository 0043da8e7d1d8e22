"""An adapter over a base: which tensors of the base it changes, and from where it started."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from geoscope.errors import OptionError
from geoscope.formats.views import Blocks, View
from geoscope.models.checkpoint import Checkpoint
from geoscope.names import NameMap
from geoscope.peft.adapted import AdaptedCheckpoint, Change
from geoscope.peft.adapter import Adapter, read_adapter
from geoscope.peft.config import drawn_start
from geoscope.peft.folder import adapter_folder, record_beside
from geoscope.records import Rename, TensorInfo
from geoscope.sources.open import open_adapter
from geoscope.verbs.adapters.changes import Changes, changes_of
from geoscope.verbs.adapters.names import BasePaths, base_paths, named_as_base

__all__ = ["adapted", "adapter_notes", "started_from"]


def started_from(
    adapter: Adapter, given: str | Adapter | None, *, alpha: float | None = None
) -> Adapter | None:
    """The adapter before training, where the product was not zero then.

    given: `--initial-adapter`. Without it, that of a base which `init-adapter` rewrote is found
    beside this base. alpha: `--lora-alpha`. Raises OptionError where the update cannot be told
    without it.
    """
    if given is not None:
        return open_adapter(given, alpha=alpha)
    if adapter.initial is None:
        return None
    base = adapter.base_folder
    if base is not None and record_beside(str(base)).get("layout") == "residual":
        beside = base.parent / "adapter"
        if beside.is_dir() and adapter_folder(beside).layout == "residual":
            return read_adapter(beside)
    raise OptionError(
        f"{adapter.given}: {adapter.initial}. Its update is therefore not s·B·A alone: give the "
        "adapter as it was before training as `initial_adapter`"
    )


def adapted(
    base: Checkpoint,
    whole: Checkpoint,
    adapter: Adapter,
    start: Adapter | None,
    names: NameMap = NameMap(),  # noqa: B008 - frozen
    *,
    is_difference: bool = False,
) -> AdaptedCheckpoint:
    """The base with the adapter over it.

    whole: the base as stored; base: the same, or in parts (`split`). names: `--map-name`.
    is_difference: see `AdaptedCheckpoint`. Raises PairingError where the adapter belongs to another
    model.
    """
    paths = base_paths(whole, base)
    laid, found, renamed = _laid(adapter, paths, base, names)
    by_name, before, notes = found.by_name, dict[str, Change](), _notes_of(base, start)
    if start is not None:
        start, started, _ = _laid(start, paths, base, names)
        before = started.by_name
        if is_difference:
            notes = _difference_notes(laid, by_name, start, before)
            by_name, before = _with_zeros(by_name, before), _with_zeros(before, by_name)
        _check_start(laid, by_name, start, before)
    base = _with_tied(base, paths, by_name)
    changes = {name: one for name, one in by_name.items() if name in base.tensors}
    tensors = dict(base.tensors) | {
        name: _changed_info(base.tensors[name], change, laid) for name, change in changes.items()
    }
    return AdaptedCheckpoint(
        ref=adapter.ref,
        config=base.config,
        tensors=tensors,
        notes=(*notes, *adapter_notes(laid, start), *found.notes),
        # what is changed is not a copy any more
        tied_to={name: kept for name, kept in base.tied_to.items() if name not in changes},
        source=base.source,
        views=base.views,
        quantised=base.quantised,
        base=base,
        whole=whole,
        adapter=laid,
        changes=changes,
        start=start,
        start_changes=before,
        is_difference=is_difference,
        is_doubled=adapter.layout == "mirror",
        uncompared=found.lacking,
        names=names,
        renamed=renamed,
    )


def _laid(
    adapter: Adapter, paths: BasePaths, base: Checkpoint, names: NameMap
) -> tuple[Adapter, Changes, tuple[Rename, ...]]:
    """The adapter under the base's names and with what the base tells, and what it changes."""
    named, renamed = named_as_base(adapter, paths, names)
    known = named.with_base(paths.every, base.config)
    return known, changes_of(known, paths, base), renamed


def _with_tied(base: Checkpoint, paths: BasePaths, changes: Mapping[str, Change]) -> Checkpoint:
    """The base with the copies that an adapter changes, as views of the tensor that they repeat."""
    copies = {one.name: one for one in paths.tied.values() if one.name in changes}
    copies = {name: one for name, one in copies.items() if name not in base.tensors}
    if not copies:
        return base
    if isinstance(base, AdaptedCheckpoint):
        base = replace(base, base=_with_tied(base.base, paths, changes))
    views = {name: _whole_view(one, base.tied_to[name]) for name, one in copies.items()}
    tensors = dict(sorted({**base.tensors, **copies}.items()))
    return replace(base, tensors=tensors, views={**base.views, **views})


def _whole_view(info: TensorInfo, stored: str) -> View:
    rows, columns = info.shape[::-1] if info.transposed else info.shape
    return View(stored, rows, columns, Blocks(0, rows))


def _check_start(
    adapter: Adapter,
    changes: Mapping[str, Change],
    start: Adapter,
    before: Mapping[str, Change],
) -> None:
    """Raises OptionError for a start that cannot be taken off this adapter."""
    for name, change in changes.items():
        if change.module is not None and change.module.kind == "base":
            raise OptionError(
                f"{adapter.given}: {change.module.called} with a start that is not zero is not "
                "read; merge it into its base (PeftModel.merge_and_unload) and give that folder"
            )
        if change.has_factors and not (name in before and before[name].has_factors):
            raise OptionError(
                f"{start.given}: {change.key} is not adapted there, or in another shape; give the "
                f"adapter that {adapter.given} began as"
            )


def _with_zeros(changes: Mapping[str, Change], others: Mapping[str, Change]) -> dict[str, Change]:
    """The changes, and one of zero for what the others change alone."""
    zeros = {n: replace(one, is_zero=True) for n, one in others.items() if n not in changes}
    return {**changes, **zeros}


def _difference_notes(
    adapter: Adapter,
    changes: Mapping[str, Change],
    other: Adapter,
    others: Mapping[str, Change],
) -> tuple[str, ...]:
    notes = [f"an adapter of the same base as {other.given}: the update is their difference"]
    for one, mine, two, theirs in (
        (adapter, changes, other, others),
        (other, others, adapter, changes),
    ):
        if alone := [name for name in mine if name not in theirs]:
            notes.append(
                f"{len(alone)} matrices are adapted by {one.given} alone; {two.given} is zero there"
            )
    return tuple(notes)


def adapter_notes(adapter: Adapter, start: Adapter | None) -> tuple[str, ...]:
    """What the adapter says of itself; how it began is told by a start that is given."""
    drawn = None if start is None else drawn_start(adapter.config)
    return tuple(note for note in adapter.notes if note != drawn)


def _notes_of(base: Checkpoint, start: Adapter | None) -> tuple[str, ...]:
    """What is taken off the adapter, and what it lies over, where that is not obvious."""
    notes = () if start is None else (f"the start {start.given} is taken off",)
    if isinstance(base, AdaptedCheckpoint):
        notes += (
            f"lies over {base.ref.given}, the adapter of which stays in; to compare two adapters "
            "of one model give MODEL+ADAPTER twice",
        )
    return notes


def _changed_info(info: TensorInfo, change: Change, adapter: Adapter) -> TensorInfo:
    """The header of the tuned tensor: the dtype of what changes it, and its rows."""
    if change.replaced is not None:
        header = adapter.tensors[change.replaced]
        if change.rows is not None:  # a part of it
            return replace(info, dtype=header.dtype)
        turned = info.transposed and len(header.shape) == 2
        return replace(
            info, shape=header.shape[::-1] if turned else header.shape, dtype=header.dtype
        )
    if change.module is None:
        return info
    dtypes = {one.dtype for one in change.module.stored}
    return replace(info, dtype=dtypes.pop() if len(dtypes) == 1 else "float64")
