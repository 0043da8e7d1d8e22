"""Is a torch_dist checkpoint of Megatron the model that transformers computes with?

Files that megatron-core itself writes (slow: it starts a process) against the logits of both
libraries. What it needs a GPU or other models for is written by torch's own DCP under Megatron's
names, with an inert class of Megatron in the metadata.
"""

from __future__ import annotations

import importlib.util
import pickle
import subprocess
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict_saver import save

from geoscope.errors import GeoscopeError
from geoscope.models.checkpoint import Checkpoint
from geoscope.models.split import narrowed
from geoscope.models.writable import refuse_unwritable
from geoscope.sources.open import open_checkpoint
from tests.helpers.files import assert_equal_bits, write_config

WRITER = Path(__file__).parents[1] / "helpers" / "write_megatron.py"
SIZES = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 24,
    "intermediate_size": 96,
    "vocab_size": 128,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}
MOE = {
    "num_experts": 3,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 40,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
}


# --- what megatron-core writes --------------------------------------------------------------------


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if importlib.util.find_spec("megatron") is None:
        pytest.skip("megatron-core is not installed")
    folder = tmp_path_factory.mktemp("megatron")
    command = [sys.executable, str(WRITER), str(folder), "--logits"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen2", "qwen3", "qwen3_moe"])
def test_transformers_computes_the_logits_of_megatron(
    written: Path, tmp_path: Path, family: str
) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(family, **SIZES, **(MOE if family == "qwen3_moe" else {}))
    config.save_pretrained(written / family)
    checkpoint = open_checkpoint(str(written / family))
    save_file(
        {name: checkpoint.read(name).clone() for name in checkpoint.tensors},
        tmp_path / "model.safetensors",
        metadata={"format": "pt"},
    )
    config.save_pretrained(tmp_path)
    loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    model, loading = loaded
    assert not any(loading.values())
    known = torch.load(written / f"{family}.pt")
    with torch.no_grad():
        logits = model.eval()(known["ids"]).logits
    assert float((logits - known["logits"]).abs().max()) < 1e-5


@pytest.mark.slow
def test_layers_of_megatron_that_are_stored_apart_are_its_own(written: Path) -> None:
    write_config(written / "layers apart", {"model_type": "llama", **SIZES})
    checkpoint = open_checkpoint(str(written / "layers apart"))
    weights = torch.load(written / "layers apart.pt")["weights"]
    fused = weights["decoder.layers.1.self_attention.linear_qkv.weight"].view(2, 4, 24, 64)
    parts = {"q_proj": fused[:, :2], "k_proj": fused[:, 2], "v_proj": fused[:, 3]}
    for module, part in parts.items():
        name = f"model.layers.1.self_attn.{module}.weight"
        assert_equal_bits(checkpoint.read(name), part.reshape(-1, 64))


# --- the tables, over files of torch's DCP --------------------------------------------------------


class MCoreMetadata:
    """Of Megatron's module of that name; unpickled for real it would be found to be missing."""


@pytest.fixture
def megatron_class(monkeypatch: pytest.MonkeyPatch) -> type:
    name = "megatron.core.dist_checkpointing.strategies.torch"
    module = ModuleType(name)
    module.MCoreMetadata = MCoreMetadata  # type: ignore[attr-defined]
    monkeypatch.setattr(MCoreMetadata, "__module__", name)
    for part in (name.rsplit(".", count)[0] for count in range(4)):
        monkeypatch.setitem(sys.modules, part, ModuleType(part))
    monkeypatch.setitem(sys.modules, name, module)
    return MCoreMetadata


def drawn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


LAYER = "decoder.layers.self_attention"


def llama(heads: int = 4, groups: int = 2, size: int = 6, hidden: int = 8) -> dict[str, Tensor]:
    return {
        "embedding.word_embeddings.weight": drawn(40, hidden),
        f"{LAYER}.linear_qkv.layer_norm_weight": drawn(2, hidden),
        f"{LAYER}.linear_qkv.weight": drawn(2, (heads + 2 * groups) * size, hidden),
        f"{LAYER}.linear_proj.weight": drawn(2, hidden, heads * size),
        "decoder.layers.mlp.linear_fc1.layer_norm_weight": drawn(2, hidden),
        "decoder.layers.mlp.linear_fc1.weight": drawn(2, 20, hidden),
        "decoder.layers.mlp.linear_fc2.weight": drawn(2, hidden, 10),
        "decoder.final_layernorm.weight": drawn(hidden),
        "output_layer.weight": drawn(40, hidden),
    }


def opened(
    folder: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any] | None = None
) -> Checkpoint:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of one process, which is meant
        save(dict(tensors), checkpoint_id=folder, no_dist=True)
    (folder / "common.pt").touch()
    if config is not None:
        write_config(folder, config)
    return open_checkpoint(str(folder))


