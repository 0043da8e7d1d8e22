"""What was not looked at, and why a number is missing: the last lines of every report."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable

from geoscope.errors import first_names
from geoscope.records import Coverage, LayerRecord, Report, Status
from geoscope.report.page import Block

__all__ = ["compared_line", "coverage_block", "status_block"]

_REASONS = 3


def compared_line(report: Report) -> str:
    """`COMPLETE 28 of 28 matrices`, or what is missing by name."""
    coverage = report.coverage
    vectors = {vector.name for vector in report.vectors}
    names = ({*coverage.matched, *coverage.missing} - vectors) | set(coverage.missing)
    total, missing = len(names), len(coverage.missing)
    if not missing:
        return f"{coverage.status} {total} of {total} matrices"
    first = first_names(coverage.missing)
    return f"{coverage.status} {missing} of {total} matrices not compared: {first}"


def coverage_block(report: Report) -> Block:
    """Coverage, what was left out on purpose, and the notes of the matrices."""
    lines = [compared_line(report), _beside(report), *_left_out(report.coverage)]
    lines += [*_notes(report.layers), _fallbacks(report)]
    status = report.coverage.status
    return Block("coverage", tuple(line for line in lines if line), code=status)


def _beside(report: Report) -> str:
    """Vectors, renames and one-sided tensors, as counts."""
    coverage = report.coverage
    missing = set(coverage.missing)
    counts = {
        "norms and biases (size only)": len(report.vectors),
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


def _notes(layers: Iterable[LayerRecord]) -> list[str]:
    notes = Counter(note for layer in layers for note in layer.notes)
    return [f"{note} ({_matrices(notes[note])})" for note in sorted(notes)]


def _fallbacks(report: Report) -> str:
    count = sum(
        any(how.get("fallback") for how in layer.method.values()) for layer in report.layers
    )
    return f"{_matrices(count)} fell back to an exact method" if count else ""


def _matrices(count: int) -> str:
    return "1 matrix" if count == 1 else f"{count} matrices"


def status_block(report: Report) -> Block:
    """Each status that occurs, with its sentence and the ids (for all k) it stands on."""
    ids: dict[Status, Counter[str]] = defaultdict(Counter)
    holders: Counter[Status] = Counter()
    for layer in report.layers:
        for key, status in layer.status.items():
            ids[status][key.split("@")[0]] += 1
        holders.update(set(layer.status.values()))
    ids.pop(Status.OK, None)
    lines = [
        _status_line(status, ids[status], holders[status]) for status in Status if status in ids
    ]
    return Block("statuses", tuple(lines))


def _status_line(status: Status, ids: Counter[str], holders: int) -> str:
    keys = first_names(sorted(ids, key=lambda key: (-ids[key], key)), limit=4)
    total = sum(ids.values())
    numbers = "1 number" if total == 1 else f"{total} numbers"
    return f"{status}: {numbers} on {_matrices(holders)} ({keys}). {status.sentence}"
