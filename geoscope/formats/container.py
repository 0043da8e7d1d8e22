"""What does every reader of a file of tensors offer, whatever the format?

A header (names, shapes, storage dtypes; no data) and one tensor at a time. A new format is one
more file with a class of this form, and one line in `readers.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from geoscope.errors import CheckpointError
from geoscope.foreign import shown
from geoscope.records import TensorInfo

if TYPE_CHECKING:
    import torch

__all__ = ["Container", "FileHeader", "byte_view", "files_of", "other_file"]

_LONGEST_NAME = 1000
# How other files begin that are saved under the name of weights.
_BEGINNINGS = {b"<": "a web page", b"PK\x03\x04": "a zip archive", b"GGUF": "a GGUF file"}


@dataclass(frozen=True)
class FileHeader:
    """The tensors of one file as they are stored.

    shared: name → name of the tensor in the same file whose storage it repeats.
    notes: one-line remarks for the user.
    Raises CheckpointError for a name that no module has.
    """

    tensors: Mapping[str, TensorInfo]
    shared: Mapping[str, str] = field(default_factory=dict[str, str])
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name, info in self.tensors.items():
            if len(name) > _LONGEST_NAME:
                raise CheckpointError(
                    f"{info.source}: a tensor has a name of {len(name)} letters, {shown(name)}; "
                    f"at most {_LONGEST_NAME} are read: save it under another name"
                )


class Container(Protocol):
    """One file of tensors that lies on this disk."""

    @property
    def header(self) -> FileHeader: ...

    def read(self, name: str, buffer: torch.Tensor | None) -> torch.Tensor:
        """The tensor in its storage dtype and shape, inside `buffer` when one is given."""
        ...

    def read_part(self, name: str, begin: int, end: int) -> torch.Tensor:
        """Entries begin … end − 1 of the tensor, in the order of the file, 1-D."""
        ...


def files_of(container: Container) -> tuple[Path, ...]:
    """The files that a container reads, as far as they lie on this disk."""
    path = getattr(container, "path", None)
    return getattr(container, "paths", () if path is None else (path,))


def other_file(first: bytes) -> str | None:
    """What a file is that begins like this and is none of its format, where that can be told."""
    if not first:
        return "an empty file"
    return next((words for begin, words in _BEGINNINGS.items() if first.startswith(begin)), None)


def byte_view(nbytes: int, buffer: torch.Tensor | None) -> torch.Tensor:
    """The first `nbytes` of the caller's buffer, or of a new one: uint8, (nbytes,)."""
    import torch

    if buffer is None:
        return torch.empty(nbytes, dtype=torch.uint8, device="cpu")
    if buffer.dtype != torch.uint8 or buffer.dim() != 1 or not buffer.is_contiguous():
        raise ValueError(f"buffer is {buffer.dtype}, {tuple(buffer.shape)}; needs 1-D uint8")
    if buffer.device.type != "cpu" or buffer.numel() < nbytes:
        raise ValueError(
            f"buffer holds {buffer.numel()} bytes on {buffer.device}; needs {nbytes} on the CPU"
        )
    return buffer[:nbytes]
