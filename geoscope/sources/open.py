"""How does a reference become an open checkpoint or adapter, wherever it lies?

checkpoint = open_checkpoint("org/base")          a whole model
opened = open_model_or_adapter("runs/step 100")   either
adapter = open_adapter("runs/adapter")            an adapter, before a model in the same folder
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from geoscope.arguments import path_text
from geoscope.errors import OptionError
from geoscope.formats.layout import Layout, file_names, is_index, shard_count
from geoscope.formats.readers import open_container
from geoscope.formats.refused import is_adapter_file
from geoscope.models.checkpoint import Checkpoint
from geoscope.models.opening import Identity, assemble, open_folder
from geoscope.peft.adapter import Adapter, read_adapter
from geoscope.sources.hub.progress import OnDownload
from geoscope.sources.local_folder import LocalFolder
from geoscope.sources.locate import Location, locate
from geoscope.sources.reference import parse_reference
from geoscope.sources.shard_folder import open_shard_base, open_shards
from geoscope.sources.signs import Kind, holds_shards

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "base_in_shards",
    "open_adapter",
    "open_checkpoint",
    "open_location",
    "open_model_or_adapter",
    "refuse_alpha",
]

_NO_CONFIG = (
    "one file, no config at hand: Conv1D layers and tied embeddings are told by names and shapes"
)


def open_checkpoint(reference: str, *, on_progress: OnDownload | None = None) -> Checkpoint:
    """The checkpoint that `reference` names, from its headers; no tensor data is read.

    reference: a folder, a file, `org/name[@revision]` or `hf://org/name[@rev][/sub/folder]`; an
    existing path wins.
    on_progress: called with (file, bytes done, bytes in all) while files are downloaded.
    Raises CheckpointError, an adapter included, or OptionError for a reference that is not one.
    """
    location = locate(parse_reference(reference), on_progress=on_progress)
    opened = open_location(location, whole=True)
    assert isinstance(opened, Checkpoint)  # an adapter was refused
    return opened


def open_model_or_adapter(
    reference: str, *, alpha: float | None = None, on_progress: OnDownload | None = None
) -> Checkpoint | Adapter:
    """What `reference` names, from its headers.

    Weights right in a folder are the model, whatever lies beside them.
    alpha: see `open_adapter`. Raises as `open_checkpoint` does.
    """
    location = locate(parse_reference(reference), on_progress=on_progress)
    return open_location(location, alpha=alpha)


def open_adapter(
    reference: str | os.PathLike[str] | Adapter | Mapping[str, Tensor],
    config: Any = None,
    *,
    alpha: float | None = None,
    on_progress: OnDownload | None = None,
) -> Adapter:
    """The adapter that `reference` names, from its config and header; no factors are read.

    reference: as of `open_checkpoint`; or a state dict with its `config`, the content of
    adapter_config.json or a configuration of PEFT; or what is open already.
    alpha: in place of the config's `lora_alpha`, which some tools write as 0.
    Raises OptionError for a model, and as `open_checkpoint` does.

    >>> start = open_adapter(get_peft_model_state_dict(model), config)  # doctest: +SKIP
    """
    if isinstance(reference, Mapping):
        from geoscope.sources.memory import adapter_of_tensors  # which takes torch

        return adapter_of_tensors(reference, config, alpha=alpha)
    if isinstance(reference, Adapter):
        refuse_alpha(reference, alpha)
        return reference
    parsed = parse_reference(path_text(reference, "reference"))
    location = locate(parsed, adapter_first=True, on_progress=on_progress)
    if location.kind is None:
        return _adapter(location, alpha)  # says what is wrong
    opened = open_location(location, alpha=alpha)
    if not isinstance(opened, Adapter):
        raise OptionError(
            f"{location.given}: a model and not an adapter; give the folder of an adapter"
        )
    return opened


def refuse_alpha(adapter: Adapter, alpha: float | None) -> None:
    """Raises OptionError for an alpha of what is open already."""
    if alpha is not None:
        raise OptionError(
            f"`lora_alpha` {alpha:g}: the configuration of {adapter.given} is in memory; set it "
            "there"
        )


def open_location(
    location: Location, *, alpha: float | None = None, whole: bool = False
) -> Checkpoint | Adapter:
    """The model or adapter at a location, from its headers; whole: an adapter is refused.

    Raises CheckpointError.
    """
    if whole:
        location.refuse_adapter()
    if location.kind is Kind.ADAPTER:
        return _adapter(location, alpha)
    if location.kind in (Kind.SHARDS, Kind.MEGATRON, Kind.ZERO):
        opened = open_shards(location.path, location.label, alpha=alpha, whole=whole)
    elif location.file:
        opened = _file(location)
    else:
        identity = Identity(location.label, location.resolved, location.commit)
        opened = open_folder(location.folder, identity)
    return opened if isinstance(opened, Adapter) else _as_named(opened, location)


def base_in_shards(adapter: Adapter) -> Checkpoint | None:
    """The base of an adapter that was read from shards, which hold it, too; None for any other."""
    if adapter.path is None:
        return None
    names = file_names(adapter.path)
    if not holds_shards(names) or any(is_adapter_file(name) for name in names):
        return None
    return open_shard_base(adapter.path, adapter.given)


def _adapter(location: Location, alpha: float | None) -> Adapter:
    beside = "a model and an adapter lie in this folder: the adapter is taken"
    note = beside if location.label in location.models else ""
    if isinstance(location.folder, LocalFolder) and location.commit is None:
        adapter = read_adapter(location.folder.path, location.label, alpha=alpha)
        return replace(adapter, beside=note) if note else adapter
    from geoscope.sources.hub.repository import fetch_adapter  # local paths need none of it

    adapter = read_adapter(fetch_adapter(location.folder), location.label, alpha=alpha)
    return replace(adapter, at=location.resolved, commit=location.commit)


def _file(location: Location) -> Checkpoint:
    """One file of weights, or an index with its shards."""
    path, given = location.path / location.file, location.given
    if is_index(path.name):
        layout = Layout(path.name, is_index=True)
        return open_folder(location.folder, Identity(given, str(path)), layout)
    container = open_container(path, given)
    folder = LocalFolder(path.parent, given, opened={path.name: container})
    notes = [_NO_CONFIG]
    if (count := shard_count(path.name)) > 1:
        notes.append(f"{path.name} is one of {count} shards; only it is read")
    headers = {path.name: container.header}
    return assemble(Identity(given, str(path)), folder, {}, headers, {}, tuple(notes))


def _as_named(checkpoint: Checkpoint, location: Location) -> Checkpoint:
    """The checkpoint as the user named it, with the note on what was chosen."""
    notes = (location.note,) if location.note else ()
    ref = replace(checkpoint.ref, given=location.given)
    return replace(checkpoint, ref=ref, notes=(*notes, *checkpoint.notes))
