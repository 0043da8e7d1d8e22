"""How is a model on the Hub opened without downloading it?

The revision is resolved to a commit once; every later call names that commit. One listing gives
files and sizes, a range request per shard gives its header, and only shards that hold wanted
tensors are downloaded, by name, into huggingface_hub's own cache. Offline, the commit comes from
the cached refs and everything else from the cached snapshot.

All of it goes through huggingface_hub, which is imported only here and only when needed. A token
comes from its environment or login; it is never taken as an argument and never printed.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from geoscope.checkpoints.checkpoint import Checkpoint
from geoscope.checkpoints.container import Container, FileHeader
from geoscope.checkpoints.hub_errors import hub_errors
from geoscope.checkpoints.hub_progress import Report, quiet_download
from geoscope.checkpoints.local import LocalFolder
from geoscope.checkpoints.opening import Identity, open_folder
from geoscope.checkpoints.output_folder import travels
from geoscope.checkpoints.readers import SAFETENSORS, open_container
from geoscope.checkpoints.reference import HubReference
from geoscope.checkpoints.safetensors_file import checked_entries, file_header
from geoscope.errors import CheckpointError, CheckpointNotFound, first_names

__all__ = ["HubFolder", "open_hub"]

_COMMIT = re.compile(r"[0-9a-f]{40}")
_TIMEOUT = 30.0
_HEADER_REQUESTS = 8


def open_hub(reference: HubReference, on_progress: Report | None) -> Checkpoint:
    """The checkpoint of a Hub model. Raises CheckpointError."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return _open_cached(reference)
    commit, sizes = _resolve(reference)
    folder = HubFolder(reference.repo, commit, reference.folder, sizes, on_progress)
    return open_folder(folder, Identity(reference.given, folder.label, commit))


def _resolve(reference: HubReference) -> tuple[str, dict[str, int]]:
    """The commit of the revision, and the size of every file of the repository."""
    from huggingface_hub import HfApi

    repo, revision = reference.repo, reference.revision
    with hub_errors(repo, revision or "main", branches=lambda: _branches(repo)):
        info = HfApi().model_info(repo, revision=revision, files_metadata=True, timeout=_TIMEOUT)
    if info.sha is None:
        raise CheckpointError(f"{repo}: the Hub names no commit; set HF_ENDPOINT to a real one")
    _remember(repo, revision or "main", info.sha)
    return info.sha, {file.rfilename: file.size or 0 for file in info.siblings or ()}


def _branches(repo: str) -> str:
    from huggingface_hub import HfApi

    try:
        return first_names([branch.name for branch in HfApi().list_repo_refs(repo).branches], 8)
    except Exception:  # only decorates an error that is raised anyway
        return ""


# --- the cache ----------------------------------------------------------------------------------


def _cache_of(repo: str) -> Path:
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    return Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=repo, repo_type="model")


def _remember(repo: str, revision: str, commit: str) -> None:
    """Note the commit of a branch in the cache, as downloads by branch name do.

    Our downloads name the commit, so nothing else would, and the model could not be found offline.
    """
    if revision == commit:
        return
    path = _cache_of(repo) / "refs" / revision
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(commit, encoding="utf-8")
        temporary.replace(path)
    except OSError:  # a cache that only others may write to
        return


def _open_cached(reference: HubReference) -> Checkpoint:
    revision = reference.revision or "main"
    cache = _cache_of(reference.repo)
    commit = revision if _COMMIT.fullmatch(revision) else _cached_commit(cache / "refs" / revision)
    if commit is None or not (cache / "snapshots" / commit).is_dir():
        raise CheckpointNotFound(f"offline, and {reference.repo}@{revision} is not cached.")
    label = _label(reference.repo, commit, reference.folder)
    path = cache / "snapshots" / commit / reference.folder
    if not path.is_dir():
        raise CheckpointNotFound(f"offline, and {label} is not cached.")
    folder = LocalFolder(path, reference.given, label)
    return open_folder(folder, Identity(reference.given, label, commit))


