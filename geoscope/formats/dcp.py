"""How is a tensor of a DCP checkpoint read? Piece by piece, from where `.metadata` says it lies.

A piece is a stream of `torch.save` inside of a `.distcp` file: a zip archive with the raw bytes
uncompressed. Its header is loaded with `weights_only` and without data (`map_location="meta"`);
then the bytes are read straight into their place. Every length is checked against the file before
anything is allocated.
"""

from __future__ import annotations

import io
import math
import struct
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, cast

from geoscope.errors import CheckpointError, first_names
from geoscope.formats.container import FileHeader
from geoscope.formats.dcp_metadata import DcpTensor, Region
from geoscope.formats.links import refuse_link_to_elsewhere
from geoscope.formats.pieces import Fill, Piece, Pieced, read_part, read_whole

if TYPE_CHECKING:
    import torch

__all__ = ["DcpFolder"]

_LOCAL_HEADER = struct.Struct("<26xHH")


@dataclass
class DcpFolder:
    """The `.distcp` files of a folder, read as one file of whole tensors."""

    folder: Path
    label: str
    header: FileHeader = field(repr=False)
    stored: Mapping[str, Pieced[Region]] = field(repr=False)

    @classmethod
    def open(
        cls, path: Path, tensors: Mapping[str, DcpTensor], label: str, source: str
    ) -> DcpFolder:
        """tensors: those to be read, under the names to be given to them. source: what headers
        name as their file. Raises CheckpointError for files that are absent, cut, or elsewhere."""
        stored = {name: tensor.stored for name, tensor in tensors.items()}
        _check_files(path, stored, label)
        header = FileHeader({name: one.info(name, source) for name, one in stored.items()})
        return cls(path, label, header, stored)

    @property
    def paths(self) -> tuple[Path, ...]:
        """The files with pieces that are read."""
        pieces = (piece for one in self.stored.values() for piece in one.pieces)
        return tuple(self.folder / file for file in sorted({one.place.file for one in pieces}))

    def read(self, name: str, buffer: torch.Tensor | None) -> torch.Tensor:
        return read_whole(self.stored[name], self._filler(name), buffer)

    def read_part(self, name: str, begin: int, end: int) -> torch.Tensor:
        return read_part(self.stored[name], self._filler(name), begin, end)

    def _filler(self, name: str) -> Fill[Region]:
        dtype = self.stored[name].dtype

        def fill(target: torch.Tensor, piece: Piece[Region], begin: int, end: int) -> None:
            label = f"{self.label}/{piece.place.file}"
            try:
                with (self.folder / piece.place.file).open("rb") as file:
                    _fill(target, file, piece, begin, end, dtype, f"{label}: {name}")
            except OSError as error:
                raise CheckpointError(
                    f"{label}: {name} cannot be read: {error.strerror or error}"
                ) from None

        return fill


def _check_files(path: Path, stored: Mapping[str, Pieced[Region]], label: str) -> None:
    ends: dict[str, int] = {}
    for one in stored.values():
        for piece in one.pieces:
            region = piece.place
            ends[region.file] = max(ends.get(region.file, 0), region.begin + region.length)
    missing = sorted(file for file in ends if not (path / file).is_file())
    if missing:
        raise CheckpointError(
            f"`{label}`: {first_names(missing)} missing, of {len(ends)} .distcp files. The "
            "checkpoint is still being written, or the copy is incomplete; copy them too"
        )
    for file, end in sorted(ends.items()):
        refuse_link_to_elsewhere(path / file, label)
        size = (path / file).stat().st_size
        if end > size:
            raise CheckpointError(
                f"{label}/{file}: has {size} bytes, but its tensors need {end}; the file is "
                "incomplete, copy it again"
            )


# --- one piece ----------------------------------------------------------------------------------


