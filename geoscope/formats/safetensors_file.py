"""How is one safetensors file laid out, and how does one tensor get into memory?

8 bytes little-endian header length N · N bytes of JSON {name: {dtype, shape, data_offsets}} · data.
The offsets count from the end of the header, in order and without holes up to the end of the file.
Everything is checked before it is believed: a header is 100 MB at most, as in the safetensors
library. Data is read with `readinto`, not mapped: mapped pages count as memory of the process for
as long as the file stays open, and a reused buffer is faster than fresh pages.
"""

from __future__ import annotations

import math
import struct
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from geoscope.errors import CheckpointError
from geoscope.foreign import parsed, shown
from geoscope.formats.container import FileHeader, byte_view, other_file
from geoscope.records import TensorInfo

if TYPE_CHECKING:
    import torch

__all__ = [
    "DTYPES",
    "MAX_HEADER",
    "Entry",
    "Header",
    "SafetensorsFile",
    "checked_entries",
    "file_header",
    "header_length",
    "parse_header",
    "read_entry",
    "read_entry_part",
    "read_header",
]

MAX_HEADER = 100_000_000

# Name in the header → (name in torch, bits). Packed and 8-bit floats are known so that a file which
# holds them is refused by name and not as damaged.
DTYPES = {
    "F64": ("float64", 64),
    "F32": ("float32", 32),
    "F16": ("float16", 16),
    "BF16": ("bfloat16", 16),
    "I64": ("int64", 64),
    "I32": ("int32", 32),
    "I16": ("int16", 16),
    "I8": ("int8", 8),
    "U64": ("uint64", 64),
    "U32": ("uint32", 32),
    "U16": ("uint16", 16),
    "U8": ("uint8", 8),
    "BOOL": ("bool", 8),
    "C64": ("complex64", 64),
    "F8_E4M3": ("float8_e4m3fn", 8),
    "F8_E5M2": ("float8_e5m2", 8),
    "F8_E8M0": ("float8_e8m0fnu", 8),
    "F8_E4M3FNUZ": ("float8_e4m3fnuz", 8),
    "F8_E5M2FNUZ": ("float8_e5m2fnuz", 8),
    "F6_E2M3": ("float6_e2m3", 6),
    "F6_E3M2": ("float6_e3m2", 6),
    "F4": ("float4_e2m1", 4),
}


@dataclass(frozen=True)
class Entry:
    """One tensor of the header: dtype as torch spells it, offsets from the end of the header."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True)
class Header:
    """A checked header. `data_start` is where the data begins in the file."""

    entries: Mapping[str, Entry]
    metadata: Mapping[str, str]
    data_start: int


def read_header(path: Path, label: str) -> Header:
    """The header of a file on disk. Raises CheckpointError, which calls the file `label`."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = header_length(file.read(8), size, label)
            text = file.read(length)
    except OSError as error:
        raise CheckpointError(f"{label}: cannot be read: {error.strerror or error}") from None
    return parse_header(text, size, label)


def parse_header(text: bytes, size: int, label: str) -> Header:
    """The header from its JSON, checked against the `size` of the whole file.

    Raises CheckpointError.
    """
    raw = _parse(text, label)
    metadata = raw.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise _damaged(label, "__metadata__ is not a table of strings")
    data_start = 8 + len(text)
    return Header(checked_entries(raw, label, size - data_start), metadata, data_start)


def header_length(first: bytes, size: int, label: str, limit: int = MAX_HEADER) -> int:
    """Bytes of JSON that the first 8 bytes of a file of `size` bytes announce.

    Raises CheckpointError for more than `limit`, or than the file can hold.
    """
    if len(first) < 8:
        raise _damaged(label, f"the file has {size} bytes, a header needs 8")
    if first == b"version ":
        raise CheckpointError(
            f"{label}: a Git LFS pointer and not the weights; run `git lfs pull` in its folder"
        )
    (length,) = struct.unpack("<Q", first)
    if 8 + length > min(size, limit) and (other := other_file(first)) is not None:
        raise CheckpointError(f"{label}: {other} and not the weights; copy or download them again")
    if length > limit:
        raise _damaged(label, f"it claims {length} bytes, {limit} are allowed")
    if 8 + length > size:
        raise _damaged(label, f"it claims {length} bytes, the file has {size}")
    return length


def _parse(text: bytes, label: str) -> dict[str, Any]:
    try:
        raw = parsed(text.decode("utf-8"), object_pairs_hook=_without_repeats)
    except ValueError as error:
        raise _damaged(label, f"no valid JSON ({str(error).splitlines()[0]})") from None
    if not isinstance(raw, dict):
        raise _damaged(label, "the JSON is not a table")
    return raw


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        counts = Counter(name for name, _ in pairs)
        ((twice, _),) = counts.most_common(1)
        raise ValueError(f"{shown(twice)} occurs twice")
    return table


