"""Small checkpoints on disk, written by the libraries that geoscope reads after."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from geoscope.models.checkpoint import Checkpoint
from geoscope.sources.open import open_checkpoint

CONFIG = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 8}


def llama(
    seed: int = 0, *, layers: int = 2, dtype: torch.dtype = torch.bfloat16
) -> dict[str, Tensor]:
    """Tensors named and shaped like those of a small Llama: hidden 8, MLP 12, vocabulary 32."""
    generator = torch.Generator().manual_seed(seed)
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (32, 8)}
    for layer in range(layers):
        block = f"model.layers.{layer}"
        shapes |= {f"{block}.self_attn.{kind}_proj.weight": (8, 8) for kind in "qkvo"}
        shapes |= {f"{block}.mlp.{kind}_proj.weight": (12, 8) for kind in ("gate", "up")}
        shapes |= {
            f"{block}.mlp.down_proj.weight": (8, 12),
            f"{block}.input_layernorm.weight": (8,),
        }
    shapes |= {"model.norm.weight": (8,), "lm_head.weight": (32, 8)}
    return {
        name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()
    }


def write_config(folder: Path, config: Mapping[str, Any] = CONFIG) -> None:
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")


def write_model(
    folder: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any] | None = CONFIG
) -> Path:
    """A folder with `model.safetensors` and, unless None, `config.json`."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(dict(tensors), folder / "model.safetensors", metadata={"format": "pt"})
    if config is not None:
        write_config(folder, config)
    return folder


def write_sharded(folder: Path, tensors: Mapping[str, Tensor], count: int = 2) -> dict[str, str]:
    """A folder with `count` shards, index and config. Returns the weight map."""
    folder.mkdir(parents=True, exist_ok=True)
    names = sorted(tensors)
    weight_map: dict[str, str] = {}
    for number in range(count):
        shard = f"model-{number + 1:05d}-of-{count:05d}.safetensors"
        part = {name: tensors[name] for name in names[number::count]}
        save_file(part, folder / shard, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, shard)
    write_index(folder, weight_map)
    write_config(folder)
    return weight_map


def write_index(
    folder: Path, weight_map: Mapping[str, Any], name: str = "model.safetensors.index.json"
) -> None:
    index = {"metadata": {"total_size": 0}, "weight_map": dict(weight_map)}
    (folder / name).write_text(json.dumps(index), encoding="utf-8")


def raw_safetensors(header: Any, data: bytes = b"", *, length: int | None = None) -> bytes:
    """The bytes of a safetensors file with any header at all."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def model_of(folder: Path, tensors: Mapping[str, Tensor], **config: Any) -> Checkpoint:
    """The checkpoint of a new folder with these tensors and this config."""
    return open_checkpoint(str(write_model(folder, tensors, {**CONFIG, **config})))


def zeros(**shapes: tuple[int, ...]) -> dict[str, Tensor]:
    """bf16 tensors of the given shapes; `__` in a name stands for a dot."""
    return {
        name.replace("__", "."): torch.zeros(shape, dtype=torch.bfloat16)
        for name, shape in shapes.items()
    }


def assert_equal_bits(actual: Tensor, expected: Tensor) -> None:
    """Same dtype, same shape, same bits (NaN included)."""
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    left, right = (
        tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (actual, expected)
    )
    assert torch.equal(left, right)


class Exploit:
    """Unpickled, it would create a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch '{self.path}'",)
