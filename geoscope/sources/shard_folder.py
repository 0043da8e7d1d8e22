"""How is a folder of a trainer's shards opened as a model? FSDP, DCP and ZeRO, on this disk.

    model_world_size_<W>_rank_<r>.pt          verl, one file a rank; huggingface/ with config.json
    .metadata, __<r>_<k>.distcp               torch DCP: Accelerate, NeMo-RL, torchtune, own loops
    the same with common.pt                   Megatron's torch_dist: slime, ms-swift, NeMo-RL, verl
    zero_pp_rank_<r>_mp_rank_00_….pt          DeepSpeed ZeRO: HF Trainer, OpenRLHF

The tensors come whole, under the names of the model, in the dtype stored. A LoRA run has base and
factors in the same shards: it is not a whole model. `open_shards` gives the
adapter, and `open_shard_base` the base.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from geoscope.errors import CheckpointError, UnsupportedFormat
from geoscope.foreign import reason, small_text
from geoscope.formats.container import Container
from geoscope.formats.dcp import DcpFolder
from geoscope.formats.dcp_metadata import METADATA, read_metadata
from geoscope.formats.disk import Room
from geoscope.formats.fsdp import FsdpShards, is_rank_file, rank_files
from geoscope.formats.layout import file_names, parse_object
from geoscope.formats.pieces import flattened
from geoscope.formats.shard_names import (
    LoraNames,
    lora_names,
    model_tensors,
    renamed,
    trained_biases,
)
from geoscope.formats.zero import ZeroShards, is_zero
from geoscope.models.checkpoint import Checkpoint
from geoscope.models.megatron import ADAPTER, is_megatron_model, with_model_names
from geoscope.models.opening import CONFIG, NO_CONFIG, Identity, assemble, parse_config
from geoscope.outputs.output_folder import travelling_files
from geoscope.peft.adapter import Adapter, adapter_of
from geoscope.peft.config import ADAPTER_CONFIG

__all__ = [
    "open_shard_base",
    "open_shards",
]

# Where config.json lies: beside the shards, verl's folder for it, and above Accelerate's folder.
_CONFIG_FOLDERS = (".", "huggingface", "..", "../huggingface")
_LORA = "lora_train_meta.json"
_ADAPTER_FOLDERS = ("lora_adapter", ".")


def open_shards(
    path: Path, given: str, *, alpha: float | None = None, whole: bool = False
) -> Checkpoint | Adapter:
    """The model in a folder of shards; of a LoRA run its adapter, from the factors in the shards.

    r and alpha come from adapter_config.json of `lora_adapter/`, else from lora_train_meta.json.
    alpha: in place of theirs.
    whole: only a whole model will do; a LoRA run raises UnsupportedFormat.
    Raises CheckpointError.
    """
    shards = _shards(path, given)
    adapted = [name for name in shards.megatron or () if ADAPTER.search(name)]
    if adapted:
        raise _bridge_refusal(given, adapted[0])
    names = lora_names(shards.container.header.tensors)
    if names is None:
        return _checkpoint(shards, given, shards.container)
    if whole:
        raise _lora_refusal(path, given)
    return _adapter(shards, names, given, alpha)


def open_shard_base(path: Path, given: str) -> Checkpoint:
    """The base of a LoRA run, under the names of the model. Raises CheckpointError."""
    shards = _shards(path, given)
    names = lora_names(shards.container.header.tensors)
    if names is None:
        raise CheckpointError(f"`{given}`: shards of a whole model, without factors of an adapter")
    return _checkpoint(shards, given, renamed(shards.container, names.base))


def _lora_refusal(path: Path, given: str) -> UnsupportedFormat:
    written = [name for name in _ADAPTER_FOLDERS if (path / name / ADAPTER_CONFIG).is_file()]
    place = f"{given.rstrip('/')}/{written[0]}" if written else "the lora_adapter/ of verl"
    return UnsupportedFormat(
        f"`{given}`: shards of a LoRA run, base and factors in the same files, where a whole model "
        f"is needed. Merge {place} into the base and give the merged folder"
    )


def _bridge_refusal(given: str, name: str) -> UnsupportedFormat:
    return UnsupportedFormat(
        f"`{given}`: an adapter of Megatron-Bridge (tensor {name}). geoscope reads the keys of "
        "PEFT. Export it with Megatron-Bridge, merged or as a PEFT folder, and give that"
    )


def _adapter(shards: _Shards, names: LoraNames, given: str, alpha: float | None) -> Adapter:
    config = _lora_config(shards.path, given)
    own = [*names.adapter, *trained_biases(names, config.get("bias", "none"))]
    container = renamed(shards.container, {name: name for name in own})
    return adapter_of(given, shards.path.resolve(), config, container, alpha=alpha)


def _lora_config(path: Path, given: str) -> dict[str, Any]:
    for folder in _ADAPTER_FOLDERS:
        if (path / folder / ADAPTER_CONFIG).is_file():
            return _json(path / folder / ADAPTER_CONFIG, f"{given}/{folder}/{ADAPTER_CONFIG}")
    if (path / _LORA).is_file():
        meta = _json(path / _LORA, f"{given}/{_LORA}")
        return {"peft_type": "LORA", **{key: meta.get(key) for key in ("r", "lora_alpha")}}
    raise CheckpointError(
        f"`{given}`: shards of a LoRA run whose alpha is not known; copy lora_adapter/"
        f"{ADAPTER_CONFIG} or {_LORA} beside them"
    )


@dataclass(frozen=True)
class _Shards:
    """What was opened. config_folder: where config.json is, None without one. megatron: the shapes
    of stacks, where the tensors have Megatron's names."""

    path: Path
    container: Container
    config: Mapping[str, Any]
    config_folder: Path | None
    notes: tuple[str, ...]
    megatron: Mapping[str, tuple[int, ...]] | None = None