def checked_entries(raw: Mapping[str, Any], label: str, data_size: int | None) -> dict[str, Entry]:
    """The tensors of a parsed header, each checked alone and all against `data_size` bytes.

    Without a `data_size` (a header that came over the network) the end of the file is not checked.
    """
    entries = {name: _entry(name, value, label) for name, value in raw.items()}
    position = 0
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.begin != position:
            what = "overlaps its neighbour" if entry.begin < position else "leaves a hole before it"
            raise _damaged(label, f"{name} at byte {entry.begin} {what} (expected {position})")
        position = entry.end
    if data_size is not None and position != data_size:
        what = "is truncated" if data_size < position else "has bytes that belong to no tensor"
        raise _damaged(label, f"the file {what}: tensors end at {position}, data at {data_size}")
    return entries


def _entry(name: str, value: Any, label: str) -> Entry:
    try:
        dtype, shape, (begin, end) = value["dtype"], value["shape"], value["data_offsets"]
    except (TypeError, KeyError, ValueError):
        raise _damaged(label, f"{name} lacks dtype, shape or data_offsets") from None
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise _damaged(label, f"{name} has the unknown dtype {shown(dtype)}")
    if not isinstance(shape, (list, tuple)) or not all(_is_count(size) for size in shape):
        raise _damaged(label, f"{name} has the impossible shape {shown(shape)}")
    if not (_is_count(begin) and _is_count(end) and begin <= end):
        raise _damaged(label, f"{name} has the impossible offsets {shown([begin, end])}")
    spelled, bits = DTYPES[dtype]
    if math.prod(shape) * bits != (end - begin) * 8:
        raise _damaged(label, f"{name}: {dtype} {list(shape)} does not fill {end - begin} bytes")
    return Entry(spelled, tuple(shape), begin, end)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _damaged(label: str, reason: str) -> CheckpointError:
    return CheckpointError(f"{label}: header is damaged: {reason}; copy or download the file again")


def file_header(
    entries: Mapping[str, Entry], metadata: Mapping[str, str], source: str
) -> FileHeader:
    """The header in the terms that all formats share."""
    tensors = {
        name: TensorInfo(name, entry.shape, entry.dtype, entry.end - entry.begin, source)
        for name, entry in entries.items()
    }
    # safetensors.torch.save_model drops repeats of a shared tensor and writes {repeat: kept} here.
    shared = {
        name: kept for name, kept in metadata.items() if kept in tensors and name not in tensors
    }
    return FileHeader(tensors, shared)


@dataclass(frozen=True)
class SafetensorsFile:
    """A safetensors file on this disk. Holds no handle: each read opens and closes the file."""

    path: Path
    label: str
    parsed: Header
    header: FileHeader = field(repr=False)

    @classmethod
    def open(cls, path: Path, label: str) -> SafetensorsFile:
        parsed = read_header(path, label)
        return cls(path, label, parsed, file_header(parsed.entries, parsed.metadata, path.name))

    def read(self, name: str, buffer: torch.Tensor | None) -> torch.Tensor:
        entry = self.parsed.entries[name]
        place = self.path, self.parsed.data_start + entry.begin
        return read_entry(entry, place, buffer, f"{self.label}: {name}")

    def read_part(self, name: str, begin: int, end: int) -> torch.Tensor:
        entry = self.parsed.entries[name]
        place = self.path, self.parsed.data_start + entry.begin
        return read_entry_part(entry, place, begin, end, f"{self.label}: {name}")


def read_entry(
    entry: Entry, place: tuple[Path, int], buffer: torch.Tensor | None, label: str
) -> torch.Tensor:
    """A tensor whose bytes begin at an offset of a file. Raises CheckpointError."""
    import torch

    raw = byte_view(entry.end - entry.begin, buffer)
    _fill(raw.numpy().data, place, label)
    return raw.view(getattr(torch, entry.dtype)).reshape(entry.shape)


def read_entry_part(
    entry: Entry, place: tuple[Path, int], begin: int, end: int, label: str
) -> torch.Tensor:
    """Entries begin … end − 1 of a tensor whose bytes begin at an offset of a file, 1-D."""
    import torch

    path, offset = place
    width = (entry.end - entry.begin) // max(1, math.prod(entry.shape))
    raw = byte_view((end - begin) * width, None)
    _fill(raw.numpy().data, (path, offset + begin * width), label)
    return raw.view(getattr(torch, entry.dtype))


def _fill(target: memoryview, place: tuple[Path, int], label: str) -> None:
    path, offset = place
    if not target:
        return
    try:
        with path.open("rb", buffering=0) as file:
            file.seek(offset)
            while target:  # one call returns 2 GiB at most on Linux
                count = file.readinto(target)
                if not count:
                    raise CheckpointError(
                        f"{label}: the file ends inside it; it was changed while it was read"
                    )
                target = target[count:]
    except OSError as error:
        raise CheckpointError(f"{label}: cannot be read: {error.strerror or error}") from None