CONFIG = {
    "model_type": "llama",
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "vocab_size": 37,
}


def test_every_part_is_its_rows_of_the_stack(tmp_path: Path) -> None:
    tensors = llama()
    checkpoint = opened(tmp_path, tensors, CONFIG)
    fused = tensors[f"{LAYER}.linear_qkv.weight"].view(2, 2, 4, 6, 8)
    gated = tensors["decoder.layers.mlp.linear_fc1.weight"]
    for layer in range(2):
        expected = {
            "self_attn.q_proj": fused[layer, :, :2].reshape(24, 8),
            "self_attn.k_proj": fused[layer, :, 2].reshape(12, 8),
            "self_attn.v_proj": fused[layer, :, 3].reshape(12, 8),
            "self_attn.o_proj": tensors[f"{LAYER}.linear_proj.weight"][layer],
            "mlp.gate_proj": gated[layer, :10],
            "mlp.up_proj": gated[layer, 10:],
            "mlp.down_proj": tensors["decoder.layers.mlp.linear_fc2.weight"][layer],
            "input_layernorm": tensors[f"{LAYER}.linear_qkv.layer_norm_weight"][layer],
            "post_attention_layernorm": tensors["decoder.layers.mlp.linear_fc1.layer_norm_weight"][
                layer
            ],
        }
        for module, part in expected.items():
            name = f"model.layers.{layer}.{module}.weight"
            assert_equal_bits(checkpoint.read(name), part.contiguous())
            assert_equal_bits(checkpoint.read_part(name, 3, 7), part.reshape(-1)[3:7])
    # Padded to 40 rows, of which config.json knows 37.
    for name, stored in (("model.embed_tokens", "embedding.word_embeddings"), ("lm_head",) * 2):
        stored = "output_layer" if stored == "lm_head" else stored
        assert_equal_bits(checkpoint.read(f"{name}.weight"), tensors[f"{stored}.weight"][:37])
    assert len(checkpoint.tensors) == 3 + 2 * 9
    assert checkpoint.notes == (
        "read from Megatron's shards",
        "3 rows of padding are left out of the vocabulary",
    )
    cut = narrowed(checkpoint, "lm_head.weight", 30)
    assert_equal_bits(cut.read("lm_head.weight"), tensors["output_layer.weight"][:30])


def test_heads_follow_from_the_norm_of_q_or_the_weight_stays_whole(tmp_path: Path) -> None:
    tensors = llama()
    plain = opened(tmp_path / "plain", tensors)
    whole = "model.layers.1.self_attn.linear_qkv.weight"
    assert_equal_bits(plain.read(whole), tensors[f"{LAYER}.linear_qkv.weight"][1])
    assert any("copy the model's config.json" in note for note in plain.notes)
    normed = opened(tmp_path / "normed", {**tensors, f"{LAYER}.q_layernorm.weight": drawn(2, 6)})
    assert normed.tensors["model.layers.1.self_attn.q_proj.weight"].shape == (24, 8)
    assert normed.tensors["model.layers.1.self_attn.q_norm.weight"].shape == (6,)
    assert whole not in normed.tensors
    wrong = opened(tmp_path / "wrong", tensors, {**CONFIG, "head_dim": 5})
    assert whole in wrong.tensors


EXPERT = "decoder.layers.mlp.experts.experts"


@pytest.mark.parametrize("apart", [False, True], ids=["stacked", "one by one, in halves"])
def test_experts_stacked_or_one_by_one(tmp_path: Path, apart: bool) -> None:
    first, second = drawn(2, 3, 20, 8), drawn(2, 3, 8, 10)
    tensors = {f"{EXPERT}.linear_fc1.weight": first, f"{EXPERT}.linear_fc2.weight": second}
    if apart:
        tensors = {}
        for number in range(3):
            stem = f"{EXPERT}.{number}"
            tensors[f"{stem}.linear_fc1.weight_w"] = first[:, number, :10].clone()
            tensors[f"{stem}.linear_fc1.weight_v"] = first[:, number, 10:].clone()
            tensors[f"{stem}.linear_fc2.weight"] = second[:, number].clone()
    checkpoint = opened(tmp_path, tensors)
    assert len(checkpoint.tensors) == 18
    for layer in range(2):
        for number in range(3):
            stem = f"model.layers.{layer}.mlp.experts.{number}"
            gate, up = first[layer, number].chunk(2)
            for module, part in (("gate", gate), ("up", up), ("down", second[layer, number])):
                assert_equal_bits(checkpoint.read(f"{stem}.{module}_proj.weight"), part.clone())


