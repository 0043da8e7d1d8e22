"""How does an adapter on the Hub become a folder here? Its few files, at one commit, in the cache.

An adapter is small and read whole, so that its files are fetched as they are, and nothing else of
the repository is. The folder is then opened by the rules of every other one.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from geoscope.errors import CheckpointNotFound, first_names
from geoscope.models.opening import Folder
from geoscope.peft.adapter import ADAPTER_CONFIG, Adapter, open_adapter
from geoscope.peft.file import adapter_files
from geoscope.peft.folder import RECORD
from geoscope.sources.hub.progress import Report
from geoscope.sources.hub.repository import HubFolder, hub_folder
from geoscope.sources.local import LocalFolder
from geoscope.sources.reference import HubReference

__all__ = ["FetchedAdapter", "fetch_adapter", "of_folder", "open_fetched"]


@dataclass(frozen=True)
class FetchedAdapter:
    """path: the folder in the cache. resolved: org/name@commit, with a sub-folder behind it."""

    path: Path
    resolved: str
    commit: str


def fetch_adapter(reference: HubReference, on_progress: Report | None) -> FetchedAdapter:
    """Its configuration, factors and geoscope.json, where they are not here yet.

    Raises CheckpointNotFound, UnsupportedFormat, or CheckpointError (a full disk, before the first
    byte of the factors).
    """
    return of_folder(*hub_folder(reference, on_progress))


def of_folder(folder: Folder, commit: str) -> FetchedAdapter:
    """The same, of a repository that is known already."""
    names = folder.names()
    if ADAPTER_CONFIG not in names:
        raise _no_adapter(folder, sorted(names))
    wanted = (ADAPTER_CONFIG, *adapter_files(names, folder.label), RECORD)
    if isinstance(folder, HubFolder):
        path = folder.files([name for name in wanted if name in names])[0].parent
        # What init-adapter says of OUT/adapter stands beside it.
        above = replace(folder, folder=folder.folder.rpartition("/")[0])
        if folder.folder and RECORD in above.names():
            above.files([RECORD])
    else:
        assert isinstance(folder, LocalFolder)  # offline, of another program
        path = folder.path
    return FetchedAdapter(path, folder.label, commit)


def open_fetched(found: FetchedAdapter, given: str, *, alpha: float | None = None) -> Adapter:
    """The adapter in the cache, which knows where it is from. Raises CheckpointError."""
    adapter = open_adapter(found.path, given=given, alpha=alpha)
    return replace(adapter, at=found.resolved, commit=found.commit)


def _no_adapter(folder: Folder, names: list[str]) -> CheckpointNotFound:
    below = folder.folders_with(ADAPTER_CONFIG) if isinstance(folder, HubFolder) else []
    hint = f"; give {first_names(below)}" if below else ""
    found = first_names(names) or "no files"
    return CheckpointNotFound(f"{folder.label}: holds no {ADAPTER_CONFIG}; found: {found}{hint}")
