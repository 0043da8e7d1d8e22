"""Does each tensor meet its counterpart, and is everything else listed with its reason?"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from geoscope.errors import PairingError
from geoscope.models.checkpoint import Checkpoint
from geoscope.models.pairing import pair
from geoscope.names import NameMap, Selection
from geoscope.records import Pairing, Rename, ShapeMismatch, Skipped
from geoscope.sources.open import open_checkpoint
from tests.helpers.files import llama, model_of, write_model, zeros

ALL = Selection()
REACH = "outside the default scope; `include` reaches it"
UP = "model.layers.0.mlp.up_proj.weight"

Tensors = dict[str, torch.Tensor]


@pytest.fixture
def sides(tmp_path: Path) -> Sides:
    return Sides(tmp_path)


class Sides:
    """Writes a base and a tuned model and pairs them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def open(self, side: str, tensors: Tensors, **config: object) -> Checkpoint:
        return model_of(self.folder / side, tensors, **config)

    def pair(self, base: Tensors, tuned: Tensors, selection: Selection = ALL) -> Pairing:
        return pair(self.open("base", base), self.open("tuned", tuned), selection)


def names(pairs: tuple[object, ...]) -> list[str]:
    return [item.name for item in pairs]  # type: ignore[attr-defined]


def reasons(pairing: Pairing) -> dict[str, str]:
    return {item.name: item.reason for item in pairing.skipped}


def renamed(tensors: Tensors, old: str, new: str) -> Tensors:
    return {name.replace(old, new): tensor for name, tensor in tensors.items()}


# --- names --------------------------------------------------------------------------------------


def test_equal_models_pair_completely_in_order_of_layers(sides: Sides) -> None:
    pairing = sides.pair(llama(layers=11), llama(1, layers=11))
    assert len(pairing.matrices) == 77
    assert [one.layer for one in pairing.matrices] == sorted(7 * list(range(11)))
    assert {one.module for one in pairing.matrices} == {
        *(f"{kind}_proj" for kind in "qkvo"), "gate_proj", "up_proj", "down_proj",
    }  # fmt: skip
    assert names(pairing.vectors)[-1] == "model.norm.weight"
    assert len(pairing.vectors) == 12
    assert pairing.missing == pairing.base_only == pairing.tuned_only == pairing.renamed == ()
    assert reasons(pairing) == {
        "lm_head.weight": f"output head: {REACH}",
        "model.embed_tokens.weight": f"embedding: {REACH}",
    }


def test_a_pair_carries_both_headers(sides: Sides) -> None:
    tuned = {name: tensor.float() for name, tensor in llama().items()}
    pairing = sides.pair(llama(), tuned)
    one = next(one for one in pairing.matrices if one.name == UP)
    assert (one.layer, one.module, one.shape) == (0, "up_proj", (12, 8))
    assert (one.base.dtype, one.tuned.dtype) == ("bfloat16", "float32")


@pytest.mark.parametrize(
    ("old", "new", "rule"),
    [
        ("model.", "_orig_mod.model.", "wrapper _orig_mod."),
        ("model.", "module.model.", "wrapper module."),
        ("model.", "base_model.model.model.", "wrapper base_model.model."),
        ("model.", "", "backbone prefix"),
        ("model.", "transformer.", "backbone prefix"),
        ("model.", "model.language_model.", "backbone prefix, vlm backbone"),
    ],
)
def test_another_spelling_of_the_names_is_matched_and_listed(
    sides: Sides, old: str, new: str, rule: str
) -> None:
    tuned = renamed(llama(), old, new)
    pairing = sides.pair(llama(), tuned)
    assert len(pairing.matrices) == 14
    assert pairing.missing == ()
    assert Rename(UP, UP.replace(old, new), rule) in pairing.renamed
    assert len(pairing.renamed) == len([name for name in tuned if name not in llama()])
    backward = pair(open_checkpoint(str(sides.folder / "tuned")),
                    open_checkpoint(str(sides.folder / "base")), ALL)  # fmt: skip
    assert {item.rule for item in backward.renamed} == {
        ", ".join(reversed(rule.split(", "))) if ", " in rule else rule
    }


