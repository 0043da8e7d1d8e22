"""Which file of an adapter's folder holds its tensors? One, or shards with an index.

adapter_model.safetensors, adapter_model.bin           safetensors first, as PEFT chooses
adapter_model-00001-of-00002.safetensors, …            with adapter_model.safetensors.index.json
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from geoscope.errors import CheckpointError, CheckpointNotFound, UnsupportedFormat, first_names
from geoscope.foreign import INDEX, reason, small_text
from geoscope.formats.container import Container, FileHeader
from geoscope.formats.layout import weight_map
from geoscope.formats.links import refuse_link_to_elsewhere
from geoscope.formats.readers import open_container
from geoscope.peft.config import ADAPTER_CONFIG, ADAPTER_WEIGHTS

if TYPE_CHECKING:
    import torch

__all__ = ["adapter_files", "open_adapter_file"]

_INDEX = ".index.json"
_SHARD = re.compile(r"adapter_model-.*-of-")
_WEIGHTS = (ADAPTER_WEIGHTS, "adapter_model.bin")


@dataclass(frozen=True)
class _Shards:
    """Several files read as one. files: tensor → its shard, as the index says."""

    header: FileHeader
    files: Mapping[str, Container] = field(repr=False)

    def read(self, name: str, buffer: torch.Tensor | None) -> torch.Tensor:
        return self.files[name].read(name, buffer)

    def read_part(self, name: str, begin: int, end: int) -> torch.Tensor:
        return self.files[name].read_part(name, begin, end)


def open_adapter_file(folder: Path, given: str) -> Container:
    """The tensors of the adapter, from their headers. Raises CheckpointNotFound or CheckpointError,
    for shards without an index UnsupportedFormat."""
    first = adapter_files([entry.name for entry in folder.iterdir() if entry.is_file()], given)[0]
    if first.endswith(_INDEX):
        return _open_shards(folder, first, given)
    refuse_link_to_elsewhere(folder / first, given)
    return open_container(folder / first, f"{given}/{first}")


def adapter_files(names: Collection[str], given: str) -> tuple[str, ...]:
    """Of the files of a folder those that hold the tensors: one, or an index and its shards.

    Raises UnsupportedFormat for shards without an index, CheckpointNotFound.
    """
    shards = sorted(name for name in names if _SHARD.match(name))
    for name in _WEIGHTS:
        if name in names:
            return (name,)
        if f"{name}{_INDEX}" in names:
            suffix = name.rpartition(".")[2]
            return f"{name}{_INDEX}", *(shard for shard in shards if shard.endswith(suffix))
    if shards:
        raise UnsupportedFormat(
            f"{given}: the factors are in {len(shards)} shards ({first_names(shards, 1)}) without "
            f"{_WEIGHTS[0]}.index.json; copy the index beside them"
        )
    raise CheckpointNotFound(
        f"{given}: {ADAPTER_CONFIG} without factors; copy {' or '.join(_WEIGHTS)} beside it"
    )


def _open_shards(folder: Path, index: str, given: str) -> Container:
    label = f"{given}/{index}"
    try:
        text = small_text(folder / index, INDEX)
    except OSError as error:
        raise CheckpointError(f"{label}: cannot be read: {reason(error)}") from None
    placed = weight_map(text, label)
    absent = sorted(one for one in set(placed.values()) if not (folder / one).is_file())
    if absent:
        raise CheckpointNotFound(
            f"{label}: names {first_names(absent)}, which is not there; copy all shards"
        )
    opened = {one: open_container(folder / one, f"{given}/{one}") for one in set(placed.values())}
    lacking = [name for name, one in placed.items() if name not in opened[one].header.tensors]
    if lacking:
        raise CheckpointError(
            f"{label}: {len(lacking)} tensors are not in the shards that it names: "
            f"{first_names(sorted(lacking))}; copy index and shards again"
        )
    tensors = {name: opened[one].header.tensors[name] for name, one in placed.items()}
    return _Shards(FileHeader(tensors), {name: opened[one] for name, one in placed.items()})
