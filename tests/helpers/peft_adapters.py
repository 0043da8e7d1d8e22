"""Adapters of every type as PEFT saves them, with what PEFT itself makes of the base in fp64."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from geoscope.records import TensorInfo

with warnings.catch_warnings():  # of packages that they import
    warnings.simplefilter("ignore")
    transformers = pytest.importorskip("transformers")
    peft = pytest.importorskip("peft")

__all__ = ["MODELS", "Merged", "infos", "merged", "peft", "quietly"]

_SMALL: dict[str, Any] = {
    "hidden_size": 12, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 8, "vocab_size": 28, "tie_word_embeddings": False,
    "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None,
}  # fmt: skip
_EXPERTS: dict[str, Any] = {"num_experts_per_tok": 2, "num_hidden_layers": 1}
_GPT2: dict[str, Any] = {
    "n_embd": 12, "n_layer": 2, "n_head": 2, "vocab_size": 28, "n_positions": 8,
    "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip

# name → (class of the model, its configuration); sides differ, so that a turned matrix shows.
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", _SMALL),
    "tied": ("LlamaForCausalLM", "LlamaConfig", {**_SMALL, "tie_word_embeddings": True}),
    "biased": ("LlamaForCausalLM", "LlamaConfig", {**_SMALL, "attention_bias": True}),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", _GPT2),
    "qwen3_moe": (
        "Qwen3MoeForCausalLM",
        "Qwen3MoeConfig",
        {**_SMALL, **_EXPERTS, "num_experts": 3, "moe_intermediate_size": 10},
    ),
    "mixtral": (
        "MixtralForCausalLM",
        "MixtralConfig",
        {**_SMALL, **_EXPERTS, "num_local_experts": 3},
    ),
    "gpt_oss": (
        "GptOssForCausalLM",
        "GptOssConfig",
        {**_SMALL, **_EXPERTS, "num_local_experts": 3, "layer_types": ["full_attention"]},
    ),
}
# The experts of this family are stored (E, in, out).
_TURNED_EXPERTS = ("gpt_oss",)
_GPT2_LINEAR = ("c_attn.weight", "c_proj.weight", "c_fc.weight")


@dataclass(frozen=True)
class Merged:
    """base, tuned: tensors of the live model before and after, in fp64, matrices as (out, in)."""

    folder: Path
    model: Any
    base: dict[str, Tensor]
    tuned: dict[str, Tensor]


def quietly(do: Callable[[], Any]) -> Any:
    """What `do` returns, without the warnings of PEFT about its own defaults."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return do()


def merged(
    folder: Path,
    name: str,
    config: Callable[[], Any],
    *,
    dtype: torch.dtype = torch.float64,
    before_saving: Callable[[Any], None] | None = None,
) -> Merged:
    """A model of MODELS under an adapter with random values, saved and merged by PEFT.

    dtype: of the base while the adapter is made; it is merged in fp64 all the same.
    """

    def make() -> Merged:
        kind, configuration, settings = MODELS[name]
        torch.manual_seed(1)
        model = getattr(transformers, kind)(getattr(transformers, configuration)(**settings))
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.4)
        model = model.to(dtype)
        base = {key: one.double().clone() for key, one in model.state_dict().items()}
        adapted = peft.get_peft_model(model, config())
        _randomise(adapted)
        if before_saving is not None:
            before_saving(adapted)
        adapted.save_pretrained(folder)
        after = copy.deepcopy(adapted).double().merge_and_unload().state_dict()
        tuned = {key: one.double() for key, one in after.items()}
        turned = {key: _turned(name, key, one) for key, one in base.items()}
        return Merged(
            folder, adapted, turned, {key: _turned(name, key, one) for key, one in tuned.items()}
        )

    return quietly(make)


def _turned(name: str, key: str, one: Tensor) -> Tensor:
    if name == "gpt2" and key.endswith(_GPT2_LINEAR):
        return one.T
    if name in _TURNED_EXPERTS and one.dim() == 3:
        return one.transpose(1, 2)
    return one


def _randomise(adapted: Any) -> None:
    """Every parameter that the adapter adds, or saves beside it; of the copies alone."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for key, parameter in adapted.named_parameters():
            if "ranknum" in key or not parameter.requires_grad:
                continue
            drawn = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(parameter + 0.3 * drawn)


def infos(tensors: dict[str, Tensor], dtype: str = "float64") -> dict[str, TensorInfo]:
    """Module → what the header of a base says about its weight."""
    return {
        key.removesuffix(".weight"): TensorInfo(key, tuple(one.shape), dtype, 0, "")
        for key, one in tensors.items()
        if one.dim() >= 2
    }
