"""Parameter names as real checkpoints spell them: block, kind, canonical form, selection."""

from __future__ import annotations

import doctest
import itertools
import re
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import geoscope.names
from geoscope.errors import OptionError
from geoscope.names import (
    NameMap,
    Selection,
    canonical,
    in_natural_order,
    is_embedding,
    is_output_head,
    layer_index,
    module_kind,
    parse_layers,
)

seeded = settings(deadline=None, derandomize=True, database=None)

LINEAR, EMBEDDING, HEAD = "linear", "embedding", "head"


@dataclass(frozen=True)
class Case:
    """A name of a published checkpoint, and what is to be read from it."""

    name: str
    layer: int | None
    kind: str
    role: str = LINEAR


FAMILIES = {
    "llama": [
        Case("model.layers.0.self_attn.q_proj.weight", 0, "q_proj"),
        Case("model.layers.31.self_attn.o_proj.weight", 31, "o_proj"),
        Case("model.layers.12.mlp.gate_proj.weight", 12, "gate_proj"),
        Case("model.layers.12.mlp.down_proj.weight", 12, "down_proj"),
        Case("model.layers.12.input_layernorm.weight", 12, "input_layernorm"),
        Case("model.norm.weight", None, "norm"),
        Case("model.embed_tokens.weight", None, "embed_tokens", EMBEDDING),
        Case("lm_head.weight", None, "lm_head", HEAD),
    ],
    "llama, as first released": [
        Case("layers.3.attention.wq.weight", 3, "wq"),
        Case("layers.3.feed_forward.w2.weight", 3, "w2"),
        Case("tok_embeddings.weight", None, "tok_embeddings", EMBEDDING),
        Case("output.weight", None, "output", HEAD),
    ],
    "qwen2": [
        Case("model.layers.27.self_attn.k_proj.weight", 27, "k_proj"),
        Case("model.layers.27.self_attn.k_proj.bias", 27, "k_proj"),
        Case("model.layers.27.mlp.up_proj.weight", 27, "up_proj"),
        Case("model.embed_tokens.weight", None, "embed_tokens", EMBEDDING),
    ],
    "qwen2 with a class head": [
        Case("score.weight", None, "score", HEAD),
    ],
    "gpt2": [
        Case("h.11.attn.c_attn.weight", 11, "c_attn"),
        Case("transformer.h.11.attn.c_proj.weight", 11, "attn.c_proj"),
        Case("h.11.mlp.c_fc.weight", 11, "c_fc"),
        Case("h.11.mlp.c_proj.weight", 11, "mlp.c_proj"),
        Case("wte.weight", None, "wte", EMBEDDING),
        Case("transformer.wpe.weight", None, "wpe", EMBEDDING),
        Case("ln_f.bias", None, "ln_f"),
    ],
    "bert": [
        Case("bert.encoder.layer.3.attention.self.query.weight", 3, "query"),
        Case("bert.encoder.layer.3.attention.output.dense.weight", 3, "attention.output.dense"),
        Case("bert.encoder.layer.3.intermediate.dense.weight", 3, "intermediate.dense"),
        Case("bert.encoder.layer.3.output.dense.weight", 3, "output.dense"),
        Case("encoder.layer.3.output.dense.bias", 3, "output.dense"),
        Case("bert.encoder.layer.3.output.LayerNorm.weight", 3, "LayerNorm"),
        Case("bert.pooler.dense.weight", None, "dense"),
        Case("bert.embeddings.word_embeddings.weight", None, "word_embeddings", EMBEDDING),
        Case("bert.embeddings.position_embeddings.weight", None, "position_embeddings", EMBEDDING),
        Case("embeddings.token_type_embeddings.weight", None, "token_type_embeddings", EMBEDDING),
        Case("classifier.weight", None, "classifier", HEAD),
    ],
    "vit": [
        Case("vit.encoder.layer.7.attention.attention.query.weight", 7, "query"),
        Case("vit.encoder.layer.7.attention.output.dense.weight", 7, "attention.output.dense"),
        Case("vit.encoder.layer.7.intermediate.dense.weight", 7, "intermediate.dense"),
        Case("vit.embeddings.position_embeddings", None, "position_embeddings", EMBEDDING),
        Case("classifier.weight", None, "classifier", HEAD),
    ],
    "vit, as in timm": [
        Case("blocks.7.attn.qkv.weight", 7, "qkv"),
        Case("blocks.7.attn.proj.weight", 7, "attn.proj"),
        Case("blocks.7.mlp.fc1.weight", 7, "fc1"),
        Case("patch_embed.proj.weight", None, "proj", EMBEDDING),
    ],
    "mixtral": [
        Case("model.layers.5.block_sparse_moe.experts.7.w1.weight", 5, "experts.w1"),
        Case("model.layers.5.block_sparse_moe.gate.weight", 5, "gate"),
        Case("model.layers.5.self_attn.v_proj.weight", 5, "v_proj"),
    ],
    "qwen3 moe": [
        Case("model.layers.47.mlp.experts.127.gate_proj.weight", 47, "experts.gate_proj"),
        Case("model.layers.47.mlp.gate.weight", 47, "gate"),
        Case("model.layers.47.mlp.experts.gate_up_proj", 47, "experts.gate_up_proj"),
        Case("model.layers.47.self_attn.q_norm.weight", 47, "q_norm"),
    ],
    "qwen2 moe": [
        Case("model.layers.2.mlp.shared_expert.up_proj.weight", 2, "up_proj"),
        Case("model.layers.2.mlp.shared_expert_gate.weight", 2, "shared_expert_gate"),
    ],
    "phi3": [
        Case("model.layers.9.self_attn.qkv_proj.weight", 9, "qkv_proj"),
        Case("model.layers.9.mlp.gate_up_proj.weight", 9, "gate_up_proj"),
    ],
    "t5": [
        Case("encoder.block.4.layer.0.SelfAttention.q.weight", 4, "q"),
        Case("decoder.block.11.layer.1.EncDecAttention.o.weight", 11, "o"),
        Case("decoder.block.11.layer.2.DenseReluDense.wi_0.weight", 11, "wi_0"),
        Case("decoder.block.11.layer.2.DenseReluDense.wo.weight", 11, "wo"),
        Case(
            "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
            0,
            "relative_attention_bias",
            EMBEDDING,
        ),
        Case("shared.weight", None, "shared", EMBEDDING),
        Case("encoder.embed_tokens.weight", None, "embed_tokens", EMBEDDING),
        Case("lm_head.weight", None, "lm_head", HEAD),
    ],
    "gpt_neox": [
        Case("gpt_neox.layers.5.attention.query_key_value.weight", 5, "query_key_value"),
        Case("gpt_neox.layers.5.attention.dense.weight", 5, "attention.dense"),
        Case("gpt_neox.layers.5.mlp.dense_h_to_4h.weight", 5, "dense_h_to_4h"),
        Case("gpt_neox.embed_in.weight", None, "embed_in", EMBEDDING),
        Case("embed_out.weight", None, "embed_out", HEAD),
    ],
    "falcon": [
        Case("transformer.h.1.self_attention.query_key_value.weight", 1, "query_key_value"),
        Case("transformer.h.1.self_attention.dense.weight", 1, "self_attention.dense"),
        Case("transformer.word_embeddings.weight", None, "word_embeddings", EMBEDDING),
        Case("lm_head.weight", None, "lm_head", HEAD),
    ],
    "bloom": [
        Case("h.29.self_attention.dense.weight", 29, "self_attention.dense"),
        Case("h.29.mlp.dense_4h_to_h.weight", 29, "dense_4h_to_h"),
        Case("word_embeddings.weight", None, "word_embeddings", EMBEDDING),
    ],
    "qwen2-vl": [
        Case("model.language_model.layers.3.mlp.up_proj.weight", 3, "up_proj"),
        Case("visual.blocks.8.attn.qkv.weight", 8, "qkv"),
    ],
    "opt and whisper": [
        Case("model.decoder.layers.2.self_attn.out_proj.weight", 2, "out_proj"),
        Case("model.encoder.layers.2.fc1.weight", 2, "fc1"),
        Case("model.decoder.embed_positions.weight", None, "embed_positions", EMBEDDING),
    ],
}
CASES = [case for cases in FAMILIES.values() for case in cases]

