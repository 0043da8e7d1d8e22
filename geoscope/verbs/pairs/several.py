"""Several tuned models of one base: how their updates overlap, matrix by matrix."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor

from geoscope.engine import Batch, plan, stream
from geoscope.engine.cache import ResultCache, content_of
from geoscope.linalg.changes import nonfinite_entries
from geoscope.linalg.factor_update import FactorUpdate
from geoscope.metrics.overlaps import overlap
from geoscope.records import Overlap, Skipped, Status, WeightPair
from geoscope.verbs.options import Options
from geoscope.verbs.pairs.matrices import recall_of, update_content
from geoscope.verbs.pairs.measuring import kept_results
from geoscope.verbs.pairs.prepare import Prepared, batches_a_shape

__all__ = ["overlaps_of"]


def overlaps_of(
    prepared: Sequence[Prepared], a: int, b: int, options: Options
) -> Iterator[Overlap | Skipped]:
    """Overlaps of the updates of the tuned models number a and b, matrix by matrix.

    One that failed says why; one with NaN or Inf, which its model's row says, is left out.
    """
    first, second = prepared[a - 1], prepared[b - 1]
    other = {matrix.base.name: matrix.tuned.name for matrix in second.pairing.matrices}
    common = [matrix for matrix in first.pairing.matrices if matrix.base.name in other]

    def read(one: WeightPair) -> tuple[Tensor, ...]:
        base = first.base.read(one.base.name)
        updates = (
            side.tuned.update(side.base, name)
            for side, name in ((first, one.tuned.name), (second, other[one.base.name]))
        )
        return base, *(part for update in updates for part in update)

    def work(batch: Batch, *stacks: Tensor) -> list[tuple[Any, dict[str, float]] | None]:
        # Of one batch all are alike: stacks hold pairs of equal dtypes, of adapters one pair.
        count = first.tuned.parts_of_update(first.base, batch.pairs[0].tuned.name)
        return [
            _overlap(
                [stack[i : i + 1] for stack in stacks],
                count,
                options,
                in_blocks=in_blocks(pair),
                cache=cache,
            )
            for i, pair in enumerate(batch.pairs)
        ]

    cache = kept_results(options)

    def in_blocks(one: WeightPair) -> bool:
        third = second.tuned.rounding(other[one.base.name])
        return any(lost is not None for lost in (*first.rounding(one), third))

    found = stream(
        plan(
            common,
            memory=first.memory,
            stack=first.stacks and second.stacks,
            parts=batches_a_shape(first.devices),
        ),
        read=read,
        work=work,
        devices=first.devices,
        workers=first.workers,
        memory=first.memory,
    )
    outcomes = {outcome.pair.name: outcome for outcome in found}
    for one in common:
        outcome = outcomes[one.name]
        if outcome.result is not None:
            yield Overlap(one.name, a, b, *outcome.result)
        elif outcome.failure is not None:
            reason = f"{Status.NOT_CONVERGED.value}: overlap of {a} and {b}: {outcome.failure}"
            yield Skipped(one.name, reason, missing=True)


def _overlap(
    stacks: Sequence[Tensor],
    count: int,
    options: Options,
    *,
    in_blocks: bool,
    cache: ResultCache | None,
) -> tuple[dict[str, float | int | None], dict[str, float]] | None:
    """One matrix; None where it holds NaN or Inf.

    stacks: the base, `count` of the first update, the rest of the second.
    """
    if any(nonfinite_entries(stack) for stack in stacks):
        return None
    base, *updates = stacks
    sides = [
        part[0] if len(part) == 1 else FactorUpdate.of(part)
        for part in (updates[:count], updates[count:])
    ]
    recall = None
    if cache is not None and len(updates) == 2:
        own = content_of(base)
        contents = [update_content(own, content_of(update)) for update in updates]
        recall = recall_of(cache, base, contents)
    how = {"ks": options.ks, "solver": options.solver, "in_blocks": in_blocks}
    return overlap(base, *sides, **how, recall=recall)
