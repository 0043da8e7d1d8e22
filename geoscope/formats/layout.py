"""Which files of a folder hold its weights? Decided on names alone, for a disk and for the Hub.

The order of transformers and huggingface_hub: a single file before an index, safetensors before
pickles. `consolidated.*` and `original/` are other copies of the same weights and are never opened.
Behind these comes a single .safetensors file, or index, of any other name: a variant such as fp16.
With an index, its `weight_map` is the authority: what it does not name is not read.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from geoscope.errors import CheckpointError, first_names
from geoscope.foreign import parsed, shown
from geoscope.formats.links import is_plain_name
from geoscope.formats.readers import SAFETENSORS, is_readable
from geoscope.formats.refused import is_adapter_file, is_never_opened, refuse_mlx

__all__ = [
    "Layout",
    "choose_layout",
    "file_names",
    "is_index",
    "is_other_copy",
    "parse_object",
    "shard_count",
    "weight_map",
]

_STANDARD = ("model.safetensors", "pytorch_model.bin")
_SHARD = re.compile(r".*-(\d{1,9})-of-(\d{1,9})\.")
_INDEX = re.compile(r".+\.(?:safetensors|bin)\.index(?:\.[\w-]+)?\.json")


@dataclass(frozen=True)
class Layout:
    """`file` holds all weights, or is the index that says which file holds what.

    other: an index beside it, which would be read if it were given.
    """

    file: str
    is_index: bool
    notes: tuple[str, ...] = ()
    other: str | None = None


def file_names(path: Path, given: str | None = None) -> frozenset[str]:
    """The files right in a folder. Raises CheckpointError, with `given` for the path."""
    try:
        return frozenset(entry.name for entry in path.iterdir() if entry.is_file())
    except OSError as error:
        words = f"cannot be listed: {error.strerror or error}"
        raise CheckpointError(f"{given or path}: {words}") from None


def is_other_copy(name: str) -> bool:
    """Whether a file repeats the weights in the layout of the original publisher."""
    return name.startswith(("consolidated.", "consolidated-"))


def shard_count(name: str) -> int:
    """Of how many files this one says to be a part: 2 for `model-00001-of-00002.safetensors`."""
    shard = _SHARD.match(name)
    return int(shard.group(2)) if shard is not None else 1


def choose_layout(names: Collection[str], label: str) -> Layout | None:
    """The layout of a folder with these file names, None when none holds weights."""
    for single in _STANDARD:
        index = f"{single}.index.json"
        if single in names:
            other = index if index in names else None
            return Layout(single, False, _notes(names, single, index), other)
        if index in names:
            return Layout(index, True, _notes(names, index, index))
    others = sorted(
        name
        for name in names
        if name.endswith(SAFETENSORS)
        and not (is_other_copy(name) or is_adapter_file(name) or is_never_opened(name))
    )
    indices = sorted(
        name
        for name in names
        if is_index(name) and not (is_other_copy(name) or name.startswith("adapter_model"))
    )
    if indices:
        return _only_index(indices, others, label)
    if others:
        refuse_mlx(names, label)
    return _only_file(others, names, label) if others else None


def is_index(name: str) -> bool:
    """Whether a file says which of the shards beside it holds what."""
    return _INDEX.fullmatch(name) is not None


def _only_index(indices: list[str], others: list[str], label: str) -> Layout:
    """Shards beside an index are taken for its own."""
    whole = [name for name in others if shard_count(name) == 1]
    if len(indices) + len(whole) > 1:
        raise CheckpointError(
            f"`{label}`: holds several sets of weights ({first_names([*indices, *whole])}); give "
            f"the file that is meant, as {label.rstrip('/')}/{indices[0]}"
        )
    return Layout(indices[0], True, (f"{indices[0]} is read, the only index there",))


def _notes(names: Collection[str], chosen: str, index: str) -> tuple[str, ...]:
    notes: list[str] = []
    if chosen != index and index in names:
        notes.append(f"{chosen} is read; {index} beside it is not looked at")
    adapters = sorted(name for name in names if is_adapter_file(name))
    if adapters:
        notes.append(f"{chosen} is read; the adapter beside it ({adapters[0]}) is not")
    return tuple(notes)


def _only_file(others: list[str], names: Collection[str], label: str) -> Layout:
    if len(others) > 1:
        raise CheckpointError(
            f"`{label}`: {len(others)} .safetensors files ({first_names(others)}) and no "
            "model.safetensors.index.json; give one of them, or add the index"
        )
    (only,) = others
    if shard_count(only) > 1:
        raise CheckpointError(
            f"`{label}`: {only} is one of {shard_count(only)} shards; the others and "
            "model.safetensors.index.json are missing; copy or download them"
        )
    note = f"{only} is read, the only .safetensors file there"
    return Layout(only, False, (note, *_notes(names, only, f"{only}.index.json")))


def weight_map(text: str, label: str) -> dict[str, str]:
    """Tensor → shard, from the text of an index. Raises CheckpointError for anything unsafe."""
    table = parse_object(text, label).get("weight_map")
    if not isinstance(table, Mapping) or not table:
        raise CheckpointError(f"{label}: has no weight_map; copy or download the index again")
    for shard in table.values():
        if not isinstance(shard, str) or not _is_shard(shard):
            raise CheckpointError(
                f"{label}: names the shard {shown(shard)}; a shard is a weight file in the same "
                "folder"
            )
    return dict(table)


def _is_shard(name: str) -> bool:
    return is_plain_name(name) and is_readable(name) and not is_never_opened(name)


def parse_object(text: str, label: str) -> dict[str, Any]:
    """A JSON document that is an object. Raises CheckpointError."""
    try:
        value = parsed(text)
    except ValueError as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(f"{label}: no valid JSON ({reason}); copy it again") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{label}: the JSON is not an object; copy it again")
    return value
