"""How do a folder's files become a checkpoint? The same steps for a disk and for the Hub.

1. config.json, and which files hold the weights.   2. Their headers, through the index if there is
one.   3. What is refused: tensors are believed over config.json.   4. Orientation, ties, dtype.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from geoscope.errors import CheckpointError, UnsupportedFormat, first_names
from geoscope.foreign import FLAG, TABLE, TEXT, TEXTS, check_fields
from geoscope.formats.container import FileHeader
from geoscope.formats.layout import Layout, choose_layout, parse_object, weight_map
from geoscope.formats.refused import (
    by_claim,
    by_config,
    by_files,
    by_tensors,
    refusal,
    unmet_claim,
)
from geoscope.models.checkpoint import Checkpoint, Source
from geoscope.models.conv1d import turned_names
from geoscope.models.quantised import quantised_weights, with_weights
from geoscope.models.tied import tied_names
from geoscope.models.ungathered import ungathered
from geoscope.records import CODES, ModelRef, TensorInfo

__all__ = [
    "CONFIG",
    "NO_CONFIG",
    "Folder",
    "Identity",
    "assemble",
    "open_folder",
    "parse_config",
    "storage_dtype",
]

CONFIG = "config.json"
NO_CONFIG = (
    "no config.json at hand: Conv1D layers and tied embeddings are told by names and shapes alone"
)
_FLOATING = ("float", "bfloat", *CODES)


@dataclass(frozen=True)
class Identity:
    """A reference as it was given and as it was resolved; see `ModelRef`."""

    given: str
    resolved: str
    commit: str | None = None


class Folder(Source, Protocol):
    """A flat folder of files, here or on the Hub at one commit."""

    @property
    def label(self) -> str:
        """How errors name it."""
        ...

    def names(self) -> Collection[str]: ...

    def text(self, name: str) -> str: ...

    def headers(self, names: Sequence[str]) -> Mapping[str, FileHeader]: ...

    def absent(self, shard: str, count: int) -> CheckpointError:
        """The error for a shard that the index names and that is not there."""
        ...

    def no_weights(self) -> CheckpointError: ...


def open_folder(folder: Folder, identity: Identity, layout: Layout | None = None) -> Checkpoint:
    """The checkpoint in a folder; layout: what was given itself. Raises CheckpointError."""
    names = folder.names()
    config: dict[str, Any] = {}
    if CONFIG in names:
        config = parse_config(folder.text(CONFIG), f"{folder.label}/{CONFIG}")
    layout = layout or choose_layout(names, identity.given)
    if layout is None:
        refused = by_config(config) or by_files(names)
        raise folder.no_weights() if refused is None else refusal(identity.given, refused)
    shards = _shards(folder, layout)
    headers = folder.headers(sorted(set(shards.values())) if shards else [layout.file])
    notes = layout.notes if CONFIG in names else (*layout.notes, NO_CONFIG)
    try:
        return assemble(identity, folder, config, headers, shards, notes)
    except UnsupportedFormat as error:
        if layout.other is None:
            raise
        label = folder.label
        raise UnsupportedFormat(
            f"{error} {label}/{layout.file} was read; give {label}/{layout.other} for the shards "
            "beside it."
        ) from None


_FIELDS = {
    **dict.fromkeys(("text_config", "quantization_config"), TABLE),
    "model_type": TEXT,
    "architectures": TEXTS,
    "tie_word_embeddings": FLAG,
}


def parse_config(text: str, label: str) -> dict[str, Any]:
    """config.json, with the fields that are read in the forms that transformers writes.

    Raises CheckpointError.
    """
    config = parse_object(text, label)
    check_fields(config, _FIELDS, label)
    check_fields(config.get("text_config") or {}, _FIELDS, f"{label}, text_config")
    return config


def _shards(folder: Folder, layout: Layout) -> dict[str, str]:
    """Tensor → file by the index; empty when one file holds all."""
    if not layout.is_index:
        return {}
    shards = weight_map(folder.text(layout.file), f"{folder.label}/{layout.file}")
    here = folder.names()
    for shard in sorted(set(shards.values())):
        if shard not in here:
            raise folder.absent(shard, sum(file == shard for file in shards.values()))
    return shards


def assemble(
    identity: Identity,
    source: Source,
    config: Mapping[str, Any],
    headers: Mapping[str, FileHeader],
    shards: Mapping[str, str],
    notes: tuple[str, ...],
) -> Checkpoint:
    """The checkpoint that these headers describe."""
    files = _stored(identity.given, headers, shards)
    weights, unscaled = quantised_weights(files, config, source)
    stored = with_weights(files, weights)
    plain = {name: info for name, info in stored.items() if name not in weights}
    refused = by_tensors(stored, unscaled) or by_claim(config, plain)
    if refused is not None:
        raise refusal(identity.given, refused)
    turned, turn_notes = turned_names(stored, config)
    tensors = {name: _turn(info) if name in turned else info for name, info in stored.items()}
    shared = {name: kept for header in headers.values() for name, kept in header.shared.items()}
    file_notes = [note for header in headers.values() for note in header.notes]
    doubts = (unmet_claim(config, files), ungathered(stored))
    return Checkpoint(
        ref=ModelRef(
            identity.given, identity.resolved, identity.commit, storage_dtype(tensors.values())
        ),
        config=config,
        tensors=tensors,
        notes=(*notes, *file_notes, *(doubt for doubt in doubts if doubt is not None), *turn_notes),
        tied_to=tied_names(tensors, config, shared),
        source=source,
        quantised=weights,
    )


def _stored(
    given: str, headers: Mapping[str, FileHeader], shards: Mapping[str, str]
) -> dict[str, TensorInfo]:
    """Every tensor as stored, sorted by name; with an index, exactly those that it names."""
    if shards:
        lacking = [name for name, file in shards.items() if name not in headers[file].tensors]
        if lacking:
            raise CheckpointError(
                f"`{given}`: the index places {len(lacking)} tensors in shards that lack them, "
                f"first {lacking[0]} in {shards[lacking[0]]} ({first_names(sorted(lacking))}); "
                "index and shards are of different saves: copy or download them again"
            )
        found = {name: headers[file].tensors[name] for name, file in shards.items()}
    else:
        found = {name: info for header in headers.values() for name, info in header.tensors.items()}
    if not found:
        raise CheckpointError(f"`{given}`: the weight file holds no tensors; save the model again")
    return dict(sorted(found.items()))


def _turn(info: TensorInfo) -> TensorInfo:
    rows, columns = info.shape
    return replace(info, shape=(columns, rows), transposed=True)


class _Stored(Protocol):
    """What is stored, or will be: `TensorInfo`, and the plan of a tensor."""

    @property
    def dtype(self) -> str: ...

    @property
    def shape(self) -> tuple[int, ...]: ...


def storage_dtype(tensors: Iterable[_Stored]) -> str:
    """ "bfloat16", or "mixed: bfloat16 290, float32 64" with the number of tensors of each."""
    counts = Counter(
        info.dtype
        for info in tensors
        if info.dtype.startswith(_FLOATING) and math.prod(info.shape) > 0
    )
    if len(counts) == 1:
        return next(iter(counts))
    if not counts:
        return "none: no floating-point tensors"
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return "mixed: " + ", ".join(f"{dtype} {count}" for dtype, count in ordered)
