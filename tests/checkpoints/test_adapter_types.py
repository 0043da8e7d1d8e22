"""Is the update of every type of adapter what PEFT adds to the base, and is nothing left out?

The oracle is PEFT: the base in fp64, the adapter merged into it, the difference. The files are those
of `save_pretrained`; every parameter of the adapter has random values.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints.peft_adapters import Merged, infos, merged, peft, quietly
from torch import Tensor

from geoscope.checkpoints.adapter import Adapter, open_adapter

LORA: dict[str, Any] = {"r": 2, "lora_alpha": 6, "task_type": "CAUSAL_LM"}
CAUSAL: dict[str, Any] = {"task_type": "CAUSAL_LM"}
LINEAR = ["q_proj", "v_proj", "down_proj"]
GPT2 = ["c_attn", "mlp.c_proj"]


def lora(**settings: Any) -> Any:
    return lambda: peft.LoraConfig(**{**LORA, "target_modules": LINEAR, **settings})


def adalora(**settings: Any) -> Any:
    made = {"init_r": 4, "target_r": 2, "lora_alpha": 6, "total_step": 10, **CAUSAL}
    return lambda: peft.AdaLoraConfig(**{**made, "target_modules": LINEAR, **settings})


def vera(**settings: Any) -> Any:
    made = {"r": 3, "projection_prng_key": 7, "target_modules": LINEAR, **CAUSAL}
    return lambda: peft.VeraConfig(**{**made, **settings})


def ia3(**settings: Any) -> Any:
    made = {"target_modules": LINEAR, "feedforward_modules": ["down_proj"], **CAUSAL}
    return lambda: peft.IA3Config(**{**made, **settings})


FIFO = {"target_modules": GPT2, "fan_in_fan_out": True}
STACKS = {"target_modules": ["q_proj"]}
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]

CASES: dict[str, tuple[str, Any]] = {
    "lora": ("llama", lora()),
    "patterns, rslora": (
        "llama",
        lora(
            use_rslora=True,
            rank_pattern={"v_proj": 3, r"layers\.1\.self_attn\.q_proj": 1},
            alpha_pattern={"down_proj": 5},
        ),
    ),
    "conv1d": ("gpt2", lora(**FIFO)),
    "dora": ("llama", lora(use_dora=True)),
    "dora, conv1d": ("gpt2", lora(use_dora=True, **FIFO)),
    "embedding": ("llama", lora(target_modules=["embed_tokens", "q_proj"])),
    "embedding, dora": ("llama", lora(target_modules=["embed_tokens"], use_dora=True)),
    "embedding, conv1d": (
        "gpt2",
        lora(target_modules=["wte", "c_attn"], fan_in_fan_out=True),
    ),
    "tied embedding": ("tied", lora(target_modules=["embed_tokens"])),
    "lora_bias": ("biased", lora(target_modules=["q_proj"], lora_bias=True, use_rslora=True)),
    "modules_to_save": ("llama", lora(modules_to_save=["lm_head", "norm"])),
    "modules_to_save, conv1d": (
        "gpt2",
        lora(target_modules=["c_attn"], fan_in_fan_out=True, modules_to_save=["mlp.c_proj"]),
    ),
    "modules_to_save, tied": ("tied", lora(modules_to_save=["embed_tokens"])),
    "bias": ("gpt2", lora(bias="all", **FIFO)),
    "tokens": ("llama", lora(trainable_token_indices=[5, 3])),
    "tokens, tied": ("tied", lora(trainable_token_indices={"embed_tokens": [1, 3, 27]})),
    "tokens of two": (
        "llama",
        lora(trainable_token_indices={"embed_tokens": [1, 3], "lm_head": [2]}),
    ),
    "experts": ("qwen3_moe", lora(target_parameters=EXPERTS, **STACKS)),
    "experts, one": ("mixtral", lora(target_parameters=EXPERTS[1:], **STACKS)),
    "experts, turned": ("gpt_oss", lora(target_parameters=EXPERTS, **STACKS)),
    "adalora": ("llama", adalora()),
    "adalora, alpha 0": ("llama", adalora(lora_alpha=0)),
    "adalora, conv1d": ("gpt2", adalora(**FIFO)),
    "vera": ("llama", vera()),
    "vera, drawn": ("llama", vera(save_projection=False)),
    "vera, conv1d": ("gpt2", vera(**FIFO)),
    "ia3": ("llama", ia3()),
    "ia3, bias": ("biased", ia3()),
    "ia3, conv1d": (
        "gpt2",
        ia3(target_modules=GPT2, feedforward_modules=["mlp.c_proj"], fan_in_fan_out=True),
    ),
}


def error(found: Tensor, expected: Tensor) -> float:
    """Largest deviation against the largest entry."""
    assert found.dtype == torch.float64
    assert found.shape == expected.shape
    return float((found - expected).abs().max() / expected.abs().max())


def changes(adapter: Adapter, base: dict[str, Tensor]) -> dict[str, Tensor]:
    """Every tensor of the base that the adapter changes → what becomes of it."""
    names = [
        *((name, name if one.is_stack else f"{name}.weight")
          for name, one in adapter.modules.items()),
        *((name, name) for name in (*adapter.replaced, *adapter.rows, *adapter.vectors)),
    ]  # fmt: skip
    found: dict[str, Tensor] = {}
    for name, tensor in names:
        if tensor in base:  # IA3 names biases that a layer may lack
            found.setdefault(tensor, adapter.updated(name, base[tensor]))
    return found


@pytest.mark.parametrize("case", CASES)
def test_the_tuned_model_is_that_of_peft(tmp_path: Path, case: str) -> None:
    made = merged(tmp_path, *CASES[case])
    adapter = open_adapter(tmp_path).with_base(infos(made.base))
    found = changes(adapter, made.base)
    heads = {"lm_head.weight"} if "tied" in case or CASES[case][0] == "gpt2" else set()
    for name, weight in made.tuned.items():
        if name in found:
            assert error(found[name], weight) < 1e-9, name
        elif name not in heads:
            assert torch.equal(made.base[name], weight), name
    assert any(not torch.equal(made.base[name], made.tuned[name]) for name in found)


@pytest.mark.parametrize("case", CASES)
def test_the_update_of_factors_is_the_difference(tmp_path: Path, case: str) -> None:
    made = merged(tmp_path, *CASES[case])
    adapter = open_adapter(tmp_path).with_base(infos(made.base))
    for name, one in adapter.modules.items():
        tensor = name if one.is_stack else f"{name}.weight"
        base, tuned = made.base[tensor], made.tuned[tensor]
        assert one.shape == base.shape[-2:]
        assert (one.kind == "base") == ("dora" in case or "ia3" in case)
        if one.kind == "factors":
            B, A = adapter.factors(name)
            update = one.scaling * (B.double() @ A.double()).reshape(base.shape)
            assert error(update, tuned - base) < 1e-9
