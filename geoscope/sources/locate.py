"""What does a reference name, and where do its weights lie? Decided here, and nowhere else.

    a folder               its own weights, else the place below it that is chosen (places.py)
    a file                 of weights, an index of shards, or the factors of an adapter
    a model on the Hub     the folder at one commit

Names of files and, for the choice, manifests are looked at; nothing is opened (open.py does).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from geoscope.errors import CheckpointError, CheckpointNotFound, first_names
from geoscope.formats.layout import file_names, is_index
from geoscope.formats.refused import (
    by_files,
    is_adapter_file,
    is_never_opened,
    refusal,
    refuse_mlx,
)
from geoscope.models.opening import Folder
from geoscope.peft.config import ADAPTER_CONFIG
from geoscope.sources.hub.progress import OnDownload
from geoscope.sources.local_folder import LocalFolder
from geoscope.sources.places import (
    Place,
    below,
    choose,
    choose_below,
    find_places,
    where,
    without_factors,
)
from geoscope.sources.reference import HubReference, Reference
from geoscope.sources.signs import WEIGHTS, Kind, holds_model

__all__ = ["Location", "locate"]


@dataclass(frozen=True)
class Location:
    """Where the weights lie, and what they are.

    given: the reference, as the user wrote it.
    kind: ADAPTER, SHARDS or MODEL; None where opening the folder says what is wrong.
    folder: the folder of the files; a shard or an adapter that was named itself lies in it.
    resolved: its path, or org/name@commit.
    label: how messages name it.
    file: the file of weights that was named itself.
    commit: that of a model on the Hub.
    choice: "actor/: shards, chosen over the model folder in actor/huggingface/".
    note: the choice, where the user should know of it.
    models: folders with whole models, for the message that refuses an adapter.
    """

    given: str
    kind: Kind | None
    folder: Folder
    resolved: str
    label: str
    file: str = ""
    commit: str | None = None
    choice: str = ""
    note: str = ""
    models: tuple[str, ...] = ()

    @property
    def path(self) -> Path:
        """The folder on this disk."""
        assert isinstance(self.folder, LocalFolder)  # shards and files are never on the Hub
        return self.folder.path

    def refuse_adapter(self) -> None:
        """Raises UnsupportedFormat for an adapter, where a whole model is needed."""
        if self.kind is not Kind.ADAPTER:
            return
        refused = by_files((self.file,) if self.file else self.folder.names())
        assert refused is not None  # what made it the place of an adapter
        hint = f" Or give {first_names(self.models)} to take the full weights."
        hint = refused.hint + (hint if self.models else "")
        raise refusal(self.given if self.file else self.label, replace(refused, hint=hint))


def locate(
    reference: Reference, *, adapter_first: bool = False, on_progress: OnDownload | None = None
) -> Location:
    """Where the weights of a reference lie.

    adapter_first: an adapter in or below a folder comes before weights in the folder itself.
    Raises CheckpointError for what is there and never opened, or is not there.
    """
    if isinstance(reference, HubReference):
        return _on_the_hub(reference, adapter_first, on_progress)
    if reference.path.is_dir():
        return _in_folder(reference.path.resolve(), reference.given, adapter_first)
    return _of_file(reference.path, reference.given)


def _in_folder(path: Path, given: str, adapter_first: bool) -> Location:
    places = find_places(path)
    chosen = choose(places) if adapter_first else choose_below(places)
    if chosen is None:
        configs = (place.folder for place in places if place.kind is Kind.CONFIG)
        return _at(path, given, next(configs, ""), None)
    if chosen.kind is Kind.NO_FACTORS:
        refuse_mlx(file_names(path / chosen.folder), below(given, chosen.folder))
        raise without_factors(given, chosen, places)
    choice = where(chosen, places)
    return replace(
        _at(path, given, chosen.folder, chosen.kind),
        choice=choice,
        note="" if adapter_first else _note(choice, chosen, places),
        models=tuple(below(given, place.folder) for place in places if place.kind in WEIGHTS),
    )


def _at(path: Path, given: str, sub_folder: str, kind: Kind | None) -> Location:
    folder, label = path / sub_folder, below(given, sub_folder)
    return Location(given, kind, LocalFolder(folder, label), str(folder), label)


def _note(choice: str, chosen: Place, places: Sequence[Place]) -> str:
    """Where the choice says something; of an adapter in the same folder the layout has its own."""
    others = [
        place
        for place in places
        if place is not chosen
        and place.kind is not Kind.CONFIG
        and (place.folder != chosen.folder or place.kind in WEIGHTS)
    ]
    return f"weights taken from {choice}" if others or chosen.folder else ""


def _of_file(path: Path, given: str) -> Location:
    if not path.is_file():
        raise CheckpointNotFound(f"{given}: neither a file nor a folder")
    if is_never_opened(path.name):
        raise CheckpointError(
            f"{given}: this file holds trainer state and no weights. geoscope does not open it; "
            "give the folder or file of the weights"
        )
    # Links stay: the name in a Hub cache has a suffix, the blob that it points to has none.
    path = path.parent.resolve() / path.name
    beside = str(Path(given).parent)
    if is_adapter_file(path.name):
        return replace(
            _at(path.parent, beside, "", Kind.ADAPTER),
            given=given,
            file=path.name,
            choice=f"{path.name}: adapter, named itself",
        )
    if not is_index(path.name) and (refused := by_files((path.name,))) is not None:
        raise refusal(given, refused)
    folder = LocalFolder(path.parent, beside if is_index(path.name) else given)
    choice = f"{path.name}: file of weights, named itself"
    return Location(given, Kind.MODEL, folder, str(path), given, path.name, choice=choice)


def _on_the_hub(
    reference: HubReference, adapter_first: bool, on_progress: OnDownload | None
) -> Location:
    from geoscope.sources.hub.repository import hub_folder  # local paths need none of it

    folder, commit = hub_folder(reference, on_progress)
    names = folder.names()
    kind = Kind.MODEL if holds_model(names) else None
    if ADAPTER_CONFIG in names and (adapter_first or kind is None):
        kind = Kind.ADAPTER
    return Location(
        reference.given,
        kind,
        folder,
        folder.label,
        reference.given,
        commit=commit,
        choice="" if kind is None else f"{reference.folder or '.'}/: {kind.value} on the Hub",
    )
