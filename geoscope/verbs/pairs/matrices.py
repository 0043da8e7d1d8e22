"""The work on one stack of pairs: finite matrices are measured together, the others say why not."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from geoscope.engine import Batch
from geoscope.engine.cache import ResultCache, content_of
from geoscope.engine.factor_cache import FactorCache
from geoscope.kinds import KINDS
from geoscope.linalg import Factors
from geoscope.linalg.changes import nonfinite_counts
from geoscope.linalg.factor_update import FactorUpdate
from geoscope.metrics import (
    RULES,
    MatrixVerdict,
    Measured,
    PairFactors,
    Recall,
    Rounding,
    measure,
    measure_nothing,
    pair_factors,
    takes_of,
    update_factors,
)
from geoscope.metrics.curves import curves
from geoscope.metrics.spectrum import noise_edge
from geoscope.records import Curve, Status, WeightPair, decode, encode
from geoscope.verbs.options import Options
from geoscope.verbs.pairs.selection import dimensions, selected, verdict_k

__all__ = [
    "Headers",
    "Matrix",
    "factors_folder",
    "failed_matrix",
    "recall_of",
    "two_sides",
    "update_content",
    "worker",
]

# Shorter side from which keeping factors pays: a file takes milliseconds.
_LEAST_SIDE = 256


@dataclass(frozen=True)
class Matrix:
    """Everything about one matrix, before it becomes a record.

    failure: why it has no numbers. recalled: they come from the cache. spectrum: with a budget the
    singular values of the update above its noise edge.
    """

    pair: WeightPair
    row: Measured
    judged: MatrixVerdict | None
    method: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    curves: Mapping[str, Curve] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    failure: str | None = None
    recalled: bool = False
    spectrum: tuple[float, ...] = ()


@dataclass(frozen=True)
class Headers:
    """What is known of pairs beside the stacks that are read of them.

    rounding: what storing a pair as codes rounded away. nominal: the rank that an adapter was asked
    for, None for another update. has_base: whether the base's weight is the first stack.
    is_one_of_several: overlaps with the updates of other tuned models will be asked for.
    """

    rounding: Callable[[WeightPair], Rounding]
    nominal: Callable[[WeightPair], int | None]
    has_base: bool = True
    is_one_of_several: bool = False


def worker(
    kind: str, options: Options, cache: ResultCache | None, headers: Headers
) -> Callable[..., Sequence[Matrix]]:
    """The work on some stacks: what is kept is recalled, finite matrices are measured together.

    It takes base and tuned weights, or the factors of an update (`FactorUpdate.of`) with the base
    before them or without.
    """

    def work(batch: Batch, *stacks: Tensor) -> list[Matrix]:
        results: dict[int, Matrix] = {}
        keys: dict[int, str] = {}
        contents: dict[int, list[str]] = {}
        facts = [(headers.rounding(pair), headers.nominal(pair)) for pair in batch.pairs]
        counts = zip(*(nonfinite_counts(stack) for stack in stacks), strict=True)
        for i, (one, bad) in enumerate(zip(batch.pairs, map(sum, counts), strict=True)):
            if bad:
                reason = f"{bad} entries are NaN or Inf"
                results[i] = failed_matrix(one, kind, options, Status.NON_FINITE, reason)
            elif cache is not None:
                contents[i] = [content_of(stack[i]) for stack in stacks]
                keys[i] = _key(cache, kind, options, contents[i], stacks[0].device.type, facts[i])
                found = _recalled(one, cache.get(keys[i]), kind, options)
                if found is not None:
                    results[i] = found
        rest = [i for i in range(len(batch.pairs)) if i not in results]
        if rest:
            whole = len(rest) == len(batch.pairs)
            taken = stacks if whole else tuple(one[rest] for one in stacks)
            measured = _measured(
                [batch.pairs[i] for i in rest],
                _Read(
                    taken,
                    tuple(facts[i] for i in rest),
                    headers.has_base,
                    _recalls(cache, taken, [contents[i] for i in rest if i in contents], headers),
                ),
                kind,
                options,
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
    contents: Sequence[str],
    device: str,
    facts: tuple[Rounding, int | None],
) -> str:
    return cache.key(
        {
            "stacks": contents,
            "facts": facts,
            "kind": kind,
            "settings": asdict(options.settings),
            "device": device,
        }
    )


def _recalls(
    cache: ResultCache | None,
    stacks: Sequence[Tensor],
    contents: Sequence[Sequence[str]],
    headers: Headers,
) -> dict[str, Recall]:
    """Where factors of the base, and of an update that has overlaps, are kept."""
    found = {"base": recall_of(cache, stacks[0], [own[0] for own in contents])}
    if headers.is_one_of_several and len(stacks) == 2:
        keys = [update_content(*own) for own in contents]
        found["update"] = recall_of(cache, stacks[0], keys)
    return {role: recall for role, recall in found.items() if recall is not None}


def update_content(base: str, tuned: str) -> str:
    """What names the content of an update."""
    return f"{tuned} of {base}"


def recall_of(cache: ResultCache | None, stack: Tensor, contents: Sequence[str]) -> Recall | None:
    """Where factors of these matrices are kept, beside the results; None for small matrices, and
    on other devices, where numbers may depend on the stack.

    contents: of each matrix of the stack.
    """
    if cache is None or stack.device.type != "cpu" or min(stack.shape[-2:]) < _LEAST_SIDE:
        return None
    factors = FactorCache(factors_folder(cache))

    def recall(i: int, facts: Mapping[str, Any], make: Callable[[], Factors]) -> Factors:
        parts = {"content": contents[i], **facts}
        kept = factors.get(parts)
        if kept is None:
            kept = make()
            factors.put(parts, kept)
        return kept

    return recall


def factors_folder(cache: ResultCache) -> Path:
    """Where factors are kept beside results."""
    return cache.folder / "factors"


def _kept(matrix: Matrix) -> dict[str, Any]:
    """What the cache keeps of a matrix; the verdict is judged anew, for limits may change."""
    return {
        "row": {**asdict(matrix.row), "status": {k: v.value for k, v in matrix.row.status.items()}},
        "method": matrix.method,
        "curves": {key: encode(curve) for key, curve in matrix.curves.items()},
        "notes": matrix.notes,
    }


def _recalled(one: WeightPair, kept: Any, kind: str, options: Options) -> Matrix | None:
    """The matrix of what `_kept` gave, judged anew; None for anything else."""
    try:
        status = {key: Status(value) for key, value in kept["row"]["status"].items()}
        row = Measured(**{**kept["row"], "status": status})
        method, notes = kept["method"], tuple(kept["notes"])
        drawn = {key: decode(Curve, curve) for key, curve in kept["curves"].items()}
    except (AttributeError, KeyError, TypeError, ValueError):
        return None
    judged = _judged(row, two_sides(one.shape), kind, options)
    return Matrix(one, row, judged, method, drawn, notes, recalled=True)


def failed_matrix(
    one: WeightPair, kind: str, options: Options, status: Status, reason: str
) -> Matrix:
    """A matrix without numbers, which says why."""
    shape = two_sides(one.shape)
    row = measure_nothing(selected(kind, options, shape), shape, status, seed=options.seed)
    judged = _judged(row, shape, kind, options)
    return Matrix(one, row, judged, notes=(reason,), failure=f"{status.value}: {reason}")


@dataclass(frozen=True)
class _Read:
    """Stacks of some pairs, rounding and nominal rank of each, and where factors are kept."""

    stacks: tuple[Tensor, ...]
    facts: tuple[tuple[Rounding, int | None], ...]
    has_base: bool
    recall: Mapping[str, Recall]

    def factors(self, takes: frozenset[str], ks: Sequence[int], options: Options) -> PairFactors:
        """Raises NumericsError."""
        settings, nominal = options.settings, self.facts[0][1]
        if not self.has_base:
            update = FactorUpdate.of(self.stacks, nominal=nominal)
            return update_factors(update, takes=takes, settings=settings)
        base, *tuned = self.stacks
        return pair_factors(
            base,
            tuned[0] if len(tuned) == 1 else FactorUpdate.of(tuned, nominal=nominal),
            takes=takes,
            ks=ks,
            settings=settings,
            rounding=[one for one, _ in self.facts],
            recall=self.recall,
        )


def _measured(
    pairs: Sequence[WeightPair], read: _Read, kind: str, options: Options
) -> list[Matrix]:
    shape = two_sides(pairs[0].shape)
    chosen = selected(kind, options, shape)
    factors = read.factors(
        takes_of(chosen), [k for k in dimensions(options, shape) if k <= min(shape)], options
    )
    rows = measure(factors, chosen, seed=options.seed)
    values = {name: tensor.cpu() for name, tensor in factors.values.items()}
    drawn = curves(kind, values, shape, seed=options.seed)
    return [
        Matrix(
            pair=one,
            row=row,
            judged=_judged(row, shape, kind, options),
            method=factors.methods[i],
            curves=drawn[i],
            notes=factors.notes[i],
            spectrum=() if options.budget is None else _above_noise(values, shape, i),
        )
        for i, (one, row) in enumerate(zip(pairs, rows, strict=True))
    ]


def _above_noise(values: Mapping[str, Tensor], shape: tuple[int, int], i: int) -> tuple[float, ...]:
    S, noise = values["update.S"][i], values["update.noise"][i]
    edge = noise_edge(S, noise, values["update.bulk_median"], shape=shape)
    return tuple(S[edge < S].tolist())


def _judged(
    row: Measured, shape: tuple[int, int], kind: str, options: Options
) -> MatrixVerdict | None:
    judge = KINDS[kind].judge
    if judge is None:
        return None
    return RULES[judge].matrix(row, verdict_k(options, shape), options.limits)


def two_sides(shape: tuple[int, ...]) -> tuple[int, int]:
    """The shape of a matrix, as its type says."""
    return shape[0], shape[1]
