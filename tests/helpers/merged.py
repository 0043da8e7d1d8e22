"""Adapters with random factors, saved by PEFT, beside what PEFT itself merges in fp64."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from geoscope.records import LayerRecord, Report
from geoscope.verbs.options import Options
from geoscope.verbs.pairs.prepare import prepare
from tests.helpers import tiny_models

with warnings.catch_warnings():  # of packages that it imports
    warnings.simplefilter("ignore")
    peft = pytest.importorskip("peft")

__all__ = [
    "CASES",
    "EXPERTS",
    "LINEAR",
    "Made",
    "by_name",
    "lora",
    "made",
    "moved",
    "peft",
    "tuned_weights",
]

LINEAR = ["q_proj", "v_proj", "down_proj"]
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


@dataclass(frozen=True)
class Made:
    """Folders: base, adapter, start (where it does not begin at zero), and the merged model."""

    base: Path
    adapter: Path
    start: Path
    merged: Path


def made(
    root: Path,
    family: Callable[..., Path],
    config: Any,
    *,
    train: Callable[[Any], None] | None = None,
    dtype: torch.dtype = torch.float64,
) -> Made:
    """The adapter with random values, saved by PEFT, and what PEFT merges in fp64."""
    found = Made(root / "base", root / "adapter", root / "start", root / "merged")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = tiny_models.live(family(found.base), dtype)
        torch.manual_seed(0)
        adapted = peft.get_peft_model(model, config)
        adapted.save_pretrained(found.start)
        (train or randomise)(adapted)
        adapted.save_pretrained(found.adapter)
        adapted.double().merge_and_unload().save_pretrained(found.merged)
    return found


def randomise(model: Any) -> None:
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        # AdaLoRA's ranknum is in no file
        if parameter.requires_grad and "ranknum" not in name:
            drawn = torch.randn(parameter.shape, generator=generator)
            parameter.data.copy_(0.3 * drawn + (parameter.data if parameter.dim() == 1 else 0))


def lora(**settings: Any) -> Any:
    given = {"r": 3, "lora_alpha": 5, "target_modules": LINEAR, "task_type": "CAUSAL_LM"}
    return peft.LoraConfig(**{**given, **settings})


def by_name(report: Report) -> dict[str, LayerRecord]:
    return {one.name: one for one in report.layers}


def tuned_weights(base: object, tuned: object, **options: Any) -> dict[str, Tensor]:
    """Every compared matrix as the tuned model has it, fp64; by its name in the base."""
    found = prepare(str(base), str(tuned), Options(**options))
    pairs = found.pairing.matrices
    return {one.name: found.tuned.read(one.tuned.name).double() for one in pairs}


def moved(model: Any) -> None:
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.02 * torch.randn(parameter.shape, generator=generator)


CASES: dict[str, tuple[Callable[..., Path], Any]] = {
    "lora": (tiny_models.llama, lora()),
    "rslora, patterns": (
        tiny_models.llama,
        lora(use_rslora=True, rank_pattern={"v_proj": 2}, alpha_pattern={"down_proj": 9}),
    ),
    "conv1d, fused": (
        tiny_models.gpt2,
        lora(target_modules=["c_attn", "c_fc"], fan_in_fan_out=True),
    ),
    "fused": (tiny_models.phi3, lora(target_modules=["qkv_proj", "gate_up_proj"])),
    "dora, fused": (tiny_models.phi3, lora(target_modules=["qkv_proj"], use_dora=True)),
    "experts": (tiny_models.qwen3_moe, lora(target_parameters=EXPERTS, target_modules=["q_proj"])),
    "saved whole": (tiny_models.llama, lora(modules_to_save=["norm", "o_proj"])),
    "adalora": (
        tiny_models.llama,
        peft.AdaLoraConfig(init_r=3, target_modules=LINEAR, total_step=10, task_type="CAUSAL_LM"),
    ),
    "vera": (tiny_models.llama, peft.VeraConfig(r=4, target_modules=LINEAR, task_type="CAUSAL_LM")),
    "ia3": (
        tiny_models.llama,
        peft.IA3Config(
            target_modules=LINEAR, feedforward_modules=["down_proj"], task_type="CAUSAL_LM"
        ),
    ),
}
