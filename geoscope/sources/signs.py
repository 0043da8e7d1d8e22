"""What do the names of the files in a folder tell? Adapters, shards, models; nothing is opened."""

from __future__ import annotations

from collections.abc import Collection
from enum import Enum

from geoscope.errors import CheckpointError
from geoscope.formats.dcp_metadata import is_dcp_file
from geoscope.formats.fsdp import is_rank_file
from geoscope.formats.layout import choose_layout
from geoscope.formats.refused import by_files, is_adapter_file, is_torch_dist
from geoscope.formats.zero import is_zero
from geoscope.models.opening import CONFIG
from geoscope.peft.config import ADAPTER_CONFIG

__all__ = ["WEIGHTS", "Kind", "holds_model", "holds_shards", "kinds_of"]

_EMPTY_ADAPTER = "lora_adapter"


class Kind(Enum):
    """What a folder holds, in the order of choice.

    UNREAD is weights in a format that is refused, CONFIG a config.json without weights.
    """

    ADAPTER = "adapter"
    NO_FACTORS = "adapter folder without factors"
    SHARDS = "shards"
    MODEL = "model folder"
    MEGATRON = "Megatron's shards"
    ZERO = "DeepSpeed's shards"
    UNREAD = "weights that are not read"
    CONFIG = "configuration"


# Kinds that are opened as a whole model.
WEIGHTS = (Kind.SHARDS, Kind.MODEL, Kind.MEGATRON, Kind.ZERO)


def kinds_of(folder: str, names: Collection[str]) -> list[Kind]:
    """What a folder with these files holds; an adapter beside a model counts as two."""
    kinds: list[Kind] = []
    if any(is_adapter_file(name) for name in names):
        kinds.append(Kind.ADAPTER)
    elif ADAPTER_CONFIG in names or folder.rpartition("/")[2] == _EMPTY_ADAPTER:
        kinds.append(Kind.NO_FACTORS)
    if is_zero(names):
        kinds.append(Kind.ZERO)
    elif holds_shards(names):
        kinds.append(Kind.MEGATRON if is_torch_dist(names) else Kind.SHARDS)
    if holds_model(names):
        kinds.append(Kind.MODEL)
    if not kinds and by_files(names) is not None:
        kinds.append(Kind.UNREAD)
    return kinds or ([Kind.CONFIG] if CONFIG in names else [])


def holds_shards(names: Collection[str]) -> bool:
    """Whether a folder with these files holds shards of a trainer that are read."""
    return is_zero(names) or any(is_rank_file(name) or is_dcp_file(name) for name in names)


def holds_model(names: Collection[str]) -> bool:
    """Whether a folder with these files holds model*.safetensors or pytorch_model*.bin."""
    try:
        return choose_layout(names, "") is not None
    except CheckpointError:  # weights that are not told apart: opening them says so
        return True
