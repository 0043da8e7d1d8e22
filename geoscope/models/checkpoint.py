"""What is a checkpoint to the rest of geoscope? Headers now, one tensor at a time on demand."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from geoscope.errors import CheckpointError
from geoscope.formats.container import Container, byte_view
from geoscope.formats.disk import Room, check_room
from geoscope.formats.quantised import Quantised
from geoscope.formats.views import Blocks, View, gather
from geoscope.records import ModelRef, Quantisation, Rename, TensorInfo

if TYPE_CHECKING:
    import torch

__all__ = ["Checkpoint", "Source", "fetch_all"]

# Entries whose rounding is summed at a time.
_PART = 1 << 22


class Source(Protocol):
    """Where the weight files come from: a folder of this disk, or the Hub and its cache."""

    def room(self, wanted: Mapping[str, Collection[str]]) -> Room:
        """What fetching these tensors (file → names) would bring, and into which folders."""
        ...

    def fetch(self, wanted: Mapping[str, Collection[str]]) -> None: ...

    def open(self, file: str) -> Container:
        """The file, opened; it is fetched first when it is not here yet."""
        ...

    def travelling(self) -> tuple[Mapping[str, Path | bytes], tuple[str, ...]]:
        """Name → file, or its bytes, of the configuration and tokenizer beside the weights, and
        remarks."""
        ...


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A set of weights, known by its headers. Made by `open_checkpoint`.

    tensors: every tensor, sorted by name; shapes are (out, in). They are those of the files, but
    where `views` says of which stored tensor a name is a part. quantised: weight that is stored as
    codes and scales → how it is read.
    tied_to: name → the tensor that it repeats (tied embeddings, shared storage); a name that is not
    stored at all may stand there, too. notes: one-line remarks for the user.
    uncompared: what an adapter changes and the base has no tensor of, with the reason. renamed: its
    modules that the base has under another name.
    """

    ref: ModelRef
    config: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo]
    notes: tuple[str, ...]
    tied_to: Mapping[str, str]
    source: Source = field(repr=False)
    views: Mapping[str, View] = field(default_factory=dict[str, View], repr=False)
    quantised: Mapping[str, Quantised] = field(default_factory=dict[str, Quantised], repr=False)
    uncompared: tuple[tuple[TensorInfo, str], ...] = ()
    renamed: tuple[Rename, ...] = ()

    def __repr__(self) -> str:
        return f"<geoscope.{type(self).__name__} {self.ref.given}: {len(self.tensors)} tensors>"

    @property
    def tied(self) -> tuple[str, ...]:
        """Names that only repeat another tensor."""
        return tuple(self.tied_to)

    @property
    def stored(self) -> int:
        """How many tensors the files hold."""
        return len({self._stored(name) for name in self.tensors})

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
        """One tensor in its storage dtype, shape (out, in); codes with their scales, as fp32.

        With `buffer` (1-D uint8, at least `memory_bytes` long) the bytes are read into it and the
        result is a view of it; without one, memory of its own. A weight that is stored (in, out)
        comes back as a strided view.
        """
        info = self._info(name)
        if name not in self.views and name not in self.quantised:
            tensor = self.source.open(info.source).read(name, buffer)
        else:
            flat = self.read_part(name, 0, math.prod(info.shape))
            if buffer is not None:
                room = byte_view(flat.nbytes, buffer)
                flat = room.view(flat.dtype).copy_(flat)
            tensor = flat.reshape(info.shape[::-1] if info.transposed else info.shape)
        return tensor.T if info.transposed else tensor

    def read_part(self, name: str, begin: int, end: int) -> torch.Tensor:
        """Entries begin … end − 1 in the order of the file, 1-D, in the dtype of `read`.

        The order is that of (in, out) for a weight that is stored so; of a part of a stored tensor
        it is the order in which its entries stand there.
        """
        weight = self.quantised.get(self._stored(name))
        if weight is None:
            return self._gathered(name, begin, end, self._open(name).read_part)
        return self._gathered(
            name, begin, end, lambda _, first, last: weight.entries(self.source, first, last)
        )

    def rounding(self, name: str) -> Quantisation | None:
        """What storing a weight as codes rounded away: √(Σ(gap·scale)²/12).

        None for a weight that is stored otherwise: its entries tell their rounding themselves.
        """
        weight = self.quantised.get(self._stored(name))
        if weight is None:
            return None
        count = math.prod(self._info(name).shape)

        def energy(begin: int) -> float:
            end = min(begin + _PART, count)
            gaps = self._gathered(
                name, begin, end, lambda _, first, last: weight.gaps(self.source, first, last)
            )
            return float(gaps.double().square().sum())

        energies = (energy(begin) for begin in range(0, count, _PART))
        return weight.kind._replace(size=math.sqrt(math.fsum(energies) / 12))

    # --- what a base with an adapter over it answers for itself (peft/adapted.py)

    @property
    def is_adapted(self) -> bool:
        """Whether it is a base with an adapter over it."""
        return False

    @property
    def module_names(self) -> tuple[str, ...]:
        """What an adapter calls its modules, before they get the names of the base."""
        return ()

    def lies_over(self, base: Checkpoint) -> bool:
        """Whether its tensors are those of this base, changed as they are read."""
        return False

    def leaves(self, name: str) -> bool:
        """Whether the tensor is that of the base, unchanged."""
        return False

    def nominal_rank(self, name: str) -> int | None:
        """The rank that was asked for; None for a tensor that no product changes."""
        return None

    def update(self, base: Checkpoint, name: str) -> tuple[torch.Tensor, ...]:
        """What `FactorUpdate.of` takes where a product changes the base; else the weight alone."""
        return (self.read(name),)

    def parts_of_update(self, base: Checkpoint, name: str) -> int:
        """How many tensors `update` gives, without reading them."""
        return 1

    def over_rows(
        self, before: Checkpoint, base: Checkpoint, rows: Mapping[str, Blocks]
    ) -> Checkpoint:
        """The same where `base`, cut to these rows, takes the place of `before`."""
        return self

    def _gathered(
        self, name: str, begin: int, end: int, read: Callable[[str, int, int], torch.Tensor]
    ) -> torch.Tensor:
        """Entries of a tensor by those of the stored one: read(stored name, begin, end)."""
        view = self.views.get(name)
        if view is None:
            return read(name, begin, end)
        info = self._info(name)
        itemsize = -(-info.nbytes // max(1, math.prod(info.shape)))
        return gather(view, begin, end, partial(read, view.stored), itemsize=itemsize)

    def _open(self, name: str) -> Container:
        return self.source.open(self._info(name).source)

    def _stored(self, name: str) -> str:
        return self.views[name].stored if name in self.views else name

    def _by_file(self, names: Iterable[str]) -> dict[str, list[str]]:
        """File → stored tensors that these are read from."""
        found: dict[str, set[str]] = {}
        for name in names:
            stored = self._stored(name)
            weight = self.quantised.get(stored)
            parts = ((stored, self._info(name).source),)
            if weight is not None:
                parts = tuple((part.name, part.source) for part in weight.parts)
            for part, file in parts:
                found.setdefault(file, set()).add(part)
        return {file: sorted(found[file]) for file in sorted(found)}

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
