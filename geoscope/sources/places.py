"""Where below a folder are the weights, and which of them are meant? Looked up in a fixed order.

The folder itself, then the rows of trainers.py and what verl's manifest names. Of a model in a Hub
cache the snapshot of its main branch stands for the folder.

Chosen by kind: an adapter comes first, because a merged output of a LoRA run may equal the base;
then the shards of a trainer, which are often fp32 masters; then the model folder; last Megatron's
shards and DeepSpeed's, which often hold the optimizer alone beside it. An adapter folder
without factors is not replaced by what lies beside it. Naming the sub-folder overrides the choice.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from geoscope.errors import CheckpointError, first_names
from geoscope.formats.layout import file_names
from geoscope.sources.cached_repository import snapshot
from geoscope.sources.signs import WEIGHTS, Kind, kinds_of
from geoscope.sources.trainers import FOLDERS, MANIFEST, Manifest, latest_tag, manifests

__all__ = [
    "Place",
    "below",
    "choose",
    "choose_below",
    "find_places",
    "kinds_at",
    "roots_below",
    "where",
    "without_factors",
]

_PLACES = ("", *(row.folder for row in FOLDERS))
_WITH_MANIFEST = frozenset(row.folder for row in FOLDERS if row.has_manifest)
# How far below a folder weights are looked for that lie in no usual place.
_DEPTH = 3


@dataclass(frozen=True)
class Place:
    """A folder below the one that was given; `folder` "" is that one itself. remark: on it."""

    folder: str
    kind: Kind
    remark: str = ""

    def __str__(self) -> str:
        return f"{self.folder or '.'}/"


def find_places(folder: Path) -> tuple[Place, ...]:
    """Every place with weights, in the order of search; empty when there is none."""
    snap = snapshot(folder)
    if snap is not None:
        found = find_places(folder / snap)
        return tuple(replace(one, folder=f"{snap}/{one.folder}".rstrip("/")) for one in found)
    written = manifests(folder)
    named = [one.folder for one in written if one.folder is not None]
    places = kinds_at(folder, tuple(dict.fromkeys([*_PLACES, *named])))
    tag = latest_tag(folder)
    tagged = [] if tag is None else kinds_at(folder, (tag,))
    zero = (place for place in tagged if place.kind is Kind.ZERO)
    return (*_with_manifest(places, {one.root: one for one in written}), *zero)


def _with_manifest(places: Sequence[Place], written: Mapping[str, Manifest]) -> Iterator[Place]:
    """Without the base of an adapter; with a remark where the manifest of a save is not there."""
    for place in places:
        root = place.folder.removesuffix("model/huggingface").rstrip("/")
        if place.folder not in _WITH_MANIFEST:
            yield place
        elif root not in written:
            remark = f"without {MANIFEST}, which verl writes last: is the save complete?"
            yield replace(place, remark=remark)
        elif written[root].folder is not None:
            yield place


def roots_below(folder: Path, depth: int = _DEPTH) -> Iterator[str]:
    """Sub-folders that weights are found in, or usually below, but no folder inside of these."""
    for entry in sorted(folder.iterdir()):
        if not entry.is_dir() or entry.name.startswith("."):
            continue
        if choose(find_places(entry)) is not None:
            yield entry.name
        elif depth > 1:
            yield from (f"{entry.name}/{one}" for one in roots_below(entry, depth - 1))


def kinds_at(folder: Path, folders: Sequence[str]) -> list[Place]:
    """What these folders below it hold. One with an adapter and a model counts as two places."""
    places: list[Place] = []
    for name in folders:
        path = folder / name
        if path.is_dir():
            kinds = kinds_of(name or path.name, file_names(path))
            places.extend(Place(name, kind) for kind in kinds)
    return places


def choose(places: Sequence[Place]) -> Place | None:
    """The place that is meant by the folder above it; None when none holds what is read."""
    readable = (Kind.ADAPTER, Kind.NO_FACTORS, *WEIGHTS)
    return next((place for kind in readable for place in places if place.kind is kind), None)


def choose_below(places: Sequence[Place]) -> Place | None:
    """The same for a folder that was named itself: weights right there come before all others."""
    here = (place for place in places if not place.folder and place.kind in WEIGHTS)
    return next(here, choose(places))


def where(chosen: Place, places: Sequence[Place]) -> str:
    """ "actor/lora_adapter/: adapter, chosen over the model folder in actor/huggingface/"."""
    others = [place for place in places if place is not chosen and place.kind is not Kind.CONFIG]
    rest = [f"the {one.kind.value} in {one}" for one in others]
    taken = f"{chosen}: {chosen.kind.value}"
    taken += f", chosen over {first_names(rest)}" if rest else ""
    return f"{taken}, {chosen.remark}" if chosen.remark else taken


def below(given: str, folder: str) -> str:
    """How messages name a folder below the one that was given."""
    return f"{given.rstrip('/')}/{folder}" if folder else given


def without_factors(given: str, chosen: Place, places: Sequence[Place]) -> CheckpointError:
    """The error for an adapter folder without factors, and what to give in its place."""
    label = below(given, chosen.folder)
    models = [below(given, place.folder) for place in places if place.kind in WEIGHTS]
    instead = [model for model in models if model != label]
    hint = f"; give {first_names(instead)} to take the full weights" if instead else ""
    return CheckpointError(f"adapter folder without `adapter_model.safetensors` ({label}){hint}")
