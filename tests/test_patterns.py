"""Regular expressions of any kind: the answer of `re`, or a word within the limit of time."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from geoscope import patterns
from geoscope.errors import CheckpointError, OptionError
from geoscope.names import NameMap, Selection
from geoscope.patterns import (
    PatternError,
    check_pattern,
    fullmatches,
    matches,
    searches,
    substituted,
)
from geoscope.peft.lora import is_targeted

LONG = "a" * 60
SLOW = [
    *(r"(a+)+b", r"(a|a)*b", r"(.*)*\d", r"(\w+\.?)+!", r"((a*)*)*b", r"(a|aa)+$b"),
    *(r"(?:a?){60}b", r"(?=(a+)+b)"),
]
NO_EXPRESSIONS = ["(", "[", "a{2,1}", "a{99999999999}", "(" * 5000 + ")" * 5000, "a" * 50_000]


@pytest.fixture
def short_limit(monkeypatch: pytest.MonkeyPatch) -> Iterator[float]:
    monkeypatch.setattr(patterns, "SECONDS", 0.5)
    yield 0.5


@pytest.mark.parametrize("pattern", SLOW)
def test_what_backtracks_for_ever_is_given_up(pattern: str, short_limit: float) -> None:
    start = time.monotonic()
    with pytest.raises(PatternError, match=r"takes more than 0.5 s"):
        searches(pattern, LONG)
    with pytest.raises(PatternError):  # at once: it is known by now
        searches(pattern, LONG + "a")
    assert time.monotonic() - start < short_limit + 5


def test_after_one_that_was_given_up_others_are_answered(short_limit: float) -> None:
    with pytest.raises(PatternError):
        searches(r"(a+)+c", LONG)
    assert searches(r"(\w+\.)+q_proj", "layers.0.q_proj")
    assert not searches(r"(\w+\.)+k_proj", "layers.0.q_proj")


@pytest.mark.parametrize("pattern", NO_EXPRESSIONS)
def test_what_is_no_expression_is_refused_in_one_line(pattern: str) -> None:
    with pytest.raises(PatternError) as caught:
        check_pattern(pattern)
    assert "\n" not in str(caught.value)
    for refused in (lambda: Selection([pattern]), lambda: NameMap([f"{pattern}=x"])):
        with pytest.raises(OptionError) as said:
            refused()
        assert len(str(said.value)) < 300


PATTERNS = [
    *(r"q_proj", r"^model\.layers\.[0-3]\.", r"(q|k|v)_proj$", r".*\.mlp\..*", r"\d+"),
    *(r"(?:\w+\.)*q_proj", r"(layers\.\d+\.)+", r".*?(?:mlp|attn).*?(?:up|q)_proj.*?"),
    *(r"(\w)\1", r"(?i:Q_PROJ)", r"(?=.*mlp)(?!.*down)"),
]
NAMES = ["model.layers.0.self_attn.q_proj.weight", "layers.12.mlp.up_proj", "lm_head.weight", ""]
LETTERS = st.text(alphabet="abmlqp.0123_é\udc80", max_size=30)


@given(st.sampled_from(PATTERNS), st.one_of(st.sampled_from(NAMES), LETTERS))
def test_answers_are_those_of_re(pattern: str, name: str) -> None:
    rules: list[tuple[Callable[[str, str], bool], Callable[..., object]]] = [
        (searches, re.search),
        (matches, re.match),
        (fullmatches, re.fullmatch),
    ]
    for ours, theirs in rules:
        assert ours(pattern, name) is (theirs(pattern, name) is not None)
    assert substituted(pattern, r"<\g<0>>", name) == re.sub(pattern, r"<\g<0>>", name)


def test_a_selection_and_a_map_name_their_option(short_limit: float) -> None:
    with pytest.raises(OptionError, match=r"`exclude` '\(a\+\)\+z' cannot be used: it takes more"):
        chosen = Selection(exclude=(r"(a+)+z",))
        chosen.reason_against(LONG, in_default_scope=True, scope_reason="")
    with pytest.raises(OptionError, match=r"`map_name` .* cannot be used: it takes more"):
        NameMap((r"(a+)+y=b",)).canonical(LONG)


def test_expressions_of_an_adapter_are_refused_in_its_words(short_limit: float) -> None:
    config = {"target_modules": r"(a|a)+x"}
    with pytest.raises(CheckpointError, match=r"adapter_config.json: the expression"):
        is_targeted(config, LONG)


def test_the_process_of_a_fork_is_not_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    """What its parent started it leaves alone, and starts its own."""
    server = patterns._Server()
    assert server.answer(r"(a)+", "aaa", "search") is True
    mine = server._process
    server._owner = -1
    assert server.answer(r"(b)+", "aaa", "search") is False
    assert mine is not None and server._process is not mine and mine.poll() is None
    server.end()
    mine.kill()
    mine.communicate()


def test_layers_and_jobs_are_bounded() -> None:
    from geoscope import Options

    many: tuple[Any, ...] = ("0-99999999999", "9" * 5000)
    for layers in many:
        with pytest.raises(OptionError, match="no model has so many blocks"):
            Options(layers=layers)
    with pytest.raises(OptionError, match="at most 1024 workers"):
        Options(jobs=100_000)


def test_the_server_is_a_script_beside_the_package() -> None:
    assert Path(patterns.__file__).with_name("pattern_server.py").is_file()
