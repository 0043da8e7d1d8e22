"""What is a checkpoint to the rest of geoscope? Headers now, one tensor at a time on demand."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from geoscope.checkpoints.block_fp8 import BlockScale, scaled, spacings
from geoscope.checkpoints.container import Container, byte_view
from geoscope.checkpoints.views import View, gather
from geoscope.errors import CheckpointError
from geoscope.records import ModelRef, TensorInfo

if TYPE_CHECKING:
    import torch

__all__ = ["Checkpoint", "Source"]

# Entries whose rounding is summed at a time.
_PART = 1 << 22


class Source(Protocol):
    """Where the weight files come from: a folder of this disk, or the Hub and its cache."""

    def bytes_to_fetch(self, files: Collection[str]) -> int: ...

    def fetch(self, files: Collection[str]) -> None: ...

    def open(self, file: str) -> Container:
        """The file, opened; it is fetched first when it is not here yet."""
        ...

    def travelling(self) -> tuple[dict[str, Path], tuple[str, ...]]:
        """Name → file of the configuration and tokenizer beside the weights, and remarks."""
        ...


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A set of weights, known by its headers. Made by `open_checkpoint`.

    tensors: every tensor, sorted by name; shapes are (out, in). They are those of the files, but
    where `views` says of which stored tensor a name is a part. scales: stored FP8 weight → the
    scales of its blocks, with which it is read.
    tied_to: name → the tensor that it repeats (tied embeddings, shared storage); a name that is not
    stored at all may stand there, too. notes: one-line remarks for the user.
    """

    ref: ModelRef
    config: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo]
    notes: tuple[str, ...]
    tied_to: Mapping[str, str]
    source: Source = field(repr=False)
    views: Mapping[str, View] = field(default_factory=dict[str, View], repr=False)
    scales: Mapping[str, BlockScale] = field(default_factory=dict[str, BlockScale], repr=False)

    @property
    def tied(self) -> tuple[str, ...]:
        """Names that only repeat another tensor."""
        return tuple(self.tied_to)

    @property
    def stored(self) -> int:
        """How many tensors the files hold."""
        return len({self._stored(name) for name in self.tensors})

    def bytes_to_fetch(self, names: Iterable[str]) -> int:
        """Bytes of the files that hold these tensors and are not on this disk yet."""
        return self.source.bytes_to_fetch(self._files(names))

    def fetch(self, names: Iterable[str]) -> None:
        """Download the files that hold these tensors, and no others."""
        self.source.fetch(self._files(names))

    def read(self, name: str, *, buffer: torch.Tensor | None = None) -> torch.Tensor:
        """One tensor in its storage dtype, shape (out, in); FP8 with its scales, as fp32.

        With `buffer` (1-D uint8, at least `memory_bytes` long) the bytes are read into it and the
        result is a view of it; without one, memory of its own. A weight that is stored (in, out)
        comes back as a strided view.
        """
        info = self._info(name)
        if name not in self.views and name not in self.scales:
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
        stored = self._stored(name)
        scale = self.scales.get(stored)
        if scale is None:
            return self._gathered(name, begin, end, self._open(name).read_part)
        values = self._scale(scale)

        def entries(first: int, last: int) -> torch.Tensor:
            codes = self._open(name).read_part(stored, first, last)
            return scaled(codes.float(), first, values, scale)

        return self._gathered(name, begin, end, lambda _, first, last: entries(first, last))

    def rounding(self, name: str) -> float | None:
        """√(Σ(spacing·scale)²/12), the size of what storing a weight in FP8 blocks rounded away.

        None for a weight that is stored otherwise: its entries tell their rounding themselves.
        """
        stored = self._stored(name)
        scale = self.scales.get(stored)
        if scale is None:
            return None
        values = self._scale(scale)

        def entries(_: str, first: int, last: int) -> torch.Tensor:
            codes = self._open(name).read_part(stored, first, last)
            return scaled(spacings(codes), first, values, scale)

        count = math.prod(self._info(name).shape)
        squares = (
            float(
                self._gathered(name, begin, min(begin + _PART, count), entries)
                .double()
                .square()
                .sum()
            )
            for begin in range(0, count, _PART)
        )
        return math.sqrt(math.fsum(squares) / 12)

    def _gathered(
        self, name: str, begin: int, end: int, read: Callable[[str, int, int], torch.Tensor]
    ) -> torch.Tensor:
        """Entries of a tensor by those of the stored one: read(stored name, begin, end)."""
        view = self.views.get(name)
        if view is None:
            return read(name, begin, end)
        info = self._info(name)
        itemsize = info.nbytes // max(1, math.prod(info.shape))
        return gather(view, begin, end, partial(read, view.stored), itemsize=itemsize)

    def _open(self, name: str) -> Container:
        return self.source.open(self._info(name).source)

    def _scale(self, scale: BlockScale) -> torch.Tensor:
        return self.source.open(scale.stored.source).read(scale.stored.name, None)

    def _stored(self, name: str) -> str:
        return self.views[name].stored if name in self.views else name

    def _files(self, names: Iterable[str]) -> list[str]:
        files: set[str] = set()
        for name in names:
            files.add(self._info(name).source)
            if scale := self.scales.get(self._stored(name)):
                files.add(scale.stored.source)
        return sorted(files)

    def _info(self, name: str) -> TensorInfo:
        info = self.tensors.get(name)
        if info is None:
            raise CheckpointError(f"{self.ref.given}: holds no tensor {name}")
        return info
