"""How are tensors read out of a PyTorch pickle (`.bin`, `.pt`, `.pth`) without running its code?

`torch.load(weights_only=True)` and nothing else: a pickle is a program, and a file that needs more
than tensors and containers is refused. The file is mapped, so that opening it costs no memory, and
the mapping is dropped now and then, because mapped pages count as memory of the process. Tensors
that share one storage are tied: one is kept, the others point to it.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from geoscope.errors import CheckpointError, UnsupportedFormat
from geoscope.foreign import shown
from geoscope.formats.container import FileHeader, byte_view, other_file
from geoscope.formats.refused import odd_shards, refusal
from geoscope.names import is_output_head
from geoscope.records import TensorInfo

if TYPE_CHECKING:
    import torch

__all__ = ["PickleFile", "load_pickle", "load_tensors", "mapped_limit", "shared_storage"]

# Wrappers that training scripts put around the weights.
_NESTS = ("state_dict", "model_state_dict", "model")

_NONE: Mapping[str, type] = {}
_LOCK = threading.Lock()

_MAPPED_LIMIT = 64 << 20
_MAPPED_LEAST = 8 << 20


def mapped_limit(files: int = 1) -> int:
    """Mapped bytes of each of so many files that may be touched before its mapping is renewed."""
    return max(_MAPPED_LIMIT // files, _MAPPED_LEAST)


@dataclass
class PickleFile:
    """A PyTorch pickle on this disk."""

    path: Path
    label: str
    header: FileHeader = field(repr=False)
    _loaded: dict[str, torch.Tensor] | None = field(default=None, repr=False)
    _touched: int = 0

    @classmethod
    def open(cls, path: Path, label: str) -> PickleFile:
        tensors, notes = load_tensors(path, label)
        _refuse_parts(tensors, label)
        infos = {name: _info(name, tensor, path.name) for name, tensor in tensors.items()}
        return cls(path, label, FileHeader(infos, shared_storage(tensors), notes))

    def read(self, name: str, buffer: torch.Tensor | None) -> torch.Tensor:
        mapped = self._tensors()[name]
        nbytes = self.header.tensors[name].nbytes
        self._touched += nbytes
        raw = byte_view(nbytes, buffer)
        return raw.view(mapped.dtype).reshape(mapped.shape).copy_(mapped)

    def read_part(self, name: str, begin: int, end: int) -> torch.Tensor:
        mapped = self._tensors()[name]
        self._touched += (end - begin) * mapped.element_size()
        return mapped.reshape(-1)[begin:end].clone()

    def __getstate__(self) -> dict[str, Any]:
        """Another process maps the file for itself."""
        return {**self.__dict__, "_loaded": None}

    def _tensors(self) -> dict[str, torch.Tensor]:
        if self._loaded is None or (
            self._touched > mapped_limit() and _is_zip(self.path, self.label)
        ):
            self._loaded, self._touched = load_tensors(self.path, self.label)[0], 0
        return self._loaded


def _is_zip(path: Path, label: str) -> bool:
    """Whether it is the format of torch 1.6 and later; the older one cannot be mapped."""
    try:
        with path.open("rb") as file:
            return file.read(4) == b"PK\x03\x04"
    except OSError as error:
        raise CheckpointError(f"{label}: cannot be read: {error.strerror or error}") from None


def load_tensors(path: Path, label: str) -> tuple[dict[str, torch.Tensor], tuple[str, ...]]:
    """The named tensors of a file, mapped where its format allows, and remarks.

    Raises CheckpointError. Parts of distributed tensors come back as DTensor, once the caller has
    imported `torch.distributed.tensor`; without that they are refused.
    """
    loaded, mappable = load_pickle(path, label)
    tensors, notes = _unwrap(loaded, label)
    if not mappable:
        notes = (*notes, f"{label}: in PyTorch's format before 1.6, read into memory as a whole")
    return tensors, notes


def load_pickle(path: Path, label: str, inert: Mapping[str, type] = _NONE) -> tuple[Any, bool]:
    """What a file holds under `weights_only`, and whether it is mapped.

    inert: qualified name of a class that the file may name → ours that is made in its place.
    Raises CheckpointError.
    """
    import torch

    mappable = _is_zip(path, label)
    known: list[Any] = [(one, name) for name, one in inert.items()]
    try:
        # safe_globals puts back the list of the whole process when it ends
        with _LOCK, warnings.catch_warnings(), torch.serialization.safe_globals(known):
            warnings.simplefilter("ignore")  # of torch about old pickles; nothing to be done here
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mappable), mappable
    except MemoryError:
        raise
    except Exception as error:  # the weights-only unpickler meets junk with any exception
        raise _refusal(error, path, label) from None


def _refusal(error: Exception, path: Path, label: str) -> CheckpointError:
    reason = str(error)
    with path.open("rb") as file:
        first = file.read(8)
    if first == b"version ":
        return CheckpointError(
            f"{label}: a Git LFS pointer and not the weights; run `git lfs pull` in its folder"
        )
    if "sharded_tensor" in reason:
        folder = label.rpartition("/")[0] or "."
        return refusal(folder, odd_shards(f"{path.name} is a pickle of ShardedTensor"))
    if "torch.distributed.tensor" in reason:
        return _parts_error(label)
    if "Weights only load failed" in reason and "Unsupported operand" not in reason:
        return UnsupportedFormat(
            f"{label}: loading this file would run code stored in it; convert it to safetensors"
        )
    what = other_file(first) or type(error).__name__
    return CheckpointError(
        f"{label}: no PyTorch file, or a damaged one ({what}); copy or download it again"
    )


def _refuse_parts(tensors: Mapping[str, torch.Tensor], label: str) -> None:
    import torch

    if any(type(value) not in (torch.Tensor, torch.nn.Parameter) for value in tensors.values()):
        raise _parts_error(label)


def _parts_error(label: str) -> CheckpointError:
    return UnsupportedFormat(
        f"{label}: holds the parts of one rank only (DTensor). geoscope needs all ranks: "
        "give the folder of model_world_size_*_rank_*.pt files"
    )


def _unwrap(loaded: Any, label: str) -> tuple[dict[str, torch.Tensor], tuple[str, ...]]:
    """The table of tensors inside what was loaded: itself, or under one of the usual keys."""
    import torch

    notes: list[str] = []
    table, opened = loaded, {id(loaded)}
    while isinstance(table, Mapping):
        nest = next((key for key in _NESTS if isinstance(table.get(key), Mapping)), None)
        if nest is None or id(table[nest]) in opened:  # it may hold itself
            break
        notes.append(f"{label}: weights taken from the entry {nest!r}")
        table = table[nest]
        opened.add(id(table))
    if not isinstance(table, Mapping):
        raise CheckpointError(f"{label}: holds {type(table).__name__}, needs a table of tensors")
    tensors = {
        str(name): _detached(value)
        for name, value in table.items()
        if isinstance(value, torch.Tensor) and _is_dense(value)
    }
    if not tensors:
        raise CheckpointError(f"{label}: {_without_tensors(table)}")
    if len(tensors) < len(table):
        rest = len(table) - len(tensors)
        notes.append(f"{label}: {rest} entries that are no dense tensors are passed over")
    return tensors, tuple(notes)


def _without_tensors(table: Mapping[Any, Any]) -> str:
    """What a table holds that has no dense tensor."""
    import torch

    others = (pair for pair in table.items() if isinstance(pair[1], torch.Tensor))
    for name, value in others:
        kind = "meta" if value.device.type == "meta" else str(value.layout).removeprefix("torch.")
        kind = "quantised" if value.is_quantized else "nested" if value.is_nested else kind
        return f"holds no dense tensors; {shown(name)} is a {kind} tensor: save the weights densely"
    return f"holds no tensors among its {len(table)} entries; give a file of weights"


def _is_dense(value: torch.Tensor) -> bool:
    """Whether it holds its entries: no sparse, nested or quantised one, and none without data."""
    import torch

    is_plain = value.layout == torch.strided and not value.is_nested and not value.is_quantized
    return is_plain and value.device.type != "meta"


def _detached(value: torch.Tensor) -> torch.Tensor:
    """The entries alone: what is copied from a parameter would want gradients, too."""
    import torch

    return value.detach() if type(value) in (torch.Tensor, torch.nn.Parameter) else value


def _info(name: str, tensor: torch.Tensor, source: str) -> TensorInfo:
    nbytes = tensor.numel() * tensor.element_size()
    return TensorInfo(
        name, tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."), nbytes, source
    )


def shared_storage(tensors: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """name → the name it repeats, for tensors that are the same view of the same storage.

    Kept is the shortest path that is not an output head: the embedding of a tied pair, and the name
    that transformers keeps where several modules share one.
    """
    kept: dict[tuple[Any, ...], str] = {}
    shared: dict[str, str] = {}
    for name in sorted(tensors, key=lambda name: (is_output_head(name), name.count("."), name)):
        tensor = tensors[name]
        if tensor.numel() == 0:
            continue
        view = (tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())
        if view in kept:
            shared[name] = kept[view]
        else:
            kept[view] = name
    return shared