def _shards(path: Path, given: str) -> _Shards:
    label = given.rstrip("/")
    below = next((one for one in _CONFIG_FOLDERS if (path / one / CONFIG).is_file()), None)
    config: dict[str, Any] = {}
    if below is not None:
        where = f"{label}/{below}/{CONFIG}"
        config = parse_config(_text(path / below / CONFIG, where), where)
    names = file_names(path, given)
    megatron = None
    if any(is_rank_file(name) for name in names):
        files = rank_files(path, names, label)
        source = files[0].replace("rank_0", "rank_*")
        container = FsdpShards.open(path, files, label, source, config)
        note = f"put together from the FSDP shards of {len(files)} ranks"
    elif is_zero(names):
        container = ZeroShards.open(path, names, label)
        note = f"put together from DeepSpeed's shards: {container.told}"
    else:
        container, note, megatron = _dcp(path, names, label)
    folder = None if below is None else path / below
    notes = (note,) if folder else (note, NO_CONFIG)
    return _Shards(path, container, config, folder, notes, megatron)


def _checkpoint(shards: _Shards, given: str, container: Container) -> Checkpoint:
    files = {info.source: container.header for info in container.header.tensors.values()}
    source = _ShardSource(container, shards.config_folder)
    identity = Identity(given, str(shards.path.resolve()))
    checkpoint = assemble(identity, source, shards.config, files, {}, shards.notes)
    if shards.megatron is None:
        return checkpoint
    return with_model_names(checkpoint, shards.megatron)


@dataclass(frozen=True)
class _ShardSource:
    """Shards on this disk: one container, whatever the number of their files."""

    container: Container
    config_folder: Path | None

    def room(self, wanted: Mapping[str, Collection[str]]) -> Room:
        return {}

    def fetch(self, wanted: Mapping[str, Collection[str]]) -> None:
        return None

    def open(self, file: str) -> Container:
        return self.container

    def travelling(self) -> tuple[dict[str, Path], tuple[str, ...]]:
        return ({}, ()) if self.config_folder is None else travelling_files(self.config_folder)


def _json(path: Path, label: str) -> dict[str, Any]:
    return parse_object(_text(path, label), label)


def _text(path: Path, label: str) -> str:
    try:
        return small_text(path)
    except OSError as error:
        raise CheckpointError(f"{label}: cannot be read: {reason(error)}") from None


def _dcp(
    path: Path, names: Collection[str], label: str
) -> tuple[Container, str, Mapping[str, tuple[int, ...]] | None]:
    """The container, a note, and the shapes of Megatron's stacks; None of another writer."""
    if METADATA not in names:
        raise CheckpointError(
            f"`{label}`: .distcp files without {METADATA}, which is written last; still being "
            "written, or cut: copy it, too"
        )
    tensors = read_metadata(path, label)
    model = model_tensors(tensors)
    if not model:
        raise CheckpointError(
            f"`{label}`: a DCP checkpoint without the weights of a model (of {len(tensors)} tensors"
            " all belong to a trainer's state); give the folder of the weights"
        )
    rest = len(tensors) - len(model)
    shapes, called = None, "a DCP checkpoint"
    if is_megatron_model(model):
        shapes, called = (
            {name: one.stored.shape for name, one in model.items()},
            "Megatron's shards",
        )
        model = {name: replace(one, stored=flattened(one.stored)) for name, one in model.items()}
    note = f"read from {called}" + (f"; {rest} entries beside the model are not" if rest else "")
    return DcpFolder.open(path, model, label, "*.distcp"), note, shapes
