"""What are tensors and modules of this process, to the rest? Checkpoints whose source is memory.

    Mapping[str, Tensor]      a state dict; of an adapter with its configuration
    nn.Module                 its state dict, with the config of transformers where it has one
    PeftModel                 the base and the active adapter, apart

A tensor is copied when it is read, one at a time; nothing of the caller's is changed, and nothing
is kept once the checkpoint is gone. Weights that are not all here (DTensor, FSDP, ZeRO-3, meta)
are refused with the way out.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn

from geoscope.arguments import path_text
from geoscope.errors import OptionError, UnsupportedFormat, first_names
from geoscope.formats.container import FileHeader, byte_view
from geoscope.formats.disk import Room
from geoscope.formats.pickle_file import shared_storage
from geoscope.models.checkpoint import Checkpoint
from geoscope.models.opening import CONFIG, NO_CONFIG, Identity, assemble
from geoscope.peft.adapter import Adapter, adapter_of, with_recorded_start
from geoscope.records import IN_MEMORY, TensorInfo

__all__ = [
    "LiveAdapter",
    "Model",
    "Opened",
    "adapter_of_tensors",
    "as_adapter_or_reference",
    "as_model_or_reference",
    "as_models_or_references",
    "model_of_tensors",
]

# As if it were the one file of a model.
_FILE = "model.safetensors"
# Modules that hold the model in an attribute: DDP and DeepSpeed, torch.compile.
_WRAPPERS = {
    "DistributedDataParallel": "module",
    "DataParallel": "module",
    "DeepSpeedEngine": "module",
    "OptimizedModule": "_orig_mod",
}
_GATHER = (
    "gather them on all ranks: get_model_state_dict(model, options=StateDictOptions("
    "full_state_dict=True, cpu_offload=True)) of torch.distributed.checkpoint.state_dict, and give "
    "the result; or save the model and give the folder"
)
_GATHER_ZERO = (
    "gather them with deepspeed.zero.GatheredParameters, and give the state dict; or save the "
    "model and give the folder"
)


@dataclass(frozen=True, eq=False)
class LiveAdapter:
    """A PEFT-wrapped module: its base and its active adapter."""

    base: Checkpoint
    adapter: Adapter


Model = (
    str | os.PathLike[str] | Checkpoint | Adapter | LiveAdapter | Mapping[str, Tensor] | nn.Module
)
Opened = str | Checkpoint | Adapter | LiveAdapter
# What is open already, whatever it is.
_OPEN = (Checkpoint, Adapter, LiveAdapter)


def as_model_or_reference(model: Model, name: str, label: str | None = None) -> Opened:
    """A model as the verbs take it: a reference as its text, anything else opened.

    name: of the parameter. label: how messages and reports name tensors and modules, by default
    the parameter. Raises OptionError, or UnsupportedFormat for weights that are not all here.
    """
    if isinstance(model, _OPEN):
        return model
    if isinstance(model, nn.Module):
        return _of_module(model, label or name)
    if isinstance(model, Mapping):
        return model_of_tensors(model, label or name)
    return path_text(model, name)


def as_models_or_references(models: Any, name: str) -> tuple[Opened, ...]:
    """One model or several, each with its number where there are several."""
    if isinstance(models, (str, os.PathLike, *_OPEN, Mapping, nn.Module)):
        return (as_model_or_reference(models, name),)
    if isinstance(models, (bytes, bytearray)) or not hasattr(models, "__iter__"):
        raise OptionError(f"`{name}` {models!r}: paths or models are needed, one or several")
    every = tuple(models)
    numbered = [f"{name} {i}" for i in range(1, len(every) + 1)] if len(every) > 1 else [name]
    return tuple(
        as_model_or_reference(one, name, label) for one, label in zip(every, numbered, strict=True)
    )


def model_of_tensors(
    tensors: Mapping[str, Tensor], label: str, config: Mapping[str, Any] | None = None
) -> Checkpoint:
    """A state dict as an open checkpoint. config: config.json, as far as it is known.

    Raises OptionError or UnsupportedFormat.
    """
    given = f"{label} (state dict)"
    return _checkpoint(_Tensors.of(_whole(tensors, given)), given, config or {})


def as_adapter_or_reference(adapter: Any, name: str) -> str | Adapter:
    """An adapter as options hold it: a reference as its text, anything else opened.

    name: of the parameter. Raises OptionError for what is no adapter.
    """
    found = adapter if isinstance(adapter, Mapping) else as_model_or_reference(adapter, name)
    if isinstance(found, LiveAdapter):
        return found.adapter
    if isinstance(found, (str, Adapter)):
        return found
    raise OptionError(
        f"`{name}`: an adapter is needed: its path, a PEFT model, or open_adapter(state, config) "
        "of a state dict and its configuration"
    )


def adapter_of_tensors(
    tensors: Mapping[str, Tensor],
    config: Any,
    *,
    label: str = "adapter",
    alpha: float | None = None,
) -> Adapter:
    """An adapter of this process: its state dict, under the names that PEFT saves it with.

    config: the content of adapter_config.json, or a configuration of PEFT. alpha: in place of its
    lora_alpha. Raises OptionError for what is neither, and as `read_adapter` does.
    """
    table = config.to_dict() if hasattr(config, "to_dict") else config
    if not isinstance(table, Mapping):
        raise OptionError(
            f"config {type(config).__name__}: an adapter needs its configuration, the content of "
            "adapter_config.json or a configuration of PEFT"
        )
    given = f"{label} (state dict)"
    plain = {key: _plain(value) for key, value in table.items()}
    adapter = _opened_adapter(_whole(tensors, given), plain, given, alpha=alpha)
    return with_recorded_start(adapter)


def _opened_adapter(
    tensors: Mapping[str, Tensor],
    config: Mapping[str, Any],
    given: str,
    *,
    alpha: float | None = None,
) -> Adapter:
    adapter = adapter_of(given, None, config, _Tensors.of(tensors), alpha=alpha)
    return replace(adapter, at=IN_MEMORY + given)


# --- tensors --------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Tensors:
    """A container over tensors of the caller."""

    tensors: Mapping[str, Tensor] = field(repr=False)
    header: FileHeader

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> _Tensors:
        infos = {name: _info(name, tensor) for name, tensor in tensors.items()}
        return cls(tensors, FileHeader(infos, shared_storage(tensors)))

    def without_repeats(self) -> _Tensors:
        """As a module is saved: of tensors that share their storage one."""
        shared = self.header.shared
        kept = {name: info for name, info in self.header.tensors.items() if name not in shared}
        return replace(self, header=FileHeader(kept, shared))

    def read(self, name: str, buffer: Tensor | None) -> Tensor:
        tensor = self.tensors[name].detach()
        room = byte_view(self.header.tensors[name].nbytes, buffer)
        return room.view(tensor.dtype).reshape(tensor.shape).copy_(tensor)

    def read_part(self, name: str, begin: int, end: int) -> Tensor:
        flat = self.tensors[name].detach().reshape(-1)[begin:end]
        return flat.to("cpu", copy=True)


@dataclass(frozen=True, eq=False)
class _Memory:
    """The source of a checkpoint in memory."""

    container: _Tensors
    config: Mapping[str, Any]

    def room(self, wanted: Mapping[str, Collection[str]]) -> Room:
        return {}

    def fetch(self, wanted: Mapping[str, Collection[str]]) -> None:
        return None

    def open(self, file: str) -> _Tensors:
        return self.container

    def travelling(self) -> tuple[Mapping[str, bytes], tuple[str, ...]]:
        if not self.config:
            return {}, ("the model is in memory: put its config.json and tokenizer beside it",)
        text = json.dumps(self.config, indent=2, sort_keys=True, default=str) + "\n"
        return {CONFIG: text.encode()}, ("the model is in memory: put its tokenizer beside it",)


def _info(name: str, tensor: Tensor) -> TensorInfo:
    dtype = str(tensor.dtype).removeprefix("torch.")
    nbytes = tensor.numel() * tensor.element_size()
    return TensorInfo(name, tuple(tensor.shape), dtype, nbytes, _FILE)


def _checkpoint(container: _Tensors, given: str, config: Mapping[str, Any]) -> Checkpoint:
    notes = () if config else (NO_CONFIG,)
    identity = Identity(given, IN_MEMORY + given)
    return assemble(
        identity, _Memory(container, config), config, {_FILE: container.header}, {}, notes
    )


def _whole(tensors: Mapping[str, Any], given: str) -> dict[str, Tensor]:
    """The tensors, all of them here. Raises OptionError or UnsupportedFormat."""
    if not tensors:
        raise OptionError(
            f"{given}: holds no tensors; give a state dict such as model.state_dict()"
        )
    for name, value in tensors.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise OptionError(
                f"{given}: {name!r} holds {type(value).__name__} and no tensor; give a mapping of "
                "names to tensors such as model.state_dict()"
            )
    _refuse_parts(tensors, given)
    return dict(tensors)


def _refuse_parts(tensors: Mapping[str, Tensor], given: str) -> None:
    """Raises UnsupportedFormat for tensors whose entries are not, or not all, in this process."""
    for is_so, what, way_out in (
        (_is_sharded, "sharded over ranks (DTensor)", _GATHER),
        (lambda one: hasattr(one, "ds_id"), "partitioned by ZeRO-3", _GATHER_ZERO),
        (
            lambda one: one.is_meta,
            "on the meta device, without entries",
            "load the model whole (no device_map that offloads), or give its folder",
        ),
        (
            lambda one: one.layout != torch.strided or one.is_quantized,
            "sparse or quantised by torch",
            "give them dense (to_dense, dequantize)",
        ),
    ):
        names = [name for name, tensor in tensors.items() if is_so(tensor)]
        if names:
            raise UnsupportedFormat(
                f"{given}: {len(names)} of {len(tensors)} tensors are {what}, first "
                f"{first_names(names, 1)}; {way_out}"
            )


def _is_sharded(tensor: Tensor) -> bool:
    return hasattr(tensor, "full_tensor") or hasattr(tensor, "local_shards")


# --- modules --------------------------------------------------------------------------------------


def _of_module(module: nn.Module, label: str) -> Checkpoint | LiveAdapter:
    while (inside := _WRAPPERS.get(type(module).__name__)) is not None:
        module = module.get_submodule(inside)
    given = f"{label} ({type(module).__name__})"
    _refuse_wrapped(module, given)
    peft = sys.modules.get("peft")
    if peft is None or not isinstance(module, peft.PeftModel):
        return _base(module, given)
    wrapped: Any = module
    base: nn.Module = wrapped.get_base_model()
    return LiveAdapter(_base(base, f"{label} ({type(base).__name__})"), _adapter(module, given))


def _refuse_wrapped(module: nn.Module, given: str) -> None:
    """Before a state dict is asked for, which of these would wait for the other ranks."""
    if any(type(part).__name__ == "FullyShardedDataParallel" for part in module.modules()):
        raise UnsupportedFormat(f"{given}: its weights are flat shards of FSDP; {_GATHER}")
    _refuse_parts(dict(module.named_parameters()), given)


def _base(module: nn.Module, given: str) -> Checkpoint:
    """The module's own weights, under the names that it has without adapters."""
    inner = dict(_inner_names(module))
    tensors = {
        plain: value
        for name, value in module.state_dict().items()
        if isinstance(value, Tensor) and (plain := _without_adapters(name, inner)) is not None
    }
    container = _Tensors.of(_whole(tensors, given)).without_repeats()
    return _checkpoint(container, given, _config(module))


