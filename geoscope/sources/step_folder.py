"""What is the checkpoint of one step? The weights below its folder, a model or an adapter.

They are looked up and chosen by places.py. What cannot be read is said in one line, so that the
series passes the step over and names the reason.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from geoscope.errors import CheckpointError, first_names
from geoscope.formats.layout import choose_layout, file_names, weight_map
from geoscope.formats.refused import by_files, refusal
from geoscope.models.checkpoint import Checkpoint
from geoscope.peft.adapter import ADAPTER_CONFIG, Adapter, open_adapter
from geoscope.sources.local import open_local, open_model_folder
from geoscope.sources.places import (
    Kind,
    Place,
    below,
    choose,
    find_places,
    kinds_at,
    where,
    without_factors,
)
from geoscope.sources.reference import LocalReference
from geoscope.sources.shard_folder import open_shards_or_adapter
from geoscope.sources.steps import step_of_part
from geoscope.sources.trainers import FOLDERS

__all__ = ["Found", "open_step_folder", "refuse_zero_alpha"]

# Folders there are named after the step once more, and hold shards.
_SHARDS_BELOW = ("", "policy/weights")


@dataclass(frozen=True)
class Found:
    """What was opened: a model or an adapter, `place` saying where and why there.

    Of `checkpoint` and `adapter` one is None.
    """

    place: str
    checkpoint: Checkpoint | None = None
    adapter: Adapter | None = None


def open_step_folder(path: Path, given: str, *, alpha: float | None = None) -> Found:
    """The weights in the folder of a step, from their headers.

    given: how messages name the folder. alpha: see `open_adapter`. Raises CheckpointError, one
    line, when nothing can be read.
    """
    places = find_places(path)
    chosen = choose(places)
    if chosen is None:
        raise _unreadable(path, given, places)
    if chosen.kind is Kind.NO_FACTORS:
        raise without_factors(given, chosen, places)
    folder, label, place = path / chosen.folder, below(given, chosen.folder), where(chosen, places)
    if chosen.kind is Kind.MODEL:
        _check_shards(folder, label)
        return Found(place, open_model_folder(folder, label))
    if chosen.kind is Kind.ADAPTER:
        if alpha is None:
            refuse_zero_alpha(folder, label)
        return Found(place, adapter=open_adapter(folder, given=label, alpha=alpha))
    found = open_shards_or_adapter(folder, label)
    if isinstance(found, Adapter):
        return Found(f"{place}, read as an adapter", adapter=found)
    return Found(place, found)


def _check_shards(folder: Path, label: str) -> None:
    """An index whose shards are not all there."""
    names = file_names(folder)
    layout = choose_layout(names, label)
    if layout is None or not layout.is_index:
        return
    try:
        text = (folder / layout.file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{label}/{layout.file}: cannot be read: {error}") from None
    absent = sorted(set(weight_map(text, f"{label}/{layout.file}").values()) - names)
    if absent:
        raise CheckpointError(
            f"{label}: the index names {first_names(absent)}, which is not there: still being "
            "written or rotated away"
        )


def refuse_zero_alpha(folder: Path, label: str) -> None:
    """Raises CheckpointError for an adapter of an old merger, which wrote no scaling."""
    try:
        config = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return  # said when the adapter is opened
    # AdaLoRA takes 0 for its own rank.
    is_lora = isinstance(config, dict) and config.get("peft_type", "LORA") == "LORA"
    if is_lora and config.get("lora_alpha") == 0:
        raise CheckpointError(
            f"{label}: lora_alpha is 0: written by an old merger; set it in "
            f"{ADAPTER_CONFIG} to the alpha of the training"
        )


def _unreadable(path: Path, given: str, places: Sequence[Place]) -> CheckpointError:
    everywhere = (*places, *kinds_at(path, _shard_folders(path)))
    unread = [one for one in everywhere if one.kind is Kind.UNREAD]
    if unread:
        refused = by_files(file_names(path / unread[0].folder))
        assert refused is not None  # what made it such a place
        return refusal(below(given, unread[0].folder), refused)
    configs = [one.folder for one in places if one.kind is Kind.CONFIG]
    folder = configs[0] if configs else ""
    return _error_of(path / folder, below(given, folder))


def _shard_folders(path: Path) -> list[str]:
    """Behind the usual places: Megatron, and DeepSpeed inside a HF checkpoint."""
    named = [
        entry.relative_to(path).as_posix()
        for folder in _SHARDS_BELOW
        if (path / folder).is_dir()
        for entry in sorted((path / folder).iterdir())
        if entry.is_dir() and step_of_part(entry.name) is not None
    ]
    return [*(row.folder for row in FOLDERS if not row.is_read), *named]


def _error_of(folder: Path, given: str) -> CheckpointError:
    """What opening a folder that holds no weights says."""
    try:
        open_local(LocalReference(given, folder))
    except CheckpointError as error:
        return error
    raise AssertionError(f"{given} holds weights")
