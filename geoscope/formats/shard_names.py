"""What are the tensors of a trainer's shards called in the model? Prefixes and wrappers taken off.

    app.model.model.layers.0.….weight                      a DCP checkpoint of nested state dicts
    base_model.model.model.layers.0.….base_layer.weight    a LoRA run: the base
    base_model.model.model.layers.0.….lora_A.default.weight            and its factors

The nesting of a DCP checkpoint is what its metadata says; entries of the optimizer, and all that is
no part of the model, are left out.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from geoscope.formats.container import Container, FileHeader, files_of
from geoscope.formats.dcp_metadata import TRAINER_STATE, DcpTensor

if TYPE_CHECKING:
    import torch

__all__ = ["LoraNames", "lora_names", "model_tensors", "renamed", "trained_biases"]

# Keys under which trainers nest the state dict of the model, outermost first.
_MODELS = (("app", "model"), ("model",), ("state_dict",), ("policy",))

_PEFT = "base_model.model."
_FACTOR = re.compile(
    r"\.lora_(?:A|B|embedding_A|embedding_B|magnitude_vector)(?:\.|$)|\.token_adapter\."
)
_SAVED = re.compile(r"\.modules_to_save\.[^.]+\.")
_ORIGINAL = ".original_module."
_BASE_LAYER = re.compile(r"\.base_layer(?=\.)")


def model_tensors(tensors: Mapping[str, DcpTensor]) -> dict[str, DcpTensor]:
    """Name in the model → the tensor, for those of the model."""
    kept = {name: one for name, one in tensors.items() if not TRAINER_STATE.match(name)}
    for nest in _MODELS:
        inside = [one for one in kept.values() if one.path[: len(nest)] == nest]
        if inside and all(len(one.path) > len(nest) for one in inside):
            return {".".join(one.path[len(nest) :]): one for one in inside}
    prefix = _prefix(kept)
    return {name.removeprefix(prefix): one for name, one in kept.items() if name.startswith(prefix)}


def _prefix(names: Collection[str]) -> str:
    """That of the model where the metadata does not tell its nesting.

    `model.` is the prefix of most models, too: it is one more only where it stands there twice.
    """
    if any(name.startswith("app.model.") for name in names):
        return "app.model."
    inner = ("model.model.", "model.lm_head.")
    is_nested = all(name.startswith("model.") for name in names)
    return "model." if is_nested and any(name.startswith(inner) for name in names) else ""


@dataclass(frozen=True)
class LoraNames:
    """The tensors of a LoRA run: base, name in the model → stored name; adapter, stored names."""

    base: Mapping[str, str]
    adapter: tuple[str, ...]


def lora_names(names: Iterable[str]) -> LoraNames | None:
    """How the tensors of a model wrapped by PEFT divide; None for a model without factors."""
    names = sorted(names)
    if not any(_FACTOR.search(name) for name in names):
        return None
    adapter = tuple(name for name in names if _FACTOR.search(name) or _SAVED.search(name))
    base = {_base_name(name): name for name in names if name not in set(adapter)}
    return LoraNames(base, adapter)


def trained_biases(names: LoraNames, bias: str) -> tuple[str, ...]:
    """Stored names of the biases that a LoRA run with `bias` of its config ("none", "all",
    "lora_only") trains; in the shards they have no mark."""
    if bias not in ("all", "lora_only"):
        return ()
    adapted = {_FACTOR.split(name)[0] for name in names.adapter}
    return tuple(
        stored
        for stored in names.base.values()
        if stored.endswith(".bias")
        and (bias == "all" or _BASE_LAYER.sub("", stored).removesuffix(".bias") in adapted)
    )


def _base_name(name: str) -> str:
    """The name in the model that was wrapped: wrappers of PEFT off, no others."""
    return _BASE_LAYER.sub("", name.removeprefix(_PEFT)).replace(_ORIGINAL, ".")


@dataclass(frozen=True)
class _Renamed:
    """A container whose tensors go by other names."""

    header: FileHeader
    container: Container
    names: Mapping[str, str]

    @property
    def paths(self) -> tuple[Path, ...]:
        return files_of(self.container)

    def read(self, name: str, buffer: torch.Tensor | None) -> torch.Tensor:
        return self.container.read(self.names[name], buffer)

    def read_part(self, name: str, begin: int, end: int) -> torch.Tensor:
        return self.container.read_part(self.names[name], begin, end)


def renamed(container: Container, names: Mapping[str, str]) -> Container:
    """The tensors in `names` (new name → stored name), and no others."""
    header = container.header
    new = {stored: name for name, stored in names.items()}
    tensors = {name: replace(header.tensors[stored], name=name) for name, stored in names.items()}
    shared = {new[a]: new[b] for a, b in header.shared.items() if a in new and b in new}
    return _Renamed(FileHeader(tensors, shared, header.notes), container, names)
