"""The work on one stack of pairs: finite matrices are measured together, the others say why not."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor

from geoscope.analysis.options import Options
from geoscope.analysis.selection import (
    VERDICT_KINDS,
    dimensions,
    selected,
    takes_of,
    verdict_k,
)
from geoscope.engine import Batch
from geoscope.engine.cache import ResultCache, content_of
from geoscope.errors import NumericsError
from geoscope.linalg.changes import nonfinite_entries
from geoscope.linalg.factor_update import FactorUpdate
from geoscope.metrics import (
    Judged,
    Measured,
    Rounding,
    judge,
    measure,
    measure_nothing,
    pair_factors,
)
from geoscope.metrics.curves import curves
from geoscope.records import Curve, Status, WeightPair

__all__ = ["Matrix", "two_sides", "worker"]


@dataclass(frozen=True)
class Matrix:
    """Everything about one matrix, before it becomes a record.

    failure: why it has no numbers. recalled: they come from the cache.
    """

    pair: WeightPair
    row: Measured
    judged: Judged | None
    method: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    curves: Mapping[str, Curve] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    failure: str | None = None
    recalled: bool = False


def worker(
    kind: str,
    options: Options,
    cache: ResultCache | None,
    rounding: Callable[[WeightPair], Rounding],
) -> Callable[..., Sequence[Matrix]]:
    """The work on one stack: what is kept is recalled, finite matrices are measured together.

    It takes base and tuned weights, or base and the factors of an update (`FactorUpdate.of`).
    rounding: what FP8 blocks of a pair rounded away.
    """

    def work(batch: Batch, base: Tensor, *tuned: Tensor) -> list[Matrix]:
        results: dict[int, Matrix] = {}
        keys: dict[int, str] = {}
        lost = [rounding(one) for one in batch.pairs]
        for i, one in enumerate(batch.pairs):
            bad = sum(nonfinite_entries(stack[i]) for stack in (base, *tuned))
            if bad:
                reason = f"{bad} entries are NaN or Inf"
                results[i] = _failed(one, kind, options, Status.NON_FINITE, reason)
            elif cache is not None:
                own = [stack[i] for stack in tuned]
                keys[i] = _key(cache, kind, options, base[i], own, lost[i])
                found = _recalled(one, cache.get(keys[i]), kind, options)
                if found is not None:
                    results[i] = found
        rest = [i for i in range(len(batch.pairs)) if i not in results]
        if rest:
            whole = len(rest) == len(batch.pairs)
            stacks = (base, *tuned) if whole else tuple(one[rest] for one in (base, *tuned))
            measured = _measured(
                [batch.pairs[i] for i in rest], stacks, kind, options, [lost[i] for i in rest]
            )
            results |= zip(rest, measured, strict=True)
            for i in rest:
                if cache is not None and results[i].failure is None:
                    cache.put(keys[i], _kept(results[i]))
        return [results[i] for i in range(len(batch.pairs))]

    return work


def _key(
    cache: ResultCache,
    kind: str,
    options: Options,
    base: Tensor,
    tuned: Sequence[Tensor],
    rounding: Rounding,
) -> str:
    return cache.key(
        {
            "base": content_of(base),
            "tuned": [content_of(one) for one in tuned],
            "rounding": rounding,
            "kind": kind,
            "settings": asdict(options.settings),
            "device": base.device.type,
        }
    )


def _kept(matrix: Matrix) -> dict[str, Any]:
    """What the cache keeps of a matrix; the verdict is judged anew, for limits may change."""
    return {
        "row": {**asdict(matrix.row), "status": {k: v.value for k, v in matrix.row.status.items()}},
        "method": matrix.method,
        "curves": matrix.curves,
        "notes": matrix.notes,
    }


def _recalled(one: WeightPair, kept: Any, kind: str, options: Options) -> Matrix | None:
    """The matrix of what `_kept` gave, judged anew; None for anything else."""
    try:
        status = {key: Status(value) for key, value in kept["row"]["status"].items()}
        row = Measured(**{**kept["row"], "status": status})
        method, notes = kept["method"], tuple(kept["notes"])
        drawn = {key: tuple((x, y) for x, y in curve) for key, curve in kept["curves"].items()}
    except (AttributeError, KeyError, TypeError, ValueError):
        return None
    judged = _judged(row, two_sides(one.shape), kind, options)
    return Matrix(one, row, judged, method, drawn, notes, recalled=True)


def _failed(one: WeightPair, kind: str, options: Options, status: Status, reason: str) -> Matrix:
    shape = two_sides(one.shape)
    row = measure_nothing(selected(kind, options, shape), shape, status, seed=options.seed)
    judged = _judged(row, shape, kind, options)
    return Matrix(one, row, judged, notes=(reason,), failure=f"{status.value}: {reason}")


def _measured(
    pairs: Sequence[WeightPair],
    stacks: Sequence[Tensor],
    kind: str,
    options: Options,
    rounding: Sequence[Rounding],
) -> list[Matrix]:
    shape = two_sides(pairs[0].shape)
    chosen = selected(kind, options, shape)
    try:
        factors = pair_factors(
            stacks[0],
            stacks[1] if len(stacks) == 2 else FactorUpdate.of(stacks[1:]),
            takes=takes_of(chosen),
            ks=[k for k in dimensions(options, shape) if k <= min(shape)],
            settings=options.settings,
            rounding=rounding,
        )
    except NumericsError as error:
        if len(pairs) > 1:  # find the one that fails; the others are fine
            return [
                matrix
                for i, one in enumerate(pairs)
                for matrix in _measured(
                    [one], [x[i : i + 1] for x in stacks], kind, options, rounding[i : i + 1]
                )
            ]
        return [_failed(pairs[0], kind, options, Status.NOT_CONVERGED, str(error))]
    rows = measure(factors, chosen, seed=options.seed)
    values = {name: tensor.cpu() for name, tensor in factors.values.items()}
    return [
        Matrix(
            pair=one,
            row=row,
            judged=_judged(row, shape, kind, options),
            method=factors.methods[i],
            curves=curves(kind, values, shape, i, seed=options.seed),
            notes=factors.notes[i],
        )
        for i, (one, row) in enumerate(zip(pairs, rows, strict=True))
    ]


def _judged(row: Measured, shape: tuple[int, int], kind: str, options: Options) -> Judged | None:
    if kind not in VERDICT_KINDS:
        return None
    return judge(row, verdict_k(options, shape), options.limits)


def two_sides(shape: tuple[int, ...]) -> tuple[int, int]:
    """The shape of a matrix, as its type says."""
    return shape[0], shape[1]
