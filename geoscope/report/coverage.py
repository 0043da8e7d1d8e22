"""What was not looked at, and why a number is missing: the last lines of every report.

With several tuned models matrices, vectors and numbers are counted per model.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable

from geoscope.errors import first_names
from geoscope.records import Coverage, LayerRecord, Report, Status
from geoscope.report.page import Block

__all__ = ["compared_line", "coverage_block", "status_block"]

_REASONS = 3
_IDS = 4
# What is known without a whole spectrum, of the ids without a dimension.
_OF_LEADING = ("frobenius_norm", "spectral_norm", "stable_rank", "stable_rank_ratio")
# What takes the rank of an update in its factors.
_OF_RANK = (
    *("nominal_rank", "effective_rank_share", "entropy_rank_share"),
    *("k90_share", "k99_share", "tail_ratio"),
)
# How the reasons of a fallback begin, and what is said of them here.
_FALLBACKS = {
    "tail": "a long tail of small singular values",
    "subspace bound": "subspace bound not met",
    "block Lanczos": "flat spectrum",
    "no SVD driver": "no convergence",
}


def compared_line(report: Report) -> str:
    """`COMPLETE 28 of 28 matrices`, or what is missing by name."""
    coverage = report.coverage
    vectors = {vector.name for vector in report.vectors}
    names = ({*coverage.matched, *coverage.missing} - vectors) | set(coverage.missing)
    names |= set(coverage.unread)
    total, missing = len(names), len(coverage.missing)
    if coverage.unread and not missing:
        read = total - len(coverage.unread)
        return f"{coverage.status} {read} of {total} matrices"
    if not missing:
        return f"{coverage.status} {total} of {total} matrices"
    first = first_names(coverage.missing)
    return f"{coverage.status} {missing} of {total} matrices not compared: {first}"


def coverage_block(report: Report) -> Block:
    """Coverage, what was left out on purpose, and the notes of the matrices."""
    lines = [compared_line(report), _beside(report), *_left_out(report.coverage)]
    lines += [_reshaped(report.coverage)]
    lines += [*_notes(report), _fallbacks(report)]
    status = report.coverage.status
    return Block("coverage", tuple(line for line in lines if line), code=status)


def _beside(report: Report) -> str:
    """Vectors, renames and one-sided tensors, as counts."""
    coverage = report.coverage
    missing = set(coverage.missing)
    counts = {
        "norms and biases (size only)": _per_model(report, report.vectors),
        "matched by renaming": len(coverage.renamed),
        "others only in base": len(set(coverage.base_only) - missing),
        "others only in tuned": len(set(coverage.tuned_only) - missing),
    }
    said = " · ".join(f"{words}: {count}" for words, count in counts.items() if count)
    return f"beside these: {said}" if said else ""


def _left_out(coverage: Coverage) -> list[str]:
    """What was left out on purpose: the most frequent reasons, and a count of the others."""
    missing = set(coverage.missing)
    reasons = Counter(item.reason for item in coverage.skipped if item.name not in missing)
    ordered = sorted(reasons, key=lambda reason: (-reasons[reason], reason))
    lines = [f"left out: {reasons[reason]}, {reason}" for reason in ordered[:_REASONS]]
    rest = sum(reasons[reason] for reason in ordered[_REASONS:])
    return [*lines, f"left out: {rest}, for other reasons"] if rest else lines


def _reshaped(coverage: Coverage) -> str:
    """Tensors out of scope that differ in shape, by name: those in scope are missing."""
    missing = set(coverage.missing)
    others = {one.name: one for one in coverage.shape_mismatch if one.name not in missing}
    if not others:
        return ""
    first = next(iter(others.values()))
    return (
        f"left out: {len(others)} of another shape, {first_names(list(others))} (base "
        f"{first.base}, tuned {first.tuned})"
    )


def _notes(report: Report) -> list[str]:
    holders: dict[str, list[LayerRecord]] = {}
    for layer in report.layers:
        for note in layer.notes:
            holders.setdefault(note, []).append(layer)
    return [f"{note} ({_matrices(report, holders[note])})" for note in sorted(holders)]


def _fallbacks(report: Report) -> str:
    """How many matrices took another method than the first, and mostly why."""
    reasons: Counter[str] = Counter()
    holders: list[LayerRecord] = []
    for layer in report.layers:
        found = {str(how["fallback"]) for how in layer.method.values() if how.get("fallback")}
        reasons.update({_short(reason) for reason in found})
        holders += [layer] if found else []
    if not holders:
        return ""
    first = min(reasons, key=lambda reason: (-reasons[reason], reason))
    why = first if len(reasons) == 1 else f"mostly: {first}"
    return f"{_matrices(report, holders)} took another method than the first ({why})"


def _short(reason: str) -> str:
    """The reason without its numbers; one that is not known is cut."""
    for start, words in _FALLBACKS.items():
        if reason.startswith(start):
            return words
    return reason if len(reason) <= 40 else f"{reason[:39]}…"


def status_block(report: Report) -> Block:
    """Each status that occurs, with its sentence and the ids (for all k) it stands on."""
    found: dict[tuple[Status, str], list[tuple[LayerRecord, str]]] = {}
    made = report.provenance
    quick, has_base = bool(made.parameters.get("quick")), all(ref.is_read for ref in made.refs[:1])
    for layer in report.layers:
        for key, status in layer.status.items():
            applies = status is not Status.NOT_APPLICABLE
            cause = "" if applies else _cause(layer, key, quick=quick, has_base=has_base)
            found.setdefault((status, cause or status.sentence), []).append((layer, key))
    order = list(Status)
    lines = [
        _status_line(report, status, sentence, found[status, sentence])
        for status, sentence in sorted(found, key=lambda one: (order.index(one[0]), one[1]))
        if status is not Status.OK
    ]
    return Block("statuses", tuple(lines))


def _cause(layer: LayerRecord, key: str, *, quick: bool, has_base: bool) -> str:
    """Why an id does not apply to a matrix, as far as the report tells; else nothing."""

    def applies(other: str) -> bool:
        return layer.status_of(other) is not Status.NOT_APPLICABLE

    m, n = layer.shape
    stem, _, dimension = key.rpartition("@")
    k = int(dimension) if stem and dimension.isdigit() else 0
    name = (stem or key).rpartition(".")[2]
    if k > min(m, n):
        return "k exceeds the shorter side."
    # Of stored weights the sparsity is always known.
    if name.startswith(("update_sparsity", "mask_")) and not applies("update_sparsity"):
        return "An update in its factors has no stored entries."
    if name in _OF_RANK and not applies("nominal_rank"):
        return "An update that is not in factors has no rank to take a share of."
    if not has_base and not key.startswith("update."):
        return "The base was not read."
    if layer.gram:
        return "The size of the base is not known." if name == "relative_update" else ""
    if has_base and not applies("relative_update"):
        return "The base is zero."
    if name.startswith("angle_") and k == (m if "left" in name else n):
        return "The basis is complete: k is the whole side."
    if name == "outside_span" and m == n:
        return "Nothing lies outside the span of a square base."
    if name.startswith("mask_") and any(
        "quantisation error" in note or "grid" in note or "codebook" in note for note in layer.notes
    ):
        return "Which weights a grid rounds away is not known from its values."
    if name.startswith("mask_"):
        return "The shorter side is below the rank of the mask."
    if quick and not k and name not in _OF_LEADING:
        return "`quick` leaves out what needs a whole spectrum."
    if name in ("numerical_rank", "condition_number"):
        return "Singular values are below what the storage format resolves at this size."
    return ""


def _status_line(
    report: Report, status: Status, sentence: str, found: list[tuple[LayerRecord, str]]
) -> str:
    ids = Counter(re.sub(r"@\d+$", "", key) for _, key in found)
    keys = first_names(sorted(ids, key=lambda key: (-ids[key], key)), limit=_IDS)
    numbers = _amount(_counts(report, (layer for layer, _ in found)), "number", "numbers")
    holders = {(layer.tuned, layer.name): layer for layer, _ in found}
    return f"{status}: {numbers} on {_matrices(report, holders.values())} ({keys}). {sentence}"


def _matrices(report: Report, layers: Iterable[LayerRecord]) -> str:
    """`1 matrix`, `3 matrices`, `2 to 3 matrices per model`."""
    counts = _counts(report, layers)
    return _amount(counts, "matrix", "matrices") + _each(counts)


def _per_model(report: Report, layers: Iterable[LayerRecord]) -> str:
    """`21`, `21 per model`; nothing for none."""
    counts = _counts(report, layers)
    return _amount(counts) + _each(counts) if any(counts) else ""


def _counts(report: Report, layers: Iterable[LayerRecord]) -> list[int]:
    """How many there are of each tuned model."""
    found = Counter(layer.tuned for layer in layers)
    return [found[run.tuned] for run in report.summary.runs] or [found.total()]


def _each(counts: list[int]) -> str:
    return " per model" if len(counts) > 1 else ""


def _amount(counts: list[int], one: str = "", many: str = "") -> str:
    least, most = min(counts), max(counts)
    number = str(most) if least == most else f"{least} to {most}"
    return f"{number} {one if least == most == 1 else many}".rstrip()