def test_three_naming_styles_of_one_vision_model_meet(sides: Sides) -> None:
    base = zeros(model__language_model__layers__0__up__weight=(4, 4), lm_head__weight=(9, 4))
    tuned = zeros(
        language_model__model__layers__0__up__weight=(4, 4), language_model__lm_head__weight=(9, 4)
    )
    pairing = sides.pair(base, tuned)
    assert names(pairing.matrices) == ["model.language_model.layers.0.up.weight"]
    assert {item.rule for item in pairing.renamed} == {"vlm backbone", "vlm head"}


def test_the_exact_name_goes_before_the_canonical_one(sides: Sides) -> None:
    base = zeros(layers__0__up__weight=(4, 4), model__layers__1__up__weight=(4, 4))
    tuned = zeros(layers__0__up__weight=(4, 4), layers__1__up__weight=(4, 4))
    pairing = sides.pair(base, tuned)
    assert len(pairing.matrices) == 2
    assert [item.base for item in pairing.renamed] == ["model.layers.1.up.weight"]


def test_two_names_of_one_tensor_are_an_error_that_names_both(sides: Sides) -> None:
    twice = {**llama(), f"_orig_mod.{UP}": llama()[UP]}
    with pytest.raises(PairingError) as caught:
        sides.pair(llama(), twice)
    assert f"_orig_mod.{UP} and {UP} mean the same tensor" in str(caught.value)


def test_nothing_is_paired_by_position(sides: Sides) -> None:
    """An extra layer in the middle must not shift the others."""
    base = llama(layers=4)
    tuned = {name: tensor for name, tensor in llama(layers=4).items() if ".layers.1." not in name}
    pairing = sides.pair(base, tuned)
    assert {one.layer for one in pairing.matrices} == {0, 2, 3}
    assert all(one.base.name == one.tuned.name for one in pairing.matrices)
    assert all(".layers.1." in name for name in pairing.base_only)
    assert len(pairing.base_only) == 8
    assert len(pairing.missing) == 7


@pytest.mark.parametrize(
    ("given", "old", "new"),
    [
        ((r"^policy\.=",), "model.", "policy.model."),
        ((r"^net\.(\w+)s\.(\d+)\.=layers.\2.",), "model.layers.", "net.blocks."),
        ((r"^a\.=b.", r"^b\.=model."), "model.", "a."),
    ],
)
def test_a_rule_of_the_user_matches_names_and_is_listed(
    sides: Sides, given: tuple[str, ...], old: str, new: str
) -> None:
    base, tuned = sides.open("base", llama()), sides.open("tuned", renamed(llama(), old, new))
    without = pair(base, tuned, Selection(), NameMap(given))
    assert (len(without.matrices), without.missing) == (14, ())
    rename = next(one for one in without.renamed if one.base == UP)
    assert rename.tuned == UP.replace(old, new)
    for rule in given:
        assert f"`map_name` {rule}" in rename.rule
    with pytest.raises(PairingError, match="nothing to compare"):
        pair(base, tuned, ALL)


def test_a_rule_that_makes_two_names_one_is_an_error_that_names_both(sides: Sides) -> None:
    base = sides.open("base", llama())
    with pytest.raises(PairingError) as caught:
        pair(base, base, ALL, NameMap((r"\bk_proj=q_proj",)))
    first, second = (f"model.layers.0.self_attn.{one}_proj.weight" for one in "kq")
    assert f"{first} and {second} mean the same tensor" in str(caught.value)


