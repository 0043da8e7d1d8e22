"""The answer: 20 lines of 80 columns, in words, with the report's own numbers and limits."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest

from geoscope.answers import Fact
from geoscope.kinds import KINDS
from geoscope.records import Report, Status, Verdict
from geoscope.report import render_headline, render_text
from geoscope.report.answer import headlines
from geoscope.report.numbers import number, share
from geoscope.report.tables import QUANTITIES
from geoscope.thresholds import MOTION_THRESHOLDS, THRESHOLDS
from tests.helpers.examples import all_null, example

LIMITS = {name: threshold.value for name, threshold in THRESHOLDS.items()}


def text_of(report: Report, width: int = 80, **options: bool) -> str:
    return render_text(report, width=width, colour=False, **options)


def judged(
    code: str, kind: str = "collapse", values: Mapping[str, float | None] | None = None, **own: Any
) -> Report:
    """A report with this verdict, these numbers of the model, and the usual limits."""
    report = example(kind)
    verdict = Verdict(
        code=code,
        share=1.0,
        shares={code: 1.0},
        flagged=own.pop("flagged", ()),
        counts={code: len(report.layers)},
        text=own.pop("text", "first sentence; its end. Second sentence."),
        thresholds={**LIMITS, **own.pop("limits", {})},
        **own,
    )
    model = {**report.summary.model, "rank_ratio": 0.97, **(values or {})}
    return replace(report, summary=replace(report.summary, model=model, verdict=verdict))


def row(text: str, label: str) -> str:
    (line,) = (line for line in text.splitlines() if line.startswith(label))
    return line


# --- size -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", sorted(KINDS))
@pytest.mark.parametrize("runs", [1, 2, 3, 7, 20])
@pytest.mark.parametrize("partial", [False, True])
def test_an_answer_has_at_most_20_lines_of_80_columns(kind: str, runs: int, partial: bool) -> None:
    report = example(kind, layers=2, runs=runs, rho=0.006, partial=partial)
    for report_ in (report, all_null(report)):
        lines = text_of(report_).splitlines()
        assert len(lines) <= 20
        assert max(map(len, lines)) <= 80
        assert not any(line != line.rstrip() for line in lines)


@pytest.mark.parametrize("kind", sorted(KINDS))
@pytest.mark.parametrize("layers", [0, 1, 200])
def test_it_stands_for_no_matrix_and_for_many(kind: str, layers: int) -> None:
    assert len(text_of(example(kind, layers=layers, modules=("q_proj",))).splitlines()) <= 20


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_a_wide_terminal_shows_the_words_of_a_pipe(kind: str) -> None:
    report = example(kind)
    assert text_of(report, 140) == text_of(report, 80)
    coloured = render_text(report, width=140, colour=True)
    bare = "".join(part.partition("m")[2] for part in f"m{coloured}".split("\x1b["))
    assert [line.rstrip() for line in bare.splitlines()] == text_of(report).splitlines()


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_every_column_has_room_in_80(kind: str) -> None:
    """The words beside a label go first where columns do not fit; here they need not."""
    said = text_of(example(kind))
    facts = [fact for fact in KINDS[kind].answer.facts if fact.label and not fact.is_aside]
    shown = [
        fact for fact in facts if any(line.startswith(fact.label) for line in said.split("\n"))
    ]
    assert len(shown) >= 3
    for fact in shown:
        assert fact.words.partition(" {k}")[0] in row(said, fact.label)


def test_a_narrow_terminal_keeps_the_numbers() -> None:
    report = example("collapse")
    text = text_of(report, 50)
    assert max(map(len, text.splitlines())) <= 50
    assert "effective rank, tuned/base" not in text
    assert number(report.summary.model["rank_ratio"]) in row(text, "rank kept")


# --- headline -------------------------------------------------------------------------------------

FIRST_WORDS = {
    "UNRELATED": "UNRELATED MODELS",
    "TOO_FAR": "CANNOT TELL",
    "NO_UPDATE": "NO CHANGE",
    "INIT_MISMATCH": "START COUNTED TWICE",
    "UNDETERMINED": "CANNOT TELL",
    "RANK_COLLAPSE": "COLLAPSE",
    "SPECTRUM_DISTORTED": "DISTORTED",
    "ON_PRINCIPAL": "NO COLLAPSE",
    "OFF_PRINCIPAL": "NO COLLAPSE",
    "MIXED": "NO COLLAPSE",
}


def test_the_map_has_every_code() -> None:
    assert set(FIRST_WORDS) == set(KINDS["collapse"].codes)


@pytest.mark.parametrize("kind", ["collapse", "compare"])
@pytest.mark.parametrize("code", FIRST_WORDS)
def test_each_code_has_its_first_words(kind: str, code: str) -> None:
    (line,) = headlines(judged(code, kind))
    assert line.partition(":")[0].split(", ")[0] == FIRST_WORDS[code]
    assert line.endswith(f"({code}, 0 of 28 matrices flagged)")


@pytest.mark.parametrize("code", ["SPECTRUM_DISTORTED", "ON_PRINCIPAL", "OFF_PRINCIPAL", "MIXED"])
def test_a_lost_rank_is_a_collapse_whatever_the_code(code: str) -> None:
    (line,) = headlines(judged(code, values={"rank_ratio": 0.62}))
    assert line.startswith("COLLAPSE: the spectrum lost rank; the effective rank is .620 ")
    lower = judged(code, values={"rank_ratio": 0.62}, limits={"distorted.rank_ratio": 0.5})
    assert "lost rank" not in headlines(lower)[0]


def test_without_the_rank_nothing_is_claimed() -> None:
    (line,) = headlines(judged("MIXED", values={"rank_ratio": None}))
    assert line.startswith("CANNOT TELL: the effective rank has no number")


@pytest.mark.parametrize("name", [name for name, kind in KINDS.items() if kind.codes])
def test_every_code_of_every_kind_has_an_outcome(name: str) -> None:
    for code in KINDS[name].codes:
        assert f"({code}" in headlines(judged(code, name))[0]


@pytest.mark.parametrize(
    ("energy", "versus", "words"),
    [
        (0.5, 0.9, "ON PRINCIPAL"),
        (0.49, 0.9, "PARTLY ON PRINCIPAL"),
        (0.049, 0.19, "OFF PRINCIPAL"),
        (0.049, 0.21, "PARTLY ON PRINCIPAL"),
        (None, None, "CANNOT TELL"),
    ],
)
def test_alignment_answers_by_the_limits_of_the_verdict(
    energy: float | None, versus: float | None, words: str
) -> None:
    report = example("alignment", modules=("q_proj",), ks=(8,), hidden=64)
    model = {**report.summary.model, "energy_two_sided@8": energy, "versus_base@8": versus}
    nulls = {**report.summary.nulls, "energy_two_sided@8": 0.001}
    report = replace(report, summary=replace(report.summary, model=model, nulls=nulls))
    assert headlines(report)[0].partition(":")[0] == words


def test_without_a_verdict_the_limits_that_were_set_are_in_force() -> None:
    report = example("alignment", modules=("q_proj",), ks=(8,), hidden=64)
    model = {**report.summary.model, "energy_two_sided@8": 0.4, "versus_base@8": 0.9}
    report = replace(report, summary=replace(report.summary, model=model))
    assert headlines(report)[0].startswith("PARTLY ON PRINCIPAL")
    set_to = {**report.provenance.parameters, "limits": {"on_principal.energy_two_sided": 0.3}}
    report = replace(report, provenance=replace(report.provenance, parameters=set_to))
    assert headlines(report)[0].startswith("ON PRINCIPAL")


def test_the_words_of_a_row_follow_the_limits_in_force() -> None:
    wide = {"undetermined.precision_ratio": 0.9, "words.few_directions": 0.1}
    values = {"precision_ratio": 0.7, "update.stable_rank": 0.2}
    nulls = {"update.stable_rank": 1.0}
    usual, other = (judged("MIXED", values=values, limits=limits) for limits in ({}, wide))
    for report, resolved, directions in ((usual, "hidden", "few"), (other, "visible", "noise")):
        report = replace(report, summary=replace(report.summary, nulls=nulls))
        text = text_of(report)
        assert row(text, "resolved").endswith(resolved)
        assert row(text, "directions").endswith(directions)


@pytest.mark.parametrize("name", sorted(KINDS))
def test_what_the_tables_name_exists(name: str) -> None:
    answer = KINDS[name].answer
    codes = {code for outcome in answer.outcomes for code in outcome.codes}
    assert codes <= {*KINDS[name].codes, "UNRELATED", "TOO_FAR"}
    ids = {fact.id for fact in answer.facts} | {fact.other for fact in answer.facts} - {""}
    ids |= {condition.id for outcome in answer.outcomes for condition in outcome.when}
    assert ids <= set(QUANTITIES) | {"update.signal_rank", "spectral_share"}
    own = {fact.id for fact in answer.facts}
    for outcome in answer.outcomes:
        assert own & set(outcome.about) or not outcome.about
    limits = {one for fact in answer.facts for one in (fact.limit, fact.over_null) if one}
    named = [condition.limit for outcome in answer.outcomes for condition in outcome.when]
    named += [bound for fact in answer.facts for bound, _ in fact.scale]
    limits |= {limit for limit in named if isinstance(limit, str)}
    assert limits <= set(THRESHOLDS) | set(MOTION_THRESHOLDS) | set(QUANTITIES)


def test_a_verdicts_own_sentence_is_its_first() -> None:
    (line,) = headlines(judged("UNDETERMINED"))
    assert line.startswith("CANNOT TELL: first sentence; its end.  (")


def test_quiet_is_the_headline_whatever_its_width() -> None:
    report = judged("INIT_MISMATCH")
    assert render_headline(report) == f"{headlines(report)[0]}\n"
    assert len(render_headline(report)) > 80
    assert " ".join(text_of(report).split()).count(" ".join(headlines(report)[0].split())) == 1


def test_several_models_have_a_line_each() -> None:
    first, *others = headlines(example("collapse", runs=3))
    assert first.startswith("3 of 3 tuned models: ")
    assert [line.split(" ")[0] for line in others] == ["1", "2", "3"]
    many = text_of(example("compare", runs=20))
    assert "… " in many
    assert " more: `details`" in many


# --- facts ----------------------------------------------------------------------------------------


def test_numbers_are_those_of_the_report() -> None:
    report = judged("MIXED", values={"nss": 0.0123, "relative_update": 0.04512})
    text, model, nulls = text_of(report), report.summary.model, report.summary.nulls
    assert row(text, "rank kept").split()[-4:] == [
        *(number(model["rank_ratio"]), number(nulls["rank_ratio"])),
        *(".900", "ok"),
    ]
    assert "  1.2 %~" in row(text, "values moved")
    assert row(text, "size").endswith("4.5 %")
    stable, noise = (of["update.stable_rank"] for of in (model, nulls))
    assert [f"{number(stable)}~", number(noise)] == row(text, "directions").split()[4:6]


@pytest.mark.parametrize(
    ("value", "limit", "word"), [(0.97, 0.9, "ok"), (0.89, 0.9, "lost"), (0.97, 0.98, "lost")]
)
def test_the_limit_in_force_stands_on_the_row(value: float, limit: float, word: str) -> None:
    report = judged(
        "SPECTRUM_DISTORTED",
        values={"rank_ratio": value},
        limits={"distorted.rank_ratio": limit},
    )
    assert row(text_of(report), "rank kept").split()[-2:] == [number(limit), word]


def test_the_limit_of_an_angle_is_the_larger_of_two() -> None:
    report = judged("MIXED")
    angle = {
        f"angle_{side}_mean@{k}": math.radians(8) for side in ("left", "right") for k in (8, 24)
    }
    for null, limit in ((4, "10.0°"), (7, "14.0°")):
        nulls = {**report.summary.nulls, **dict.fromkeys(angle, math.radians(null))}
        model = {**report.summary.model, **angle}
        other = replace(report, summary=replace(report.summary, model=model, nulls=nulls))
        assert row(text_of(other), "turned").split()[-3:] == [f"{null}.00°", limit, "ok"]


@pytest.mark.parametrize(("checkpoints", "limit"), [(8, True), (7, False)])
def test_a_limit_that_needs_checkpoints_stands_from_these_on(checkpoints: int, limit: bool) -> None:
    report = judged("DRIFT", "trajectory", limits={"level": 0.01, "few": 8})
    steps = tuple(range(checkpoints + 1))
    text = text_of(replace(report, summary=replace(report.summary, steps=steps)))
    assert (" .0100 " in row(text, "by chance")) == limit


def test_a_full_rank_asks_for_the_start() -> None:
    assert "→ If it did not start at zero" in text_of(judged("SATURATED", "capacity"))


def test_a_missing_number_says_why() -> None:
    report = all_null(judged("MIXED"))
    verdict = replace(judged("MIXED").summary.verdict or _none(), code="RANK_COLLAPSE")
    text = text_of(replace(report, summary=replace(report.summary, verdict=verdict)))
    assert row(text, "directions").split()[-2:] == ["–", "unchanged"]
    assert Status.ZERO_UPDATE.sentence not in text


def _none() -> Verdict:
    raise AssertionError("a judged report has a verdict")


def test_a_number_of_some_matrices_is_marked() -> None:
    report = example("anisotropy", rho=0.5)
    layers = tuple(
        replace(layer, values={**layer.values, "update.stable_rank": None}) if i < 3 else layer
        for i, layer in enumerate(report.layers)
    )
    text = text_of(replace(report, layers=layers))
    assert row(text, "directions").split()[4].endswith("*")
    assert "* not all matrices have this number" in text
    assert "*" not in row(text_of(report), "directions")


@pytest.mark.parametrize(
    ("norms", "words"),
    [
        ((1, 1, 1, 3), "by block 0 … 3: 8 · 8 · 8 · 75 %  late"),
        ((3, 1, 1, 1), "by block 0 … 3: 75 · 8 · 8 · 8 %  early"),
        ((1, 1, 1, 1), "by block 0 … 3: 25 · 25 · 25 · 25 %  even"),
        ((1,) * 6 + (3, 1), "by depth, blocks 0 … 7: 12 · 12 · 12 · 62 %  late"),
    ],
)
def test_where_the_update_is(norms: tuple[int, ...], words: str) -> None:
    """Shares of Σ‖ΔW‖²: of norms 1, 1, 1, 3 they are 1/12, 1/12, 1/12, 9/12."""
    report = example("collapse", layers=len(norms), modules=("q_proj",))
    layers = tuple(
        replace(layer, values={**layer.values, "update.frobenius_norm": float(norm)})
        for layer, norm in zip(report.layers, norms, strict=True)
    )
    verdict = judged("MIXED").summary.verdict
    summary = replace(report.summary, verdict=verdict)
    assert row(text_of(replace(report, layers=layers, summary=summary)), "where").endswith(words)
    assert "where" not in text_of(example("alignment"))


def test_what_the_outcome_is_about_stands_alone() -> None:
    text = text_of(judged("UNRELATED", values={"base_cosine": 0.003, "relative_update": 1.4}))
    assert row(text, "cosine").split()[-3:] == [".600", "too", "far"]
    assert row(text, "size").endswith("140 %")
    assert "rank kept" not in text
    assert "→ Give as BASE" in text


@pytest.mark.parametrize("fact", KINDS["collapse"].answer.facts, ids=lambda fact: fact.id)
def test_words_of_a_fact_fit_their_columns(fact: Fact) -> None:
    assert len(fact.label) <= 17
    assert len(fact.words) <= 30


def test_shares_have_two_digits_and_claim_neither_none_nor_all() -> None:
    assert [share(value) for value in (0.17762, 0.00868, 0.9961, 0.045, 1.4, 0.0)] == [
        *("18 %", ".87 %", ">99 %", "4.5 %", "140 %", "0 %"),
    ]


# --- what needs the user --------------------------------------------------------------------------


def test_flagged_matrices_of_a_benign_model_are_told() -> None:
    report = judged("MIXED")
    worst = report.layers[3]
    layers = tuple(
        replace(layer, verdict={"code": "RANK_COLLAPSE", "k": 8, "clause": ""})
        if layer is worst
        else layer
        for layer in report.layers
    )
    verdict = replace(report.summary.verdict or _none(), flagged=(worst.name,))
    text = text_of(replace(report, layers=layers, summary=replace(report.summary, verdict=verdict)))
    told = row(text, "→ Look at RANK_COLLAPSE 1, worst ")
    assert worst.name.removesuffix(".weight") in told.replace(".weight", "")
    assert "1 of 28 matrices flagged" in " ".join(text.split())
    assert "→ " not in text_of(report).partition("\n")[2]


def test_partial_coverage_stands_below_the_headline() -> None:
    report = example("anisotropy", partial=True)
    lines = text_of(report).splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith("→ PARTIAL 1 of 28"))
    assert at <= 4
    assert not any(line.startswith("COMPLETE") for line in lines)
    assert any(line.startswith("COMPLETE 28 of 28") for line in text_of(example()).splitlines())


def test_what_is_set_apart_is_named() -> None:
    text = text_of(judged("MIXED", apart=("lm_head.weight", "model.layers.1.mlp.up_proj.weight")))
    assert "→ Set apart, no update of the base's: lm_head.weight and 1 more." in text


def test_details_and_explanations_are_one_option_away() -> None:
    report = example("collapse")
    assert "All numbers: `details` · why: `explain`" in text_of(report)
    assert "why: `explain`" not in text_of(example("alignment"))
    explained = text_of(report, explain=True)
    assert explained.startswith(text_of(report))
    assert "rules in order" in explained
    details = text_of(report, details=True)
    assert headlines(report)[0].split("  ")[0][:60] in details
    assert "modules" in details.splitlines()