@pytest.mark.parametrize(
    ("family", "stored", "name"),
    [
        ("glm4", "post_mlp_layernorm.weight", "post_mlp_layernorm.weight"),
        ("glm4", "post_self_attn_layernorm.weight", "post_self_attn_layernorm.weight"),
        ("glm4_moe", "mlp.router.expert_bias", "mlp.gate.e_score_correction_bias"),
        ("glm4_moe", "mlp.shared_experts.linear_fc2.weight", "mlp.shared_experts.down_proj.weight"),
        ("qwen2_moe", "mlp.shared_experts.linear_fc2.weight", "mlp.shared_expert.down_proj.weight"),
        ("qwen2_moe", "mlp.shared_experts.gate_weight", "mlp.shared_expert_gate.weight"),
        ("llama", "self_attention.novel_thing.weight", "self_attention.novel_thing.weight"),
    ],
)
def test_names_of_families(tmp_path: Path, family: str, stored: str, name: str) -> None:
    shape = (2, 8) if "norm" in stored or stored.endswith("bias") else (2, 4, 8)
    tensor = drawn(*shape)
    tensors = {**llama(), f"decoder.layers.{stored}": tensor}
    checkpoint = opened(tmp_path, tensors, {**CONFIG, "model_type": family})
    assert_equal_bits(checkpoint.read(f"model.layers.1.{name}"), tensor[1])
    told = [note for note in checkpoint.notes if "kept under Megatron's names" in note]
    assert bool(told) == ("novel" in stored)


def test_shared_experts_are_the_modules_that_transformers_has(tmp_path: Path) -> None:
    """By the live model of GLM-4-MoE: no name of the table is made up."""
    from transformers import Glm4MoeConfig, Glm4MoeForCausalLM

    sizes = {**SIZES, "n_routed_experts": 2, "moe_intermediate_size": 8, "num_hidden_layers": 1}
    with torch.device("meta"):
        model = Glm4MoeForCausalLM(Glm4MoeConfig(**sizes, first_k_dense_replace=0))
    names = {name for name in model.state_dict() if "shared" in name or "correction" in name}
    assert {name.removeprefix("model.layers.0.") for name in names} == {
        "mlp.gate.e_score_correction_bias",
        *(f"mlp.shared_experts.{module}_proj.weight" for module in ("gate", "up", "down")),
    }


def test_classes_of_megatron_are_inert_and_the_optimizer_is_not_looked_at(
    tmp_path: Path, megatron_class: type
) -> None:
    state = {"optimizer.state.exp_avg.decoder.layers.mlp.linear_fc2.weight": drawn(2, 8, 10)}
    opened(tmp_path, {**llama(), **state})
    metadata = FileSystemReader(tmp_path).read_metadata()
    metadata.mcore_data = {"x": megatron_class()}  # type: ignore[attr-defined]
    for name, kept in metadata.state_dict_metadata.items():
        if name.startswith("optimizer"):
            kept.chunks = kept.chunks * 2  # type: ignore[union-attr]  # cut as no tensor is
    raw = pickle.dumps(metadata)
    assert b"MCoreMetadata" in raw
    (tmp_path / ".metadata").write_bytes(raw)
    checkpoint = open_checkpoint(str(tmp_path))
    assert "read from Megatron's shards; 1 entries beside the model are not" in checkpoint.notes
    assert "lm_head.weight" in checkpoint.tensors


def test_an_adapter_of_the_bridge_is_refused_by_its_name(tmp_path: Path) -> None:
    adapter = {f"{LAYER}.linear_proj.adapter.linear_in.weight": drawn(2, 4, 24)}
    with pytest.raises(GeoscopeError, match="an adapter of Megatron-Bridge"):
        opened(tmp_path, {**llama(), **adapter})


def test_shards_of_megatron_are_not_written_over(tmp_path: Path) -> None:
    with pytest.raises(GeoscopeError, match="init-adapter needs the files of a model"):
        refuse_unwritable(opened(tmp_path, llama()), "init-adapter")