def test_per_expert_names_of_two_libraries_meet(sides: Sides) -> None:
    base = zeros(
        model__layers__0__block_sparse_moe__experts__3__w1__weight=(6, 4),
        model__layers__0__block_sparse_moe__experts__3__w2__weight=(4, 6),
        model__layers__0__block_sparse_moe__experts__3__w3__weight=(6, 4),
        model__layers__0__block_sparse_moe__gate__weight=(8, 4),
    )
    tuned = zeros(
        model__layers__0__mlp__experts__3__gate_proj__weight=(6, 4),
        model__layers__0__mlp__experts__3__down_proj__weight=(4, 6),
        model__layers__0__mlp__experts__3__up_proj__weight=(6, 4),
        model__layers__0__mlp__gate__weight=(8, 4),
    )
    pairing = sides.pair(base, tuned)
    met = {one.base.split(".")[-2]: one.tuned.split(".")[-2] for one in pairing.renamed}
    assert met == {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj", "gate": "gate"}
    assert {one.rule for one in pairing.renamed} == {"expert names"}


# --- what is left over --------------------------------------------------------------------------


def test_one_sided_tensors_are_listed_and_only_matrices_in_scope_are_missing(sides: Sides) -> None:
    base = {**llama(), **zeros(score__weight=(2, 8), model__layers__0__extra__bias=(8,))}
    tuned = {**llama(), **zeros(model__layers__0__new__weight=(8, 8))}
    del tuned[UP]
    pairing = sides.pair(base, tuned)
    assert pairing.base_only == ("model.layers.0.extra.bias", UP, "score.weight")
    assert pairing.tuned_only == ("model.layers.0.new.weight",)
    assert pairing.missing == (UP, "model.layers.0.new.weight")


def test_reshaped_tensors_are_listed_and_a_resized_vocabulary_is_not_missing(sides: Sides) -> None:
    tuned = {**llama(), "model.embed_tokens.weight": torch.zeros(40, 8), UP: torch.zeros(8, 12)}
    pairing = sides.pair(llama(), tuned)
    assert pairing.shape_mismatch == (
        ShapeMismatch("model.embed_tokens.weight", (32, 8), (40, 8)),
        ShapeMismatch(UP, (12, 8), (8, 12)),
    )
    assert pairing.missing == (UP,)
    including = pair(
        open_checkpoint(str(sides.folder / "base")),
        open_checkpoint(str(sides.folder / "tuned")),
        Selection(include=("embed", "q_proj")),
    )
    assert including.missing == ("model.embed_tokens.weight",)


def test_what_is_no_matrix_is_skipped_with_its_reason(sides: Sides) -> None:
    block = "model.layers.0"
    extra = {
        f"{block}.attn.bias": torch.ones(4, 4, dtype=torch.bool),
        f"{block}.counter": torch.tensor(3),
        f"{block}.scale": torch.tensor(0.5),
        f"{block}.rotary_emb.inv_freq": torch.ones(4),
        f"{block}.gate.weight": torch.ones(1, 8),
        f"{block}.column.weight": torch.ones(8, 1),
        f"{block}.conv1d.weight": torch.ones(8, 1, 4),
        f"{block}.patch.weight": torch.ones(8, 3, 2, 2),
        f"{block}.empty.weight": torch.ones(0, 8),
        "model.projector.weight": torch.ones(8, 8),
    }
    pairing = sides.pair({**llama(), **extra}, {**llama(), **extra})
    found = reasons(pairing)
    assert {name: found[name] for name in extra} == {
        f"{block}.attn.bias": "buffer (bool)",
        f"{block}.counter": "buffer (int64)",
        f"{block}.scale": "0-D: a single number",
        f"{block}.rotary_emb.inv_freq": "buffer (float32)",
        f"{block}.gate.weight": "1 row or column",
        f"{block}.column.weight": "1 row or column",
        f"{block}.conv1d.weight": "3-D (8, 1, 4): no matrix",
        f"{block}.patch.weight": "4-D (8, 3, 2, 2): no matrix",
        f"{block}.empty.weight": "empty (0, 8)",
        "model.projector.weight": f"not in a numbered block: {REACH}",
    }
    assert pairing.missing == ()
    assert len(pairing.matrices) == 14


def test_a_stack_whose_layout_is_not_known_is_missing(sides: Sides) -> None:
    name = "model.layers.0.mlp.experts.gate_up_proj"
    tensors = {**llama(), name: torch.zeros(4, 6, 8)}
    pairing = sides.pair(tensors, tensors)
    reason = "3-D (4, 6, 8): a stack of experts of unknown layout"
    assert Skipped(name, reason, missing=True) in pairing.skipped
    assert pairing.missing == (name,)
    excluded = sides.pair(tensors, tensors, Selection(exclude=("experts",)))
    assert Skipped(name, "excluded by `exclude`") in excluded.skipped
    assert excluded.missing == ()


def test_a_weight_that_became_integers_is_missing(sides: Sides) -> None:
    tuned = {**llama(), UP: torch.zeros(12, 8, dtype=torch.int8)}
    pairing = sides.pair(llama(), tuned)
    assert Skipped(UP, "bfloat16 in base, int8 in tuned", missing=True) in pairing.skipped
    assert pairing.missing == (UP,)


def test_a_t5_bias_table_is_an_embedding(sides: Sides) -> None:
    name = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    tensors = {**zeros(encoder__block__0__layer__0__SelfAttention__q__weight=(8, 8)),
               name: torch.zeros(32, 4)}  # fmt: skip
    assert reasons(sides.pair(tensors, tensors))[name] == f"embedding: {REACH}"


def test_conv1d_and_its_copy_in_linear_layers_correspond(sides: Sides) -> None:
    base = zeros(h__0__attn__c_attn__weight=(4, 12), h__0__mlp__c_fc__weight=(4, 16))
    tuned = {name: tensor.T.contiguous() for name, tensor in base.items()}
    one = sides.open("base", base, model_type="gpt2")
    other = sides.open("tuned", tuned, model_type="gpt2")
    pairing = pair(one, other, ALL)
    assert [item.shape for item in pairing.matrices] == [(12, 4), (16, 4)]
    assert [item.base.transposed for item in pairing.matrices] == [True, True]
    assert [item.tuned.transposed for item in pairing.matrices] == [False, False]


# --- tied embeddings ----------------------------------------------------------------------------


def test_a_tied_head_is_counted_once_stored_or_not(sides: Sides) -> None:
    without = {name: tensor for name, tensor in llama().items() if name != "lm_head.weight"}
    stored = sides.open("stored", llama(), tie_word_embeddings=True)
    absent = sides.open("absent", without, tie_word_embeddings=True)
    for base, tuned in ((stored, stored), (stored, absent), (absent, stored), (absent, absent)):
        pairing = pair(base, tuned, ALL)
        assert pairing.base_only == pairing.tuned_only == pairing.missing == ()
        expected = "tied to model.embed_tokens.weight: counted once"
        found = reasons(pairing).get("lm_head.weight")
        assert found == (None if base is tuned is absent else expected)


def test_a_head_untied_on_one_side_has_no_counterpart(sides: Sides) -> None:
    without = {name: tensor for name, tensor in llama().items() if name != "lm_head.weight"}
    base = sides.open("base", without, tie_word_embeddings=True)
    tuned = sides.open("tuned", llama(), tie_word_embeddings=False)
    pairing = pair(base, tuned, Selection(include=("lm_head", "q_proj")))
    assert pairing.tuned_only == pairing.missing == ()
    assert reasons(pairing)["lm_head.weight"] == (
        "tied to model.embed_tokens.weight in base: no counterpart of its own"
    )


# --- selection ----------------------------------------------------------------------------------


def test_include_replaces_the_default_scope(sides: Sides) -> None:
    pairing = sides.pair(llama(), llama(1), Selection(include=("lm_head", "embed", "q_proj")))
    assert names(pairing.matrices) == [
        "lm_head.weight", "model.embed_tokens.weight",
        *(f"model.layers.{layer}.self_attn.q_proj.weight" for layer in (0, 1)),
    ]  # fmt: skip
    assert pairing.vectors == ()
    assert reasons(pairing)[UP] == "not matched by `include`"
    assert pairing.missing == ()


def test_exclude_takes_away_and_layers_choose(sides: Sides) -> None:
    selection = Selection(exclude=("mlp", r"norm"), layers=frozenset({1}))
    pairing = sides.pair(llama(), llama(1), selection)
    assert names(pairing.matrices) == [
        f"model.layers.1.self_attn.{kind}_proj.weight" for kind in "koqv"
    ]
    assert pairing.vectors == ()
    assert reasons(pairing)[UP] == "excluded by `exclude`"
    assert reasons(pairing)["model.layers.0.self_attn.q_proj.weight"] == "not in `layers`"


def test_what_the_selection_leaves_out_is_not_missing(sides: Sides) -> None:
    tuned = {name: tensor for name, tensor in llama().items() if name != UP}
    pairing = sides.pair(llama(), tuned, Selection(exclude=("up_proj",)))
    assert pairing.base_only == (UP,)
    assert pairing.missing == ()


def test_a_selection_of_norms_alone_is_a_comparison(sides: Sides) -> None:
    pairing = sides.pair(llama(), llama(1), Selection(include=("norm",)))
    assert pairing.matrices == ()
    assert len(pairing.vectors) == 3


def test_a_model_without_numbered_blocks_compares_every_matrix_but_embeddings(
    sides: Sides,
) -> None:
    tensors = zeros(encoder__fc1__weight=(4, 4), fc2__weight=(3, 4), embed__weight=(9, 4),
                    classifier__weight=(2, 4), fc2__bias=(3,))  # fmt: skip
    pairing = sides.pair(tensors, tensors)
    assert names(pairing.matrices) == ["encoder.fc1.weight", "fc2.weight"]
    assert names(pairing.vectors) == ["fc2.bias"]
    assert set(reasons(pairing)) == {"embed.weight", "classifier.weight"}


# --- nothing to compare -------------------------------------------------------------------------


def nothing(sides: Sides, base: Tensors, tuned: Tensors, selection: Selection = ALL) -> str:
    with pytest.raises(PairingError) as caught:
        sides.pair(base, tuned, selection)
    message = str(caught.value)
    assert message.startswith("nothing to compare: ")
    assert "\n" not in message
    return message


def test_a_selection_that_takes_nothing_is_an_error_with_example_names(sides: Sides) -> None:
    selection = Selection(include=("qproj",), exclude=("mlp",), layers=frozenset({0, 7}))
    message = nothing(sides, llama(), llama(), selection)
    assert "no matrix passes `include` 'qproj' `exclude` 'mlp' `layers` 0,7; names look like" in (
        message
    )
    assert "model.layers.0.mlp.down_proj.weight" in message


def test_models_without_a_common_name_are_an_error_with_names_of_both(sides: Sides) -> None:
    message = nothing(sides, llama(), zeros(h__0__attn__weight=(4, 4)))
    assert "no tensor of" in message
    assert "model.layers.0.input_layernorm.weight" in message
    assert "h.0.attn.weight" in message


def test_models_of_another_width_are_an_error_with_the_first_shapes(sides: Sides) -> None:
    wider = {name: torch.zeros([2 * size for size in t.shape]) for name, t in llama().items()}
    message = nothing(sides, llama(), wider)
    assert "14 matrices in scope differ in shape, first model.layers.0.mlp.down_proj.weight" in (
        message
    )
    assert "base (8, 12), tuned (16, 24)" in message


def test_models_of_stacked_experts_alone_are_an_error(sides: Sides) -> None:
    tensors = zeros(layers__0__mlp__experts__up=(4, 6, 8))
    assert "for 1 weights in scope, the other model has no readable" in nothing(
        sides, tensors, tensors
    )


def test_vectors_alone_are_nothing_to_compare_by_default(sides: Sides) -> None:
    tensors = zeros(layers__0__norm__weight=(8,))
    message = nothing(sides, tensors, tensors)
    assert "no matrix passes the default scope" in message


def test_a_folder_and_a_single_file_correspond(tmp_path: Path) -> None:
    folder = write_model(tmp_path, llama())
    pairing = pair(
        open_checkpoint(str(folder)), open_checkpoint(str(folder / "model.safetensors")), ALL
    )
    assert len(pairing.matrices) == 14
