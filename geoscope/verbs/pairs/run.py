"""One tuned model beside its base: measured, and judged together."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from geoscope.kinds import KINDS
from geoscope.metrics import (
    RULES,
    Distance,
    Instance,
    MatrixVerdict,
    distance,
    judge_distance,
    limits_in_force,
)
from geoscope.metrics.budget import ranks_within
from geoscope.records import LayerRecord, Verdict
from geoscope.verbs.adapters.start_check import LARGE
from geoscope.verbs.options import Options, Progress
from geoscope.verbs.pairs.about import About, about
from geoscope.verbs.pairs.matrices import Matrix, two_sides
from geoscope.verbs.pairs.measuring import Work, kept_results, measure_pairs
from geoscope.verbs.pairs.nodes import measure_on_nodes
from geoscope.verbs.pairs.prepare import Prepared
from geoscope.verbs.pairs.selection import all_selected

__all__ = ["TunedRun", "judged_run", "run_one"]


@dataclass(frozen=True)
class TunedRun:
    """One tuned model: its matrices in the order of the pairing, and its norms and biases.

    distance: what of it is far from the base.
    interrupted: the signal, where one stopped it.
    notes: what came out on the way.
    budget: ranks within a budget, as reports hold them.
    """

    about: About
    matrices: tuple[Matrix, ...]
    vectors: tuple[LayerRecord, ...]
    selected: tuple[Instance, ...]
    verdict: Verdict | None
    distance: Distance | None
    interrupted: int | None
    notes: tuple[str, ...] = ()
    budget: Mapping[str, Any] | None = None


def run_one(prepared: Prepared, kind: str, options: Options, progress: Progress) -> TunedRun:
    """Downloads what is needed, and measures and judges every matrix; stops early on a signal."""
    elsewhere = options.ray is not None or prepared.processes
    measure = measure_on_nodes if elsewhere else measure_pairs
    work = measure(prepared, kind, options, progress, kept_results(options))
    said = about(prepared, is_whole=work.interrupted is None)
    said = said if work.device is None else replace(said, device=work.device)
    run = judged_run(said, work, kind, options)
    for note in run.notes:
        progress.on_note(note)
    return run


def judged_run(about: About, work: Work, kind: str, options: Options) -> TunedRun:
    """What the matrices come to together; takes no weights."""
    matrices, notes = work.matrices, tuple[str, ...]()
    if work.interrupted is None:
        matrices, notes = _with_start(about, kind, matrices)
        notes += () if about.cut is None else (about.cut,)
    budget = None
    if options.budget is not None and matrices:
        budget, note = _within(options.budget, matrices)
        notes += (note,)
    return TunedRun(
        about=about,
        matrices=matrices,
        vectors=work.vectors,
        selected=all_selected(kind, options, {two_sides(matrix.pair.shape) for matrix in matrices}),
        verdict=_verdict(kind, matrices, options) if matrices else None,
        distance=_distance(matrices, options),
        interrupted=work.interrupted,
        notes=notes,
        budget=budget,
    )


def _with_start(
    about: About, kind: str, matrices: tuple[Matrix, ...]
) -> tuple[tuple[Matrix, ...], tuple[str, ...]]:
    """The matrices, and what is to be said of an adapter whose start is not known."""
    start, given = about.start, about.tuned.given
    if start is None:
        ratio = _ratio(matrices)
        if not about.unknown_start or not about.has_base or ratio <= LARGE:
            return matrices, ()
        note = (
            f"{given}: ρ is {ratio:.2g}, which is large for an adapter. If the adapter did not "
            "start at zero, give it as it was before training as `initial_adapter`"
        )
        return matrices, (note,)
    notes = (f"{given}: {start.text}",)
    judge = KINDS[kind].judge
    if judge is None:
        return matrices, notes
    clause = f"as {start.method} begins"
    judged = tuple(
        replace(matrix, judged=MatrixVerdict(judge.blind_start, matrix.judged.k, clause, "", ()))
        if matrix.judged is not None and matrix.judged.code != "NO_UPDATE"
        else matrix
        for matrix in matrices
    )
    return judged, notes


def _within(budget: int, matrices: Sequence[Matrix]) -> tuple[dict[str, Any], str]:
    """Ranks within a budget, and what they hold in words."""
    shapes = [two_sides(matrix.pair.shape) for matrix in matrices]
    found = ranks_within(budget, [matrix.spectrum for matrix in matrices], shapes)
    names = [matrix.pair.name.removesuffix(".weight") for matrix in matrices]
    told = {**asdict(found), "given": budget, "ranks": dict(zip(names, found.ranks, strict=True))}
    same, own = (f"{100 * one:.0f} %" for one in (found.uniform_energy, found.energy))
    words = (
        f"within {budget} parameters rank {found.uniform} in every matrix holds {same} of the "
        f"energy above the noise; ranks from {min(found.ranks)} to {max(found.ranks)} by matrix "
        f"hold {own} (in the JSON, for rank_pattern, which servers mostly ignore)"
    )
    return told, words


def _ratio(matrices: Sequence[Matrix]) -> float:
    """ρ of all together; 0 without numbers."""
    update, base = (
        sum(matrix.row.weights.get(key, 0.0) for matrix in matrices) for key in ("update", "base")
    )
    return math.sqrt(update / base) if base > 0 else 0.0


def _distance(matrices: Sequence[Matrix], options: Options) -> Distance | None:
    rows = [matrix.row for matrix in matrices]
    limits = limits_in_force(options.limits)
    near = MatrixVerdict("", None, "", "", ())
    judged = [judge_distance(row, None, limits)[0] or near for row in rows]
    return distance([matrix.pair.name for matrix in matrices], rows, judged, limits)


def _verdict(kind: str, matrices: Sequence[Matrix], options: Options) -> Verdict | None:
    judge = KINDS[kind].judge
    if judge is None:
        return None
    names = [matrix.pair.name for matrix in matrices]
    rows = [matrix.row for matrix in matrices]
    judged = [matrix.judged for matrix in matrices if matrix.judged is not None]
    modules = [matrix.pair.module for matrix in matrices]
    return RULES[judge].model(names, modules, rows, judged, options.limits)