def _fill(
    target: torch.Tensor,
    file: BinaryIO,
    piece: Piece[Region],
    begin: int,
    end: int,
    dtype: str,
    what: str,
) -> None:
    """Rows begin … end − 1 of the piece into `target`."""
    view = io.BufferedReader(_View(file, piece.place.begin, piece.place.length))
    start, held = _data(view, what)
    meta = _load(view, "meta", what)
    name = str(meta.dtype).removeprefix("torch.")
    shape = tuple(meta.shape) or (1,)
    outer = len(shape) - len(piece.sizes)  # of a stack that is read as one matrix
    if shape[:outer] != (1,) * outer or shape[max(outer, 0) :] != piece.sizes or name != dtype:
        raise _damaged(what, f"it is {name} {list(shape)}, needs {dtype} {list(piece.sizes)}")
    first = start + int(meta.storage_offset()) * meta.itemsize
    if first + meta.numel() * meta.itemsize > start + held:
        raise _damaged(what, "it claims more entries than are stored")
    if not meta.is_contiguous():
        target.copy_(_load(view, "cpu", what).reshape(piece.sizes)[begin:end])
        return
    width = math.prod(piece.sizes[1:]) * meta.itemsize
    rows = target if target.is_contiguous() else target.new_empty(target.shape)
    _read_into(rows, view, first + begin * width, what)
    if rows is not target:
        target.copy_(rows)


def _data(view: BinaryIO, what: str) -> tuple[int, int]:
    """Where the bytes of the one tensor in an archive begin, and how many there are."""
    try:
        archive = zipfile.ZipFile(view)
        entries = archive.infolist()
        (data,) = [entry for entry in entries if entry.filename.split("/")[1:2] == ["data"]]
        orders = [entry for entry in entries if entry.filename.endswith("/byteorder")]
        plain = all(entry.compress_type == zipfile.ZIP_STORED for entry in entries)
        if not plain or any(archive.read(order) != b"little" for order in orders):
            raise _damaged(what, "it is compressed, or in the byte order of another machine")
        view.seek(data.header_offset)
        lengths = _LOCAL_HEADER.unpack(view.read(_LOCAL_HEADER.size))
    except (zipfile.BadZipFile, ValueError, struct.error, NotImplementedError, RuntimeError):
        raise _damaged(what, "no archive of one tensor") from None
    return data.header_offset + _LOCAL_HEADER.size + sum(lengths), data.file_size


def _load(view: BinaryIO, device: str, what: str) -> torch.Tensor:
    """The tensor; on the device `meta` without its data."""
    import torch

    view.seek(0)
    try:
        loaded: Any = torch.load(view, map_location=device, weights_only=True)
    except MemoryError:
        raise
    except Exception as error:  # the weights-only unpickler meets junk with any exception
        raise _damaged(what, f"no stored tensor ({type(error).__name__})") from None
    if type(loaded) is not torch.Tensor:
        raise _damaged(what, f"it is a {type(loaded).__name__}, needs a tensor")
    return loaded


def _read_into(rows: torch.Tensor, view: BinaryIO, offset: int, what: str) -> None:
    import torch

    flat = rows.reshape(-1).view(torch.uint8)
    view.seek(offset)
    if cast(Any, view).readinto(flat.numpy().data) != flat.numel():
        raise _damaged(what, "the file ends inside of it")


class _View(io.RawIOBase):
    """A stretch of a file, as a file of its own."""

    def __init__(self, file: BinaryIO, begin: int, length: int) -> None:
        super().__init__()
        self._file, self._begin, self._length, self._at = file, begin, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._length}[whence]
        if start + offset < 0:
            raise OSError("before the beginning")
        self._at = start + offset
        return self._at

    def readinto(self, target: Any) -> int:
        room = memoryview(target).cast("B")[: max(0, self._length - self._at)]
        self._file.seek(self._begin + self._at)
        count = cast(Any, self._file).readinto(room)
        self._at += count
        return count


def _damaged(what: str, reason: str) -> CheckpointError:
    return CheckpointError(f"{what} is damaged: {reason}; copy the checkpoint again")
