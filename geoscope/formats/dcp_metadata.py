"""What does the `.metadata` of a DCP checkpoint say? Names, sizes, and which file holds which box.

torch pickles it, and reads it back with a `pickle.load` that runs anything. Here only the names of
DCP's own records pass, and each stands for an inert record of ours: nothing of torch is called. A
pickle that names anything else is refused.

    state_dict_metadata     {name: TensorStorageMetadata(properties, size, chunks)}
    storage_data            {MetadataIndex(name, offset): _StorageInfo(file, offset, length)}
    planner_data            {name: path of keys in the nested state dict}

Megatron's torch_dist is DCP with classes of Megatron in it, which are as inert. What belongs to a
trainer's state is named and not looked at: Megatron cuts its optimizer along no side.
"""

from __future__ import annotations

import io
import math
import pickle
import pickletools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from geoscope.errors import CheckpointError, UnsupportedFormat
from geoscope.foreign import reason, shown, small_bytes
from geoscope.formats.links import is_plain_name
from geoscope.formats.pieces import Piece, Pieced, flaw

__all__ = ["METADATA", "TRAINER_STATE", "DcpTensor", "Region", "is_dcp_file", "read_metadata"]

METADATA = ".metadata"
_MAX_BYTES = 1 << 30
_MEMO = {"PUT", "BINPUT", "LONG_BINPUT"}


def is_dcp_file(name: str) -> bool:
    """Whether a file belongs to a DCP checkpoint."""
    return name == METADATA or name.endswith(".distcp")


@dataclass(frozen=True)
class Region:
    """Bytes begin … begin + length − 1 of a file: one tensor as `torch.save` writes it."""

    file: str
    begin: int
    length: int


@dataclass(frozen=True)
class DcpTensor:
    """A tensor of the checkpoint. path: its keys in the nested state dict, outermost first."""

    name: str
    path: tuple[str, ...]
    stored: Pieced[Region]


TRAINER_STATE = re.compile(
    r"(?:app\.|chained_\d+\.)?(?:optim|optimizer|lr_scheduler|scheduler|rng|extra_state)", re.I
)
_UNREAD: Pieced[Region] = Pieced((), "", ())


def read_metadata(folder: Path, label: str) -> dict[str, DcpTensor]:
    """Every tensor by its name. Raises CheckpointError, which calls the folder `label`."""
    where = f"{label}/{METADATA}"
    root = _unpickled(folder / METADATA, where)
    try:
        return _tensors(root, where)
    except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError):
        raise _damaged(where, "it does not have the format of DCP") from None


# --- the pickle ---------------------------------------------------------------------------------


class _Record:
    """Stands for an object of the pickle: keeps what it would be made of, and does nothing."""

    def __new__(cls, *args: Any) -> _Record:
        made = object.__new__(cls)
        made.args, made.state = args, {}
        return made

    args: tuple[Any, ...]
    state: Any

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Tensor(_Record):
    """A TensorStorageMetadata."""


_DCP = "torch.distributed.checkpoint.metadata"
_KNOWN: dict[tuple[str, str], Any] = {
    **{
        (_DCP, name): _Record
        for name in (
            "BytesStorageMetadata",
            "ChunkStorageMetadata",
            "Metadata",
            "MetadataIndex",
            "StorageMeta",
            "TensorProperties",
            "_MEM_FORMAT_ENCODING",
        )
    },
    (_DCP, "TensorStorageMetadata"): _Tensor,
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"): _Record,
    ("torch.serialization", "_get_layout"): _Record,
    **{
        ("torch.distributed.checkpoint.planner", name): _Record
        for name in ("SavePlan", "TensorWriteData", "WriteItem", "WriteItemType")
    },
    ("torch", "Size"): tuple,
    **{
        (module, name): _Record
        for module in ("pathlib", "pathlib._local")
        for name in ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath", "Path")
    },
}


# Megatron's torch_dist keeps its plans and what it adds to them; none of it is needed.
_MEGATRON = "megatron.core.dist_checkpointing."


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        known = _KNOWN.get((module, name))
        if known is None and module.startswith(_MEGATRON):
            known = _Record
        if known is None and module == "torch":
            import torch

            value = getattr(torch, name, None)
            known = value if isinstance(value, torch.dtype | torch.layout) else None
        if known is None:
            raise pickle.UnpicklingError(f"{module}.{name}")
        return known


