"""Simulated runs as a trainer leaves them: a base and one folder a step."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from geoscope.records import Report
from tests.helpers.matrices import save_model
from tests.helpers.series import simulated

__all__ = ["GPT2", "LLAMA", "Run", "adapter", "lora_run", "same_numbers", "steps_of", "stored"]

Weights = dict[str, Tensor]
# Name → shape (out, in), and where the same weight lies in GPT-2's files, as (in, out).
LLAMA = {
    "model.layers.0.self_attn.q_proj.weight": (64, 64),
    "model.layers.0.mlp.down_proj.weight": (64, 96),
    "model.layers.1.self_attn.q_proj.weight": (64, 64),
    "model.layers.1.mlp.down_proj.weight": (64, 96),
}
GPT2 = {
    "model.layers.0.self_attn.q_proj.weight": "transformer.h.0.attn.c_proj.weight",
    "model.layers.0.mlp.down_proj.weight": "transformer.h.0.mlp.c_proj.weight",
    "model.layers.1.self_attn.q_proj.weight": "transformer.h.1.attn.c_proj.weight",
    "model.layers.1.mlp.down_proj.weight": "transformer.h.1.mlp.c_proj.weight",
}
_CONFIG = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
EQUAL_STEPS = tuple(range(0, 130, 10))


@dataclass(frozen=True)
class Run:
    """A run on disk. models: the weights as stored, that of the base first."""

    base: Path
    points: tuple[Path, ...]
    steps: tuple[int, ...]
    models: tuple[Weights, ...]

    @classmethod
    def write(
        cls,
        root: Path,
        steps: Sequence[int] = EQUAL_STEPS,
        *,
        dtype: torch.dtype = torch.float32,
        shards: int = 2,
        names: Mapping[str, str] | None = None,
        rho: float = 1e-2,
        **motion: float,
    ) -> Run:
        """`motion` as of `simulated`: drift, noise, seed. names: LLAMA → as stored, (in, out)."""
        paths = {
            name: simulated(
                steps, entries=m * n, rho=rho, dtype=dtype,
                **{**motion, "seed": 100 * int(motion.get("seed", 0)) + i},
            )
            for i, (name, (m, n)) in enumerate(LLAMA.items())
        }  # fmt: skip
        models = []
        for i in range(len(steps)):
            weights = {name: paths[name][i].reshape(shape) for name, shape in LLAMA.items()}
            if names is not None:
                weights = {names[name]: W.T.contiguous() for name, W in weights.items()}
            generator = torch.Generator().manual_seed(i)
            weights["model.norm.weight"] = torch.rand(64, generator=generator).to(dtype)
            weights["model.embed_tokens.weight"] = torch.rand(8, 64, generator=generator).to(dtype)
            models.append(weights)
        config = {"model_type": "gpt2"} if names is not None else _CONFIG
        return cls.of(root, steps, models, shards=shards, config=config)

    @classmethod
    def of(
        cls,
        root: Path,
        steps: Sequence[int],
        models: Sequence[Weights],
        *,
        shards: int = 1,
        config: Mapping[str, object] = _CONFIG,
    ) -> Run:
        places = [root / "base", *(root / f"run/checkpoint-{step}" for step in steps[1:])]
        for place, weights in zip(places, models, strict=True):
            save_model(place, weights, config=config, shards=shards)
        return cls(places[0], tuple(places[1:]), tuple(steps), tuple(models))

    @property
    def folder(self) -> str:
        return str(self.points[0].parent)

    def stack(self, name: str) -> Tensor:
        """Rows W_0 … W_T of one tensor as stored, fp64 (T + 1, mn)."""
        return torch.stack([one[name].double().flatten() for one in self.models])


def stored(folder: Path) -> Weights:
    """All tensors of a folder."""
    return {
        k: v for path in sorted(folder.glob("*.safetensors")) for k, v in load_file(path).items()
    }


def steps_of(points: Sequence[Path]) -> list[str]:
    return [str(one) for one in points]


def adapter(
    folder: Path, factors: Mapping[str, tuple[Tensor, Tensor]], *, alpha: float, **config: Any
) -> Path:
    """A LoRA as PEFT writes it; factors: module → (B, A)."""
    folder.mkdir(parents=True, exist_ok=True)
    rank = len(next(iter(factors.values()))[1])
    settings = {"peft_type": "LORA", "r": rank, "lora_alpha": alpha, "init_lora_weights": True}
    modules = [name.rpartition(".")[2] for name in factors]
    settings |= {"target_modules": sorted(set(modules)), **config}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    tensors = {}
    for name, (B, A) in factors.items():
        tensors[f"base_model.model.{name}.lora_B.weight"] = B.contiguous()
        tensors[f"base_model.model.{name}.lora_A.weight"] = A.contiguous()
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def lora_run(root: Path, steps: Sequence[int], *, from_zero: bool) -> tuple[Run, Path, Path]:
    """(the merged run in fp64, folder of the adapters, the adapter before training).

    Rank 4, α = 8. Where it does not start at zero the base is W_res + s·B0·A0, as of PiSSA.
    """
    generator = torch.Generator().manual_seed(7)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    modules = {name.removesuffix(".weight"): shape for name, shape in LLAMA.items()}
    now = {
        name: (torch.zeros(m, 4) if from_zero else normal(m, 4), normal(4, n))
        for name, (m, n) in modules.items()
    }
    base = {name: normal(*shape).double() for name, shape in modules.items()}
    first, series = now, []
    for _ in steps[1:]:
        now = {
            name: (B + 1e-2 * normal(*B.shape), A + 1e-2 * normal(*A.shape))
            for name, (B, A) in now.items()
        }
        series.append(now)
    initial = adapter(root / "initial", first, alpha=8)
    for step, one in zip(steps[1:], series, strict=True):
        adapter(root / f"lora/checkpoint-{step}", one, alpha=8)
    models: list[Weights] = []
    for one in [first, *series]:
        merged = {}
        for name, (B, A) in one.items():
            B0, A0 = (part.double() for part in first[name])
            moved = 2 * (B.double() @ A.double() - B0 @ A0)
            merged[f"{name}.weight"] = base[name] + moved
        models.append(merged)
    return Run.of(root / "merged", steps, models), root / "lora", initial


def same_numbers(one: Report, other: Report, *, rel: float, skip: Sequence[str] = ()) -> None:
    """Equal values and H of every matrix and of the model. skip: beginnings of ids left out."""

    def close(left: Mapping[str, float | None], right: Mapping[str, float | None]) -> None:
        for key in left.keys() & right.keys():
            if not key.startswith(tuple(skip)) and None not in (left[key], right[key]):
                assert left[key] == pytest.approx(right[key], rel=rel, abs=rel), key

    assert len(one.layers) == len(other.layers)
    for left, right in zip(one.layers, other.layers, strict=True):
        scale = max(abs(x) for row in left.gram for x in row)
        for row, its in zip(left.gram, right.gram, strict=True):
            assert row == pytest.approx(its, rel=0, abs=rel * scale)
        close(left.values, right.values)
    close(one.summary.model, other.summary.model)
