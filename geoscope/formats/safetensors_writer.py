"""How is a safetensors file written, one tensor at a time and with its header fixed beforehand?

Names, dtypes and shapes say all that the header holds, so its bytes and the size of the file are
known before any data is. The order is that of the safetensors library: wide dtypes first, then by
name. It keeps every tensor aligned, and equal input gives equal bytes. Tensors that do not change
are copied byte for byte out of their file in chunks; it is read, never mapped.
A file has a temporary name in its own folder until all of it is on the disk.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from geoscope import files
from geoscope.errors import CheckpointError
from geoscope.formats.safetensors_file import DTYPES, SafetensorsFile

if TYPE_CHECKING:
    import torch

__all__ = ["FilePlan", "TensorPlan", "TensorWriter", "replacing", "write_tensors"]

_CHUNK = 8 << 20
# Readers that map files, and torch's typed views, want data to start at a multiple of 8.
_ALIGNMENT = 8

# Name in torch → (name in the header, bytes), of the dtypes whose entries are whole bytes.
_CODES = {spelled: (code, bits // 8) for code, (spelled, bits) in DTYPES.items() if bits % 8 == 0}


@dataclass(frozen=True)
class TensorPlan:
    """A tensor to be written: dtype as torch spells it, and the shape that the file shows."""

    dtype: str
    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        if self.dtype not in _CODES:
            raise CheckpointError(
                f"dtype {self.dtype} has no place in a safetensors file; needed is one of "
                f"{', '.join(_CODES)}: convert the tensor first"
            )

    @classmethod
    def of(cls, tensor: torch.Tensor) -> TensorPlan:
        return cls(str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))

    @property
    def code(self) -> str:
        """The dtype as the header spells it."""
        return _CODES[self.dtype][0]

    @property
    def itemsize(self) -> int:
        """Bytes of one entry."""
        return _CODES[self.dtype][1]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.itemsize


@dataclass(frozen=True)
class FilePlan:
    """A safetensors file before its data: what goes in, and with that its header and its size.

    `metadata` are strings of ours beside {"format": "pt"}, without which transformers refuses the
    file.
    """

    tensors: Mapping[str, TensorPlan]
    metadata: Mapping[str, str] = field(default_factory=dict[str, str])

    @property
    def order(self) -> tuple[str, ...]:
        """Names in the order of the file: wide dtypes first, then by name."""
        return tuple(sorted(self.tensors, key=lambda name: (-self.tensors[name].itemsize, name)))

    @property
    def header(self) -> bytes:
        """Length and JSON, padded with spaces."""
        table: dict[str, object] = {"__metadata__": {"format": "pt", **self.metadata}}
        position = 0
        for name in self.order:
            tensor = self.tensors[name]
            offsets = [position, position + tensor.nbytes]
            table[name] = {
                "dtype": tensor.code,
                "shape": list(tensor.shape),
                "data_offsets": offsets,
            }
            position = offsets[1]
        text = files.encoded(json.dumps(table, separators=(",", ":"), ensure_ascii=False))
        text += b" " * (-len(text) % _ALIGNMENT)
        return struct.pack("<Q", len(text)) + text

    @property
    def data_bytes(self) -> int:
        """Bytes of all tensors; `metadata.total_size` of an index is the sum of these."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @property
    def nbytes(self) -> int:
        """Size of the file."""
        return len(self.header) + self.data_bytes


class TensorWriter:
    """Takes the tensors of a plan, in its order. Made by `write_tensors`."""

    def __init__(self, file: BinaryIO, plan: FilePlan, label: str) -> None:
        self._file = file
        self._plan = plan
        self._label = label
        self._waiting = list(reversed(plan.order))
        file.write(plan.header)

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """The next tensor, from memory; any device, any strides."""
        import torch

        planned = self._next(name)
        given = TensorPlan.of(tensor)
        if given != planned:
            raise ValueError(f"{self._label}: {name} is {given}, planned was {planned}")
        whole = tensor.detach().to("cpu").contiguous().reshape(-1)
        if whole.numel():
            self._file.write(whole.view(torch.uint8).numpy().data)

    def copy(self, name: str, source: SafetensorsFile) -> None:
        """The next tensor, byte for byte from the file that holds it under the same name."""
        planned, entry = self._next(name), source.parsed.entries[name]
        if (entry.dtype, entry.shape) != (planned.dtype, planned.shape):
            raise ValueError(f"{self._label}: {name} is {entry}, planned was {planned}")
        for chunk in _chunks(source, name):
            self._file.write(chunk)

    def finish(self) -> None:
        """Says that everything was written."""
        if self._waiting:
            raise ValueError(f"{self._label}: {len(self._waiting)} tensors were not written")

    def _next(self, name: str) -> TensorPlan:
        if not self._waiting or self._waiting[-1] != name:
            due = self._waiting[-1] if self._waiting else "nothing"
            raise ValueError(f"{self._label}: {name} was given, {due} is next")
        self._waiting.pop()
        return self._plan.tensors[name]


def _chunks(source: SafetensorsFile, name: str) -> Iterator[bytes]:
    """The bytes of a tensor as they stand in its file."""
    entry = source.parsed.entries[name]
    left = entry.end - entry.begin
    try:
        with source.path.open("rb", buffering=0) as file:
            file.seek(source.parsed.data_start + entry.begin)
            while left:
                chunk = file.read(min(left, _CHUNK))
                if not chunk:
                    raise CheckpointError(
                        f"{source.label}: ends inside {name}; it was changed while it was copied"
                    )
                left -= len(chunk)
                yield chunk
    except OSError as error:
        raise CheckpointError(
            f"{source.label}: {name} cannot be read: {error.strerror or error}"
        ) from None


@contextmanager
def write_tensors(path: Path, plan: FilePlan) -> Iterator[TensorWriter]:
    """A file at `path` once every tensor of the plan was written; else there is none."""
    with replacing(path) as file:
        writer = TensorWriter(file, plan, path.name)
        yield writer
        writer.finish()


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Like `files.replacing`. Raises CheckpointError."""
    try:
        with files.replacing(path) as file:
            yield file
    except OSError as error:
        raise CheckpointError(
            f"{path}: cannot be written: {error.strerror or error}; "
            "make room, or give another output folder"
        ) from None
