"""What a reference stands for: a model, an adapter, or a base with an adapter over it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from geoscope.errors import CheckpointError, GeoscopeError, OptionError
from geoscope.models.checkpoint import Checkpoint
from geoscope.models.split import split
from geoscope.models.ungathered import refuse_ungathered
from geoscope.names import NameMap
from geoscope.peft.adapted import AdaptedCheckpoint
from geoscope.peft.adapter import Adapter
from geoscope.peft.folder import record_beside
from geoscope.sources.hub.progress import OnDownload
from geoscope.sources.memory import LiveAdapter, Opened
from geoscope.sources.open import (
    base_in_shards,
    open_adapter,
    open_model_or_adapter,
    refuse_alpha,
)
from geoscope.sources.reference import base_and_adapter
from geoscope.verbs.adapted_model import adapted, started_from

__all__ = [
    "adapter_at",
    "in_parts",
    "open_model",
    "open_tuned",
    "over",
    "split_tuned",
    "split_with_notes",
]


def open_model(
    reference: Opened,
    *,
    initial: str | Adapter | None = None,
    alpha: float | None = None,
    names: NameMap = NameMap(),  # noqa: B008 - frozen
    on_progress: OnDownload | None = None,
) -> Checkpoint:
    """The weights that a reference names; of an adapter alone those of its own base with it.

    initial, alpha, names: `--initial-adapter`, `--lora-alpha`, `--map-name`. Raises GeoscopeError.
    """
    if isinstance(reference, Checkpoint):
        return reference
    if isinstance(reference, LiveAdapter):
        refuse_alpha(reference.adapter, alpha)
        return _over_own(reference, names)
    if isinstance(reference, str) and (pair := base_and_adapter(reference)) is not None:
        base = open_model(pair[0], alpha=alpha, names=names, on_progress=on_progress)
        adapter = adapter_at(pair[1], alpha=alpha, on_progress=on_progress)
        return _as_model(_over(base, adapter, initial, alpha, names), reference)
    found = _model_or_adapter(reference, alpha, on_progress)
    if isinstance(found, Checkpoint):
        return found
    whole = _over(_base_of(found, on_progress), found, initial, alpha, names)
    return _as_model(whole, found.given)


def open_tuned(
    reference: Opened,
    base: Checkpoint,
    *,
    initial: str | Adapter | None = None,
    alpha: float | None = None,
    names: NameMap = NameMap(),  # noqa: B008 - frozen
    on_progress: OnDownload | None = None,
) -> Checkpoint:
    """A tuned model of `base`; an adapter, alone or as base+adapter of the same base, lies over it.

    Where `base` is a model with an adapter of the same base, the one takes the place of the other.

    Raises GeoscopeError.
    """
    if isinstance(reference, Checkpoint):
        return reference
    if isinstance(reference, LiveAdapter):
        refuse_alpha(reference.adapter, alpha)
        return _live(reference, base, initial, names)
    if isinstance(reference, str) and (pair := base_and_adapter(reference)) is not None:
        own = open_model(pair[0], alpha=alpha, names=names, on_progress=on_progress)
        same = (own.ref.resolved, own.ref.commit) == (base.ref.resolved, base.ref.commit)
        adapter = adapter_at(pair[1], alpha=alpha, on_progress=on_progress)
        over_base = _over(base if same else own, adapter, initial, alpha, names)
        return _as_model(over_base, reference)
    found = _model_or_adapter(reference, alpha, on_progress)
    if isinstance(found, Checkpoint):
        return found
    if isinstance(base, AdaptedCheckpoint) and _are_siblings(base.adapter, found):
        return _difference(base, found, names)
    return _over(base, found, initial, alpha, names)


def _model_or_adapter(
    reference: str | Adapter, alpha: float | None, on_progress: OnDownload | None
) -> Checkpoint | Adapter:
    if isinstance(reference, Adapter):
        refuse_alpha(reference, alpha)
        return reference
    return open_model_or_adapter(reference, alpha=alpha, on_progress=on_progress)


def _live(
    live: LiveAdapter, base: Checkpoint, initial: str | Adapter | None, names: NameMap
) -> AdaptedCheckpoint:
    """Over the base that is given where this has the weights of its own; else over its own."""
    own = _over_own(live, names)
    whole = base.whole if isinstance(base, AdaptedCheckpoint) else base
    if initial is None and not _same_weights(own, whole):
        note = (
            f"its base is not {whole.ref.given}: the weights of both are compared whole; give "
            "get_base_model() in its place for the adapter alone"
        )
        told = replace(live, adapter=replace(live.adapter, beside=note))
        return _over_own(told, names)
    if initial is None and isinstance(base, AdaptedCheckpoint):
        return _difference(base, live.adapter, names)
    return _over(base, live.adapter, initial, None, names)


def _over_own(live: LiveAdapter, names: NameMap) -> AdaptedCheckpoint:
    """Its own base holds what a start took out of it, so there is nothing to take off."""
    return _as_model(adapted(live.base, live.base, live.adapter, None, names), live.adapter.given)


def _same_weights(own: AdaptedCheckpoint, base: Checkpoint) -> bool:
    """Whether every tensor that the adapter changes has the same entries in both bases."""
    if own.whole is base:
        return True
    stored = {
        own.whole.views[name].stored if name in own.whole.views else name for name in own.changes
    }
    return all(_is_equal(own.whole, base, name) for name in sorted(stored))


def _is_equal(one: Checkpoint, other: Checkpoint, name: str) -> bool:
    info = other.tensors.get(name)
    if info is None or info.shape != one.tensors[name].shape:
        return False
    return bool((one.read(name).double() == other.read(name).double()).all())


def _are_siblings(one: Adapter, other: Adapter) -> bool:
    """Whether both adapters are of the same base, so that neither lies over the other."""
    if one.base is None or other.base is None:
        return False
    folders = one.base_folder, other.base_folder
    if folders[0] is not None or folders[1] is not None:
        return folders[0] == folders[1]
    return (one.base, one.revision) == (other.base, other.revision)


def _difference(base: AdaptedCheckpoint, adapter: Adapter, names: NameMap) -> AdaptedCheckpoint:
    """The adapter in place of the one that `base` has: the update is their difference.

    Raises OptionError where one of them changes a matrix by no product.
    """
    found = adapted(base, base, adapter, base.adapter, names, is_difference=True)
    if not all(change.has_factors for change in (*found.changes.values(), *base.changes.values())):
        raise OptionError(
            f"{adapter.given}: this adapter and {base.adapter.given} have the same base, but at "
            "least one change is not a product of factors, so their difference cannot be taken. "
            "Give both as BASE+ADAPTER, or merge both and compare the merged folders"
        )
    return found


def in_parts(checkpoint: Checkpoint, config: Mapping[str, Any]) -> Checkpoint:
    """As `split`, of a base with an adapter, too."""
    if isinstance(checkpoint, AdaptedCheckpoint):
        return over(checkpoint, in_parts(checkpoint.whole, config))
    return split(checkpoint, config)


def split_with_notes(
    checkpoint: Checkpoint, config: Mapping[str, Any]
) -> tuple[Checkpoint, tuple[str, ...]]:
    """The checkpoint in parts, and the remarks on these."""
    parts = in_parts(checkpoint, config)
    if isinstance(checkpoint, AdaptedCheckpoint):
        return parts, ()
    own = len(checkpoint.notes)
    return replace(parts, notes=checkpoint.notes), parts.notes[own:]


def split_tuned(
    tuned: Checkpoint, whole: Checkpoint, base: Checkpoint, config: Mapping[str, Any]
) -> tuple[Checkpoint, Checkpoint, tuple[str, ...]]:
    """The tuned model in parts, the base that it is compared with, and remarks on the parts.

    whole: the base as stored; base: the same in parts. An adapter over the one lies over the other
    then.
    """
    if isinstance(tuned, AdaptedCheckpoint) and tuned.whole is whole:
        laid = over(tuned, base)
        return laid, laid.base, ()
    parts, notes = split_with_notes(tuned, config)
    return parts, base, notes


def over(checkpoint: AdaptedCheckpoint, base: Checkpoint) -> AdaptedCheckpoint:
    """The same adapter over the base in other parts."""
    found = adapted(
        base,
        checkpoint.whole,
        checkpoint.adapter,
        checkpoint.start,
        checkpoint.names,
        is_difference=checkpoint.is_difference,
    )
    return replace(found, ref=checkpoint.ref, renamed=checkpoint.renamed)


def _over(
    base: Checkpoint,
    adapter: Adapter,
    initial: str | Adapter | None,
    alpha: float | None,
    names: NameMap,
) -> AdaptedCheckpoint:
    """Of a base that `init-adapter` relieved of the start nothing more is taken off."""
    refuse_ungathered(base)
    is_relieved = record_beside(base.ref.resolved).get("layout") == "residual"
    start = None if is_relieved else started_from(adapter, initial, alpha=alpha)
    return adapted(base, base, adapter, start, names)


def _as_model(found: AdaptedCheckpoint, given: str) -> AdaptedCheckpoint:
    """Known as base and adapter together, as two of one adapter over different bases differ."""
    resolved = f"{found.whole.ref.resolved}+{found.ref.resolved}"
    return replace(found, ref=replace(found.ref, given=given, resolved=resolved))


def adapter_at(
    reference: Opened, *, alpha: float | None = None, on_progress: OnDownload | None = None
) -> Adapter:
    """The adapter that a reference names. Raises OptionError for a model, alone or below it."""
    if isinstance(reference, Checkpoint):
        raise OptionError(f"{reference.ref.given}: a model and not an adapter; give its base, too")
    if isinstance(reference, (Adapter, LiveAdapter)):
        adapter = reference.adapter if isinstance(reference, LiveAdapter) else reference
        refuse_alpha(adapter, alpha)
        return adapter
    if (pair := base_and_adapter(reference)) is not None:
        raise OptionError(
            f"{reference}: base+adapter, where the adapter alone is meant; give {pair[1]}"
        )
    return open_adapter(reference, alpha=alpha, on_progress=on_progress)


def _base_of(adapter: Adapter, on_progress: OnDownload | None) -> Checkpoint:
    """The model that its config names; of an adapter out of shards the base in the same shards."""
    if (base := base_in_shards(adapter)) is not None:
        return base
    field = "base_model_name_or_path in adapter_config.json"
    reference = adapter.base_reference
    if reference is None:
        raise CheckpointError(f"{adapter.given}: no {field}; give base+adapter")
    try:
        return open_model(reference, on_progress=on_progress)
    except GeoscopeError as error:
        raise CheckpointError(
            f"{adapter.given}: its base, {field}, cannot be opened ({error}); "
            f"give BASE+{adapter.given}"
        ) from None
