"""Is the step of a name what its trainer meant, and nothing else taken for one?"""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from geoscope.errors import OptionError
from geoscope.sources.steps import Step, given_steps, parse_step, step_of_part

NUMBERS = st.integers(0, 10**9)
SPELLINGS = (
    "checkpoint-{}", "global_step_{}", "global_step{}", "global_step-{}", "global_steps_{}",
    "global_step{}_hf", "global_step_{}_hf", "step_{}", "step-{}", "GRPO-step-{}",
    "my.run-step-{}", "iter_{}",
)  # fmt: skip


@given(NUMBERS, st.sampled_from(SPELLINGS), st.integers(0, 7))
def test_every_spelling_of_a_trainer_tells_its_number(number: int, spelling: str, pad: int) -> None:
    assert step_of_part(spelling.format(f"{number:0{pad}d}")) == Step(number)


@given(NUMBERS, st.integers(0, 7))
def test_epochs_are_told_apart_from_steps(number: int, pad: int) -> None:
    assert step_of_part(f"epoch_{number:0{pad}d}") == Step(number, "epoch")


@given(NUMBERS, st.sampled_from(SPELLINGS), st.sampled_from([".safetensors", ".bin", ".pt"]))
def test_a_file_tells_the_step_of_its_stem(number: int, spelling: str, suffix: str) -> None:
    assert step_of_part(spelling.format(number) + suffix) == Step(number)


@given(
    NUMBERS,
    st.sampled_from(SPELLINGS),
    st.lists(
        st.sampled_from(["actor", "huggingface", "policy", "weights", "a b", "v2"]), max_size=4
    ),
)
def test_parents_are_asked_when_the_last_part_tells_nothing(
    number: int, spelling: str, below: list[str]
) -> None:
    assert parse_step(["runs", spelling.format(number), *below]) == Step(number)
    assert parse_step(["step_1", spelling.format(number), *below]) == Step(number)


@given(st.text(max_size=12))
def test_any_name_at_all_is_parsed_or_left(text: str) -> None:
    found = step_of_part(text)
    assert found is None or (found.number >= 0 and any(one.isdigit() for one in text))


@pytest.mark.parametrize(
    "name",
    [
        "checkpoint-final", "checkpoint-", "latest", "checkpoint-200-merged", "tmp-checkpoint-200",
        "checkpoint-x200", "xcheckpoint-200", "step_", "step200", "global_step", "v2", "200",
        "epoch", "epoch_1_5", "step_1.5", "step_-3", "checkpoint-٣", "step_3_hf", "checkpoint-3_hf",
        "global_step_50_delta_svd_matrix", "step_" + "9" * 40, "main", "",
    ],
)  # fmt: skip
def test_what_is_only_like_a_step_is_not_guessed(name: str) -> None:
    assert step_of_part(name) is None


@pytest.mark.parametrize("name", ["checkpoint-final", "latest", "tmp-checkpoint-5", "Best"])
def test_the_parents_of_a_save_without_a_number_are_not_asked(name: str) -> None:
    assert parse_step(["step_2", name]) is None


def test_folders_far_above_belong_to_another_run() -> None:
    assert parse_step(["step_2", "policy", "weights", "model", "model.safetensors"]) == Step(2)
    assert parse_step(["step_2", "a", "b", "c", "d", "e"]) is None
    assert parse_step([]) is None


def test_steps_by_hand() -> None:
    assert given_steps("10, 20,5") == (10, 20, 5)


@pytest.mark.parametrize("text", ["", "10,", "1.5", "-1", "ten", "1 2"])
def test_steps_by_hand_are_whole_numbers(text: str) -> None:
    with pytest.raises(OptionError, match="needs whole numbers with commas"):
        given_steps(text)
