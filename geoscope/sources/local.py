"""How is a checkpoint on this disk opened: a folder, or one file of tensors?

No network, and nothing outside of the folder: a shard that is a link to elsewhere is refused,
except into the `blobs` of a Hub cache, which is how that cache stores its snapshots.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from geoscope.errors import CheckpointError, CheckpointNotFound, first_names
from geoscope.formats.container import Container, FileHeader
from geoscope.formats.disk import Room
from geoscope.formats.layout import Layout, file_names, is_index, is_other_copy, shard_count
from geoscope.formats.links import refuse_link_to_elsewhere
from geoscope.formats.readers import is_readable, open_container
from geoscope.formats.refused import Refused, by_files, is_never_opened, refusal
from geoscope.models.checkpoint import Checkpoint
from geoscope.models.opening import CONFIG, Identity, assemble, open_folder
from geoscope.names import in_natural_order
from geoscope.outputs.output_folder import travelling_files
from geoscope.sources.cached_repository import cached_models, repository_name, snapshots
from geoscope.sources.places import (
    WEIGHTS,
    Kind,
    Place,
    below,
    choose_below,
    find_places,
    roots_below,
    where,
    without_factors,
)
from geoscope.sources.reference import LocalReference
from geoscope.sources.shard_folder import holds_shards, open_shards
from geoscope.sources.trainers import FOLDERS, manifests

__all__ = ["LocalFolder", "as_chosen", "open_local", "open_model_folder"]

_NO_CONFIG = (
    "one file, no config at hand: Conv1D layers and tied embeddings are told by names and shapes"
)


def open_local(reference: LocalReference) -> Checkpoint:
    """The checkpoint at an existing path. Raises CheckpointError."""
    path, given = reference.path, reference.given
    if path.is_dir():
        return _open_directory(path.resolve(), given)
    # Links stay: the name in a Hub cache has a suffix, the blob that it points to has none.
    return _open_file(path.parent.resolve() / path.name, given)


def _open_directory(path: Path, given: str) -> Checkpoint:
    """Weights right here, as named; else those that are chosen below."""
    places = find_places(path)
    chosen = choose_below(places)
    if chosen is None or (chosen.kind is Kind.ADAPTER and not chosen.folder):
        return open_model_folder(path, given)  # says what is wrong
    if chosen.kind is Kind.NO_FACTORS:
        raise without_factors(given, chosen, places)
    folder, label = path / chosen.folder, below(given, chosen.folder)
    if chosen.kind is Kind.ADAPTER:
        raise _adapter_first(folder, label, given, places)
    open_it = open_shards if chosen.kind is Kind.SHARDS else open_model_folder
    return as_chosen(open_it(folder, label), given, chosen, places)


def as_chosen(
    checkpoint: Checkpoint, given: str, chosen: Place, places: Sequence[Place]
) -> Checkpoint:
    """The same, as the user named it, with a remark where the choice says something."""
    # Of an adapter in the same folder the layout has its own word.
    others = [
        one
        for one in places
        if one is not chosen
        and one.kind is not Kind.CONFIG
        and (one.folder != chosen.folder or one.kind in WEIGHTS)
    ]
    note = (f"weights taken from {where(chosen, places)}",) if others or chosen.folder else ()
    ref = replace(checkpoint.ref, given=given)
    return replace(checkpoint, ref=ref, notes=(*note, *checkpoint.notes))


def open_model_folder(path: Path, given: str) -> Checkpoint:
    """The checkpoint right in a folder of model*.safetensors or pytorch_model*.bin, and no other.

    given: how messages name it. Raises CheckpointError.
    """
    resolved = path.resolve()
    return open_folder(LocalFolder(resolved, given), Identity(given, str(resolved)))


def _adapter_first(
    folder: Path, label: str, given: str, places: Sequence[Place]
) -> CheckpointError:
    refused = by_files(file_names(folder))
    assert refused is not None  # what made it the place of an adapter
    models = [below(given, one.folder) for one in places if one.kind in WEIGHTS]
    hint = f" Or give {first_names(models)} to take the full weights." if models else ""
    return refusal(label, replace(refused, hint=refused.hint + hint))


def _open_file(path: Path, given: str) -> Checkpoint:
    if not path.is_file():
        raise CheckpointNotFound(f"{given}: neither a file nor a folder")
    if is_never_opened(path.name):
        raise CheckpointError(
            f"{given}: holds the state of a trainer and no weights; it is never opened. "
            "Give the folder or file of the weights"
        )
    if is_index(path.name):
        folder = LocalFolder(path.parent, str(Path(given).parent))
        return open_folder(folder, Identity(given, str(path)), Layout(path.name, is_index=True))
    refused = by_files((path.name,))
    if refused is not None:
        raise refusal(given, refused)
    container = open_container(path, given)
    folder = LocalFolder(path.parent, given, opened={path.name: container})
    notes = [_NO_CONFIG]
    if shard_count(path.name) > 1:
        notes.append(f"{path.name} is one of {shard_count(path.name)} shards; only it is read")
    headers = {path.name: container.header}
    return assemble(Identity(given, str(path)), folder, {}, headers, {}, tuple(notes))


@dataclass(frozen=True)
class LocalFolder:
    """A folder of this disk. `cached_as` is org/name@commit for a snapshot in the Hub's cache."""

    path: Path
    given: str
    cached_as: str | None = None
    opened: dict[str, Container] = field(default_factory=dict[str, Container], repr=False)

    @property
    def label(self) -> str:
        return (self.cached_as or self.given).rstrip("/")

    def names(self) -> Collection[str]:
        return file_names(self.path, self.given)

    def text(self, name: str) -> str:
        try:
            return (self.path / name).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise CheckpointError(f"{self.label}/{name}: cannot be read: {error}") from None

    def headers(self, names: Sequence[str]) -> Mapping[str, FileHeader]:
        return {name: self.open(name).header for name in names}

    def open(self, file: str) -> Container:
        if file not in self.opened:
            path = self.path / file
            refuse_link_to_elsewhere(path, self.label)
            self.opened[file] = open_container(path, f"{self.label}/{file}")
        return self.opened[file]

    def room(self, wanted: Mapping[str, Collection[str]]) -> Room:
        return {}

    def fetch(self, wanted: Mapping[str, Collection[str]]) -> None:
        return None

    def travelling(self) -> tuple[dict[str, Path], tuple[str, ...]]:
        return travelling_files(self.path)

    def absent(self, shard: str, count: int) -> CheckpointError:
        if self.cached_as is not None:
            return CheckpointNotFound(f"offline, and {shard} of {self.cached_as} is not cached.")
        stale = [
            name
            for name in in_natural_order(self.names())
            if shard_count(name) not in (1, shard_count(shard)) and is_readable(name)
        ]
        why = "the checkpoint is still being written, or was cut: copy the shard"
        if stale:
            why = (
                f"the shards that are ({first_names(stale, 2)}) are of another save: copy the "
                "index that belongs to them"
            )
        return CheckpointError(
            f"`{self.label}`: the index names {shard}, which is not there ({count} tensors); {why}"
        )

    def no_weights(self) -> CheckpointError:
        if self.cached_as is not None:
            return CheckpointNotFound(
                f"offline, and model.safetensors of {self.cached_as} is not cached."
            )
        found = sorted(self.names())
        if (cached := _in_hub_cache(self.path, self.label)) is not None:
            return cached
        below = _weights_below(self.path)
        if below:
            return self._elsewhere(below)
        if CONFIG in found:
            return _configuration_only(self.path, self.label)
        copies = [name for name in found if is_other_copy(name)]
        if copies:
            return CheckpointError(
                f"`{self.label}`: only {first_names(copies)}, in the publisher's own layout; "
                "give that file itself, or a folder with model.safetensors"
            )
        return CheckpointError(
            f"`{self.label}`: no weights geoscope can read; found: "
            f"{first_names(found) or 'no files'}. It needs model*.safetensors or pytorch_model*.bin"
        )

    def _elsewhere(self, below: Mapping[str, Refused | None]) -> CheckpointError:
        readable = [f"{folder}/" for folder, refused in below.items() if refused is None]
        if readable:
            return CheckpointError(
                f"`{self.label}`: no weights here, but in {first_names(readable)}; "
                "give the folder that is meant"
            )
        folder, refused = next((folder, what) for folder, what in below.items() if what is not None)
        return refusal(f"{self.label}/{folder}", refused)