def _config(module: nn.Module) -> dict[str, Any]:
    """config.json of transformers; empty for other modules."""
    config: Any = getattr(module, "config", None)
    made = config.to_dict() if hasattr(config, "to_dict") else config
    return dict(made) if isinstance(made, Mapping) else {}


def _inner_names(module: nn.Module) -> Iterator[tuple[str, str]]:
    """Path of each module that PEFT put in place of another → the name of the other inside."""
    if "peft" not in sys.modules:
        return
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    for path, part in module.named_modules():
        if isinstance(part, AuxiliaryTrainingWrapper):
            yield path, "original_module"
        elif isinstance(part, BaseTunerLayer):
            yield path, "base_layer"


def _without_adapters(name: str, inner: Mapping[str, str]) -> str | None:
    """The name that the tensor has without PEFT's modules; None for what these brought along."""
    path, kept = "", list[str]()
    for part in name.split("."):
        wanted = inner.get(path)
        if wanted is None:
            kept.append(part)
        elif part != wanted:
            return None
        path = f"{path}.{part}" if path else part
    return ".".join(kept)


def _adapter(module: Any, given: str) -> Adapter:
    """The active adapter, as PEFT would save it."""
    from peft import get_peft_model_state_dict
    from peft.tuners.tuners_utils import BaseTunerLayer

    names = module.active_adapters
    if len(names) != 1:
        raise OptionError(
            f"{given}: {len(names)} adapters are active ({first_names(names)}); choose one with "
            "set_adapter"
        )
    if any(isinstance(part, BaseTunerLayer) and part.merged for part in module.modules()):
        raise OptionError(
            f"{given}: its adapter is merged into the base; call unmerge_adapter() first, or give "
            "merge_and_unload() as a model of its own"
        )
    config = {key: _plain(value) for key, value in module.peft_config[names[0]].to_dict().items()}
    # Embeddings that were saved beside an adapter are those of the base, which is here.
    tensors = get_peft_model_state_dict(module, adapter_name=names[0], save_embedding_layers=False)
    return _opened_adapter(_whole(tensors, given), config, given)


def _plain(value: Any) -> Any:
    """A value of a PEFT configuration as adapter_config.json has it."""
    if isinstance(value, set):
        return sorted(value)
    return value.value if isinstance(value, Enum) else value
