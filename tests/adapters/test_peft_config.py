"""Is `adapter_config.json` the least that PEFT takes, and does it name the right modules?"""

from __future__ import annotations

import json
from typing import Any

import pytest

from geoscope.adapters.peft_config import (
    VLLM_RANKS,
    adapter_config,
    config_bytes,
    max_lora_rank,
    rank_advice,
    target_modules,
    vllm_findings,
)
from geoscope.errors import OptionError

LEAVES = ("q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "gate_proj", "down_proj")

# What old and new PEFT load without a warning, word for word.
EXPECTED = (
    '{"alpha_pattern": {}, "auto_mapping": null, "base_model_name_or_path": "org/model", '
    '"bias": "none", "fan_in_fan_out": false, "inference_mode": false, '
    '"init_lora_weights": true, "layers_pattern": null, "layers_to_transform": null, '
    '"lora_alpha": 64, "lora_dropout": 0.0, "modules_to_save": null, "peft_type": "LORA", '
    '"r": 32, "rank_pattern": {}, "revision": null, "task_type": "CAUSAL_LM", '
    '"target_modules": ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", '
    '"v_proj"], "use_dora": false, "use_rslora": false}'
)


def made(**changes: Any) -> dict[str, Any]:
    settings: dict[str, Any] = {"base": "org/model", "rank": 32, "alpha": 64, "targets": LEAVES}
    return adapter_config(**{**settings, **changes})


def test_the_keys_and_their_order_are_those_of_the_format() -> None:
    assert json.dumps(made()) == EXPECTED


def test_the_file_reads_back_and_is_the_same_for_the_same_input() -> None:
    config = made(revision="abc", base="/a b/é")
    assert json.loads(config_bytes(config)) == config
    assert config_bytes(made(targets=LEAVES[::-1])) == config_bytes(made())


def test_alpha_is_written_as_a_whole_number_where_it_is_one() -> None:
    assert type(made(alpha=64.0)["lora_alpha"]) is int
    assert made(alpha=22.5)["lora_alpha"] == 22.5


def test_parameters_are_named_only_where_there_are_some() -> None:
    assert "target_parameters" not in made()
    parameters = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    assert made(parameters=parameters)["target_parameters"] == sorted(parameters)


# --- target_modules -------------------------------------------------------------------------------


def blocks(*leaves: str, count: int = 3) -> list[str]:
    return [f"model.layers.{i}.{leaf}" for i in range(count) for leaf in leaves]


def peft_matches(path: str, targets: list[str]) -> bool:
    """PEFT's rule for a list: the whole path, or what follows a dot."""
    return path in targets or any(path.endswith(f".{target}") for target in targets)


ALL = [*blocks("attn.q_proj", "attn.o_proj", "mlp.up_proj", "norm"), "model.embed", "lm_head"]


@pytest.mark.parametrize(
    ("adapted", "every", "expected"),
    [
        (blocks("attn.q_proj"), ALL, ["q_proj"]),
        (blocks("attn.q_proj", "mlp.up_proj"), ALL, ["q_proj", "up_proj"]),
        (blocks("attn.q_proj", count=1), ALL, ["model.layers.0.attn.q_proj"]),
        (
            [*blocks("attn.q_proj"), *blocks("mlp.up_proj", count=1)],
            ALL,
            ["model.layers.0.mlp.up_proj", "q_proj"],
        ),
        # a vision tower has a q_proj of its own
        (
            blocks("attn.q_proj", count=1),
            [*blocks("attn.q_proj", count=1), "vision.layers.0.q_proj"],
            ["model.layers.0.attn.q_proj"],
        ),
        # a module that holds others is named like an adapted one
        (["h.0.output"], ["h.0.output", "h.1.output.dense"], ["h.0.output"]),
        (["lm_head"], ALL, ["lm_head"]),
        ([], ALL, []),
    ],
)
def test_a_last_part_stands_only_where_all_of_its_modules_are_adapted(
    adapted: list[str], every: list[str], expected: list[str]
) -> None:
    targets = target_modules(adapted, every)
    assert targets == expected
    assert {path for path in {*every, *adapted} if peft_matches(path, targets)} == set(adapted)


def test_a_last_part_that_ends_another_is_no_match() -> None:
    every = ["a.up_proj", "a.gate_up_proj"]
    assert target_modules(["a.up_proj"], every) == ["up_proj"]


def test_a_full_path_that_ends_another_is_refused() -> None:
    with pytest.raises(OptionError, match=r"selects only the adapted modules: tower\.h\.0\.q"):
        target_modules(["h.0.q"], ["h.0.q", "h.1.q", "tower.h.0.q"])


# --- vLLM -----------------------------------------------------------------------------------------


def test_ranks_are_served_up_to_the_next_of_the_list() -> None:
    assert [max_lora_rank(rank) for rank in (1, 2, 8, 24, 32, 300, 512)] == [
        *(1, 8, 8, 32, 32, 320, 512)
    ]
    assert max_lora_rank(513) is None
    assert all(max_lora_rank(rank) == rank for rank in VLLM_RANKS)


def test_advice_names_the_option_and_is_silent_where_none_is_needed() -> None:
    assert rank_advice(32) is None
    assert rank_advice(24) == "rank 24 is not one of vLLM's: it needs --max-lora-rank 32"
    assert "rank 128 is high: vLLM needs --max-lora-rank 128" in str(rank_advice(128))
    assert "512 at most" in str(rank_advice(1000))
    assert rank_advice(64) is None
    assert "rank 65 is high" in str(rank_advice(65))


def test_what_we_write_is_what_vllm_takes() -> None:
    assert vllm_findings(made()) == ()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"bias": "all"}, "bias is 'all'"),
        ({"use_dora": True}, "use_dora"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save holds lm_head"),
        ({"rank_pattern": {"q_proj": 8}}, "rank_pattern is not empty: vLLM reads r alone"),
        ({"alpha_pattern": {"q_proj": 8}}, "alpha_pattern is not empty: vLLM reads lora_alpha"),
        ({"r": 1024}, "vLLM serves 512 at most"),
        ({"r": None}, "r is None"),
        ({"r": True}, "r is True"),
        ({"lora_alpha": 0}, "lora_alpha is 0"),
    ],
)
def test_each_rule_of_vllm_has_its_line(changes: dict[str, Any], words: str) -> None:
    (line,) = vllm_findings(made() | changes)
    assert words in line
    assert "\n" not in line
