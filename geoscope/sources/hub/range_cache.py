"""What of the Hub's files was fetched before, tensor by tensor?

    CACHE/hub/models--org--name/<commit>/listing.json         file → size, of the repository
    CACHE/hub/models--org--name/<commit>/<file>/header        the header of a safetensors file
    CACHE/hub/models--org--name/<commit>/<file>/<begin>-<end> the bytes of one tensor
    CACHE/hub/models--org--name/<commit>/<file>/*.part        so many of them, after a break

A commit never changes, so nothing here is ever stale. A file has its last name only when it is
complete, and one process at a time writes into a folder.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from types import TracebackType
from urllib.parse import quote

from geoscope.errors import CheckpointError
from geoscope.files import keep
from geoscope.folders import cache_folder
from geoscope.foreign import parsed, small_bytes, small_text
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


def tensors_folder() -> Path:
    """Where tensors of Hub models are kept."""
    return cache_folder() / "hub"


def commit_folder(repo: str, commit: str) -> Path:
    return tensors_folder() / f"models--{repo.replace('/', '--')}" / commit


def keep_listing(repo: str, commit: str, sizes: Mapping[str, int]) -> None:
    """Notes the files of a commit, for the time without a network."""
    path = commit_folder(repo, commit) / _LISTING
    if not path.exists():
        keep(path, json.dumps(dict(sizes)).encode())


def cached_listing(repo: str, commit: str) -> dict[str, int] | None:
    """File → size, or None where it was not noted; a damaged note counts as none."""
    try:
        sizes = parsed(small_text(commit_folder(repo, commit) / _LISTING))
    except (OSError, ValueError):
        return None
    is_listing = isinstance(sizes, dict) and all(
        isinstance(size, int) and size >= 0 for size in sizes.values()
    )
    return sizes if is_listing else None


def kept_tensors() -> Iterator[Path]:
    """The file of every tensor that is kept."""
    for path in sorted(tensors_folder().glob("models--*/*/*/*-*")):
        if not path.name.startswith(".") and path.suffix != _PART:
            yield path


def clear_tensors() -> int:
    """Removes everything; the number of tensors that were removed."""
    removed = sum(1 for _ in kept_tensors())
    shutil.rmtree(tensors_folder(), ignore_errors=True)
    return removed


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
            return small_bytes(self.folder / _HEADER)
        except OSError:
            return None

    def keep_header(self, raw: bytes) -> None:
        keep(self.folder / _HEADER, raw)

    def path(self, span: Span) -> Path:
        return self.folder / f"{span.begin}-{span.end}"

    def has(self, span: Span) -> bool:
        return span.begin == span.end or _size(self.path(span)) == span.end - span.begin

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
        self._part(piece.span).replace(self.path(piece.span))


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


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0
