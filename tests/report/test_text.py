"""Text for people: fits the width, says everything once, explains every –."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from geoscope.errors import ReportError
from geoscope.records import Coverage, Report, ShapeMismatch, Skipped, Status
from geoscope.report import render_text
from geoscope.report.tables import KINDS, QUANTITIES

from .examples import MODULES, all_null, example

GOLDEN = Path(__file__).parent / "golden"
DIMENSIONAL = [quantity for quantity in QUANTITIES.values() if quantity.id.endswith("@k")]


def plain(report: Report, width: int = 80, **options: bool) -> str:
    return render_text(report, width=width, colour=False, **options)


def lines_with(text: str, start: str) -> list[str]:
    return [line for line in text.splitlines() if line.strip().startswith(start)]


@pytest.mark.parametrize(("kind", "width"), [("compare", 80), ("compare", 120), ("anisotropy", 80)])
def test_text_is_as_reviewed(kind: str, width: int) -> None:
    """GEOSCOPE_WRITE_GOLDEN=1 writes the files again; read their change in review."""
    text = plain(example(kind, layers=2, rho=0.006, partial=True), width)
    path = GOLDEN / f"{kind}-{width}.txt"
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
    coloured = render_text(report, width=80, colour=True)
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
        assert " – " in line
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
    text = plain(example("alignment", ks=(3, 17), hidden=96), 120)
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


def test_explain_shows_each_condition_and_what_it_met() -> None:
    text = plain(example(), explain=True).partition("rules in order")[2]
    assert lines_with(text, "C_LR(k) ≥")[0].split()[2:] == [
        *(".500", "1", "of", "28", ".0100", ".100", "ours"),
    ]
    assert lines_with(text, "NSS/ρ ≥")[0].split()[-3:] == ["–", "–", "ours"]
    assert lines_with(text, "mean angle ≤")[0].split()[3] == "1.00°"
    assert len(lines_with(text, "ON_PRINCIPAL")) == 1


def test_complete_coverage_is_one_line() -> None:
    assert lines_with(plain(example()), "COMPLETE 28 of 28 matrices")


def test_missing_matrices_are_named_three_and_counted() -> None:
    names = tuple(f"model.layers.{index}.q_proj.weight" for index in range(5))
    coverage = Coverage(
        matched=("a.weight",),
        base_only=(*names[:4], "model.norm.weight"),
        shape_mismatch=(ShapeMismatch(names[4], (3, 4), (3, 5)),),
        missing=names,
    )
    text = plain(replace(example(), coverage=coverage), 200)
    assert lines_with(text, "PARTIAL 5 of 6 matrices not compared: ")[0].endswith(
        f"{', '.join(names[:3])} and 2 more"
    )
    assert "others only in base: 1" in text


def test_reasons_for_leaving_out_are_counted() -> None:
    text = plain(example())
    assert lines_with(text, "left out: 1, embedding")
    skipped = tuple(Skipped(f"x{index}", f"reason {index // 2}") for index in range(10))
    text = plain(replace(example(), coverage=Coverage(matched=(), skipped=skipped)))
    assert lines_with(text, "left out: 2, reason 2")
    assert lines_with(text, "left out: 4, for other reasons")


def test_notes_and_fallbacks_are_counted() -> None:
    text = plain(example())
    assert "stored as float32, holds only bfloat16 numbers (4 matrices)" in text
    assert "7 matrices fell back to an exact method" in text


def test_overlaps_and_anchor_are_shown() -> None:
    report = example(runs=2)
    anchor = {"ref": {"given": "sft"}, "ratios": {"nss": 0.2}, "spectrum_preserving": True}
    text = plain(replace(report, summary=replace(report.summary, anchor=anchor)))
    assert "1 with 2" in text
    assert ".310 (0)" in text
    assert "nss .20×" in text
    assert "spectrum-preserving relative to the anchor: yes" in text


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
