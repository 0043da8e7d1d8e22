"""A report of kind capacity: shares of matrices, and why an adapter lacks a number."""

from __future__ import annotations

from dataclasses import replace

import pytest

from geoscope.records import NOT_READ, Report, Status
from geoscope.report import render_text
from geoscope.report.coverage import status_block
from geoscope.report.markdown import render_markdown
from tests.helpers.examples import all_null, example

ENTRIES = "An update in its factors has no stored entries."
NO_BASE = "The base was not read."
NO_RANK = "An update that is not in factors has no rank to take a share of."
SPARSITIES = ("update_sparsity", "update_sparsity_abs", "update_sparsity_exact")
OF_RANK = (
    "nominal_rank", "effective_rank_share", "entropy_rank_share", "k90_share", "k99_share",
    "tail_ratio",
)  # fmt: skip


def text_of(report: Report, **options: bool) -> str:
    return render_text(report, width=100, colour=False, details=True, **options)


def lacking(report: Report, *keys: str) -> Report:
    """The report of matrices to which these ids do not apply."""
    layers = tuple(
        replace(
            layer,
            values={**layer.values, **dict.fromkeys(keys)},
            status={**layer.status, **dict.fromkeys(keys, Status.NOT_APPLICABLE)},
        )
        for layer in report.layers
    )
    model = {**report.summary.model, **dict.fromkeys(keys)}
    modules = {name: {**row, **dict.fromkeys(keys)} for name, row in report.summary.modules.items()}
    return replace(
        report, layers=layers, summary=replace(report.summary, model=model, modules=modules)
    )


def without_base(report: Report) -> Report:
    first, *rest = report.provenance.refs
    refs = (replace(first, storage_dtype=NOT_READ), *rest)
    return replace(report, provenance=replace(report.provenance, refs=refs))


def causes(report: Report) -> dict[str, set[str]]:
    """Sentence → ids, of what does not apply."""
    found = {}
    for line in status_block(report).lines:
        if line.startswith("NOT_APPLICABLE: "):
            ids, _, sentence = line.partition("(")[2].partition("). ")
            found[sentence] = set(ids.split(" and ")[0].split(", "))
    return found


@pytest.mark.parametrize("render", [text_of, render_markdown])
def test_shares_are_of_matrices_and_not_of_energy(render) -> None:
    report = example("capacity")
    verdict = report.summary.verdict
    assert verdict is not None and verdict.share is not None
    text = render(report).replace("\\_", "_")
    assert f"{verdict.code} · {100 * verdict.share:.0f} % of the changed matrices" in text
    assert "\nmatrices: " in text
    assert "share of energy" not in text
    assert "of the update's energy" not in text


def test_shares_of_other_kinds_are_of_energy() -> None:
    text = text_of(example("compare"))
    assert "of the update's energy" in text
    assert "matrices (share of energy): " in text


def test_ranks_are_whole_numbers() -> None:
    (line,) = [one for one in text_of(example("capacity")).splitlines() if "suggested rank" in one]
    number = line.split("suggested rank")[1].split()[0]
    assert number.isdigit()


def test_rows_and_columns_without_any_number_are_left_out() -> None:
    report = lacking(example("capacity"), *OF_RANK)
    text = text_of(report, verbose=True)
    tables = text.partition("statuses")[0]
    for words in ("nominal rank", "k90/r_max", "eff./r_max", "σ_r/σ1"):
        assert words not in tables
        assert words in text_of(example("capacity"), verbose=True)
    assert "suggested rank" in tables
    assert "relative update ρ" in tables


def test_nothing_changed_leaves_no_table_of_dashes() -> None:
    text = text_of(all_null(example("capacity")))
    assert "–" not in text.replace("– see statuses", "")
    assert Status.ZERO_UPDATE.sentence in text.replace("\n  ", " ")


def test_an_adapter_over_its_base_has_no_entries() -> None:
    masks = ("mask_overlap_low", "mask_lift_principal")
    assert causes(lacking(example("capacity"), *SPARSITIES)) == {ENTRIES: set(SPARSITIES)}
    masked = causes(lacking(example("alignment"), "update_sparsity", *masks))
    assert masked[ENTRIES] == {"update_sparsity", *masks}
    # of stored weights it is the rank of the mask
    assert ENTRIES not in causes(lacking(example("alignment"), *masks))


def test_an_adapter_alone_was_read_without_its_base() -> None:
    report = lacking(example("capacity"), *SPARSITIES, "relative_update")
    assert causes(without_base(report)) == {ENTRIES: set(SPARSITIES), NO_BASE: {"relative_update"}}
    assert "The base is zero." in causes(report), "a base that was read, and is zero"
    spectra = lacking(example("anisotropy"), "relative_update", "base.stable_rank", "nss")
    assert causes(without_base(spectra)) == {
        NO_BASE: {"relative_update", "base.stable_rank", "nss"}
    }


def test_what_the_update_lacks_is_no_fault_of_the_base() -> None:
    report = without_base(lacking(example("anisotropy"), "update.condition_number"))
    (sentence,) = causes(report)
    assert sentence.startswith("Singular values are below")


def test_a_full_update_has_no_rank() -> None:
    (found,) = causes(lacking(example("capacity"), *OF_RANK)).items()
    assert found[0] == NO_RANK


def test_explain_has_no_column_of_dimensions() -> None:
    for kind, has_k in (("capacity", False), ("compare", True)):
        text = text_of(example(kind, layers=1), explain=True)
        head = text.partition("what decided\n")[2].splitlines()[0].split()
        assert ("k" in head) == has_k, head
