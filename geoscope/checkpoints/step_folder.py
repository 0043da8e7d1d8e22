"""Where in the folder of one step are its weights? Looked up in a fixed order, chosen by kind.

    X · X/actor · X/lora_adapter · X/actor/lora_adapter · X/huggingface · X/actor/huggingface
    X/hf_model · X/policy/weights · X/policy/weights/model

An adapter comes first, because a merged output of a LoRA run may equal the base; then the shards of
a trainer, which are often fp32 masters; then the model folder. Shards are not read yet: they are
named, and the model folder is taken where there is one. An adapter folder without factors is not
replaced by the model beside it: the step is passed over, and naming the sub-folder overrides that.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from geoscope.checkpoints.adapter import ADAPTER_CONFIG, Adapter, open_adapter
from geoscope.checkpoints.checkpoint import Checkpoint
from geoscope.checkpoints.layout import SHARD_FOLDERS, WEIGHT_FOLDERS, choose_layout, weight_map
from geoscope.checkpoints.local import file_names, open_local
from geoscope.checkpoints.opening import CONFIG
from geoscope.checkpoints.reference import LocalReference
from geoscope.checkpoints.refused import by_files, is_adapter_file, refusal
from geoscope.checkpoints.steps import step_of_part
from geoscope.errors import CheckpointError, first_names

__all__ = ["Found", "Kind", "Place", "find_places", "open_step_folder", "refuse_zero_alpha"]

_PLACES = ("", *WEIGHT_FOLDERS)
# Folders there are named after the step once more, and hold shards.
_SHARDS_BELOW = ("", "policy/weights")
_EMPTY_ADAPTER = "lora_adapter"


class Kind(Enum):
    """What a place holds, in the order of choice. CONFIG is a config.json without weights."""

    ADAPTER = "adapter"
    NO_FACTORS = "adapter folder without factors"
    SHARDS = "shards"
    MODEL = "model folder"
    CONFIG = "configuration"


@dataclass(frozen=True)
class Place:
    """A folder below that of the step; `folder` "" is that one itself."""

    folder: str
    kind: Kind

    def __str__(self) -> str:
        return f"{self.folder or '.'}/"


@dataclass(frozen=True)
class Found:
    """What was opened: a model or an adapter, `place` saying where and why there.

    Of `checkpoint` and `adapter` one is None. notes: one-line remarks.
    """

    place: str
    checkpoint: Checkpoint | None = None
    adapter: Adapter | None = None
    notes: tuple[str, ...] = ()


def find_places(folder: Path) -> tuple[Place, ...]:
    """Every place with weights, in the order of search; empty when there is none."""
    return tuple(_kinds_at(folder, _PLACES))


def _kinds_at(folder: Path, below: Sequence[str]) -> list[Place]:
    """A folder that holds an adapter and a model counts as two places."""
    found: list[Place] = []
    for one in below:
        path = folder / one
        if path.is_dir():
            found.extend(Place(one, kind) for kind in _kinds(path, one, file_names(path)))
    return found


def _kinds(path: Path, folder: str, names: Collection[str]) -> list[Kind]:
    if any(is_adapter_file(name) for name in names):
        kinds = [Kind.ADAPTER]
    elif ADAPTER_CONFIG in names or (folder or path.name).rpartition("/")[2] == _EMPTY_ADAPTER:
        kinds = [Kind.NO_FACTORS]
    else:
        kinds = []
    if _has_layout(names):
        return [*kinds, Kind.MODEL]
    if not kinds and by_files(names) is not None:
        return [Kind.SHARDS]
    return kinds or ([Kind.CONFIG] if CONFIG in names else [])


def _has_layout(names: Collection[str]) -> bool:
    try:
        return choose_layout(names, "") is not None
    except CheckpointError:  # weights that are not told apart: opening them says so
        return True


def open_step_folder(path: Path, given: str) -> Found:
    """The weights in the folder of a step, from their headers.

    given: how messages name the folder. Raises CheckpointError, one line, when nothing can be read.
    """
    places = find_places(path)
    by_kind = {kind: [one for one in places if one.kind is kind] for kind in Kind}
    for kind in (Kind.ADAPTER, Kind.NO_FACTORS, Kind.MODEL):
        if by_kind[kind]:
            return _open(path, given, by_kind[kind][0], places)
    raise _unreadable(path, given, by_kind)


def _open(path: Path, given: str, chosen: Place, places: Sequence[Place]) -> Found:
    folder, label = path / chosen.folder, _below(given, chosen.folder)
    others = [one for one in places if one is not chosen and one.kind is not Kind.CONFIG]
    if chosen.kind is Kind.MODEL:
        _check_shards(folder, label)
        checkpoint = open_local(LocalReference(label, folder))
        passed = [str(one) for one in others if one.kind is Kind.SHARDS]
        notes = (f"{first_names(passed)}: shards are not read yet; {chosen} is taken",)
        return Found(_where(chosen, others), checkpoint, notes=notes if passed else ())
    models = [_below(given, one.folder) for one in others if one.kind is Kind.MODEL]
    if chosen.kind is Kind.NO_FACTORS:
        instead = [one for one in models if one != label]
        hint = f"; give {first_names(instead)} to take the full weights" if instead else ""
        raise CheckpointError(f"adapter folder without `adapter_model.safetensors` ({label}){hint}")
    refuse_zero_alpha(folder, label)
    return Found(_where(chosen, others), adapter=open_adapter(folder, given=label))


def _below(given: str, folder: str) -> str:
    return f"{given.rstrip('/')}/{folder}" if folder else given


def _where(chosen: Place, others: Sequence[Place]) -> str:
    """ "actor/lora_adapter/: adapter, before the model folder in actor/huggingface/"."""
    rest = [f"the {one.kind.value} in {one}" for one in others]
    taken = f"{chosen}: {chosen.kind.value}"
    return f"{taken}, chosen over {first_names(rest)}" if rest else taken


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
    if isinstance(config, dict) and config.get("lora_alpha") == 0:
        raise CheckpointError(
            f"{label}: lora_alpha is 0: written by an old merger; set it in "
            f"{ADAPTER_CONFIG} to the alpha of the training"
        )


def _unreadable(path: Path, given: str, by_kind: dict[Kind, list[Place]]) -> CheckpointError:
    shards = by_kind[Kind.SHARDS] or [
        one for one in _kinds_at(path, _shard_folders(path)) if one.kind is Kind.SHARDS
    ]
    for one in by_kind[Kind.CONFIG]:
        # The error about the configuration knows of shards right beside it.
        if any((path / other.folder) == (path / one.folder).parent for other in shards):
            return _error_of(path / one.folder, _below(given, one.folder))
    if shards:
        refused = by_files(file_names(path / shards[0].folder))
        assert refused is not None  # what made it a place of shards
        return refusal(_below(given, shards[0].folder), refused)
    configs = by_kind[Kind.CONFIG]
    folder = configs[0].folder if configs else ""
    return _error_of(path / folder, _below(given, folder))


def _shard_folders(path: Path) -> list[str]:
    """Behind the usual places: Accelerate, Megatron, and DeepSpeed inside a HF checkpoint."""
    named = [
        entry.relative_to(path).as_posix()
        for below in _SHARDS_BELOW
        if (path / below).is_dir()
        for entry in sorted((path / below).iterdir())
        if entry.is_dir() and step_of_part(entry.name) is not None
    ]
    return [*SHARD_FOLDERS, *named]


def _error_of(folder: Path, given: str) -> CheckpointError:
    """What opening a folder that holds no weights says."""
    try:
        open_local(LocalReference(given, folder))
    except CheckpointError as error:
        return error
    raise AssertionError(f"{given} holds weights")
