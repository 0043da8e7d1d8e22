"""What of the Hub's files was fetched before, tensor by tensor?

    CACHE/hub/models--org--name/<commit>/listing.json         file → size, of the repository
    CACHE/hub/models--org--name/<commit>/<file>/header        the header of a safetensors file
    CACHE/hub/models--org--name/<commit>/<file>/<begin>-<end> the bytes of one tensor
    CACHE/hub/models--org--name/<commit>/<file>/*.part        so many of them, after a break
    …/*.sha256                                                the checksum of each of the others

A commit never changes, so nothing here is ever stale. A file has its last name only when it is
complete, and one process at a time writes into a folder. What does not agree with its checksum is
not there: it is fetched again.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import lru_cache
from io import FileIO
from pathlib import Path
from types import TracebackType
from urllib.parse import quote

from geoscope.errors import CheckpointError
from geoscope.files import TEMPORARY, keep, own_entries, remove, remove_if_empty
from geoscope.folders import cache_folder
from geoscope.foreign import parsed, small_bytes, small_text
from geoscope.formats.hashes import file_sha256
from geoscope.sources.hub.byte_ranges import Piece, Run, Span

__all__ = [
    "RangeCache",
    "cached_listing",
    "clear_tensors",
    "commit_folder",
    "keep_listing",
    "kept_tensors",
    "tensors_folder",
]

_HEADER = "header"
_LISTING = "listing.json"
_PART = ".part"
_SUM = ".sha256"
_ANY, _REPO, _COMMIT = (re.compile(text) for text in (r".+", r"models--.+", r"[0-9a-f]{40}"))
_TENSOR = re.compile(r"[0-9]+-[0-9]+")
_OTHERS = re.compile(
    r"(?:header|listing\.json|[0-9]+-[0-9]+)\.sha256|header|listing\.json|\.lock|[0-9]+-[0-9]+\.part"
    rf"|\..+{re.escape(TEMPORARY)}"
)


def tensors_folder() -> Path:
    """Where tensors of Hub models are kept."""
    return cache_folder() / "hub"


def commit_folder(repo: str, commit: str) -> Path:
    return tensors_folder() / f"models--{repo.replace('/', '--')}" / commit


def keep_listing(repo: str, commit: str, sizes: Mapping[str, int]) -> None:
    """Notes the files of a commit, for the time without a network."""
    if cached_listing(repo, commit) is None:
        path = commit_folder(repo, commit) / _LISTING
        _keep_summed(path, json.dumps(dict(sizes)).encode())


def cached_listing(repo: str, commit: str) -> dict[str, int] | None:
    """File → size, or None where it was not noted; a damaged note counts as none."""
    try:
        sizes = parsed(_summed(commit_folder(repo, commit) / _LISTING))
    except (OSError, ValueError):
        return None
    is_listing = isinstance(sizes, dict) and all(
        isinstance(size, int) and size >= 0 for size in sizes.values()
    )
    return sizes if is_listing else None


def kept_tensors() -> Iterator[Path]:
    """The file of every tensor that is kept."""
    for _, folder in _folders():
        yield from own_entries(folder, _TENSOR)


def clear_tensors() -> int:
    """Removes all that is named as this cache names it; the number of tensors removed."""
    removed = 0
    for commit, folder in list(_folders()):
        removed += remove(own_entries(folder, _TENSOR))
        remove(own_entries(folder, _OTHERS))
        remove_if_empty(folder)
        remove(own_entries(commit, _OTHERS))
        remove_if_empty(commit)
        remove_if_empty(commit.parent)
    remove_if_empty(tensors_folder())
    return removed


def _folders() -> Iterator[tuple[Path, Path]]:
    """The folder of every commit and file, and that of the commit itself, no link among them."""
    for repo in own_entries(tensors_folder(), _REPO, folders=True):
        for commit in own_entries(repo, _COMMIT, folders=True):
            for folder in own_entries(commit, _ANY, folders=True):
                yield commit, folder
            yield commit, commit


@dataclass(frozen=True)
class RangeCache:
    """The kept tensors of one file at one commit."""

    folder: Path

    @classmethod
    def of(cls, repo: str, commit: str, file: str) -> RangeCache:
        return cls(commit_folder(repo, commit) / quote(file, safe=""))

    def header(self) -> bytes | None:
        """The first bytes of the file, as far as its header goes."""
        try:
            return _summed(self.folder / _HEADER)
        except OSError:
            return None

    def keep_header(self, raw: bytes) -> None:
        _keep_summed(self.folder / _HEADER, raw)

    def path(self, span: Span) -> Path:
        return self.folder / f"{span.begin}-{span.end}"

    def has(self, span: Span) -> bool:
        """Whether the bytes are here, as they came."""
        length = span.end - span.begin
        return length == 0 or (_size(self.path(span)) == length and _is_intact(self.path(span)))

    def missing(self, span: Span) -> Piece:
        """What of a span is still to be fetched, after a break from where it broke."""
        done = _size(self._part(span))
        return Piece(span, span.begin + (done if done < span.end - span.begin else 0))

    def lock(self) -> AbstractContextManager[object]:
        """Held while the folder is written to. Raises CheckpointError where that cannot be done."""
        from huggingface_hub.utils import WeakFileLock

        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / ".lock").touch()
        except OSError as error:
            raise CheckpointError(
                f"{self.folder}: cannot be written: {error.strerror or error}; set GEOSCOPE_CACHE "
                "to a folder that can be"
            ) from None
        return WeakFileLock(self.folder / ".lock")

    def sink(self, run: Run) -> Sink:
        """Takes the bytes of a run; under `lock`."""
        return Sink(self, run)

    def _part(self, span: Span) -> Path:
        return self.folder / f"{span.begin}-{span.end}{_PART}"

    def _open(self, piece: Piece) -> FileIO:
        file = FileIO(self._part(piece.span), "a")
        file.truncate(piece.start - piece.span.begin)
        return file

    def _complete(self, piece: Piece) -> None:
        part, path = self._part(piece.span), self.path(piece.span)
        keep(_sum_of(path), file_sha256(part).encode())
        part.replace(path)


class Sink:
    """The bytes of a run, in their order, into the files of its pieces; gaps are let go."""

    def __init__(self, cache: RangeCache, run: Run) -> None:
        self._cache = cache
        self._waiting = list(run.pieces)
        self._position = run.begin
        self._file: FileIO | None = None

    def __enter__(self) -> Sink:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._file is not None:
            self._file.close()

    def write(self, chunk: bytes) -> None:
        """The next bytes of the run. Raises OSError."""
        view = memoryview(chunk)
        while view and self._waiting:
            piece = self._waiting[0]
            if self._position < piece.start:  # in a gap
                passed = min(len(view), piece.start - self._position)
            else:
                self._file = self._file or self._cache._open(piece)
                passed = self._file.write(view[: piece.span.end - self._position])
            self._position += passed
            view = view[passed:]
            if self._position == piece.span.end:
                self._finish(piece)

    def _finish(self, piece: Piece) -> None:
        assert self._file is not None  # its last byte was just written
        self._file.close()
        self._file = None
        self._cache._complete(piece)
        del self._waiting[0]


def _sum_of(path: Path) -> Path:
    return path.with_name(f"{path.name}{_SUM}")


def _keep_summed(path: Path, content: bytes) -> None:
    keep(_sum_of(path), hashlib.sha256(content).hexdigest().encode())
    keep(path, content)


def _summed(path: Path) -> bytes:
    """A small file that agrees with its checksum. Raises OSError."""
    content = small_bytes(path)
    if hashlib.sha256(content).hexdigest() != small_text(_sum_of(path)):
        raise OSError(f"{path}: is not what was written")
    return content


def _is_intact(path: Path) -> bool:
    """Whether a file agrees with its checksum; it is read once, as long as it stays as it is."""
    try:
        changed = path.stat().st_mtime_ns
        return _digest(path, changed) == small_text(_sum_of(path))
    except (OSError, CheckpointError):
        return False


@lru_cache(maxsize=1 << 16)
def _digest(path: Path, _changed: int) -> str:
    return file_sha256(path)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0