every_case = pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])


def test_the_examples_in_the_docstrings_hold() -> None:
    tried = doctest.testmod(geoscope.names)
    assert tried.failed == 0
    assert tried.attempted >= 4


# --- real names ---------------------------------------------------------------------------------


@every_case
def test_the_block_of_a_real_name(case: Case) -> None:
    assert layer_index(case.name) == case.layer


@every_case
def test_the_kind_of_a_real_name(case: Case) -> None:
    assert module_kind(case.name) == case.kind


@every_case
def test_embeddings_and_heads_are_known_and_told_apart(case: Case) -> None:
    assert is_embedding(case.name) == (case.role == EMBEDDING)
    assert is_output_head(case.name) == (case.role == HEAD)


@pytest.mark.parametrize(
    ("rule", "said"),
    [
        ("nothing", "write REGEX=REPL"),
        ("=model.", "write REGEX=REPL"),
        ("(=x", "cannot be used: "),
        (r"a=\2", "cannot be used: invalid group reference"),
        (r"a=\g<b>", "cannot be used: unknown group name"),
        (r"a=\q", "cannot be used: bad escape"),
    ],
)
def test_what_is_no_rule_is_refused_before_any_name(rule: str, said: str) -> None:
    with pytest.raises(OptionError) as caught:
        NameMap((rule,))
    assert str(caught.value).startswith("`map_name` ") and said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_last_equals_sign_divides_a_rule() -> None:
    mapped = NameMap((r"(?=net)net\.(?<=\.)=model.",))
    assert mapped.canonical("net.norm.weight")[0] == "norm.weight"


