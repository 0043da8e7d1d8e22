"""mergekit-extract-lora: a rank-64 adapter out of the SVD of each update.

Its command needs a whole model, so the shards are linked into folders with a complete config and
with embeddings of 32 tokens and norms, which it does not decompose.

    cd benchmarks && ENVIRONMENT/bin/python -m peers.mergekit_extract BASE TUNED
"""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path

import torch
from mergekit.scripts.extract_lora import main as extract  # pyright: ignore
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import LlamaConfig

from peers.folders import report, weights

RANK = 64
HEAD = 128  # both families that synthetic.py makes
VOCABULARY = 32


def whole_model(folder: Path, out: Path) -> Path:
    """`out`: the shards of `folder`, linked, with what makes a Llama of them."""
    out.mkdir()
    shapes = {name: tuple(weight.shape) for name, weight in weights(folder)}
    layers = 1 + max(int(name.split(".")[2]) for name in shapes)
    first = {name.split(".")[-2]: shape for name, shape in shapes.items()}
    hidden = first["q_proj"][1]
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=first["gate_proj"][0],
        num_hidden_layers=layers,
        num_attention_heads=first["q_proj"][0] // HEAD,
        num_key_value_heads=first["k_proj"][0] // HEAD,
        vocab_size=VOCABULARY,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
    )
    config.save_pretrained(out)
    rest = {
        "model.embed_tokens.weight": torch.zeros(VOCABULARY, hidden),
        "lm_head.weight": torch.zeros(VOCABULARY, hidden),
        "model.norm.weight": torch.ones(hidden),
    }
    for layer in range(layers):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            rest[f"model.layers.{layer}.{norm}.weight"] = torch.ones(hidden)
    save_file({name: one.bfloat16() for name, one in rest.items()}, out / "rest.safetensors")
    where = dict.fromkeys(rest, "rest.safetensors")
    for file in sorted(folder.glob("*.safetensors")):
        (out / file.name).symlink_to(file)
        with safe_open(file, framework="pt") as handle:
            where |= dict.fromkeys(handle.keys(), file.name)
    index = {"metadata": {}, "weight_map": where}
    (out / "model.safetensors.index.json").write_text(json.dumps(index))
    return out


def adapter(base: Path, tuned: Path) -> float:
    """Extracts the adapter; returns the seconds of making the folders."""
    with tempfile.TemporaryDirectory() as scratch:
        started = time.perf_counter()
        before = whole_model(base, Path(scratch) / "base")
        after = whole_model(tuned, Path(scratch) / "tuned")
        prepared = time.perf_counter() - started
        out = Path(scratch) / "adapter"
        extract(
            [
                *("--model", str(after), "--base-model", str(before), "--out-path", str(out)),
                *("--max-rank", str(RANK), "--skip-undecomposable"),
            ],
            standalone_mode=False,
        )
        with safe_open(out / "adapter_model.safetensors", framework="pt") as handle:
            pairs = sum(name.endswith("lora_A.weight") for name in handle.keys())
        assert pairs == sum(1 for _ in weights(base)), f"{pairs} adapters were extracted"
        return prepared


if __name__ == "__main__":
    report(
        "mergekit",
        {"extract-lora": adapter},
        computes=f"leading {RANK} triplets of the update (full fp32 SVD), written as an adapter",
        omits="base and tuned spectra, angles, captured energy, every metric, nulls, precision "
        "floor, error bounds, verdict",
    )
