"""Coverage and statuses: what was not looked at is counted, what is missing says why."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

import geoscope
from geoscope.records import Coverage, Report, ShapeMismatch, Skipped, Status
from geoscope.report.coverage import _FALLBACKS, status_block
from tests.helpers.examples import FALLBACK, example, lines_with, plain


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
    assert "7 matrices took another method than the first (subspace bound not met)" in text


def with_fallbacks(report: Report, *reasons: str) -> Report:
    """The report whose first matrices fell back for these reasons, one each, and no others."""
    layers = [
        replace(layer, method={"base.S": {"how": "svd", "fallback": reason}})
        for layer, reason in zip(report.layers, reasons, strict=False)
    ]
    rest = (replace(layer, method={}) for layer in report.layers[len(layers) :])
    return replace(report, layers=(*layers, *rest))


def test_the_most_common_reason_of_a_fallback_is_shortened() -> None:
    tail = "tail: least singular value below 3e-05 of the largest"
    flat = "block Lanczos reached residual 1.1e-06 only: a flat spectrum"
    text = plain(with_fallbacks(example(), FALLBACK, flat, flat, tail), 120)
    assert "4 matrices took another method than the first (mostly: flat spectrum)" in text
    text = plain(with_fallbacks(example(), tail), 120)
    assert "1 matrix took another method than the first (a long tail of small" in text
    unheard = "something that nobody has thought of when this was written"
    text = plain(with_fallbacks(example(), unheard), 120)
    assert "(something that nobody has thought of wh…)" in text
    assert "another method" not in plain(with_fallbacks(example()), 120)


def test_the_reasons_that_are_shortened_are_those_of_the_solver() -> None:
    folder = Path(geoscope.__file__).parent / "linalg"
    source = "".join(path.read_text("utf-8") for path in sorted(folder.glob("svd*.py")))
    for start in _FALLBACKS:
        assert f'"{start}' in source, start


def test_what_is_counted_of_several_models_is_counted_per_model() -> None:
    one = plain(example("alignment", layers=2))
    assert "norms and biases (size only): 2\n" in one.replace(" · ", "\n")
    report = example("alignment", runs=3, layers=2)
    vectors = tuple(replace(one, tuned=run) for run in (1, 2, 3) for one in report.vectors)
    three = plain(replace(report, vectors=vectors))
    assert "norms and biases (size only): 2 per model" in three
    assert "COMPLETE 14 of 14 matrices" in three
    assert "7 matrices took another" in one
    assert "7 matrices per model took another" in three
    assert "numbers (2 matrices)" in one
    assert "numbers (2 matrices per model)" in three
    assert lines_with(one, "NOT_APPLICABLE: 8 numbers on 4 matrices (")
    assert lines_with(three, "NOT_APPLICABLE: 8 numbers on 4 matrices per model (")


def test_counts_that_differ_by_model_are_a_range() -> None:
    report = example(runs=2, layers=2)
    layers = tuple(
        replace(layer, notes=("odd",) if layer.tuned == 1 else ()) for layer in report.layers
    )
    assert "odd (0 to 14 matrices per model)" in plain(replace(report, layers=layers))


def causes(report: Report, *, quick: bool = False) -> dict[str, str]:
    """Sentence → ids, of what does not apply."""
    parameters = {**report.provenance.parameters, "quick": quick}
    report = replace(report, provenance=replace(report.provenance, parameters=parameters))
    found: dict[str, str] = {}
    for line in status_block(report).lines:
        if line.startswith("NOT_APPLICABLE: "):
            ids, _, sentence = line.partition("(")[2].partition("). ")
            assert sentence not in found
            found[sentence] = ids
    return found


def inapplicable(shape: tuple[int, int], *keys: str) -> Report:
    report = example(layers=1, modules=("q_proj",))
    status = dict.fromkeys(keys, Status.NOT_APPLICABLE)
    layer = replace(report.layers[0], shape=shape, values=dict.fromkeys(keys), status=status)
    return replace(report, layers=(layer,))


@pytest.mark.parametrize(
    ("shape", "key", "quick", "sentence"),
    [
        ((32, 64), "energy_left@64", False, "k exceeds the shorter side."),
        ((4, 64), "update.top_share@8", True, "k exceeds the shorter side."),
        ((32, 64), "angle_left_mean@64", False, "k exceeds the shorter side."),
        ((32, 64), "angle_left_mean@32", False, "The basis is complete: k is the whole side."),
        ((64, 32), "angle_right_max@32", True, "The basis is complete: k is the whole side."),
        ((64, 32), "nss", True, "`quick` leaves out what needs a whole spectrum."),
        ((64, 32), "rank_ratio", True, "`quick` leaves out what needs a whole spectrum."),
        ((64, 32), "base.effective_rank", True, "`quick` leaves out what needs a whole spectrum."),
        ((64, 32), "nss", False, Status.NOT_APPLICABLE.sentence),
        ((64, 32), "angle_left_mean@32", False, Status.NOT_APPLICABLE.sentence),
        ((64, 32), "tuned.stable_rank", True, Status.NOT_APPLICABLE.sentence),
        (
            (256, 256),
            "base.numerical_rank",
            False,
            "Singular values are below what the storage format resolves at this size.",
        ),
        (
            (64, 64),
            "update.condition_number",
            False,
            "Singular values are below what the storage format resolves at this size.",
        ),
        ((64, 64), "outside_span", False, "Nothing lies outside the span of a square base."),
        ((32, 64), "mask_lift_principal", False, "The shorter side is below the rank of the mask."),
    ],
)
def test_what_does_not_apply_says_why(
    shape: tuple[int, int], key: str, quick: bool, sentence: str
) -> None:
    assert causes(inapplicable(shape, key), quick=quick) == {sentence: key.split("@")[0]}


def test_a_base_of_zeros_is_named() -> None:
    keys = ("relative_update", "nss", "energy_left@8", "angle_left_mean@64")
    assert set(causes(inapplicable((64, 64), *keys))) == {"The base is zero."}


def test_causes_take_few_lines() -> None:
    assert list(causes(example(ks=(8, 192)))) == [
        "The basis is complete: k is the whole side.",
        "k exceeds the shorter side.",
    ]
    assert len(status_block(example(rho=0.006, partial=True)).lines) == 4