def _cached_commit(path: Path) -> str | None:
    try:
        commit = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return None
    return commit if _COMMIT.fullmatch(commit) else None


def _label(repo: str, commit: str, folder: str) -> str:
    return f"{repo}@{commit}/{folder}" if folder else f"{repo}@{commit}"


# --- a repository as a folder -------------------------------------------------------------------


@dataclass(frozen=True)
class HubFolder:
    """A folder of a Hub repository at one commit. `sizes` lists the whole repository."""

    repo: str
    commit: str
    folder: str
    sizes: Mapping[str, int] = field(repr=False)
    on_progress: Report | None = field(default=None, repr=False)
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
            return self._download(name).read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise CheckpointError(f"{self.label}/{name}: cannot be read: {error}") from None

    def headers(self, names: Sequence[str]) -> Mapping[str, FileHeader]:
        with ThreadPoolExecutor(max_workers=_HEADER_REQUESTS) as pool:
            return dict(zip(names, pool.map(self._header, names), strict=True))

    def _header(self, name: str) -> FileHeader:
        # A pickle has its header inside: there is no other way than to download it.
        if self._cached(name) is not None or not name.endswith(SAFETENSORS):
            return self.open(name).header
        with hub_errors(self.repo, self.commit, name):
            raw, metadata = _remote_header(self.repo, self._path(name), self.commit)
        entries = checked_entries(raw, f"{self.label}/{name}", None)
        return file_header(entries, metadata, name)

    def open(self, file: str) -> Container:
        if file not in self.opened:
            self.opened[file] = open_container(self._download(file), f"{self.label}/{file}")
        return self.opened[file]

    def bytes_to_fetch(self, files: Collection[str]) -> int:
        return sum(self.sizes[self._path(file)] for file in files if self._cached(file) is None)

    def fetch(self, files: Collection[str]) -> None:
        for file in files:
            self._download(file)

    def travelling(self) -> tuple[dict[str, Path], tuple[str, ...]]:
        return {name: self._download(name) for name in sorted(self.names()) if travels(name)}, ()

    def absent(self, shard: str, count: int) -> CheckpointError:
        return CheckpointError(
            f"`{self.label}`: the index names {shard}, which is not in the repository "
            f"({count} tensors); ask its owner, or give another revision"
        )

    def no_weights(self) -> CheckpointError:
        found = first_names(sorted(self.names())) or "no files"
        return CheckpointError(f"no weights geoscope can read in {self.label}; found: {found}")

    def _path(self, name: str) -> str:
        return f"{self.folder}/{name}" if self.folder else name

    def _cached(self, name: str) -> Path | None:
        from huggingface_hub import try_to_load_from_cache

        cached = try_to_load_from_cache(self.repo, self._path(name), revision=self.commit)
        return Path(cached) if isinstance(cached, str) else None

    def _download(self, name: str) -> Path:
        cached = self._cached(name)
        if cached is not None:
            return cached
        path = self._path(name)
        with hub_errors(self.repo, self.commit, name):
            return quiet_download(self.repo, path, self.commit, self.sizes[path], self.on_progress)


def _remote_header(repo: str, path: str, commit: str) -> tuple[dict[str, Any], dict[str, str]]:
    """The header of a safetensors file by range request, in the form that it has in the file."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import SafetensorsParsingError

    try:
        remote = HfApi().parse_safetensors_file_metadata(repo, path, revision=commit)
    except (AttributeError, TypeError, RecursionError) as error:  # JSON of another form than theirs
        raise SafetensorsParsingError(str(error)) from None
    raw = {
        name: {"dtype": info.dtype, "shape": info.shape, "data_offsets": info.data_offsets}
        for name, info in remote.tensors.items()
    }
    return raw, dict(remote.metadata or {})
