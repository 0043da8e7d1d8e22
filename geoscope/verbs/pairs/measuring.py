"""The matrices of one tuned model beside its base: fetched, streamed, measured."""

from __future__ import annotations

import signal
from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import Tensor

from geoscope.engine import Outcome, matrix_boundary, stream
from geoscope.engine.cache import ResultCache
from geoscope.errors import NumericsError, Stopped
from geoscope.linalg.changes import nonfinite_entries, unchanged
from geoscope.linalg.operand import Operand
from geoscope.models.checkpoint import fetch_all
from geoscope.records import LayerRecord, Status, WeightPair
from geoscope.verbs.options import Options, Progress
from geoscope.verbs.pairs.matrices import Headers, Matrix, failed_matrix, worker
from geoscope.verbs.pairs.prepare import Prepared

__all__ = ["Work", "kept_results", "measure_pairs"]

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
    device: where it was computed, if not on the devices of the plan.
    """

    matrices: tuple[Matrix, ...]
    vectors: tuple[LayerRecord, ...]
    interrupted: int | None = None
    device: str | None = None


def measure_pairs(
    prepared: Prepared,
    kind: str,
    options: Options,
    progress: Progress,
    kept: ResultCache | None,
) -> Work:
    """Every matrix of the pairing; fewer where a signal stopped it. kept: results of before."""
    pairing = prepared.pairing
    fetch_all(prepared.wanted)
    done: dict[str, Matrix] = {}
    interrupted = None
    outcomes = stream(
        prepared.batches,
        read=_reader(prepared),
        work=worker(kind, options, kept, _headers(prepared)),
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


def kept_results(options: Options) -> ResultCache | None:
    """Where results are found again; what a budget takes is not kept."""
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

    has_base, several = prepared.has_base, prepared.is_one_of_several
    return Headers(prepared.rounding, nominal, has_base, several)


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
