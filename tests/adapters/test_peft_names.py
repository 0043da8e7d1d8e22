"""Do names on disk lead to the modules of the live model?

Tables of strings here; the live models of transformers and PEFT are asked in test_peft_clients.
"""

from __future__ import annotations

import pytest
import torch

from geoscope.adapters.peft_names import (
    expert_findings,
    lora_keys,
    module_paths,
    parameter_keys,
    stack_experts,
)

LLAMA = {"model_type": "llama"}


def only(name: str, config: dict[str, object], *others: str) -> str:
    return module_paths([name, *others], config).paths[name]


@pytest.mark.parametrize(
    ("family", "disk", "live"),
    [
        ("llama", "model.layers.0.self_attn.q_proj.weight", "model.layers.0.self_attn.q_proj"),
        ("llama", "layers.0.self_attn.q_proj.weight", "model.layers.0.self_attn.q_proj"),
        ("gpt2", "h.0.attn.c_attn.weight", "transformer.h.0.attn.c_attn"),
        ("gpt2", "transformer.h.0.attn.c_attn.weight", "transformer.h.0.attn.c_attn"),
        ("gpt_neox", "layers.0.attention.dense.weight", "gpt_neox.layers.0.attention.dense"),
        ("gpt_neox", "gpt_neox.layers.0.mlp.dense_h_to_4h.weight",
         "gpt_neox.layers.0.mlp.dense_h_to_4h"),
        ("opt", "decoder.layers.0.fc1.weight", "model.decoder.layers.0.fc1"),
        ("mamba", "layers.0.mixer.in_proj.weight", "backbone.layers.0.mixer.in_proj"),
        ("phi3", "model.layers.0.self_attn.qkv_proj.weight", "model.layers.0.self_attn.qkv_proj"),
        ("gemma3", "language_model.model.layers.0.mlp.up_proj.weight",
         "model.language_model.layers.0.mlp.up_proj"),
        ("gemma3", "model.language_model.layers.0.mlp.up_proj.weight",
         "model.language_model.layers.0.mlp.up_proj"),
        ("gemma3", "vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight",
         "model.vision_tower.vision_model.encoder.layers.0.mlp.fc1"),
        ("llava", "language_model.lm_head.weight", "lm_head"),
        ("llava", "lm_head.weight", "lm_head"),
        ("qwen2_5_vl", "model.layers.0.mlp.up_proj.weight",
         "model.language_model.layers.0.mlp.up_proj"),
        ("qwen2_5_vl", "visual.blocks.0.attn.qkv.weight", "model.visual.blocks.0.attn.qkv"),
        ("qwen2_5_vl", "model.visual.blocks.0.attn.qkv.weight", "model.visual.blocks.0.attn.qkv"),
        ("qwen3_vl", "model.language_model.layers.0.mlp.up_proj.weight",
         "model.language_model.layers.0.mlp.up_proj"),
        ("qwen3_moe", "model.layers.0.mlp.experts.3.up_proj.weight",
         "model.layers.0.mlp.experts.3.up_proj"),
        ("qwen3_moe", "model.layers.0.mlp.experts.gate_up_proj",
         "model.layers.0.mlp.experts.gate_up_proj"),
    ],
)  # fmt: skip
def test_a_name_on_disk_leads_to_its_module(family: str, disk: str, live: str) -> None:
    assert only(disk, {"model_type": family}) == live


def test_a_bare_backbone_is_told_and_its_head_stays_outside() -> None:
    names = ["layers.0.mlp.up_proj.weight", "embed_tokens.weight", "lm_head.weight"]
    made = module_paths(names, LLAMA)
    assert list(made.paths.values()) == [
        *("model.layers.0.mlp.up_proj", "model.embed_tokens", "lm_head")
    ]
    assert len(made.notes) == 1 and "bare backbone" in made.notes[0]


def test_without_a_config_the_names_say_the_family() -> None:
    assert only("h.0.attn.c_attn.weight", {}) == "transformer.h.0.attn.c_attn"
    assert only("layers.0.mlp.up_proj.weight", {}) == "model.layers.0.mlp.up_proj"
    assert only("model.layers.0.mlp.up_proj.weight", {}) == "model.layers.0.mlp.up_proj"


