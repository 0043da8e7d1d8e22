"""Are the parts of fused and stacked weights those that the live model computes with?

The oracle is the model's own forward pass: what its attention is given as q, k and v, and what its
experts answer. One token at position 0 is used, where a rotary embedding changes nothing.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import silu

from geoscope.models.checkpoint import Checkpoint
from geoscope.models.pairing import pair
from geoscope.models.split import split
from geoscope.names import Selection
from geoscope.sources.open import open_checkpoint

with warnings.catch_warnings():  # of packages that transformers imports
    warnings.simplefilter("ignore")
    transformers = pytest.importorskip("transformers")

QKV = ("q_proj", "k_proj", "v_proj")
SIZES = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 4,
    "vocab_size": 40, "attn_implementation": "eager",
}  # fmt: skip
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
MOE = {"num_key_value_heads": 2, "head_dim": 4, "num_experts_per_tok": 2, **SIZES, **TOKENS}
FALCON = {"bias": True, **SIZES, **TOKENS}
GPT2 = {
    "n_embd": 16, "n_layer": 1, "n_head": 4, "vocab_size": 40, "n_positions": 8,
    "attn_implementation": "eager", **TOKENS,
}  # fmt: skip
VISION = {
    "depth": 1, "embed_dim": 16, "hidden_size": 16, "num_heads": 4, "in_channels": 3,
    "patch_size": 4, "spatial_merge_size": 1,
}  # fmt: skip


def made(kind: str, config: str, **settings: Any) -> Any:
    """A model whose every parameter is drawn, biases and norms too."""
    name = settings.pop("attn_implementation", "eager")
    chosen = getattr(transformers, config)(**settings)
    chosen._attn_implementation = name
    generator = torch.Generator().manual_seed(0)
    model = getattr(transformers, kind)(chosen).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model


def saved(model: Any, folder: Path) -> Checkpoint:
    model.save_pretrained(folder)
    return split(open_checkpoint(str(folder)))


def tokens(count: int = 1) -> Tensor:
    return torch.arange(3, 3 + count)[None]


def heads_in_line(states: Tensor) -> Tensor:
    """(1, heads, 1, d) as the attention has it → (heads·d,)."""
    return states[0, :, 0].reshape(-1)


def applied(checkpoint: Checkpoint, prefix: str, module: str, x: Tensor) -> Tensor:
    """W·x + b with one part, by its name."""
    out = checkpoint.read(f"{prefix}{module}.weight") @ x
    bias = f"{prefix}{module}.bias"
    return out + checkpoint.read(bias) if bias in checkpoint.tensors else out


# --- q, k, v --------------------------------------------------------------------------------------


def given_to_attention(monkeypatch: pytest.MonkeyPatch, model: Any) -> list[tuple[Tensor, ...]]:
    """What the eager attention of a model's own file is called with: q, k, v."""
    modelling = importlib.import_module(type(model).__module__)
    eager, found = modelling.eager_attention_forward, []

    def spied(module: Any, query: Tensor, key: Tensor, value: Tensor, *rest: Any, **more: Any):
        found.append((query, key, value))
        return eager(module, query, key, value, *rest, **more)

    monkeypatch.setattr(modelling, "eager_attention_forward", spied)
    return found


def persimmon() -> Any:
    return made("PersimmonForCausalLM", "PersimmonConfig", qk_layernorm=False, **SIZES, **TOKENS)


def input_of(module: torch.nn.Module) -> list[Tensor]:
    found: list[Tensor] = []
    module.register_forward_pre_hook(lambda _, inputs: found.append(inputs[0].reshape(-1)))
    return found


EAGER = {
    "phi3": (
        lambda: made("Phi3ForCausalLM", "Phi3Config", num_key_value_heads=2, **SIZES, **TOKENS),
        "model.layers.0.self_attn.", "qkv_proj",
    ),
    "gpt_neox": (
        lambda: made("GPTNeoXForCausalLM", "GPTNeoXConfig", **SIZES, **TOKENS),
        "gpt_neox.layers.0.attention.", "query_key_value",
    ),
    "persimmon": (persimmon, "model.layers.0.self_attn.", "query_key_value"),
    "gpt2": (
        lambda: made("GPT2LMHeadModel", "GPT2Config", **GPT2), "transformer.h.0.attn.", "c_attn",
    ),
}  # fmt: skip