def test_a_rule_that_leaves_nothing_of_a_name_is_refused() -> None:
    with pytest.raises(OptionError, match="nothing is left of norm"):
        NameMap((".*=",)).canonical("norm.weight")


def test_rules_come_in_their_order_and_the_unused_are_told() -> None:
    rules = NameMap(("^a=b", "^b=c", "^x=y"))
    assert rules.canonical("a.weight") == ("c.weight", ("`map_name` ^a=b", "`map_name` ^b=c"))
    assert rules.notes(["a.weight", "d.weight"]) == ("`map_name` ^x=y: changes no name",)
    assert NameMap().canonical("module.x.weight") == canonical("module.x.weight")


# Kinds whose names differ between versions: on disk, and in the canonical name.
RENAMED_KINDS = {"experts.w1": "experts.gate_proj", "embed_out": "lm_head"}


@every_case
def test_wrappers_and_the_backbone_prefix_change_none_of_it(case: Case) -> None:
    for prefix in ("module.", "_orig_mod.", "_fsdp_wrapped_module.", "base_model.model."):
        name = prefix + case.name
        assert layer_index(name) == case.layer
        assert is_embedding(name) == (case.role == EMBEDDING)
        assert canonical(name)[0] == canonical(case.name)[0]
    bare = canonical(case.name)[0]
    assert layer_index(bare) == case.layer
    assert module_kind(bare) == RENAMED_KINDS.get(case.kind, case.kind)
    assert is_embedding(bare) == (case.role == EMBEDDING)
    assert is_output_head(bare) == (case.role == HEAD)


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_matrices_of_one_block_that_differ_have_kinds_that_differ(family: list[Case]) -> None:
    kinds = [
        (case.layer, case.kind)
        for case in family
        if case.layer is not None and case.name.endswith("weight")
    ]
    assert len(set(kinds)) == len(kinds)


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("model.layers.10.mlp.experts.3.w1.weight", 10),  # the block, not the expert
        ("encoder.block.2.layer.1.DenseReluDense.wi.weight", 2),  # the block, not its part
        ("backbone.layers.7.mixer.in_proj.weight", 7),
        ("visual.transformer.resblocks.5.mlp.c_fc.weight", 5),
        ("layers.0.weight", 0),
        ("model.mylayers.4.weight", None),
        ("layer1.0.conv1.weight", None),
        ("model.layers.weight", None),
        ("layers.3", None),
        ("fc.weight", None),
        ("", None),
    ],
)
def test_only_a_numbered_part_that_means_a_block_is_one(name: str, layer: int | None) -> None:
    assert layer_index(name) == layer


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("weight", "weight"),
        ("fc.weight", "fc"),
        ("0.weight", "0.weight"),
        ("model.0.1.weight", "model"),
        ("layers.3.ff.2.weight", "ff"),
        ("layers.3.mlp.gate_proj.lora_A.weight", "lora_A"),
        ("layers.2.dense.weight", "dense"),
    ],
)
def test_a_kind_is_the_last_word_whatever_the_name(name: str, kind: str) -> None:
    assert module_kind(name) == kind


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.mlp.shared_experts.up_proj.weight",
        "model.layers.0.self_attn.rotary_emb.inv_freq",
        "model.layers.0.mlp.output.weight",  # a part of a block, no vocabulary
        "bert.encoder.layer.0.output.dense.weight",
        "model.embedder_free.weight_norm",
    ],
)
def test_what_merely_sounds_like_an_output_head_or_embedding_is_none(name: str) -> None:
    assert not is_output_head(name)
    assert "embed" in name or not is_embedding(name)


