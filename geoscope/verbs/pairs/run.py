"""One tuned model beside its base: fetch, stream, measure, judge."""

from __future__ import annotations

import math
import signal
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from torch import Tensor

from geoscope.engine import Outcome, matrix_boundary, stream
from geoscope.engine.cache import ResultCache
from geoscope.errors import NumericsError, Stopped
from geoscope.kinds import KINDS
from geoscope.linalg.changes import nonfinite_entries, unchanged
from geoscope.linalg.operand import Operand
from geoscope.metrics import (
    RULES,
    Distance,
    Instance,
    Judged,
    distance,
    judge_distance,
    limits_in_force,
)
from geoscope.metrics.budget import ranks_within
from geoscope.models.checkpoint import fetch_all
from geoscope.records import LayerRecord, Status, Verdict, WeightPair
from geoscope.verbs.adapters.start_check import LARGE
from geoscope.verbs.options import Options, Progress
from geoscope.verbs.pairs.about import About, about
from geoscope.verbs.pairs.matrices import Headers, Matrix, failed_matrix, two_sides, worker
from geoscope.verbs.pairs.prepare import Prepared
from geoscope.verbs.pairs.selection import all_selected

__all__ = ["TunedRun", "Work", "judged_run", "measure_pairs", "run_one"]


_VECTOR_IDS = (
    "relative_update",
    "update.frobenius_norm",
    "update_sparsity",
    "update_sparsity_exact",
)


@dataclass(frozen=True)
class Work:
    """What was measured: matrices in the order of the pairing, norms and biases.

    interrupted: the signal, where one stopped it.
    """

    matrices: tuple[Matrix, ...]
    vectors: tuple[LayerRecord, ...]
    interrupted: int | None = None


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
    work = measure_pairs(prepared, kind, options, progress)
    run = judged_run(about(prepared, is_whole=work.interrupted is None), work, kind, options)
    for note in run.notes:
        progress.on_note(note)
    return run


def measure_pairs(prepared: Prepared, kind: str, options: Options, progress: Progress) -> Work:
    """Every matrix of the pairing; fewer where a signal stopped it."""
    pairing = prepared.pairing
    fetch_all(prepared.wanted)
    done: dict[str, Matrix] = {}
    interrupted = None
    outcomes = stream(
        prepared.batches,
        read=_reader(prepared),
        work=worker(kind, options, _cache(options), _headers(prepared)),
        devices=prepared.devices,
        workers=prepared.workers,
        memory=prepared.memory,
    )
    try:
        for outcome in outcomes:
            matrix = _finished(outcome, kind, options)
            done[matrix.pair.name] = matrix
            progress.on_pair(len(done), len(pairing.matrices), matrix.pair.name)
        vectors = tuple(_vector_record(prepared, pair) for pair in pairing.vectors)
    except (KeyboardInterrupt, Stopped) as stop:
        interrupted, vectors = getattr(stop, "signum", int(signal.SIGINT)), ()
    if recalled := sum(matrix.recalled for matrix in done.values()):
        progress.on_recalled(recalled, len(pairing.matrices))
    matrices = tuple(done[pair.name] for pair in pairing.matrices if pair.name in done)
    return Work(matrices, vectors, interrupted)


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
        replace(matrix, judged=Judged(judge.blind_start, matrix.judged.k, clause, "", ()))
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


def _cache(options: Options) -> ResultCache | None:
    # what a budget takes is not kept
    kept = options.budget is None
    return ResultCache(options.cache) if kept and options.cache is not None else None


def _reader(prepared: Prepared) -> Callable[[WeightPair], tuple[Tensor, ...]]:
    """Base and tuned weight, or the factors of the update, with the base or without."""

    def read(one: WeightPair) -> tuple[Tensor, ...]:
        update = prepared.tuned.update(prepared.base, one.tuned.name)
        return (prepared.base.read(one.base.name), *update) if prepared.has_base else update

    return read


def _headers(prepared: Prepared) -> Headers:
    def nominal(pair: WeightPair) -> int | None:
        return prepared.tuned.nominal_rank(pair.tuned.name)

    return Headers(prepared.rounding, nominal, prepared.has_base)


def _finished(outcome: Outcome[Matrix], kind: str, options: Options) -> Matrix:
    """The matrix, or that it failed; with a note on where it was computed."""
    matrix = outcome.result
    if matrix is None:
        reason = outcome.failure or ""
        matrix = failed_matrix(outcome.pair, kind, options, Status.NOT_CONVERGED, reason)
    return matrix if outcome.note is None else replace(matrix, notes=(*matrix.notes, outcome.note))


def _vector_record(prepared: Prepared, one: WeightPair) -> LayerRecord:
    """Norm of change and changed share of a 1-D tensor; never part of a spectral summary."""
    before = prepared.base.read(one.base.name)
    after = prepared.tuned.read(one.tuned.name)
    values: dict[str, float | int | None] = dict.fromkeys(_VECTOR_IDS)
    status: dict[str, Status] = {}
    notes: tuple[str, ...] = ()
    if nonfinite_entries(before) + nonfinite_entries(after):
        status = dict.fromkeys(_VECTOR_IDS, Status.NON_FINITE)
    else:
        try:
            with matrix_boundary():
                values = _vector_values(before, after)
        except NumericsError as error:
            status, notes = dict.fromkeys(_VECTOR_IDS, Status.NOT_CONVERGED), (str(error),)
        else:
            if values["relative_update"] is None:
                status["relative_update"] = Status.NOT_APPLICABLE
    return LayerRecord(
        one.name, one.layer, one.module, one.shape, values=values, status=status, notes=notes
    )


def _vector_values(before: Tensor, after: Tensor) -> dict[str, float | int | None]:
    rows, others = after.reshape(1, 1, -1), before.reshape(1, 1, -1)
    size, base_norm = float(Operand(rows, others).norm()), float(Operand(others).norm())
    shares = unchanged(before, after)
    numbers = (size / base_norm if base_norm else None, size, shares.relative, shares.exact)
    return dict(zip(_VECTOR_IDS, numbers, strict=True))


def _distance(matrices: Sequence[Matrix], options: Options) -> Distance | None:
    rows = [matrix.row for matrix in matrices]
    limits = limits_in_force(options.limits)
    near = Judged("", None, "", "", ())
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