def test_an_unknown_family_keeps_its_names_and_is_told() -> None:
    name = "tower.layers.0.up_proj.weight"
    for config in ({"model_type": "new_vl", "vision_config": {}}, {"model_type": "strange"}):
        made = module_paths([name], config)
        assert made.paths == {name: "tower.layers.0.up_proj"}
        assert len(made.notes) == 1
        assert made.notes[0].startswith(f"unknown family '{config['model_type']}', disk names used")


def test_known_families_need_no_note() -> None:
    assert module_paths(["model.layers.0.mlp.up_proj.weight"], LLAMA).notes == ()
    assert (
        module_paths(["model.layers.0.mlp.up_proj.weight"], {"model_type": "qwen2_vl"}).notes == ()
    )


def test_keys_are_those_of_peft() -> None:
    assert lora_keys("model.layers.0.self_attn.q_proj") == (
        "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight",
        "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight",
    )


# --- experts --------------------------------------------------------------------------------------


def experts(*leaves: str, count: int = 2) -> list[str]:
    return [
        f"model.layers.{i}.mlp.experts.{e}.{leaf}"
        for i in range(2)
        for e in range(count)
        for leaf in leaves
    ]


ALL = experts("gate_proj", "up_proj", "down_proj")
OTHERS = ["model.layers.0.self_attn.q_proj", "model.layers.0.mlp.gate"]


def test_all_experts_or_none_are_fine() -> None:
    every = [*ALL, *OTHERS]
    for adapted in ([], OTHERS, ALL, [*ALL, *OTHERS], experts("down_proj")):
        assert expert_findings(adapted, every) == ()
    assert expert_findings(OTHERS, OTHERS) == ()  # no experts at all


@pytest.mark.parametrize(
    ("adapted", "every", "words"),
    [
        (experts("down_proj")[1:], ALL, "1 of 4 down_proj of experts are not adapted"),
        (experts("gate_proj", "down_proj"), ALL, "experts are adapted without up_proj"),
        (experts("gate_proj", "up_proj"), ALL, "experts are adapted without down_proj"),
        (
            [*ALL, "model.layers.2.mlp.up_proj"],
            [*ALL, "model.layers.2.mlp.up_proj"],
            "model.layers.2.mlp.up_proj cannot be adapted beside experts",
        ),
        (
            ["model.layers.0.mlp.shared_expert.up_proj"],
            [*ALL, "model.layers.0.mlp.shared_expert.up_proj"],
            "cannot be adapted beside experts",
        ),
    ],
)
def test_what_the_live_model_cannot_hold_is_told(
    adapted: list[str], every: list[str], words: str
) -> None:
    (line,) = expert_findings(adapted, every)
    assert words in line


def test_stacked_factors_give_each_expert_its_product() -> None:
    """The formula of docs/formats.md#adapters, which is how PEFT reads the parameter."""
    E, r, m, n = 3, 2, 5, 4
    generator = torch.Generator().manual_seed(0)
    A = [torch.randn(r, n, generator=generator) for _ in range(E)]
    B = [torch.randn(m, r, generator=generator) for _ in range(E)]
    stacked_A, stacked_B = stack_experts(A, B)
    assert stacked_A.shape == (E * r, n)
    assert stacked_B.shape == (m, r * E)
    assert stacked_A.is_contiguous() and stacked_B.is_contiguous()
    for e in range(E):
        product = stacked_B[:, e::E] @ stacked_A[e * r : (e + 1) * r]
        assert torch.equal(product, B[e] @ A[e])


def test_the_first_parameter_of_a_module_is_wrapped_innermost() -> None:
    both = parameter_keys("m.experts", ["gate_up_proj", "down_proj"])
    assert both["gate_up_proj"][0] == "base_model.model.m.experts.base_layer.lora_A.weight"
    assert both["down_proj"][1] == "base_model.model.m.experts.lora_B.weight"
    assert parameter_keys("m.experts", ["down_proj"])["down_proj"] == lora_keys("m.experts")