# --- canonical names ----------------------------------------------------------------------------

_WRAPPED = "model.layers.0.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("name", "rules"),
    [
        ("layers.0.mlp.up_proj.weight", ()),
        (_WRAPPED, ("backbone prefix",)),
        ("transformer.layers.0.mlp.up_proj.weight", ("backbone prefix",)),
        (f"module.{_WRAPPED}", ("wrapper module.", "backbone prefix")),
        (f"_orig_mod.{_WRAPPED}", ("wrapper _orig_mod.", "backbone prefix")),
        (
            f"module._orig_mod.{_WRAPPED}",
            ("wrapper module.", "wrapper _orig_mod.", "backbone prefix"),
        ),
        (
            "_fsdp_wrapped_module.model.layers.0._fsdp_wrapped_module.mlp.up_proj.weight",
            ("wrapper _fsdp_wrapped_module.", "backbone prefix"),
        ),
        (
            "model.layers.0._checkpoint_wrapped_module.mlp.up_proj.weight",
            ("wrapper _checkpoint_wrapped_module.", "backbone prefix"),
        ),
        (
            f"_fsdp_wrapped_module._checkpoint_wrapped_module.{_WRAPPED}",
            (
                "wrapper _fsdp_wrapped_module.",
                "wrapper _checkpoint_wrapped_module.",
                "backbone prefix",
            ),
        ),
        (
            "base_model.model.model.layers.0.mlp.up_proj.base_layer.weight",
            ("wrapper base_model.model.", "wrapper .base_layer", "backbone prefix"),
        ),
        ("model.language_model.layers.0.mlp.up_proj.weight", ("vlm backbone",)),
        ("language_model.model.layers.0.mlp.up_proj.weight", ("vlm backbone",)),
    ],
)
def test_every_spelling_of_a_weight_has_one_canonical_name(
    name: str, rules: tuple[str, ...]
) -> None:
    assert canonical(name) == ("layers.0.mlp.up_proj.weight", rules)


def test_the_head_of_a_vision_language_model_is_that_of_the_text_model() -> None:
    assert canonical("language_model.lm_head.weight") == ("lm_head.weight", ("vlm head",))
    assert canonical("lm_head.weight") == ("lm_head.weight", ())