@pytest.mark.parametrize("family", EAGER)
def test_q_k_and_v_are_those_of_the_live_attention(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    make, prefix, leaf = EAGER[family]
    model = make()
    checkpoint = saved(model, tmp_path)
    inputs = input_of(model.get_submodule(f"{prefix}{leaf}"))
    found = given_to_attention(monkeypatch, model)
    with torch.no_grad():
        model(input_ids=tokens())
    names = [name for name in checkpoint.tensors if name.startswith(prefix) and leaf in name]
    assert names == []
    for module, states in zip(QKV, found[0], strict=True):
        actual = applied(checkpoint, prefix, module, inputs[0])
        torch.testing.assert_close(actual, heads_in_line(states), rtol=1e-5, atol=1e-6)
    remarks = [note for note in checkpoint.notes if leaf in note]
    assert remarks == [f"{leaf} is compared as q_proj, k_proj, v_proj"]


def bloom() -> Any:
    return made(
        "BloomForCausalLM", "BloomConfig",
        **{"hidden_size": 16, "n_layer": 1, "n_head": 4, "vocab_size": 40, **TOKENS},
    )  # fmt: skip


def falcon(**settings: Any) -> Callable[[], Any]:
    return lambda: made("FalconForCausalLM", "FalconConfig", **FALCON, **settings)


# The model's own method that takes the fused product apart: (it gives heads third, repeats of k).
OWN_METHODS = {
    "bloom": (bloom, "self_attention", "_reshape", False, 1),
    "falcon, new": (
        falcon(new_decoder_architecture=True, num_kv_heads=2),
        "self_attention", "_split_heads", True, 2,
    ),
    "falcon, multi-query": (
        falcon(new_decoder_architecture=False, multi_query=True),
        "self_attention", "_split_heads", True, 1,
    ),
    "falcon, old": (
        falcon(new_decoder_architecture=False, multi_query=False),
        "self_attention", "_split_heads", True, 1,
    ),
}  # fmt: skip


@pytest.mark.parametrize("family", OWN_METHODS)
def test_q_k_and_v_are_what_the_models_own_method_takes_apart(tmp_path: Path, family: str) -> None:
    make, attention, method, heads_third, repeats = OWN_METHODS[family]
    model = make()
    checkpoint = saved(model, tmp_path)
    module = model.transformer.h[0].get_submodule(attention)
    x = torch.randn(16, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        parts = getattr(module, method)(module.query_key_value(x[None, None]))
    for name, states in zip(QKV, parts, strict=True):
        states = states.transpose(1, 2) if heads_third else states
        heads = states[:, :: repeats if name != "q_proj" else 1]
        actual = applied(checkpoint, f"transformer.h.0.{attention}.", name, x)
        torch.testing.assert_close(actual, heads_in_line(heads), rtol=1e-5, atol=1e-6)


def test_the_last_third_of_mpt_is_v(tmp_path: Path) -> None:
    """Its attention takes the product apart inside; of one token the answer is that token's v."""
    model = made("MptForCausalLM", "MptConfig", d_model=16, n_layers=1, n_heads=4, vocab_size=40,
                 max_seq_len=8)  # fmt: skip
    checkpoint = saved(model, tmp_path)
    attention = model.transformer.blocks[0].attn
    inputs, answers = input_of(attention.Wqkv), input_of(attention.out_proj)
    with torch.no_grad():
        model(input_ids=tokens())
    assert {f"transformer.blocks.0.attn.{one}.weight" for one in QKV} <= set(checkpoint.tensors)
    actual = applied(checkpoint, "transformer.blocks.0.attn.", "v_proj", inputs[0])
    torch.testing.assert_close(actual, answers[0], rtol=1e-5, atol=1e-6)


def test_the_first_rows_are_not_q_where_heads_alternate(tmp_path: Path) -> None:
    """Negative control: thirds of a GPT-NeoX weight are not what its attention gets."""
    model = made("GPTNeoXForCausalLM", "GPTNeoXConfig", **SIZES, **TOKENS)
    checkpoint = saved(model, tmp_path)
    name = "gpt_neox.layers.0.attention.query_key_value.weight"
    fused = model.state_dict()[name]
    assert not torch.equal(checkpoint.read(name.replace("query_key_value", "q_proj")), fused[:16])


def test_the_vision_blocks_of_qwen_vl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = qwen2_vl()
    checkpoint = saved(model, tmp_path)
    block = model.model.visual.blocks[0].attn
    found = given_to_attention(monkeypatch, model)
    x = torch.randn(1, 16, generator=torch.Generator().manual_seed(1))
    still = (torch.ones(1, 4), torch.zeros(1, 4))  # cos and sin of no rotation
    with torch.no_grad():
        block(x, cu_seqlens=torch.tensor([0, 1], dtype=torch.int32), position_embeddings=still)
    prefix = next(name for name in checkpoint.tensors if "blocks.0.attn.q_proj.weight" in name)
    for module, states in zip(QKV, found[0], strict=True):
        actual = applied(checkpoint, prefix.removesuffix("q_proj.weight"), module, x[0])
        torch.testing.assert_close(actual, heads_in_line(states), rtol=1e-5, atol=1e-6)


def qwen2_vl() -> Any:
    text = {**SIZES, "num_key_value_heads": 2, **TOKENS, "vocab_size": 40}
    del text["attn_implementation"]
    rope = {"rope_type": "default", "mrope_section": [1, 1, 0], "rope_theta": 1e4}
    return made(
        "Qwen2VLForConditionalGeneration", "Qwen2VLConfig",
        text_config={**text, "rope_parameters": rope}, vision_config=dict(VISION),
        image_token_id=3, video_token_id=4, vision_start_token_id=5, vision_end_token_id=6,
    )  # fmt: skip


# --- gate and up ----------------------------------------------------------------------------------

DENSE = {
    "phi3": ("Phi3ForCausalLM", "Phi3Config"),
    "glm": ("GlmForCausalLM", "GlmConfig"),
    "glm4": ("Glm4ForCausalLM", "Glm4Config"),
}


@pytest.mark.parametrize("family", DENSE)
def test_gate_and_up_are_those_of_the_live_mlp(tmp_path: Path, family: str) -> None:
    settings = {**SIZES, **TOKENS, "num_key_value_heads": 2}
    model = made(*DENSE[family], **settings, **({} if family == "phi3" else {"head_dim": 4}))
    checkpoint = saved(model, tmp_path)
    prefix, x = "model.layers.0.mlp.", torch.randn(16, generator=torch.Generator().manual_seed(1))
    gate, up = (applied(checkpoint, prefix, one, x) for one in ("gate_proj", "up_proj"))
    with torch.no_grad():
        expected = model.get_submodule("model.layers.0.mlp")(x[None])[0]
    actual = applied(checkpoint, prefix, "down_proj", silu(gate) * up)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


def qwen3_moe() -> Any:
    return made("Qwen3MoeForCausalLM", "Qwen3MoeConfig", num_experts=4, moe_intermediate_size=8,
                **MOE)  # fmt: skip


def mixtral() -> Any:
    settings = {key: value for key, value in MOE.items() if key != "head_dim"}
    return made("MixtralForCausalLM", "MixtralConfig", num_local_experts=4, **settings)


def gpt_oss() -> Any:
    return made("GptOssForCausalLM", "GptOssConfig", num_local_experts=4, **MOE)


def llama4() -> Any:
    settings = {**MOE, "intermediate_size": 8, "intermediate_size_mlp": 24}
    return made("Llama4ForCausalLM", "Llama4TextConfig", num_local_experts=4,
                interleave_moe_layer_step=1, **settings)  # fmt: skip


def oss_activation(gate: Tensor, up: Tensor) -> Tensor:
    gate, up = gate.clamp(max=7.0), up.clamp(-7.0, 7.0)
    return (up + 1) * gate * torch.sigmoid(1.702 * gate)


def gated(gate: Tensor, up: Tensor) -> Tensor:
    return silu(gate) * up


EXPERTS = {
    "qwen3_moe": (qwen3_moe, "model.layers.0.mlp.experts", gated),
    "mixtral": (mixtral, "model.layers.0.mlp.experts", gated),
    "gpt_oss": (gpt_oss, "model.layers.0.mlp.experts", oss_activation),
    "llama4": (llama4, "model.layers.0.feed_forward.experts", gated),
}


@pytest.mark.parametrize("family", EXPERTS)
def test_each_expert_answers_as_the_live_one(tmp_path: Path, family: str) -> None:
    """Of the stacked tensors as they are live; how transformers saves them is the test below."""
    make, module, activation = EXPERTS[family]
    model = make()
    torch.save(model.state_dict(), tmp_path / "live.bin")
    checkpoint = split(open_checkpoint(str(tmp_path / "live.bin")), model.config.to_dict())
    x = torch.randn(16, generator=torch.Generator().manual_seed(1))
    experts = model.get_submodule(module)
    for number in range(4):
        prefix = f"{module}.{number}."
        gate, up = (applied(checkpoint, prefix, one, x) for one in ("gate_proj", "up_proj"))
        actual = applied(checkpoint, prefix, "down_proj", activation(gate, up))
        with torch.no_grad():
            if family == "llama4":
                expected = experts(x.repeat(4, 1))[number]
            else:
                one = torch.tensor([[number]])
                expected = experts(x[None], one, torch.ones(1, 1))[0]
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", EXPERTS)
def test_the_saved_folder_and_the_live_stack_pair_up(tmp_path: Path, family: str) -> None:
    model = EXPERTS[family][0]()
    folder = saved(model, tmp_path / "folder")
    torch.save(model.state_dict(), tmp_path / "live.bin")
    live = split(open_checkpoint(str(tmp_path / "live.bin")), folder.config)
    found = pair(folder, live, Selection())
    assert found.missing == found.base_only == found.tuned_only == found.shape_mismatch == ()
    experts = [one for one in found.matrices if ".experts." in one.name]
    assert len(experts) == 4 * 3
    for one in found.matrices:
        assert torch.equal(folder.read(one.base.name), live.read(one.tuned.name))
    rules = {one.rule for one in found.renamed}
    assert rules == ({"expert names"} if family == "mixtral" else set())


# --- what stays whole -----------------------------------------------------------------------------


def test_a_fused_weight_of_an_unknown_family_is_one_matrix_and_said_so(tmp_path: Path) -> None:
    torch.save({"layers.0.attn.qkv_proj.weight": torch.zeros(24, 8)}, tmp_path / "x.pt")
    plain = open_checkpoint(str(tmp_path / "x.pt"))
    for config, known in (
        ({"model_type": "own"}, "of own it is"), ({}, "without a config.json it is"),
    ):  # fmt: skip
        parts = split(plain, config)
        assert [*parts.tensors] == ["layers.0.attn.qkv_proj.weight"]
        assert parts.notes[-1] == f"qkv_proj: fused, and {known} not known how; each is one matrix"


def test_a_known_family_whose_sides_do_not_fit_stays_whole(tmp_path: Path) -> None:
    """Seven heads' worth of rows cannot be four heads of q and two each of k and v."""
    name = "model.layers.0.self_attn.qkv_proj.weight"
    torch.save({name: torch.zeros(28, 8)}, tmp_path / "x.pt")
    config = {"model_type": "phi3", "num_attention_heads": 4, "num_key_value_heads": 2}
    parts = split(open_checkpoint(str(tmp_path / "x.pt")), config)
    assert [*parts.tensors] == [name] and "of phi3 it is not known how" in parts.notes[-1]


def test_a_side_without_config_is_split_by_that_of_the_other(tmp_path: Path) -> None:
    from geoscope.verbs.options import Options
    from geoscope.verbs.pairs.prepare import prepare

    model = EAGER["phi3"][0]()
    model.save_pretrained(tmp_path / "base")
    torch.save(model.state_dict(), tmp_path / "tuned.pt")
    for one, other in (("base", "tuned.pt"), ("tuned.pt", "base")):
        found = prepare(str(tmp_path / one), str(tmp_path / other), Options(device="cpu"))
        kinds = {pair.module for pair in found.pairing.matrices}
        assert {*QKV, "gate_proj", "up_proj"} <= kinds and found.pairing.missing == ()


def qwen2_5_vl() -> Any:
    text = {**SIZES, "num_key_value_heads": 2, **TOKENS}
    del text["attn_implementation"]
    rope = {"rope_type": "default", "mrope_section": [1, 1, 0], "rope_theta": 1e4}
    vision = {
        "depth": 1, "hidden_size": 16, "intermediate_size": 24, "num_heads": 4, "patch_size": 4,
        "spatial_merge_size": 1, "out_hidden_size": 16,
    }  # fmt: skip
    return made(
        "Qwen2_5_VLForConditionalGeneration", "Qwen2_5_VLConfig",
        text_config={**text, "rope_parameters": rope}, vision_config=vision,
        image_token_id=3, video_token_id=4, vision_start_token_id=5, vision_end_token_id=6,
    )  # fmt: skip


@pytest.mark.parametrize("make", [qwen2_vl, qwen2_5_vl])
def test_spellings_of_a_vision_language_model_meet(tmp_path: Path, make: Callable[[], Any]) -> None:
    """The saved folder, the live model, and the names of two older libraries."""
    model = make()
    folder = saved(model, tmp_path / "folder")
    live = model.state_dict()
    old = {name.replace("model.language_model.", "model."): W for name, W in live.items()}
    older = {
        name.replace("model.language_model.", "language_model.model.")
        .replace("model.visual.", "visual.")
        .replace("lm_head.", "language_model.lm_head."): W
        for name, W in live.items()
    }
    for number, tensors in enumerate((live, old, older)):
        torch.save(tensors, tmp_path / f"{number}.bin")
        other = split(open_checkpoint(str(tmp_path / f"{number}.bin")), folder.config)
        found = pair(folder, other, Selection())
        assert found.missing == found.base_only == found.tuned_only == ()
        assert {one.module for one in found.matrices} >= {*QKV, "down_proj"}
        for one in (*found.matrices, *found.vectors):
            assert torch.equal(folder.read(one.base.name), other.read(one.tuned.name))
        # The folder has the names of older libraries: `model.` and `visual.`.
        told = any("vlm backbone" in one.rule for one in found.renamed)
        assert told == (tensors is not old)
