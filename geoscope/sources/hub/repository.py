"""How is a model on the Hub opened without downloading it?

The revision is resolved to a commit once; every later call names that commit. One listing gives
files and sizes, a range request per shard gives its header. Wanted tensors come as ranges of their
own (shard.py) or, where they are most of a shard, with the whole shard in huggingface_hub's own
cache. Offline, the commit comes from the cached refs and everything else from what was kept.

All of it goes through huggingface_hub, which is imported only in the hub_* files and only when
needed. A token comes from its environment or login; it is never an argument and never printed.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from geoscope.errors import CheckpointError, CheckpointNotFound, HubError, first_names
from geoscope.foreign import COUNT, INDEX, SMALL, reason, shown, small_text
from geoscope.formats.container import Container, FileHeader
from geoscope.formats.disk import Room, check_room
from geoscope.formats.layout import is_index
from geoscope.formats.links import is_plain_name
from geoscope.formats.readers import SAFETENSORS, open_container
from geoscope.models.opening import Folder
from geoscope.outputs.output_folder import travels
from geoscope.peft.config import ADAPTER_CONFIG
from geoscope.peft.file import adapter_files
from geoscope.peft.folder import RECORD
from geoscope.sources.hub.cache import (
    cache_of,
    cached_commit,
    download,
    in_cache,
    is_commit,
    remember,
)
from geoscope.sources.hub.errors import hub_errors, not_cached
from geoscope.sources.hub.progress import OnDownload
from geoscope.sources.hub.range_cache import cached_listing, keep_listing
from geoscope.sources.hub.ranges import RemoteFile
from geoscope.sources.hub.shard import HubShard
from geoscope.sources.local_folder import LocalFolder
from geoscope.sources.reference import HubReference

__all__ = ["HubFolder", "fetch_adapter", "hub_folder"]

_TIMEOUT = 30.0
_HEADER_REQUESTS = 8
_LONGEST_PATH = 1000  # letters
_LARGEST_FILE = 1 << 50  # bytes


def hub_folder(reference: HubReference, on_progress: OnDownload | None) -> tuple[Folder, str]:
    """The folder that a reference names, and its commit. Raises CheckpointError."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return _cached_folder(reference)
    commit, sizes = _resolve(reference)
    return HubFolder(reference.repo, commit, reference.folder, sizes, on_progress), commit


def _resolve(reference: HubReference) -> tuple[str, dict[str, int]]:
    """The commit of the revision, and the size of every file of the repository."""
    from huggingface_hub import HfApi

    repo, revision = reference.repo, reference.revision
    with hub_errors(repo, revision or "main", branches=lambda: _branches(repo)):
        info = HfApi().model_info(repo, revision=revision, files_metadata=True, timeout=_TIMEOUT)
        sizes = {
            file.rfilename: file.size or 0 for file in info.siblings or () if _is_file(repo, file)
        }
    if not isinstance(info.sha, str) or not is_commit(info.sha):
        raise CheckpointError(f"{repo}: the Hub names no commit; set HF_ENDPOINT to a real one")
    remember(repo, revision or "main", info.sha)
    keep_listing(repo, info.sha, sizes)
    return info.sha, sizes


def _is_file(repo: str, sibling: Any) -> bool:
    """True for a file of a listing. Raises HubError for a name or a size that none has."""
    name, size = sibling.rfilename, sibling.size
    is_name = isinstance(name, str) and len(name) <= _LONGEST_PATH and name.isprintable()
    if not is_name or not all(map(is_plain_name, name.split("/"))):
        raise HubError(f"{repo}: its listing names the file {shown(name)}, which is no path in it")
    if size is not None and (not COUNT.holds(size) or not 0 <= size < _LARGEST_FILE):
        raise HubError(f"{repo}: its listing gives {name} the size {shown(size)}")
    return True


def _branches(repo: str) -> str:
    from huggingface_hub import HfApi

    try:
        return first_names([branch.name for branch in HfApi().list_repo_refs(repo).branches], 8)
    except Exception:  # only decorates an error that is raised anyway
        return ""


def _cached_folder(reference: HubReference) -> tuple[Folder, str]:
    """Offline: by the listing that was kept, or a snapshot that another program fetched."""
    repo, revision = reference.repo, reference.revision or "main"
    commit = cached_commit(repo, revision)
    sizes = None if commit is None else cached_listing(repo, commit)
    if commit is not None and sizes is not None:
        return HubFolder(repo, commit, reference.folder, sizes), commit
    if commit is None or not (cache_of(repo) / "snapshots" / commit).is_dir():
        raise not_cached(f"{repo}@{revision}")
    label = _label(repo, commit, reference.folder)
    path = cache_of(repo) / "snapshots" / commit / reference.folder
    if not path.is_dir():
        raise not_cached(label, reference.folder)
    return LocalFolder(path, reference.given, label), commit


def _label(repo: str, commit: str, folder: str) -> str:
    return f"{repo}@{commit}/{folder}" if folder else f"{repo}@{commit}"


