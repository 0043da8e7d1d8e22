"""Tiny models as transformers saves them, each in several shards: a folder of the real format.

Their sides are small and all different where the family allows it, so that a turned or swapped
matrix shows; the weights come from a seed. Norms and biases are drawn too: a fresh norm is all
ones, which hides a tensor that was not copied.
"""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

with warnings.catch_warnings():  # of packages that transformers imports
    warnings.simplefilter("ignore")
    transformers = pytest.importorskip("transformers")

__all__ = [
    "VOCABULARY",
    "assert_same_logits",
    "gpt2",
    "gpt_oss",
    "live",
    "llama",
    "logits",
    "mixtral",
    "phi3",
    "qwen2_tied",
    "qwen3_moe",
    "stacked",
]

VOCABULARY = 48


def llama(
    folder: Path, *, seed: int = 0, dtype: torch.dtype = torch.float32, **config: Any
) -> Path:
    """Two blocks, grouped-query attention, untied head; a few shards."""
    settings: dict[str, Any] = {
        "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": VOCABULARY,
        "tie_word_embeddings": False, **config,
    }  # fmt: skip
    made = transformers.LlamaConfig(**settings)
    return _saved(transformers.LlamaForCausalLM, made, folder, seed, dtype)


def qwen2_tied(
    folder: Path, *, seed: int = 0, dtype: torch.dtype = torch.float32, **config: Any
) -> Path:
    """Two blocks with biases of q, k and v; the head is the embedding and is not stored."""
    settings: dict[str, Any] = {
        "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": VOCABULARY,
        "tie_word_embeddings": True, **config,
    }  # fmt: skip
    made = transformers.Qwen2Config(**settings)
    return _saved(transformers.Qwen2ForCausalLM, made, folder, seed, dtype)


def gpt2(folder: Path, *, seed: int = 0, dtype: torch.dtype = torch.float32, **config: Any) -> Path:
    """Two blocks of Conv1D, stored (in, out)."""
    settings: dict[str, Any] = {
        "n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": VOCABULARY, "n_positions": 32,
        "bos_token_id": 0, "eos_token_id": 0, **config,
    }  # fmt: skip
    made = transformers.GPT2Config(**settings)
    return _saved(transformers.GPT2LMHeadModel, made, folder, seed, dtype)


def qwen3_moe(
    folder: Path, *, seed: int = 0, dtype: torch.dtype = torch.float32, **config: Any
) -> Path:
    """Two blocks of four experts, two of them active; one matrix per expert on disk."""
    settings: dict[str, Any] = {
        "hidden_size": 16, "intermediate_size": 24, "moe_intermediate_size": 16,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
        "num_experts": 4, "num_experts_per_tok": 2, "vocab_size": VOCABULARY,
        "tie_word_embeddings": False, **config,
    }  # fmt: skip
    made = transformers.Qwen3MoeConfig(**settings)
    return _saved(transformers.Qwen3MoeForCausalLM, made, folder, seed, dtype)


def mixtral(
    folder: Path, *, seed: int = 0, dtype: torch.dtype = torch.float32, **config: Any
) -> Path:
    """Two blocks of four experts under the names of Mixtral: block_sparse_moe, w1, w2, w3."""
    settings: dict[str, Any] = {
        "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4,
        "num_experts_per_tok": 2, "vocab_size": VOCABULARY, "tie_word_embeddings": False, **config,
    }  # fmt: skip
    made = transformers.MixtralConfig(**settings)
    return _saved(transformers.MixtralForCausalLM, made, folder, seed, dtype)


def phi3(folder: Path, *, seed: int = 0, dtype: torch.dtype = torch.float32, **config: Any) -> Path:
    """Two blocks with fused qkv_proj and gate_up_proj."""
    settings: dict[str, Any] = {
        "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": VOCABULARY,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": False,
        **config,
    }  # fmt: skip
    made = transformers.Phi3Config(**settings)
    return _saved(transformers.Phi3ForCausalLM, made, folder, seed, dtype)


def gpt_oss(
    folder: Path, *, seed: int = 0, dtype: torch.dtype = torch.float32, **config: Any
) -> Path:
    """One block whose four experts are stacked on disk, too, and lie (in, out)."""
    settings: dict[str, Any] = {
        "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "num_local_experts": 4,
        "num_experts_per_tok": 2, "vocab_size": VOCABULARY, "tie_word_embeddings": False,
        "layer_types": ["full_attention"], "bos_token_id": 0, "eos_token_id": 0,
        "pad_token_id": None, **config,
    }  # fmt: skip
    made = transformers.GptOssConfig(**settings)
    return _saved(transformers.GptOssForCausalLM, made, folder, seed, dtype)


def stacked(folder: Path, made: Path) -> Path:
    """The model of the folder `made` with the tensors of its live class: experts in stacks."""
    folder.mkdir(parents=True)
    tensors = {name: one.contiguous() for name, one in live(made).state_dict().items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    shutil.copy(made / "config.json", folder)
    return folder


def _saved(kind: Any, config: Any, folder: Path, seed: int, dtype: torch.dtype) -> Path:
    generator = torch.Generator().manual_seed(seed)
    model = kind(config)
    with torch.no_grad():
        for parameter in model.parameters():  # the order of the modules: the same in every run
            drawn = torch.randn(parameter.shape, generator=generator)
            scale = 0.3 if parameter.dim() > 1 else 0.1
            parameter.copy_(drawn * scale + (parameter.dim() == 1))
    model.to(dtype).save_pretrained(folder, max_shard_size="3KB")
    return folder


def live(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """The model of a folder, in evaluation mode."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    return model.eval()


def logits(model: Any, *, seed: int = 1) -> Tensor:
    """What the model says to two fixed rows of twelve tokens."""
    tokens = torch.randint(
        0, VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(seed), device="cpu"
    )
    with torch.no_grad():
        return model(input_ids=tokens).logits


def assert_same_logits(actual: Tensor, expected: Tensor, tolerance: float = 2e-6) -> None:
    """‖actual − expected‖ / ‖expected‖ within the tolerance for fp32."""
    error = (actual.double() - expected.double()).norm() / expected.double().norm()
    assert float(error) <= tolerance
