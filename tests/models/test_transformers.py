"""Are models that transformers saves read as the tensors that it holds?

The oracle is the live model: every shard, tie and orientation that `save_pretrained` chose.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from geoscope.models.pairing import pair
from geoscope.names import Selection
from geoscope.sources.open import open_checkpoint

with warnings.catch_warnings():  # of packages that transformers imports
    warnings.simplefilter("ignore")
    transformers = pytest.importorskip("transformers")


def gpt2() -> Any:
    config = transformers.GPT2Config(
        n_embd=8, n_layer=2, n_head=2, vocab_size=20, n_positions=16, bos_token_id=0, eos_token_id=0
    )
    return transformers.GPT2LMHeadModel(config)


def qwen2(*, tied: bool) -> Any:
    config = transformers.Qwen2Config(
        hidden_size=8, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, vocab_size=32, tie_word_embeddings=tied,
    )  # fmt: skip
    return transformers.Qwen2ForCausalLM(config)


def t5() -> Any:
    config = transformers.T5Config(
        d_model=8, d_ff=16, d_kv=4, num_layers=2, num_heads=2, vocab_size=20
    )
    return transformers.T5ForConditionalGeneration(config)


def bert() -> Any:
    config = transformers.BertConfig(
        hidden_size=8, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        vocab_size=20,
    )  # fmt: skip
    return transformers.BertModel(config)


MODELS = {
    "gpt2": (gpt2, {"lm_head.weight": "transformer.wte.weight"}, 8),
    "qwen2 tied": (lambda: qwen2(tied=True), {"lm_head.weight": "model.embed_tokens.weight"}, 14),
    "qwen2": (lambda: qwen2(tied=False), {}, 14),
    "t5": (t5, {"lm_head.weight": "shared.weight"}, 32),
    "bert": (bert, {}, 12),
}


@pytest.mark.parametrize("kind", MODELS)
def test_a_saved_model_reads_as_the_live_one(tmp_path: Path, kind: str) -> None:
    make, tied, matrices = MODELS[kind]
    torch.manual_seed(0)  # the models draw from the global generator
    model = make()
    model.save_pretrained(tmp_path / "sharded", max_shard_size="1KB")
    checkpoint = open_checkpoint(str(tmp_path / "sharded"))
    assert dict(checkpoint.tied_to) == tied
    assert checkpoint.notes == ()
    live = model.state_dict()
    assert set(checkpoint.tensors) <= set(live)
    for name, info in checkpoint.tensors.items():
        expected = live[name].T if info.transposed else live[name]
        assert torch.equal(checkpoint.read(name), expected)
    turned = {info.name.split(".")[-2] for info in checkpoint.tensors.values() if info.transposed}
    assert turned == ({"c_attn", "c_proj", "c_fc"} if kind == "gpt2" else set())

    torch.save(live, tmp_path / "whole.bin")
    pairing = pair(checkpoint, open_checkpoint(str(tmp_path / "whole.bin")), Selection())
    assert len(pairing.matrices) == matrices
    assert pairing.missing == pairing.base_only == pairing.shape_mismatch == ()
    assert pairing.renamed == ()
