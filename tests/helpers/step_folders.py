"""What lies in the folder of a step: an adapter, smaller than any that a trainer writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

__all__ = ["ADAPTER", "Q", "adapter"]

Q = "model.layers.0.self_attn.q_proj"
ADAPTER = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}


def adapter(folder: Path, **config: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps({**ADAPTER, **config}))
    A, B = torch.ones(2, 8), torch.ones(8, 2)
    names = f"base_model.model.{Q}.lora_A.weight", f"base_model.model.{Q}.lora_B.weight"
    save_file(dict(zip(names, (A, B), strict=True)), folder / "adapter_model.safetensors")
    return folder