@pytest.mark.parametrize(
    "name",
    [
        "submodule.fc.weight",  # ends like `module.`
        "layers.0.my_module.fc.weight",
        "layers.0.base_layer_norm.weight",  # begins like `.base_layer`
        "visual.blocks.0.attn.qkv.weight",
        "decoder.model_head.weight",
        "encoder.transformer.h.0.fc.weight",  # the prefix of a backbone only at the front
        "models.0.fc.weight",
    ],
)
def test_only_whole_parts_of_a_name_are_dropped(name: str) -> None:
    assert canonical(name) == (name, ())


_PREFIX = "_fsdp_wrapped_module.", "_orig_mod.", "module.", "_checkpoint_wrapped_module."
_parts = st.lists(
    st.sampled_from(["layers", "0", "11", "mlp", "self_attn", "up_proj", "experts", "visual", "h"]),
    min_size=1,
    max_size=6,
)


@seeded
@given(parts=_parts, wrappers=st.lists(st.sampled_from(_PREFIX), max_size=4), at=st.integers(0, 6))
def test_wrappers_vanish_wherever_they_stand(
    parts: list[str], wrappers: list[str], at: int
) -> None:
    plain = ".".join([*parts, "weight"])
    at = min(at, len(parts))
    head = "".join(f"{part}." for part in parts[:at])
    wrapped = head + "".join(wrappers) + ".".join([*parts[at:], "weight"])
    found, rules = canonical(wrapped)
    assert found == canonical(plain)[0]
    assert {f"wrapper {one}" for one in wrappers} == {r for r in rules if "wrapper" in r}
    assert layer_index(found) == layer_index(plain)
    assert module_kind(found) == module_kind(plain)


@seeded
@given(parts=_parts)
def test_a_canonical_name_stays_as_it_is(parts: list[str]) -> None:
    name = canonical(".".join([*parts, "weight"]))[0]
    assert canonical(name) == (name, ())


@seeded
@given(st.text(alphabet="abhlyersmodul._0123", max_size=30))
def test_any_string_has_a_kind_and_a_place(name: str) -> None:
    assert isinstance(module_kind(name), str)
    assert (module_kind(name) == "") == (name == "")
    layer = layer_index(name)
    assert layer is None or re.search(rf"\.0*{layer}\.", name)
    assert canonical(name)[0] == name or canonical(name)[1]


# --- order --------------------------------------------------------------------------------------


def test_layer_2_comes_before_layer_10() -> None:
    names = [f"model.layers.{i}.mlp.{kind}" for i in (0, 1, 2, 9, 10, 11, 100) for kind in "ab"]
    assert in_natural_order(reversed(names)) == names


@seeded
@given(
    st.lists(
        st.tuples(st.sampled_from(["layers", "h", "experts"]), st.integers(0, 300)),
        unique=True,
        max_size=12,
    ),
    st.randoms(use_true_random=False),
)
def test_numbers_are_ordered_as_numbers_and_words_as_words(parts, draw) -> None:
    names = [f"{word}.{number}.weight" for word, number in sorted(parts)]
    shuffled = list(names)
    draw.shuffle(shuffled)
    assert in_natural_order(shuffled) == names


@seeded
@given(st.lists(st.text(alphabet="ab.019", max_size=8), unique=True, max_size=8))
def test_the_order_does_not_depend_on_where_a_name_stood(names: list[str]) -> None:
    ordered = in_natural_order(names)
    assert sorted(ordered) == sorted(names)
    assert in_natural_order(reversed(names)) == ordered


# --- options ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0", {0}),
        ("0-3,7", {0, 1, 2, 3, 7}),
        (" 1 , 3-4 ", {1, 3, 4}),
        ("5-5", {5}),
        ("2,2,1-3", {1, 2, 3}),
        ("007", {7}),
    ],
)
def test_layers_are_a_list_of_indices_and_ranges(text: str, expected: set[int]) -> None:
    assert parse_layers(text) == expected


@pytest.mark.parametrize("text", ["", ",", "1,", "a", "1-", "-1", "1--2", "0..3", "1.5", "3 4"])
def test_what_is_no_index_or_range_is_refused_in_one_line(text: str) -> None:
    with pytest.raises(OptionError, match="write 0-3,7") as caught:
        parse_layers(text)
    assert f"`layers` {text!r}" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_range_that_runs_backwards_is_refused() -> None:
    with pytest.raises(OptionError, match="range 7-3 runs backwards"):
        parse_layers("0, 7-3")


