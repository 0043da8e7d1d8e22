"""How is a safetensors file on the Hub read without all of it?

Its header comes by a range request; each tensor is a range of its own, fetched when it is wanted
and kept. Where most of the file is wanted, or the server knows no ranges, the whole file goes into
huggingface_hub's cache instead. From wherever a tensor then lies on this disk, it is read as from
any other file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from geoscope.formats.container import FileHeader
from geoscope.formats.disk import Room, check_room
from geoscope.formats.safetensors_file import (
    Header,
    file_header,
    header_length,
    parse_header,
    read_entry,
    read_entry_part,
)
from geoscope.sources.hub.byte_ranges import WHOLE, Run, Span, runs
from geoscope.sources.hub.cache import cache_of, download, in_cache
from geoscope.sources.hub.progress import OnDownload, ignore
from geoscope.sources.hub.range_cache import RangeCache
from geoscope.sources.hub.ranges import RemoteFile

if TYPE_CHECKING:
    import torch

__all__ = ["HubShard"]

MAX_HEADER = 25_000_000  # as huggingface_hub allows
_FIRST = 100_000  # bytes of the first request: nearly all headers are shorter


@dataclass(frozen=True)
class HubShard:
    """A safetensors file on the Hub, of which the header is known."""

    label: str
    parsed: Header
    header: FileHeader = field(repr=False)
    remote: RemoteFile = field(repr=False)
    cache: RangeCache = field(repr=False)
    without_ranges: list[bool] = field(default_factory=list[bool], repr=False)

    @classmethod
    def open(cls, remote: RemoteFile, label: str) -> HubShard:
        """From the header alone. Raises CheckpointError."""
        cache = RangeCache.of(remote.repo, remote.commit, remote.path)
        raw = cache.header()
        kept = raw is not None
        raw = raw if raw is not None else _fetched_header(remote, label)
        parsed = parse_header(raw[8:], remote.size, label)
        if not kept:
            cache.keep_header(raw)
        name = remote.path.rpartition("/")[2]
        header = file_header(parsed.entries, parsed.metadata, name)
        return cls(label, parsed, header, remote, cache)

    @property
    def path(self) -> Path | None:
        """The whole file on this disk, if it is there."""
        return in_cache(self.remote.repo, self.remote.commit, self.remote.path)

    def room(self, names: Iterable[str]) -> Room:
        """What fetching these tensors would bring, and into which folder."""
        if self.path is not None:
            return {}
        found = self._runs(names)
        if self._wants_whole(found):
            return {cache_of(self.remote.repo): self.remote.size}
        return {self.cache.folder: sum(run.nbytes for run in found)}

    def fetch(self, names: Iterable[str], on_progress: OnDownload | None) -> None:
        """Brings these tensors here. Raises CheckpointError."""
        if self.path is not None or not self._runs(names):
            return
        with self.cache.lock():
            found = self._runs(names)  # another process may have brought them meanwhile
            if not found:
                return
            if not self._wants_whole(found) and self._fetch_runs(found, on_progress or ignore):
                return
        if not self._wants_whole(found):
            self.without_ranges.append(True)
            check_room([{cache_of(self.remote.repo): self.remote.size}])
        one = self.remote
        download(one.repo, one.commit, one.path, one.size, on_progress)

    def read(self, name: str, buffer: torch.Tensor | None) -> torch.Tensor:
        entry = self.parsed.entries[name]
        return read_entry(entry, self._place(name), buffer, f"{self.label}: {name}")

    def read_part(self, name: str, begin: int, end: int) -> torch.Tensor:
        entry = self.parsed.entries[name]
        return read_entry_part(entry, self._place(name), begin, end, f"{self.label}: {name}")

    def _place(self, name: str) -> tuple[Path, int]:
        """File and offset of a tensor's bytes on this disk; it is fetched when it is not here."""
        span = self._span(name)
        if not self.cache.has(span) and self.path is None:
            self.fetch([name], None)
        path = self.path
        return (self.cache.path(span), 0) if path is None else (path, span.begin)

    def _span(self, name: str) -> Span:
        entry, start = self.parsed.entries[name], self.parsed.data_start
        return Span(start + entry.begin, start + entry.end)

    def _runs(self, names: Iterable[str]) -> tuple[Run, ...]:
        """The requests for what is missing."""
        spans = {self._span(name) for name in names}
        missing = [self.cache.missing(span) for span in spans if not self.cache.has(span)]
        return runs(missing)

    def _wants_whole(self, found: tuple[Run, ...]) -> bool:
        wanted = sum(run.nbytes for run in found)
        return bool(self.without_ranges) or wanted >= WHOLE * self.remote.size

    def _fetch_runs(self, found: tuple[Run, ...], report: OnDownload) -> bool:
        """False when the server knows no ranges."""
        total, done = sum(run.nbytes for run in found), 0
        report(self.remote.path, 0, total)
        for run in found:
            with self.cache.sink(run) as sink:

                def keep(chunk: bytes, write: Callable[[bytes], None] = sink.write) -> None:
                    nonlocal done
                    write(chunk)
                    done += len(chunk)
                    report(self.remote.path, done, total)

                if not self.remote.read(run.begin, run.end, keep):
                    return False
        return True


def _fetched_header(remote: RemoteFile, label: str) -> bytes:
    """The first 8 + N bytes of the file."""
    raw = bytearray()
    remote.read(0, min(_FIRST, remote.size), raw.extend)
    end = 8 + header_length(bytes(raw[:8]), remote.size, label, MAX_HEADER)
    if end > len(raw):
        remote.read(len(raw), end, raw.extend, passing=MAX_HEADER)
    return bytes(raw[:end])
