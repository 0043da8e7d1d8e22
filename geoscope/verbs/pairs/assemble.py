"""From runs to a Report: records, coverage, aggregates, anchor."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from geoscope._version import __version__
from geoscope.kinds import KINDS
from geoscope.metrics import aggregate
from geoscope.records import (
    Coverage,
    Layers,
    Provenance,
    Report,
    Run,
    Skipped,
    Summary,
    encode,
)
from geoscope.verbs.options import Options
from geoscope.verbs.pairs.about import About
from geoscope.verbs.pairs.rows import record_of
from geoscope.verbs.pairs.run import TunedRun

__all__ = ["anchored", "assemble", "coverage_without"]


def assemble(
    sides: Sequence[About],
    runs: Sequence[TunedRun],
    kind: str,
    options: Options,
    argv: Sequence[str],
    seconds: float,
) -> Report:
    """The report of one or several runs on one base.

    sides: what is said of every tuned model, also of those that an interruption left undone.
    """
    several = len(sides) > 1
    refs = (sides[0].base, *(side.tuned for side in sides))
    records = [
        record_of(matrix, i + 1 if several else None)
        for i, run in enumerate(runs)
        for matrix in run.matrices
    ]
    vectors = [
        replace(vector, tuned=i + 1 if several else None)
        for i, run in enumerate(runs)
        for vector in run.vectors
    ]
    return Report(
        kind=kind,
        provenance=Provenance(
            tool_version=__version__,
            argv=tuple(argv),
            refs=refs,
            device=sides[0].device,
            compute_dtype=options.dtype,
            seed=options.seed,
            parameters={
                **_parameters(options),
                **_limits(kind, options),
                "notes": _notes(sides, runs),
                "budget": runs[0].budget,
            },
            seconds=seconds,
        ),
        coverage=_coverage(runs),
        layers=Layers(records),
        summary=_summary(runs, several=several),
        vectors=Layers(vectors),
    )


def _notes(sides: Sequence[About], runs: Sequence[TunedRun]) -> list[str]:
    """Remarks on the models, on their pairing and on what came out, each once."""
    told = [note for side in sides for note in side.notes]
    return list(dict.fromkeys([*told, *(note for run in runs for note in run.notes)]))


def _parameters(options: Options) -> dict[str, Any]:
    """The options that decide the numbers, but for those with a place of their own."""
    return {k: v for k, v in options.deciding.items() if k not in ("dtype", "seed", "limits")}


def _limits(kind: str, options: Options) -> dict[str, Any]:
    """The thresholds that were set; a verdict has all that are in force itself."""
    return {"limits": dict(options.limits)} if options.limits and not KINDS[kind].judge else {}


def _coverage(runs: Sequence[TunedRun]) -> Coverage:
    """Of all runs together: what any of them could not compare is missing."""
    matched: dict[str, None] = {}
    missing: dict[str, None] = {}
    skipped: dict[tuple[str, str], Skipped] = {}
    for run in runs:
        pairing = run.about.pairing
        missing.update(dict.fromkeys(pairing.missing))
        skipped.update({(one.name, one.reason): one for one in pairing.skipped})
        done = {matrix.pair.name for matrix in run.matrices}
        for one in run.matrices:
            if one.failure is None:
                matched[one.pair.name] = None
            else:
                skipped[one.pair.name, one.failure] = Skipped(one.pair.name, one.failure, True)
                missing[one.pair.name] = None
        for one in pairing.matrices:
            if one.name not in done:
                reason = "interrupted before it was computed"
                skipped[one.name, reason] = Skipped(one.name, reason, True)
                missing[one.name] = None
    pairings = [run.about.pairing for run in runs]
    return Coverage(
        matched=tuple(name for name in matched if name not in missing),
        base_only=_union(one.base_only for one in pairings),
        tuned_only=_union(one.tuned_only for one in pairings),
        shape_mismatch=_union(one.shape_mismatch for one in pairings),
        skipped=tuple(skipped.values()),
        renamed=_union(one.renamed for one in pairings),
        missing=tuple(missing),
    )


def coverage_without(coverage: Coverage, failed: Sequence[Skipped]) -> Coverage:
    """The coverage, without matrices of which something failed that was asked for."""
    names = {one.name for one in failed}
    return replace(
        coverage,
        matched=tuple(name for name in coverage.matched if name not in names),
        skipped=(*coverage.skipped, *failed),
        missing=tuple(dict.fromkeys([*coverage.missing, *(one.name for one in failed)])),
    )


def _union(parts: Iterable[Sequence[Any]]) -> tuple[Any, ...]:
    return tuple(dict.fromkeys(item for part in parts for item in part))


def _summary(runs: Sequence[TunedRun], *, several: bool) -> Summary:
    """Aggregates of the first tuned model, and with several of each under `runs`."""
    parts = [_aggregates(run) for run in runs]
    model, nulls, modules, module_nulls = parts[0]
    numbered = tuple(
        Run(i + 1, *part, verdict=run.verdict, distance=_told(run))
        for i, (run, part) in enumerate(zip(runs, parts, strict=True))
    )
    return Summary(
        model=model,
        nulls=nulls,
        modules=modules,
        module_nulls=module_nulls,
        verdict=runs[0].verdict,
        distance=_told(runs[0]),
        runs=numbered if several else (),
    )


def _told(run: TunedRun) -> dict[str, Any] | None:
    return None if run.distance is None else run.distance.to_json()


_Values = dict[str, float | int | None]


def _aggregates(
    run: TunedRun,
) -> tuple[_Values, dict[str, float], dict[str, _Values], dict[str, dict[str, float]]]:
    values, nulls = aggregate([matrix.row for matrix in run.matrices], run.selected)
    kinds = dict.fromkeys(matrix.pair.module for matrix in run.matrices)
    per_kind = {
        kind: aggregate(
            [matrix.row for matrix in run.matrices if matrix.pair.module == kind], run.selected
        )
        for kind in kinds
    }
    return (
        values,
        nulls,
        {kind: part[0] for kind, part in per_kind.items()},
        {kind: part[1] for kind, part in per_kind.items()},
    )


def anchored(run: TunedRun, anchor: TunedRun, given: str | None) -> dict[str, Any]:
    """Every number of the model as a ratio to the anchor's (`--anchor`).

    See docs/methods.md#thresholds.

    spectrum_preserving: mean NSS at most half of the anchor's; None where one has no number.
    """
    ours, theirs = _aggregates(run)[0], _aggregates(anchor)[0]
    ratios: dict[str, float | None] = {}
    for key, value in ours.items():
        other = theirs.get(key)
        ratios[key] = value / other if value is not None and other else None
    nss, other = ours.get("nss"), theirs.get("nss")
    preserving = None if nss is None or other is None else nss <= 0.5 * other
    ref = anchor.about.tuned
    return {
        "ref": encode(ref) | {"given": given or ref.given},
        "ratios": ratios,
        "spectrum_preserving": preserving,
    }
