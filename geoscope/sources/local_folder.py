"""A folder of this disk: its files, and what is said where they hold no weights.

Nothing outside of the folder is read: a shard that is a link to elsewhere is refused, except into
the `blobs` of a Hub cache, which is how that cache stores its snapshots.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from geoscope.errors import CheckpointError, CheckpointNotFound, first_names
from geoscope.foreign import INDEX, SMALL, reason, small_text
from geoscope.formats.container import Container, FileHeader
from geoscope.formats.disk import Room
from geoscope.formats.layout import file_names, is_index, is_other_copy, shard_count
from geoscope.formats.links import refuse_link_to_elsewhere
from geoscope.formats.readers import is_readable, open_container
from geoscope.formats.refused import Refused, by_files, refusal
from geoscope.models.opening import CONFIG
from geoscope.names import in_natural_order
from geoscope.outputs.output_folder import travelling_files
from geoscope.sources.cached_repository import cached_models, repository_name, snapshots
from geoscope.sources.places import below, find_places, roots_below
from geoscope.sources.signs import WEIGHTS, holds_shards
from geoscope.sources.steps import step_of_part
from geoscope.sources.trainers import FOLDERS, manifests

__all__ = ["LocalFolder"]

# Folders there are named after the step once more, and hold shards.
_SHARDS_BELOW = ("", "policy/weights")


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
            return small_text(self.path / name, INDEX if is_index(name) else SMALL)
        except OSError as error:
            raise CheckpointError(f"{self.label}/{name}: cannot be read: {reason(error)}") from None

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
        why = "the checkpoint is still being written, was cut, or rotated away: copy the shard"
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
    others = in_natural_order({*roots_below(path), *_folders(path), *_step_parts(path)})
    if any(
        manifest.folder is None for manifest in manifests(path)
    ):  # beside Megatron's shards the base
        usual, others = [row.folder for row in FOLDERS if row.folder.endswith("dist_ckpt")], []
    found: dict[str, Refused | None] = {}
    for folder in dict.fromkeys([*usual, *others]):
        try:
            readable = any(place.kind in WEIGHTS for place in find_places(path / folder))
            refused = by_files(file_names(path / folder, folder))
        except CheckpointError:
            continue
        if readable or refused is not None:
            found[folder] = None if readable else refused
    return found


def _folders(path: Path) -> list[str]:
    return [entry.name for entry in path.iterdir() if entry.is_dir()]


def _step_parts(path: Path) -> Iterator[str]:
    """Behind the usual places: Megatron, and DeepSpeed inside a HF checkpoint."""
    for folder in _SHARDS_BELOW:
        if (path / folder).is_dir():
            for name in _folders(path / folder):
                if step_of_part(name) is not None:
                    yield f"{folder}/{name}".lstrip("/")


def _configuration_only(path: Path, label: str) -> CheckpointError:
    if holds_shards(file_names(path.parent, label)):
        return CheckpointError(
            f"`{path.name}/` holds configuration only; weights are in the shards beside it: give "
            f"{Path(label).parent}"
        )
    odd = next((p.name for p in path.glob("*.*") if is_readable(p.name) and not p.is_file()), None)
    if odd is not None:
        return CheckpointError(
            f"`{label}/{odd}` is no file: a link to nothing, a folder or a pipe; copy or download "
            "the weights again"
        )
    return CheckpointError(
        f"`{label}` holds configuration only (config.json); geoscope needs model*.safetensors "
        "or pytorch_model*.bin beside it"
    )
