"""A LoRA of a 7B model, from its factors: what `capacity` and `anisotropy --no-base` cost.

The adapter has rank 64 in all seven projections of 28 layers of Qwen2.5-7B shapes, fp32, random.
Each command runs as a process of its own, in every round; beside it reading the file alone, and a
full SVD of one densified matrix of each shape as the obvious way takes it, scaled to all of them.
Prints Markdown.

    python benchmarks/adapter.py [--rounds 3] [--layers 28]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

RANK = 64
# Qwen2.5-7B: leaf → (out, in).
SHAPES = {
    "self_attn.q_proj": (3584, 3584),
    "self_attn.k_proj": (512, 3584),
    "self_attn.v_proj": (512, 3584),
    "self_attn.o_proj": (3584, 3584),
    "mlp.gate_proj": (18944, 3584),
    "mlp.up_proj": (18944, 3584),
    "mlp.down_proj": (3584, 18944),
}


def make(
    root: Path, layers: int, shapes: Mapping[str, tuple[int, int]] = SHAPES, rank: int = RANK
) -> None:
    """A LoRA of these shapes in every layer; singular values of B fall as 1/i."""
    root.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(0)
    tensors: dict[str, torch.Tensor] = {}
    for layer in range(layers):
        for leaf, (m, n) in shapes.items():
            prefix = f"base_model.model.model.layers.{layer}.{leaf}"
            B = torch.randn(m, rank, generator=generator) * torch.arange(1, rank + 1) ** -1.0
            tensors[f"{prefix}.lora_B.weight"] = 1e-3 * B
            tensors[f"{prefix}.lora_A.weight"] = torch.randn(rank, n, generator=generator) / n**0.5
    save_file(tensors, root / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {
        "peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank,
        "target_modules": [leaf.rpartition(".")[2] for leaf in shapes],
    }  # fmt: skip
    (root / "adapter_config.json").write_text(json.dumps(config))


def command(root: Path, *words: str) -> tuple[float, float]:
    """Seconds and peak resident MB of a run."""
    started = time.perf_counter()
    line = [sys.executable, "-m", "geoscope", words[0], str(root), *words[1:], "--no-resume", "-q"]
    with subprocess.Popen(line, stdout=subprocess.DEVNULL) as child:
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        sys.exit(f"geoscope {words[0]} failed with status {child.returncode}")
    return time.perf_counter() - started, usage.ru_maxrss / 1024


def reading(root: Path) -> float:
    started = time.perf_counter()
    with safe_open(root / "adapter_model.safetensors", "pt") as file:
        sum(file.get_tensor(name).clone().numel() for name in file.keys())
    return time.perf_counter() - started


def dense(root: Path, layers: int) -> float:
    """fp32 singular values of s·B·A made dense, one matrix of each shape, scaled to all."""
    total = 0.0
    timed: dict[tuple[int, int], float] = {}
    with safe_open(root / "adapter_model.safetensors", "pt") as file:
        for leaf, shape in SHAPES.items():
            if shape not in timed:
                prefix = f"base_model.model.model.layers.0.{leaf}"
                B, A = (file.get_tensor(f"{prefix}.lora_{side}.weight") for side in "BA")
                started = time.perf_counter()
                torch.linalg.svdvals(2 * B @ A)
                timed[shape] = time.perf_counter() - started
            total += layers * timed[shape]
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--no-dense", action="store_true", help="leave out what takes minutes")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        make(root, given.layers)
        lines = {"capacity": ("capacity",), "anisotropy --no-base": ("anisotropy", "--no-base")}
        load = os.getloadavg()[0]
        seconds: dict[str, list[float]] = {name: [] for name in lines}
        peak: dict[str, float] = {}
        read: list[float] = []
        for _ in range(given.rounds):
            read.append(reading(root))
            for name, words in lines.items():
                took, memory = command(root, *words)
                seconds[name].append(took)
                peak[name] = max(peak.get(name, 0.0), memory)
        whole = None if given.no_dense else dense(root, given.layers)
        size = (root / "adapter_model.safetensors").stat().st_size
        print(
            f"r = {RANK}, {7 * given.layers} matrices of {given.layers} layers of Qwen2.5-7B, "
            f"{size / 1e6:.0f} MB, fp32; {os.cpu_count()} cores (load average {load:.1f} before, "
            f"{os.getloadavg()[0]:.1f} after); least of {given.rounds} rounds (most).\n"
        )
        print("| line | seconds | faster than dense | memory MB |\n|---|--:|--:|--:|")
        print(f"| reading the file | {min(read):.2f} ({max(read):.2f}) | | |")
        for name, found in seconds.items():
            ratio = "" if whole is None else f"{whole / min(found):.0f} ×"
            print(
                f"| `{name}`, whole command | {min(found):.2f} ({max(found):.2f}) | "
                f"{ratio} | {peak[name]:.0f} |"
            )
        if whole is not None:
            print(f"| fp32 `svdvals` of s·B·A made dense, scaled | {whole:.0f} | 1 | |")


if __name__ == "__main__":
    main()
