"""How are the FSDP shards of verl read as one model? One file of each rank, put together by name.

    model_world_size_4_rank_0.pt … model_world_size_4_rank_3.pt      {name: DTensor}
    fsdp_config.json                                                 {"world_size": 4, …}

A DTensor tells its global shape, the mesh of ranks, and for each dimension of the mesh whether the
tensor is repeated (Replicate) or split (Shard(dim)) along it. Read are meshes with one split: the
parts of one replica, in the order of the mesh, uneven or empty. Plain tensors with equal bytes on
all ranks are repeated; others are parts of the rows, and only where the sum is what config.json
asks for.

The files are mapped and opened with `weights_only`; no process group is needed. Data is touched
when a tensor is read, in the dtype stored.
"""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from geoscope.errors import CheckpointError, first_names
from geoscope.foreign import parsed, reason, shown, small_text
from geoscope.formats.container import FileHeader
from geoscope.formats.links import refuse_link_to_elsewhere
from geoscope.formats.pickle_file import load_tensors, mapped_limit, shared_storage
from geoscope.formats.pieces import Fill, Piece, Pieced, read_part, read_whole
from geoscope.formats.rank_parts import joined

if TYPE_CHECKING:
    import torch

__all__ = ["FsdpShards", "is_rank_file", "rank_files"]

_RANK_FILE = re.compile(r"model_world_size_([0-9]{1,6})_rank_([0-9]{1,6})\.pt")
_WORLD = "fsdp_config.json"


def is_rank_file(name: str) -> bool:
    """Whether a file holds the weights of one rank."""
    return _RANK_FILE.fullmatch(name) is not None


def rank_files(folder: Path, names: Collection[str], label: str) -> tuple[str, ...]:
    """The files of all ranks, in order. Raises CheckpointError when one is not there."""
    found: dict[int, set[int]] = {}
    for name in names:
        match = _RANK_FILE.fullmatch(name)
        if match is not None:
            found.setdefault(int(match[1]), set()).add(int(match[2]))
    world = _world_size(folder, label) if _WORLD in names else None
    if world is None and len(found) > 1:
        raise CheckpointError(
            f"`{label}`: holds shards of {len(found)} saves "
            f"({' and '.join(map(str, sorted(found)))} ranks); move the shards of all but one save "
            "away"
        )
    if world is None:
        world = next(iter(found))
    if world not in found:
        raise CheckpointError(
            f"`{label}`: {_WORLD} says {world} ranks, and the shards are of {min(found)}; "
            "the folder mixes two saves: copy it again"
        )
    files = [f"model_world_size_{world}_rank_{rank}.pt" for rank in range(world)]
    missing = [files[rank] for rank in range(world) if rank not in found[world]]
    if missing:
        raise CheckpointError(
            f"`{label}`: {len(missing)} of {world} rank files are not there "
            f"({first_names(missing)}); still being written, or cut: copy them, too"
        )
    return tuple(files)


def _world_size(folder: Path, label: str) -> int | None:
    """What fsdp_config.json says; None when it says nothing."""
    try:
        value = parsed(small_text(folder / _WORLD))
    except (OSError, ValueError) as error:
        why = reason(error) if isinstance(error, OSError) else str(error).splitlines()[0]
        raise CheckpointError(f"{label}/{_WORLD}: cannot be read: {why}") from None
    world = value.get("world_size") if isinstance(value, dict) else None
    if world is None:
        return None
    if not isinstance(world, int) or isinstance(world, bool) or world < 1:
        raise CheckpointError(
            f"{label}/{_WORLD}: world_size is {shown(world)}, needs a number of ranks"
        )
    return world


@dataclass
class FsdpShards:
    """The files of all ranks on this disk, read as one file of whole tensors."""

    paths: tuple[Path, ...]
    labels: tuple[str, ...]
    header: FileHeader = field(repr=False)
    stored: Mapping[str, Pieced[int]] = field(repr=False)
    _loaded: list[dict[str, torch.Tensor] | None] = field(repr=False)
    _touched: list[int] = field(repr=False)

    @classmethod
    def open(
        cls, folder: Path, files: Sequence[str], label: str, source: str, config: Mapping[str, Any]
    ) -> FsdpShards:
        """The shards in `files`, one of each rank. source: what headers name as their file.

        Raises CheckpointError, UnsupportedFormat for tensors that are split in other ways.
        """
        for file in files:
            refuse_link_to_elsewhere(folder / file, label)
        paths = tuple(folder / file for file in files)
        labels = tuple(f"{label}/{file}" for file in files)
        ranks = [_load(path, one) for path, one in zip(paths, labels, strict=True)]
        stored = joined([tensors for tensors, _ in ranks], config, label)
        header = FileHeader(
            {name: one.info(name, source) for name, one in stored.items()},
            shared_storage({name: _local(value) for name, value in ranks[0][0].items()}),
            tuple(dict.fromkeys(note for _, notes in ranks for note in notes)),
        )
        # Plain tensors were compared with one another, and what was touched counts as memory.
        compared = any(not hasattr(value, "_spec") for value in ranks[0][0].values())
        loaded: list[dict[str, torch.Tensor] | None] = [
            None if compared else tensors for tensors, _ in ranks
        ]
        return cls(paths, labels, header, stored, loaded, [0] * len(files))

    def read(self, name: str, buffer: torch.Tensor | None) -> torch.Tensor:
        return read_whole(self.stored[name], self._filler(name), buffer)

    def read_part(self, name: str, begin: int, end: int) -> torch.Tensor:
        return read_part(self.stored[name], self._filler(name), begin, end)

    def _filler(self, name: str) -> Fill[int]:
        def fill(target: torch.Tensor, piece: Piece[int], begin: int, end: int) -> None:
            local = self._tensors(piece.place)[name]
            rows = _local(local).reshape(piece.sizes) if not local.dim() else _local(local)
            target.copy_(rows[begin:end])
            self._touched[piece.place] += target.numel() * target.element_size()

        return fill

    def _tensors(self, rank: int) -> dict[str, torch.Tensor]:
        """Those of one rank; the mapping is renewed now and then, because its pages count."""
        loaded = self._loaded[rank]
        if loaded is None or self._touched[rank] > mapped_limit(len(self.paths)):
            loaded = _load(self.paths[rank], self.labels[rank])[0]
            self._loaded[rank], self._touched[rank] = loaded, 0
        return loaded

    def __getstate__(self) -> dict[str, Any]:
        """Another process maps the files for itself."""
        return {**self.__dict__, "_loaded": [None] * len(self.paths)}


def _load(path: Path, label: str) -> tuple[dict[str, torch.Tensor], tuple[str, ...]]:
    import torch.distributed.tensor  # noqa: F401  (makes weights_only know DTensor)

    with _without_word_of_process_groups():
        return load_tensors(path, label)


@contextlib.contextmanager
def _without_word_of_process_groups() -> Iterator[None]:
    """torch logs once a mesh that the groups it was made with are not here."""
    logger = logging.getLogger("torch.distributed.device_mesh")
    was = logger.disabled
    logger.disabled = True
    try:
        yield
    finally:
        logger.disabled = was


def _local(value: torch.Tensor) -> torch.Tensor:
    """What this rank holds of a tensor."""
    return getattr(value, "_local_tensor", value)
