"""Synthetic checkpoints with the shapes and spectra of real models, for benchmarks.

Weights: a Gaussian bulk whose rows have log-normal scales, plus 64 power-law outliers, stored in
bf16. Update: rank 16 plus dense noise, of relative size 1e-3 by default, rounded to bf16 as a
trainer's save does. Real weights may differ; the script states what it makes.

    python benchmarks/synthetic.py OUT --family qwen2.5-1.5b --layers 2
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor


def experts(count: int, up: tuple[int, int], router: tuple[int, int]) -> dict[str, tuple[int, int]]:
    """The matrices of a layer of so many experts: gate, up and down of each, and the router."""
    shapes = {"gate_proj": up, "up_proj": up, "down_proj": up[::-1]}
    named = {f"mlp.experts.{i}.{leaf}": side for i in range(count) for leaf, side in shapes.items()}
    return {**named, "mlp.gate": router}


FAMILIES: dict[str, dict[str, tuple[int, int]]] = {
    "qwen2.5-1.5b": {
        "self_attn.q_proj": (1536, 1536),
        "self_attn.k_proj": (256, 1536),
        "self_attn.v_proj": (256, 1536),
        "self_attn.o_proj": (1536, 1536),
        "mlp.gate_proj": (8960, 1536),
        "mlp.up_proj": (8960, 1536),
        "mlp.down_proj": (1536, 8960),
    },
    "smollm2-135m": {
        "self_attn.q_proj": (576, 576),
        "self_attn.k_proj": (192, 576),
        "self_attn.v_proj": (192, 576),
        "self_attn.o_proj": (576, 576),
        "mlp.gate_proj": (1536, 576),
        "mlp.up_proj": (1536, 576),
        "mlp.down_proj": (576, 1536),
    },
    "small": {
        "self_attn.q_proj": (320, 320),
        "self_attn.k_proj": (80, 320),
        "mlp.up_proj": (960, 320),
        "mlp.down_proj": (320, 960),
    },
    # 24 layers have 4,608 matrices of 96×64 and 24 of 32×64
    "small-experts": experts(64, (96, 64), (32, 64)),
    # of Qwen3-30B-A3B, a part of the 128 of a layer
    "qwen3-30b-a3b": experts(24, (768, 2048), (128, 2048)),
    "llama-3-8b": {
        "self_attn.q_proj": (4096, 4096),
        "self_attn.k_proj": (1024, 4096),
        "self_attn.v_proj": (1024, 4096),
        "self_attn.o_proj": (4096, 4096),
        "mlp.gate_proj": (14336, 4096),
        "mlp.up_proj": (14336, 4096),
        "mlp.down_proj": (4096, 14336),
    },
}
OUTLIERS = 64


def weight(m: int, n: int, generator: torch.Generator) -> Tensor:
    """One base weight (m, n), fp32: log-normal rows, outliers from 3 × the bulk's edge down.

    64 of them, or an eighth of a shorter side that is not longer than that.
    """
    rows = torch.exp(0.3 * torch.randn(m, 1, generator=generator))
    bulk = 0.02 * rows * torch.randn(m, n, generator=generator)
    edge = 0.02 * math.exp(0.09) * (math.sqrt(m) + math.sqrt(n))
    outliers = OUTLIERS if min(m, n) > OUTLIERS else min(m, n) // 8
    U = torch.linalg.qr(torch.randn(m, outliers, generator=generator)).Q
    V = torch.linalg.qr(torch.randn(n, outliers, generator=generator)).Q
    scale = 3 * edge * torch.arange(1, outliers + 1) ** -0.5
    return bulk + (U * scale) @ V.T


def update(m: int, n: int, size: float, generator: torch.Generator) -> Tensor:
    """An update (m, n) of Frobenius norm `size`: half of its energy of rank 16, half dense."""
    low = torch.randn(m, 16, generator=generator) @ torch.randn(16, n, generator=generator)
    dense = torch.randn(m, n, generator=generator)
    return size * (low / low.norm() + dense / dense.norm()) / math.sqrt(2)


def write(out: Path, family: str, layers: int, *, rho: float = 1e-3, seed: int = 0) -> None:
    """`out`/base and `out`/tuned: one shard a layer, an index and a config."""
    generator = torch.Generator().manual_seed(seed)
    where: dict[str, str] = {}
    for layer in range(layers):
        file = f"model-{layer + 1:05d}-of-{layers:05d}.safetensors"
        base, tuned = {}, {}
        for name, (m, n) in FAMILIES[family].items():
            key = f"model.layers.{layer}.{name}.weight"
            before = weight(m, n, generator).bfloat16()
            after = before.float() + update(m, n, rho * float(before.float().norm()), generator)
            base[key], tuned[key] = before, after.bfloat16()
            where[key] = file
        for side, tensors in (("base", base), ("tuned", tuned)):
            (out / side).mkdir(parents=True, exist_ok=True)
            save_file(tensors, out / side / file, metadata={"format": "pt"})
    for side in ("base", "tuned"):
        index = {"metadata": {}, "weight_map": where}
        (out / side / "model.safetensors.index.json").write_text(json.dumps(index))
        (out / side / "config.json").write_text(json.dumps({"model_type": "llama"}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("out", type=Path)
    parser.add_argument("--family", choices=sorted(FAMILIES), default="qwen2.5-1.5b")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--rho", type=float, default=1e-3, help="relative size of the update")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    write(given.out, given.family, given.layers, rho=given.rho, seed=given.seed)


if __name__ == "__main__":
    main()
