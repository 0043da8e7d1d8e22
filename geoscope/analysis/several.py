"""Several tuned models of one base: how their updates overlap, matrix by matrix."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor

from geoscope.analysis.options import Options
from geoscope.analysis.prepare import Prepared, batches_a_shape
from geoscope.engine import Batch, plan, stream
from geoscope.errors import NumericsError
from geoscope.linalg.changes import nonfinite_entries
from geoscope.metrics.overlaps import overlap
from geoscope.records import Overlap, WeightPair

__all__ = ["overlaps_of"]


def overlaps_of(
    prepared: Sequence[Prepared], a: int, b: int, options: Options
) -> Iterator[Overlap]:
    """Overlaps of the updates of the tuned models number a and b, matrix by matrix."""
    first, second = prepared[a - 1], prepared[b - 1]
    other = {one.base.name: one.tuned.name for one in second.pairing.matrices}
    common = [one for one in first.pairing.matrices if one.base.name in other]

    def read(one: WeightPair) -> tuple[Tensor, Tensor, Tensor]:
        base, tuned = first.base.read(one.base.name), first.tuned.read(one.tuned.name)
        return base, tuned, second.tuned.read(other[one.base.name])

    def work(batch: Batch, *stacks: Tensor) -> list[tuple[Any, dict[str, float]] | None]:
        return [
            _overlap([one[i : i + 1] for one in stacks], options, in_blocks=in_blocks(pair))
            for i, pair in enumerate(batch.pairs)
        ]

    def in_blocks(one: WeightPair) -> bool:
        third = second.tuned.rounding(other[one.base.name])
        return any(lost is not None for lost in (*first.rounding(one), third))

    found = stream(
        plan(
            common,
            memory=first.memory,
            stack=first.devices[0].type != "cpu",
            parts=batches_a_shape(first.devices),
        ),
        read=read,
        work=work,
        devices=first.devices,
        workers=first.workers,
        memory=first.memory,
    )
    results = {outcome.pair.name: outcome.result for outcome in found}
    for one in common:
        result = results[one.name]
        if result is not None:
            yield Overlap(one.name, a, b, *result)


def _overlap(
    stacks: Sequence[Tensor], options: Options, *, in_blocks: bool
) -> tuple[dict[str, float | int | None], dict[str, float]] | None:
    """One matrix; None where it holds NaN or Inf, or where no solver converges."""
    if any(nonfinite_entries(one) for one in stacks):
        return None
    try:
        return overlap(*stacks, ks=options.ks, solver=options.solver, in_blocks=in_blocks)
    except NumericsError:
        return None
