"""Adapters as PEFT writes them, initialised in each layout and trained for a few steps."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from geoscope.adapters.peft_config import adapter_config
from geoscope.formats.hashes import file_sha256, tensor_sha256
from tests.helpers.tiny_models import VOCABULARY, live

with warnings.catch_warnings():  # of packages that peft imports
    warnings.simplefilter("ignore")
    peft = pytest.importorskip("peft")

__all__ = [
    "DEPRECATION",
    "PATTERNS",
    "adapted",
    "edit",
    "expert_folder",
    "initialised",
    "mirrored",
    "record",
    "relative",
    "residual_folder",
    "saved",
    "train",
]

# Of transformers 5.23 about a name that peft 0.21 still uses.
DEPRECATION = "`is_gradient_checkpointing` is deprecated"
# Of peft 0.21 about the patterns that it makes itself for stacked experts, and does use.
PATTERNS = "The following .*_pattern keys did not match"
LEAVES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def adapted(base: Path, *, leaves: tuple[str, ...] = LEAVES, **settings: Any) -> Any:
    """The model of a folder under a LoRA of rank 4 and alpha 8, s = 2."""
    config = {"r": 4, "lora_alpha": 8, "target_modules": list(leaves), "task_type": "CAUSAL_LM"}
    return peft.get_peft_model(live(base), peft.LoraConfig(**{**config, **settings}))


def initialised(model: Any, *, seed: int = 3) -> Any:
    """Random factors of which the base is relieved: W_res + s·B0·A0 = W, as residual layouts do."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if not hasattr(module, "lora_A"):
            continue
        A, B = module.lora_A["default"].weight, module.lora_B["default"].weight
        with torch.no_grad():
            A.copy_(torch.randn(A.shape, generator=generator) * 0.1)
            B.copy_(torch.randn(B.shape, generator=generator) * 0.1)
            product = module.scaling["default"] * (B @ A)
            weight = module.get_base_layer().weight
            weight.sub_(product.T if module.fan_in_fan_out else product)
    return model


def residual_folder(model: Any, base: Path, out: Path, *, dtype: torch.dtype | None = None) -> Path:
    """OUT of the residual layout: residual/ of `dtype`, adapter/ and geoscope.json with hashes."""
    shutil.copytree(base, out / "residual")
    for file in (out / "residual").glob("*.safetensors"):
        tensors = load_file(file)
        for name, tensor in tensors.items():
            path, _, leaf = name.rpartition(".")
            module = model.base_model.model.get_submodule(path)
            if leaf == "weight" and hasattr(module, "lora_A"):
                kept = module.get_base_layer().weight.detach()
                tensors[name] = kept.to(dtype or kept.dtype)
                assert tensors[name].shape == tensor.shape
        save_file(tensors, file, metadata={"format": "pt"})
    model.peft_config["default"].base_model_name_or_path = str(out / "residual")
    adapter = saved(model, out / "adapter")
    factors = load_file(adapter / "adapter_model.safetensors")
    matrices: dict[str, dict[str, str]] = {}
    for key, tensor in factors.items():
        module, _, side = key.removeprefix("base_model.model.").rpartition(".lora_")
        matrices.setdefault(f"{module}.weight", {})[f"sha256_{side[0]}"] = tensor_sha256(tensor)
    files = {file.name: file_sha256(file) for file in base.glob("*.safetensors")}
    origin = {"reference": str(base), "commit": None, "sha256": files}
    record(out, base, layout="residual", matrices=matrices, base=origin)
    return out


def expert_folder(base: Path, out: Path, *, seed: int = 7) -> Path:
    """OUT of the residual layout for every projection of a model, experts one by one."""
    generator = torch.Generator().manual_seed(seed)
    shutil.copytree(base, out / "residual")
    factors: dict[str, Tensor] = {}
    leaves: set[str] = set()
    for file in sorted((out / "residual").glob("*.safetensors")):
        tensors = load_file(file)
        for name in sorted(tensors):
            path, _, leaf = name.removesuffix(".weight").rpartition(".")
            if not leaf.endswith("_proj"):
                continue
            leaves.add(leaf)
            m, n = tensors[name].shape
            A, B = (torch.randn(shape, generator=generator) * 0.1 for shape in ((2, n), (m, 2)))
            tensors[name] = tensors[name] - 2 * B @ A
            key = f"base_model.model.{path}.{leaf}"
            factors |= {f"{key}.lora_A.weight": A, f"{key}.lora_B.weight": B}
        save_file(tensors, file, metadata={"format": "pt"})
    (out / "adapter").mkdir()
    save_file(factors, out / "adapter" / "adapter_model.safetensors", metadata={"format": "pt"})
    config = adapter_config(base=str(out / "residual"), rank=2, alpha=4, targets=sorted(leaves))
    (out / "adapter" / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    record(out, base, layout="residual")
    return out


def edit(folder: Path, **changes: Any) -> None:
    """Changes adapter_config.json; None takes a key away."""
    path = folder / "adapter_config.json"
    config = {**json.loads(path.read_text(encoding="utf-8")), **changes}
    kept = {key: value for key, value in config.items() if key not in changes or value is not None}
    path.write_text(json.dumps(kept), encoding="utf-8")


def saved(model: Any, folder: Path) -> Path:
    """The adapter as PEFT saves it; its warning that no Hub answers is not ours."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(folder)
    return folder


def mirrored(model: Any, *, seed: int = 3) -> Any:
    """A = [a1; a1; …], B = [b1, −b1, …] on the untouched base."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if hasattr(module, "lora_A"):
            A, B = module.lora_A["default"].weight, module.lora_B["default"].weight
            half = torch.randn(A.shape[0] // 2, A.shape[1], generator=generator) * 0.1
            left = torch.randn(B.shape[0], B.shape[1] // 2, generator=generator) * 0.1
            with torch.no_grad():
                A.copy_(half.repeat_interleave(2, 0))
                B.copy_(left.repeat_interleave(2, 1))
                B[:, 1::2].mul_(-1)
    return model


def record(folder: Path, original: Path, *, layout: str | None, **more: Any) -> None:
    """geoscope.json, as far as reading goes."""
    content = {
        "schema": "geoscope.adapter/1", "method": "geora", "layout": layout,
        "base": {"reference": str(original), "commit": None}, **more,
    }  # fmt: skip
    (folder / "geoscope.json").write_text(json.dumps(content), encoding="utf-8")


def train(model: Any, *, steps: int = 3, lr: float = 1e-2, seed: int = 5) -> Any:
    """AdamW on random tokens; the adapter alone moves."""
    generator = torch.Generator().manual_seed(seed)
    parameters = [one for one in model.parameters() if one.requires_grad]
    optimiser = torch.optim.AdamW(parameters, lr=lr)
    model.train()
    for _ in range(steps):
        tokens = torch.randint(0, VOCABULARY, (4, 16), generator=generator)
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    return model.eval()


def relative(actual: Tensor, expected: Tensor) -> float:
    """‖actual − expected‖ / ‖expected‖."""
    return float((actual - expected).norm() / expected.norm())