def _in_hub_cache(path: Path, label: str) -> CheckpointError | None:
    """For a Hub cache, or a model there, of which no snapshot stands for the others."""
    if models := cached_models(path):
        return CheckpointError(
            f"`{label}`: a Hub cache and not a model; give a model of it by its name, as "
            f"{models[0]}"
        )
    name = repository_name(path)
    if name is None:
        return None
    here = snapshots(path)
    if not here:
        return CheckpointError(
            f"`{label}`: the folder of {name} in a Hub cache, without a snapshot; give {name} to "
            "download it"
        )
    return CheckpointError(
        f"`{label}`: the folder of {name} in a Hub cache, and refs/main names no snapshot of it; "
        f"give one: {first_names([below(label, one) for one in here])}"
    )


def _weights_below(path: Path) -> dict[str, Refused | None]:
    """Folders below that hold weights, in the usual places and right here, → why not to be read."""
    usual = [row.folder for row in FOLDERS if (path / row.folder).is_dir()]
    others = in_natural_order({*roots_below(path), *_folders(path)})
    if any(one.folder is None for one in manifests(path)):  # beside Megatron's shards the base
        usual, others = [row.folder for row in FOLDERS if not row.is_read], []
    found: dict[str, Refused | None] = {}
    for folder in dict.fromkeys([*usual, *others]):
        try:
            readable = any(one.kind in WEIGHTS for one in find_places(path / folder))
            refused = by_files(file_names(path / folder, folder))
        except CheckpointError:
            continue
        if readable or refused is not None:
            found[folder] = None if readable else refused
    return found


def _folders(path: Path) -> list[str]:
    return [entry.name for entry in path.iterdir() if entry.is_dir()]


def _configuration_only(path: Path, label: str) -> CheckpointError:
    if holds_shards(file_names(path.parent, label)):
        return CheckpointError(
            f"`{path.name}/` holds configuration only; weights are in the shards beside it: give "
            f"{Path(label).parent}"
        )
    return CheckpointError(
        f"`{label}` holds configuration only (config.json); geoscope needs model*.safetensors "
        "or pytorch_model*.bin beside it"
    )
