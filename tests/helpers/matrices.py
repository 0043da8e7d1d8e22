"""Matrices whose answer is known, and checkpoints made of them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

__all__ = [
    "DTYPES",
    "gaussian",
    "heavy_headed",
    "orthonormal",
    "save_model",
    "updated",
    "with_spectrum",
]

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def gaussian(m: int, n: int, *, seed: int, sd: float = 0.02) -> Tensor:
    """iid N(0, sd²), fp64."""
    return sd * torch.randn(m, n, dtype=torch.float64, generator=generator(seed))


def orthonormal(rows: int, columns: int, *, seed: int) -> Tensor:
    """Orthonormal columns, Haar distributed."""
    return torch.linalg.qr(gaussian(rows, columns, seed=seed, sd=1.0)).Q


def with_spectrum(m: int, n: int, spectrum: np.ndarray | Tensor, *, seed: int) -> Tensor:
    """A matrix with these singular values and random frames."""
    S = torch.as_tensor(spectrum, dtype=torch.float64)
    U, V = orthonormal(m, len(S), seed=seed), orthonormal(n, len(S), seed=seed + 1)
    return (U * S) @ V.T


def heavy_headed(m: int, n: int, *, seed: int) -> Tensor:
    """As weights are: three large singular values, then a slow decay; entries of sd .02."""
    place = torch.arange(min(m, n), dtype=torch.float64)
    S = (place + 1) ** -0.3 * (1 - 0.8 * place / len(place))
    S[:3] *= torch.tensor([6.0, 3.0, 2.0])
    W = with_spectrum(m, n, S, seed=seed)
    return W * (0.02 * (m * n) ** 0.5 / W.norm())


def updated(base: Tensor, direction: Tensor, rho: float) -> Tensor:
    """base plus `direction` scaled to the relative size rho."""
    return base + direction * (rho * base.norm() / direction.norm())


def save_model(
    folder: Path,
    weights: Mapping[str, Tensor],
    *,
    config: Mapping[str, object] | None = None,
    shards: int = 1,
) -> Path:
    """A checkpoint folder: config.json and one or several safetensors shards."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config or {"model_type": "llama"}))
    names = sorted(weights)
    if shards == 1:
        tensors = {name: weights[name].contiguous() for name in names}
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    where = {}
    for i in range(shards):
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: weights[name].contiguous() for name in names[i::shards]}
        save_file(part, folder / file, metadata={"format": "pt"})
        where.update(dict.fromkeys(part, file))
    index = {"metadata": {"total_size": 0}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder
