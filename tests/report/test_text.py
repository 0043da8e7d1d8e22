"""Text for people: fits the width, says everything once, explains every –."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from geoscope.errors import ReportError
from geoscope.kinds import KINDS
from geoscope.records import Report, Status
from geoscope.report import render_text
from geoscope.report.markdown import render_markdown
from geoscope.report.numbers import number
from geoscope.report.tables import QUANTITIES
from tests.helpers.examples import FALLBACK, MODULES, all_null, example, lines_with, plain

GOLDEN = Path(__file__).parent / "golden"
DIMENSIONAL = [quantity for quantity in QUANTITIES.values() if quantity.id.endswith("@k")]


@pytest.mark.parametrize(
    ("name", "kind", "width", "runs"),
    [
        ("compare-80", "compare", 80, 1),
        ("compare-120", "compare", 120, 1),
        ("anisotropy-80", "anisotropy", 80, 1),
        *((f"answer-{kind}", kind, 0, 1) for kind in KINDS),
        ("answer-two-models", "compare", 0, 2),
    ],
)
def test_text_is_as_reviewed(name: str, kind: str, width: int, runs: int) -> None:
    """GEOSCOPE_WRITE_GOLDEN=1 writes the files again; read their change in review."""
    report = example(kind, layers=2, rho=0.006, partial=True, runs=runs)
    text = plain(report, width) if width else render_text(report, width=80, colour=False)
    path = GOLDEN / f"{name}.txt"
    if os.environ.get("GEOSCOPE_WRITE_GOLDEN"):
        path.write_text(text, encoding="utf-8")
    assert text == path.read_text(encoding="utf-8")


@pytest.mark.parametrize("kind", sorted(KINDS))
@pytest.mark.parametrize("width", [40, 80, 120, 200])
@pytest.mark.parametrize("runs", [1, 3])
def test_every_line_fits(kind: str, width: int, runs: int) -> None:
    report = example(kind, layers=3, rho=0.004, partial=True, runs=runs)
    text = plain(report, width, verbose=True, explain=True)
    assert max(len(line) for line in text.splitlines()) <= width
    assert not any(line != line.rstrip() for line in text.splitlines())


def test_without_colour_there_are_no_escapes_and_no_boxes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    text = plain(example(), explain=True, verbose=True)
    assert "\x1b" not in text
    assert not set("│┃─━┏┐└|") & set(text)


def test_colour_adds_escapes_and_no_letters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")  # the caller decides, not the environment
    report = example()
    coloured = render_text(report, width=80, colour=True, details=True)
    assert "\x1b[1;32mOFF_PRINCIPAL" in coloured
    bare = "".join(part.partition("m")[2] for part in f"m{coloured}".split("\x1b["))
    assert [line.rstrip() for line in bare.splitlines()] == plain(report).splitlines()


def test_wider_shows_more_columns() -> None:
    report = example()
    heads = [lines_with(plain(report, width), "module  ")[0].split("  ") for width in (60, 80, 120)]
    counts = [len([head for head in parts if head]) for parts in heads]
    assert counts == sorted(set(counts))


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_no_number_is_a_dash_and_is_explained(kind: str) -> None:
    text = plain(all_null(example(kind)), 120)
    assert all("–" in line for line in lines_with(text, "relative update ρ"))
    for line in lines_with(text, "q_proj"):
        assert (" – " in line) != KINDS[kind].drops_empty  # there the column itself is left out
    assert Status.ZERO_UPDATE.sentence in text.replace("\n  ", " ")
    assert "nan" not in text.lower()
    assert "None" not in text


def test_caution_is_marked_and_explained() -> None:
    text = plain(example(rho=0.006), 120)
    assert "~" in lines_with(text, "stable rank  ")[0]
    assert "~ rounding visible" in text
    assert Status.CAUTION.sentence in text.replace("\n  ", " ")


def test_every_number_stands_beside_its_null() -> None:
    report = example("anisotropy", modules=("q_proj",))
    row = lines_with(plain(report, 120), "q_proj")[0]
    value = report.summary.modules["q_proj"]["update.stable_rank"]
    null = report.summary.module_nulls["q_proj"]["update.stable_rank"]
    assert f"{value:.2f} ({null:.1f})" in row


def test_several_models_have_nulls_in_their_module_tables() -> None:
    text = plain(example("anisotropy", runs=2), 120)
    rows = lines_with(text, "q_proj")
    assert len(rows) == 2
    assert all("(48.0)" in row for row in rows)


def test_partly_resolved_aggregate_says_from_how_many() -> None:
    report = example()
    count = sum(layer.values["update.effective_rank"] is not None for layer in report.layers)
    assert 0 < count < 28
    assert lines_with(plain(report), "effective rank  ")[0].endswith(f"{count} of 28")


def test_dimensions_are_found_in_the_ids() -> None:
    text = plain(example("alignment", ks=(3, 17), hidden=96), 120, verbose=True)
    for k in (3, 17):
        assert lines_with(text, f"captured C_LR({k})")
        assert lines_with(text, f"mean angle left, k = {k} ")


def test_rows_that_differ_in_k_say_theirs() -> None:
    head, *rows = plain(example()).partition("modules\n")[2].splitlines()[:3]
    assert head.split()[2] == "k"
    assert [row.split()[2] for row in rows] == ["24", "8"]


def test_flagged_matrices_come_first_and_are_counted() -> None:
    report = example("collapse")
    verdict = report.summary.verdict
    assert verdict is not None
    names = tuple(layer.name for layer in report.layers[10:17])
    summary = replace(report.summary, verdict=replace(verdict, flagged=names))
    block = plain(replace(report, summary=summary), 120).partition("flagged: ")[2]
    title, _, *rows = block.splitlines()
    assert title == "7 of 28 matrices, worst first"
    assert [row.split()[0] for row in rows[:5]] == list(names[:5])
    assert rows[5] == ""


def test_verbose_lists_every_matrix() -> None:
    report = example(layers=3)
    text = plain(report, 120, verbose=True)
    assert all(layer.name in text for layer in report.layers)
    assert report.layers[-1].name not in plain(example("collapse", layers=3, modules=MODULES), 120)


def test_explain_names_thresholds_and_clauses() -> None:
    text = plain(example(), explain=True)
    assert lines_with(text, "distorted.nss")[0].split() == ["distorted.nss", ".0500"]
    assert lines_with(text, "distorted.angle ")[0].split()[1] == "10.0°"
    assert lines_with(text, "distorted.angle_over_null")[0].split()[1] == "1.50"
    assert len(lines_with(text.partition("what decided")[2], "model.layers")) == 28
    assert "thresholds" not in plain(example())


@pytest.mark.parametrize(
    ("clause", "shown"),
    [
        ("mean angle 0.0349066 > 0.0174533", "mean angle 2.00° > 1.00°"),
        ("mean angle 3.49066e-2 > .0174533", "mean angle 2.00° > 1.00°"),
        ("mean angle 0.031.0318 > 0.0174533", "mean angle 0.031.0318 > 0.0174533"),
        ("mean angle -e > +E", "mean angle -e > +E"),
    ],
)
def test_angles_of_a_clause_are_degrees_and_a_damaged_one_stays(clause: str, shown: str) -> None:
    report = example(kind="collapse", layers=1)
    layers = [
        replace(one, verdict={**(one.verdict or {}), "clause": clause}) for one in report.layers
    ]
    assert shown in " ".join(plain(replace(report, layers=tuple(layers)), explain=True).split())


def test_explain_shows_each_condition_and_what_it_met() -> None:
    text = plain(example(), explain=True).partition("rules in order")[2]
    assert lines_with(text, "C_LR(k) ≥")[0].split()[2:] == [
        *(".500", "1", "of", "28", ".0100", ".100", "ours"),
    ]
    assert lines_with(text, "NSS/ρ ≥")[0].split()[-3:] == ["–", "–", "ours"]
    assert lines_with(text, "mean angle ≤")[0].split()[3] == "1.00°"
    assert len(lines_with(text, "ON_PRINCIPAL")) == 1


# --- several models, anchor ---------------------------------------------------------------------


def block(text: str, start: str) -> list[str]:
    """The lines of a block below the first that begins so."""
    lines = text.splitlines()
    (at, *_) = [i for i, line in enumerate(lines) if line.startswith(start)]
    end = lines.index("", at) if "" in lines[at:] else len(lines)
    return lines[at + 1 : end]


def test_overlaps_begin_with_the_telling_ones() -> None:
    heads, row = block(plain(example(runs=2)), "overlap of the updates")
    found = [head for head in heads.split("  ") if head]
    assert [head.strip() for head in found] == [
        *("updates", "n", "cosine", "φ L(8,8)", "φ R(8,8)", "angle L(8)", "Jaccard"),
    ]
    for cell in ("1 with 2", ".310 (0)", ".600 (.100)", "30.0° (70.0°)", ".900 (.800)"):
        assert cell in row
    wide = block(plain(example(runs=2), 200), "overlap of the updates")[0]
    assert wide.split()[-6:] == [f"phi_left@{ij}" for ij in ("1,1", "1,8", "1,16", "8,1")] + [
        *("phi_left@8,16", "phi_left@16,1"),
    ]
    assert "update_angle_right_mean@64" in render_markdown(example(runs=2))


def anchored(report: Report, preserving: bool | None = False, **ratios: float | None) -> str:
    every = dict.fromkeys(report.summary.model, 2.0) | ratios
    anchor = {"ref": {"given": "sft"}, "ratios": every, "spectrum_preserving": preserving}
    return plain(replace(report, summary=replace(report.summary, anchor=anchor)))


def test_the_anchor_is_a_short_table() -> None:
    report = example("collapse")
    rows = block(anchored(report), "grpo/checkpoint-240 against the anchor sft")
    heads = [row.split() for row in rows].index(["value", "anchor", "ratio"])
    table = rows[heads + 1 :]
    rho = report.summary.model["relative_update"]
    assert rho is not None
    assert table[0].split() == ["relative", "update", "ρ", number(rho), number(rho / 2), "2.0×"]
    assert len(table) < 10
    assert not [row for row in table if "intruders" in row or "gap" in row]
    assert lines_with("\n".join(table), "mean angle left, k = 24")[0].endswith("°   2.0×")


@pytest.mark.parametrize(
    ("preserving", "words"),
    [
        (True, "The update is spectrum-preserving beside the anchor: its NSS, .20× the anchor's"),
        (False, "The update is not spectrum-preserving beside the anchor: its NSS, .20× the"),
        (None, "Whether the spectrum is preserved is not known"),
    ],
)
def test_the_anchor_says_in_words_whether_the_spectrum_is_preserved(
    preserving: bool | None, words: str
) -> None:
    text = anchored(example("collapse"), preserving, nss=0.2)
    assert words in text.replace("\n  ", " ")


def test_an_anchor_without_a_number_is_a_dash() -> None:
    text = anchored(example("collapse"), None, nss=None)
    (row,) = lines_with(text.partition("against the anchor")[2], "spectral shift NSS")
    assert row.split()[-2:] == ["–", "–"]


# --- subspace dimensions ------------------------------------------------------------------------


def test_rows_beyond_an_eighth_of_every_side_are_left_out() -> None:
    report = example()  # hidden size 192: k_v is 24 and 8, and 64 exceeds an eighth of 192
    text = plain(report)
    assert "left out: k = 64, above an eighth of every shorter side (see `verbose`)" in text
    assert [line for line in lines_with(text, "captured C_LR(") if "(64)" in line] == []
    for words in ("captured C_LR(8)", "captured C_LR(24)", "mean angle left, k = 24"):
        assert lines_with(text, words)
    every = plain(report, verbose=True)
    assert lines_with(every, "captured C_LR(64)")
    assert lines_with(every, "mean angle right, k = 64")
    assert "left out: k" not in every
    wide = plain(example(hidden=512))
    assert lines_with(wide, "captured C_LR(64)")
    assert "left out: k" not in wide


def test_the_k_of_the_verdict_is_never_left_out() -> None:
    text = plain(example(hidden=12, ks=(8,), modules=("k_proj",)))  # 4 x 12: k_v = 1 > 4/8
    assert lines_with(text, "captured C_LR(1)")
    assert "left out: k = 8" in text


def test_the_sentence_is_told_apart_from_the_rows() -> None:
    words = "the verdict takes each matrix at its own (k = 8, 24)"
    assert words in plain(example())
    assert "at its own" not in plain(example(modules=("q_proj",)))
    assert "at its own" not in plain(example("alignment"))


# --- long words ---------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [40, 60, 80, 120])
def test_the_clause_that_decided_is_shown_at_every_width(width: int) -> None:
    report = example(layers=1)
    text = " ".join(plain(report, width, explain=True).partition("what decided")[2].split())
    for layer in report.layers:
        assert layer.verdict is not None
        clause = layer.verdict["clause"].replace("0.0277 ≤ 0.0318", "1.59° ≤ 1.82°")
        assert clause in text, clause


def test_long_words_go_on_in_their_column_or_below_their_row() -> None:
    report = example(layers=1, modules=("q_proj", "k_proj"))
    words = "C_LR(24) 0.0413 ≤ 0.05 and C_LR/E_24 0.114 ≤ 0.2 and C_L(24) 0.173 ≤ 0.5"
    verdict = {"code": "OFF_PRINCIPAL", "k": 24, "clause": words}
    report = replace(report, layers=tuple(replace(one, verdict=verdict) for one in report.layers))
    heads, first, second, *_ = block(plain(report, explain=True), "what decided")
    start = heads.index("clause")
    assert first[start:].startswith("C_LR(24) 0.0413")
    assert second[:start].strip() == ""
    assert second[start] != " "
    heads, first, below, *_ = block(plain(report, 50, explain=True), "what decided")
    assert "clause" not in heads
    assert first.split()[-2:] == ["OFF_PRINCIPAL", "24"]
    assert below.startswith("    C_LR(24) 0.0413")


def test_verbose_says_how_each_matrix_was_computed() -> None:
    text = plain(example(layers=2), 160, verbose=True)
    said, heads, *rows = block(text, "how each matrix was computed")
    assert said.startswith("σ: bound on the error of every singular value, over the largest.")
    assert heads.split() == ["matrix", "σ", "subspace", "how"]
    first = next(row for row in rows if ".0." in row)
    assert first.split()[1:3] == ["3.0e-14", "6.0e-10"]
    assert first.endswith("base, tuned, update: gram-tridiagonal")
    assert f"base: svd ({FALLBACK}); tuned, update: gram-tridiagonal" in " ".join(
        " ".join(rows).split()
    )
    for layer in example(layers=2).layers:
        assert any(layer.name in row for row in rows)
    assert "how each matrix" not in plain(example(layers=2), 120)


def test_names_are_not_parted_at_a_hyphen() -> None:
    report = example(runs=3)
    for line in plain(report, 60).splitlines():
        assert not line.endswith("checkpoint-")


def test_report_without_matrices_is_said_to_be_empty() -> None:
    text = plain(example("anisotropy", layers=0))
    assert "No number for update.stable_rank" in text
    assert "COMPLETE 0 of 0 matrices" in text


def test_kind_without_a_table_is_refused() -> None:
    with pytest.raises(ReportError, match="unheard"):
        plain(replace(example(), kind="unheard"))


@pytest.mark.parametrize("name", sorted(KINDS))
def test_every_id_of_a_kind_has_a_name(name: str) -> None:
    kind = KINDS[name]
    shown = [id for _, group in kind.model for id in group]
    assert not {*shown, *kind.columns} - set(QUANTITIES)


@pytest.mark.parametrize("quantity", DIMENSIONAL, ids=lambda quantity: quantity.id)
def test_names_of_dimensional_quantities_say_k(quantity: object) -> None:
    assert "{k}" in getattr(quantity, "label", "")
    assert "{k}" in getattr(quantity, "head", "")