def _unpickled(path: Path, where: str) -> _Record:
    try:
        raw = small_bytes(path, _MAX_BYTES)
    except OSError as error:
        raise CheckpointError(f"{where}: cannot be read: {reason(error)}") from None
    try:
        _check_claims(raw)
        root = _Unpickler(io.BytesIO(raw)).load()
    except pickle.UnpicklingError as error:
        raise _foreign(where, str(error)) from None
    except Exception as error:  # the unpickler meets junk with any exception
        raise _damaged(where, f"no pickle ({type(error).__name__})") from None
    if not isinstance(root, _Record):
        raise _damaged(where, "it does not have the format of DCP")
    return root


def _check_claims(raw: bytes) -> None:
    """Lengths and places of the memo beyond the file: the unpickler would allocate them first."""
    for opcode, argument, _ in pickletools.genops(raw):
        if opcode.name in _MEMO and int(str(argument)) > len(raw):
            raise ValueError(f"place {argument} of the memo")


# --- its content --------------------------------------------------------------------------------


def _tensors(root: _Record, where: str) -> dict[str, DcpTensor]:
    places = {_key(index): info for index, info in root.state["storage_data"].items()}
    planned = root.state.get("planner_data")
    paths: Mapping[Any, Any] = planned if isinstance(planned, dict) else {}
    found: dict[str, DcpTensor] = {}
    for name, record in root.state["state_dict_metadata"].items():
        if isinstance(record, _Tensor):
            path = paths.get(name)
            keys = tuple(str(key) for key in path) if isinstance(path, tuple) else (str(name),)
            stored = _UNREAD
            if TRAINER_STATE.match(str(name)) is None:
                stored = _pieced(str(name), record, places, where)
            found[str(name)] = DcpTensor(str(name), keys, stored)
    return found


def _key(index: _Record) -> tuple[str, tuple[int, ...] | None]:
    offset = index.state.get("offset")
    return index.state["fqn"], None if offset is None else tuple(offset)


def _pieced(
    name: str, record: _Record, places: Mapping[Any, _Record], where: str
) -> Pieced[Region]:
    dtype = str(record.state["properties"].state[0]).removeprefix("torch.")
    shape = _counts(record.state["size"], name, where)
    pieces: list[Piece[Region]] = []
    for chunk in record.state["chunks"]:
        offsets = _counts(chunk.state["offsets"], name, where)
        sizes = _counts(chunk.state["sizes"], name, where)
        if not len(offsets) == len(sizes) == len(shape):
            raise _damaged(where, f"a piece of {name} has other dimensions than the tensor")
        region = _region(name, places.get((name, offsets)), where)
        pieces.append(Piece(offsets or (0,), sizes or (1,), region))
    wrong = flaw(shape, pieces)
    if wrong is not None:
        raise _damaged(where, f"{name}: {wrong}")
    stored = Pieced(shape, dtype, tuple(piece for piece in pieces if math.prod(piece.sizes)))
    held = {(one.place.file, one.place.begin): one.place.length for one in stored.pieces}
    if stored.nbytes > sum(held.values()):
        raise _damaged(where, f"{name} claims {stored.nbytes} bytes, {sum(held.values())} are kept")
    return stored


def _counts(value: Any, name: str, where: str) -> tuple[int, ...]:
    good = isinstance(value, tuple) and all(
        isinstance(one, int) and not isinstance(one, bool) and one >= 0 for one in value
    )
    if not good:
        raise _damaged(where, f"{name} has the impossible size {shown(value)}")
    return value


def _region(name: str, info: _Record | None, where: str) -> Region:
    if info is None:
        raise _damaged(where, f"no file is named for a piece of {name}")
    if info.state.get("transform_descriptors"):
        raise UnsupportedFormat(
            f"{where}: {name} is stored compressed ({info.state['transform_descriptors']}); save "
            "the checkpoint without transforms"
        )
    file = info.state["relative_path"]
    if not isinstance(file, str) or not is_plain_name(file):
        raise _damaged(
            where, f"{name} is placed in {shown(file)}, which is not a file of this folder"
        )
    begin, length = _counts((info.state["offset"], info.state["length"]), name, where)
    return Region(file, begin, length)


def _foreign(where: str, what: str) -> CheckpointError:
    return UnsupportedFormat(
        f"{where}: loading it needs `{what}`, which DCP metadata never contains; save the "
        "checkpoint again with torch.distributed.checkpoint"
    )


def _damaged(where: str, reason: str) -> CheckpointError:
    return CheckpointError(f"{where}: damaged: {reason}; copy the checkpoint again")