@seeded
@given(st.sets(st.integers(0, 60), min_size=1))
def test_any_set_of_layers_can_be_written_with_ranges(layers: set[int]) -> None:
    ordered = sorted(layers)
    starts = [a for a, b in zip(ordered, [-9, *ordered], strict=False) if a != b + 1]
    ends = [a for a, b in pairwise([*ordered, 99]) if b != a + 1]
    text = ",".join(f"{a}-{b}" if a != b else f"{a}" for a, b in zip(starts, ends, strict=True))
    assert parse_layers(text) == layers


IN_SCOPE = "model.layers.3.mlp.up_proj.weight"
OUTSIDE = "model.embed_tokens.weight"


def reason(selection: Selection, name: str = IN_SCOPE, *, default: bool = True) -> str | None:
    return selection.reason_against(name, in_default_scope=default, scope_reason="embedding")


def test_without_options_the_default_scope_decides() -> None:
    assert reason(Selection()) is None
    assert reason(Selection(), OUTSIDE, default=False) == "embedding"


def test_include_replaces_the_default_scope() -> None:
    reaching = Selection(include=("embed", "q_proj"))
    assert reason(reaching, OUTSIDE, default=False) is None
    assert reason(reaching) == "not matched by `include`"


def test_exclude_takes_away_whatever_the_other_options_say() -> None:
    assert reason(Selection(exclude=("mlp",))) == "excluded by `exclude`"
    both = Selection(include=("up_proj",), exclude=("layers.3",), layers=frozenset({3}))
    assert reason(both) == "excluded by `exclude`"


def test_layers_pick_blocks_and_leave_out_what_is_in_none() -> None:
    assert reason(Selection(layers=frozenset({3}))) is None
    assert reason(Selection(layers=frozenset({2}))) == "not in `layers`"
    assert reason(Selection(layers=frozenset())) == "not in `layers`"
    outside = Selection(include=("embed",), layers=frozenset({3}))
    assert reason(outside, OUTSIDE, default=False) == "not in `layers`"


def test_patterns_are_searched_anywhere_in_the_full_name() -> None:
    for pattern in ("up", r"layers\.[0-3]\.", "weight$", "^model"):
        assert reason(Selection(include=(pattern,))) is None
    assert reason(Selection(include=("^layers",))) == "not matched by `include`"


@pytest.mark.parametrize("option", ["include", "exclude"])
def test_a_pattern_that_is_no_regular_expression_is_refused(option: str) -> None:
    patterns: Any = ("fine", "layers.(")
    with pytest.raises(OptionError, match="is not a regular expression") as caught:
        Selection(**{option: patterns})
    assert str(caught.value).startswith(f"`{option}` 'layers.('")
    assert "\n" not in str(caught.value)


@seeded
@given(
    include=st.sets(st.sampled_from(["up", "q_proj", "embed"])),
    exclude=st.sets(st.sampled_from(["mlp", "embed", "layers.1"])),
    layers=st.none() | st.frozensets(st.integers(0, 3)),
)
def test_a_name_is_looked_at_exactly_when_no_option_speaks_against_it(
    include: set[str], exclude: set[str], layers: frozenset[int] | None
) -> None:
    selection = Selection(tuple(include), tuple(exclude), layers)
    words = ("mlp.up_proj", "self_attn.q_proj")
    names = [f"layers.{i}.{word}" for i, word in itertools.product(range(3), words)]
    for name in [*names, "embed_tokens"]:
        in_scope = name != "embed_tokens"
        wanted = any(one in name for one in include) if include else in_scope
        allowed = layers is None or (in_scope and int(name[7]) in layers)
        looked_at = wanted and allowed and not any(one in name for one in exclude)
        assert (reason(selection, name, default=in_scope) is None) == looked_at