def fetch_adapter(folder: Folder) -> Path:
    """The folder in the cache with an adapter's configuration, factors and geoscope.json.

    An adapter is small and read whole: its files are fetched as they are, and nothing else.
    Raises CheckpointNotFound, UnsupportedFormat, or CheckpointError (a full disk, before the first
    byte of the factors).
    """
    if not isinstance(folder, HubFolder):  # offline, of another program
        assert isinstance(folder, LocalFolder)
        return folder.path
    names = folder.names()
    if ADAPTER_CONFIG not in names:
        raise _without_adapter(folder)
    wanted = (ADAPTER_CONFIG, *adapter_files(names, folder.label), RECORD)
    path = folder.files([name for name in wanted if name in names])[0].parent
    # What init-adapter says of OUT/adapter stands above it.
    above = replace(folder, folder=folder.folder.rpartition("/")[0])
    if folder.folder and RECORD in above.names():
        above.files([RECORD])
    return path


def _without_adapter(folder: HubFolder) -> CheckpointNotFound:
    below = folder.folders_with(ADAPTER_CONFIG)
    hint = f"; give {first_names(below)}" if below else ""
    names = first_names(sorted(folder.names())) or "no files"
    return CheckpointNotFound(f"{folder.label}: holds no {ADAPTER_CONFIG}; found: {names}{hint}")


# --- a repository as a folder -------------------------------------------------------------------


@dataclass(frozen=True)
class HubFolder:
    """A folder of a Hub repository at one commit. `sizes` lists the whole repository."""

    repo: str
    commit: str
    folder: str
    sizes: Mapping[str, int] = field(repr=False)
    on_progress: OnDownload | None = field(default=None, repr=False)
    opened: dict[str, Container] = field(default_factory=dict[str, Container], repr=False)

    def __getstate__(self) -> dict[str, Any]:
        """Another process reads on, but it does not report to this one."""
        return {**self.__dict__, "on_progress": None}

    @property
    def label(self) -> str:
        return _label(self.repo, self.commit, self.folder)

    def names(self) -> Collection[str]:
        prefix = f"{self.folder}/" if self.folder else ""
        inside = (path[len(prefix) :] for path in self.sizes if path.startswith(prefix))
        return frozenset(name for name in inside if "/" not in name)

    def text(self, name: str) -> str:
        try:
            return small_text(self._download(name), INDEX if is_index(name) else SMALL)
        except OSError as error:
            raise CheckpointError(f"{self.label}/{name}: cannot be read: {reason(error)}") from None

    def headers(self, names: Sequence[str]) -> Mapping[str, FileHeader]:
        with ThreadPoolExecutor(max_workers=_HEADER_REQUESTS) as pool:
            return dict(zip(names, pool.map(self._header, names), strict=True))

    def _header(self, name: str) -> FileHeader:
        # A pickle has its header inside: there is no other way than to download it.
        return self.open(name).header

    def open(self, file: str) -> Container:
        known = self.opened.get(file)
        if known is None or (isinstance(known, HubShard) and known.path is not None):
            known = self.opened[file] = self._opened(file)
        return known

    def _opened(self, file: str) -> Container:
        label, path = f"{self.label}/{file}", self._path(file)
        if not file.endswith(SAFETENSORS) or in_cache(self.repo, self.commit, path) is not None:
            return open_container(self._download(file), label)
        return HubShard.open(RemoteFile(self.repo, self.commit, path, self.sizes[path]), label)

    def room(self, wanted: Mapping[str, Collection[str]]) -> Room:
        total: dict[Path, int] = {}
        for file, names in wanted.items():
            container = self.open(file)
            if isinstance(container, HubShard):
                for folder, nbytes in container.room(names).items():
                    total[folder] = total.get(folder, 0) + nbytes
        return total

    def fetch(self, wanted: Mapping[str, Collection[str]]) -> None:
        for file, names in wanted.items():
            container = self.open(file)
            if isinstance(container, HubShard):
                container.fetch(names, self.on_progress)

    def files(self, names: Sequence[str]) -> list[Path]:
        """Whole files on this disk, fetched if there is room for all of them."""
        paths = [self._path(name) for name in names]
        missing = [path for path in paths if in_cache(self.repo, self.commit, path) is None]
        check_room([{cache_of(self.repo): sum(self.sizes[one] for one in missing)}])
        return [self._download(name) for name in names]

    def folders_with(self, name: str) -> list[str]:
        """References to the folders of the repository right below with a file of that name."""
        prefix = f"{self.folder}/" if self.folder else ""
        below = (path[len(prefix) :] for path in sorted(self.sizes) if path.startswith(prefix))
        found = [one.removesuffix(f"/{name}") for one in below if one.endswith(f"/{name}")]
        return [f"hf://{_label(self.repo, self.commit, prefix + one)}" for one in found]

    def travelling(self) -> tuple[dict[str, Path], tuple[str, ...]]:
        return {name: self._download(name) for name in sorted(self.names()) if travels(name)}, ()

    def absent(self, shard: str, count: int) -> CheckpointError:
        return CheckpointError(
            f"`{self.label}`: the index names {shard}, which is not in the repository "
            f"({count} tensors); ask its owner, or give another revision"
        )

    def no_weights(self) -> CheckpointError:
        names = first_names(sorted(self.names())) or "no files"
        return CheckpointError(f"no weights geoscope can read in {self.label}; found: {names}")

    def _path(self, name: str) -> str:
        return f"{self.folder}/{name}" if self.folder else name

    def _download(self, name: str) -> Path:
        path = self._path(name)
        return download(self.repo, self.commit, path, self.sizes[path], self.on_progress)
