"""What is a checkpoint to the rest of geoscope? Headers now, one tensor at a time on demand."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from geoscope.checkpoints.container import Container
from geoscope.checkpoints.disk import Room, check_room
from geoscope.errors import CheckpointError
from geoscope.records import ModelRef, TensorInfo

if TYPE_CHECKING:
    import torch

__all__ = ["Checkpoint", "Source", "fetch_all"]


class Source(Protocol):
    """Where the weight files come from: a folder of this disk, or the Hub and its cache."""

    def room(self, wanted: Mapping[str, Collection[str]]) -> Room:
        """What fetching these tensors (file → names) would bring, and into which folders."""
        ...

    def fetch(self, wanted: Mapping[str, Collection[str]]) -> None: ...

    def open(self, file: str) -> Container:
        """The file, opened; it is fetched first when it is not here yet."""
        ...

    def travelling(self) -> tuple[dict[str, Path], tuple[str, ...]]:
        """Name → file of the configuration and tokenizer beside the weights, and remarks."""
        ...


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A set of weights, known by its headers. Made by `open_checkpoint`.

    tensors: every stored tensor, sorted by name; shapes are (out, in).
    tied_to: name → the tensor that it repeats (tied embeddings, shared storage); a name that is not
    stored at all may stand there, too. notes: one-line remarks for the user.
    """

    ref: ModelRef
    config: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo]
    notes: tuple[str, ...]
    tied_to: Mapping[str, str]
    source: Source = field(repr=False)

    @property
    def tied(self) -> tuple[str, ...]:
        """Names that only repeat another tensor."""
        return tuple(self.tied_to)

    def bytes_to_fetch(self, names: Iterable[str]) -> int:
        """Bytes that `fetch` would bring onto this disk."""
        return sum(self.room(names).values())

    def room(self, names: Iterable[str]) -> Room:
        """Folder → bytes that `fetch` would write there."""
        return self.source.room(self._by_file(names))

    def fetch(self, names: Iterable[str]) -> None:
        """Bring these tensors onto this disk; raises CheckpointError when they do not fit."""
        fetch_all([(self, names)])

    def read(self, name: str, *, buffer: torch.Tensor | None = None) -> torch.Tensor:
        """One tensor in its storage dtype, shape (out, in).

        With `buffer` (1-D uint8, at least `nbytes` long) the bytes are read into it and the result
        is a view of it; without one, memory of its own. A weight that is stored (in, out) comes
        back as a strided view.
        """
        info = self._info(name)
        tensor = self.source.open(info.source).read(name, buffer)
        return tensor.T if info.transposed else tensor

    def read_part(self, name: str, begin: int, end: int) -> torch.Tensor:
        """Entries begin … end − 1 in the order of the file, 1-D, in the storage dtype.

        The order is that of (in, out) for a weight that is stored so.
        """
        return self.source.open(self._info(name).source).read_part(name, begin, end)

    def _by_file(self, names: Iterable[str]) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        for name in sorted(set(names)):
            found.setdefault(self._info(name).source, []).append(name)
        return dict(sorted(found.items()))

    def _info(self, name: str) -> TensorInfo:
        info = self.tensors.get(name)
        if info is None:
            raise CheckpointError(f"{self.ref.given}: holds no tensor {name}")
        return info


def fetch_all(wanted: Iterable[tuple[Checkpoint, Iterable[str]]]) -> None:
    """Brings tensors of several checkpoints onto this disk, if there is room for all of them.

    Raises CheckpointError, for a full disk before the first byte.
    """
    chosen = [(one, one._by_file(names)) for one, names in wanted]
    check_room(one.source.room(files) for one, files in chosen)
    for one, files in chosen:
        one.source.fetch(files)
