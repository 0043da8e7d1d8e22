"""Several tuned models of one base: how their updates overlap, matrix by matrix."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

from torch import Tensor

from geoscope.engine import Batch, matrix_boundary, plan, room_for_batches, stream
from geoscope.engine.cache import ResultCache, content_of
from geoscope.errors import NumericsError
from geoscope.linalg.changes import nonfinite_entries
from geoscope.linalg.factor_update import FactorUpdate
from geoscope.metrics.overlaps import overlap, updates_of
from geoscope.records import Overlap, Skipped, Status, WeightPair
from geoscope.verbs.options import Options
from geoscope.verbs.pairs.matrices import recall_of, update_content
from geoscope.verbs.pairs.measuring import kept_results
from geoscope.verbs.pairs.prepare import Prepared, batches_a_shape

__all__ = ["overlaps_of"]

_Found = tuple[dict[str, float | int | None], dict[str, float]]
# (a, b), model numbers from 1, → what was found; why not; None where one holds NaN or Inf.
_Pairs = dict[tuple[int, int], _Found | str | None]
# Bytes of an entry that the masks of a model hold: what changed, what differs, what grew.
_MASKS = 3


def overlaps_of(prepared: Sequence[Prepared], options: Options) -> list[Overlap | Skipped]:
    """Overlaps of the updates of every two tuned models, matrix by matrix.

    One that failed says why; one with NaN or Inf, which its model's row says, is left out.
    """
    found: dict[str, _Pairs] = {}
    for group in _groups(prepared):
        found |= group.overlaps(options)
    rows: list[Overlap | Skipped] = []
    for a, b in combinations(range(1, len(prepared) + 1), 2):
        for one in prepared[a - 1].pairing.matrices:
            row = found.get(one.base.name, {}).get((a, b))
            if isinstance(row, str):
                reason = f"{Status.NOT_CONVERGED.value}: overlap of {a} and {b}: {row}"
                rows.append(Skipped(one.name, reason, missing=True))
            elif row is not None:
                rows.append(Overlap(one.name, a, b, *row))
    return rows


@dataclass(frozen=True)
class _Group:
    """Matrices of the base that the same tuned models have, in the same dtypes.

    models: by their number, from 1. tuned: what each calls the matrices, by their name in the base.
    """

    models: Mapping[int, Prepared]
    tuned: Mapping[int, Mapping[str, str]]
    matrices: tuple[WeightPair, ...]

    def overlaps(self, options: Options) -> dict[str, _Pairs]:
        """By the name in the base. Where memory allows each model is read once, and factorised
        once."""
        first, cache = next(iter(self.models.values())), kept_results(options)
        batches = plan(
            self.matrices,
            memory=first.memory,
            stack=all(one.stacks for one in self.models.values()),
            parts=batches_a_shape(first.devices),
            entry_bytes=max(map(self._beside, self.matrices)),
        )
        if batches[0].working_bytes > room_for_batches(first.memory) and len(self.models) > 2:
            return self._two_by_two(options)

        def work(batch: Batch, *stacks: Tensor) -> list[_Pairs]:
            return [
                self._of_one(pair, [stack[i : i + 1] for stack in stacks], options, cache)
                for i, pair in enumerate(batch.pairs)
            ]

        outcomes = stream(
            batches,
            read=self._read,
            work=work,
            devices=first.devices,
            workers=first.workers,
            memory=first.memory,
        )
        every = list(combinations(self.models, 2))
        return {
            one.pair.base.name: dict.fromkeys(every, one.failure)
            if one.result is None
            else one.result
            for one in outcomes
        }

    def _two_by_two(self, options: Options) -> dict[str, _Pairs]:
        """The same with two models in memory at a time."""
        found: dict[str, _Pairs] = {one.base.name: {} for one in self.matrices}
        for pair in combinations(self.models, 2):
            two = replace(self, models={number: self.models[number] for number in pair})
            for name, row in two.overlaps(options).items():
                found[name] |= row
        return found

    def _read(self, one: WeightPair) -> tuple[Tensor, ...]:
        """The base, and of each model its weight or the factors of its update."""
        first = next(iter(self.models.values()))
        parts = [first.base.read(one.base.name)]
        for number, side in self.models.items():
            parts += side.tuned.update(side.base, self.tuned[number][one.base.name])
        return tuple(parts)

    def _beside(self, one: WeightPair) -> int:
        """Bytes of an entry that the models beyond the first, and all masks, take."""
        others = (
            side.tuned.tensors[self.tuned[number][one.base.name]].memory_bytes
            for number, side in [*self.models.items()][1:]
        )
        return _MASKS * len(self.models) + -(-sum(others) // math.prod(one.shape))

    def _of_one(
        self,
        one: WeightPair,
        stacks: Sequence[Tensor],
        options: Options,
        cache: ResultCache | None,
    ) -> _Pairs:
        base, *rest = stacks
        if nonfinite_entries(base):
            return {}
        kept: list[int] = []
        sides: list[Tensor | FactorUpdate] = []
        contents: list[str] = []
        own = None if cache is None else content_of(base[0])
        for number, side in self.models.items():
            count = side.tuned.parts_of_update(side.base, self.tuned[number][one.base.name])
            parts, rest = rest[:count], rest[count:]
            if any(map(nonfinite_entries, parts)):
                continue
            kept.append(number)
            sides.append(parts[0] if count == 1 else FactorUpdate.of(parts))
            if own is not None:
                contents.append(update_content(own, content_of(parts[0][0])) if count == 1 else "")
        recall = recall_of(cache, base, contents)
        updates = updates_of(base, sides, ks=options.ks, solver=options.solver, recall=recall)
        found: _Pairs = {}
        for (a, x), (b, y) in combinations(zip(kept, updates, strict=True), 2):
            in_blocks = any(self._is_coded(one, number) for number in (a, b))
            try:
                with matrix_boundary():
                    found[a, b] = overlap(x, y, in_blocks=in_blocks)
            except NumericsError as error:
                if base.device.type != "cpu":
                    raise  # it is tried again on the CPU
                found[a, b] = str(error)
        return found

    def _is_coded(self, one: WeightPair, number: int) -> bool:
        """Whether the base or that model stores the weight as codes."""
        side = self.models[number]
        tuned = self.tuned[number][one.base.name]
        return any(
            model.rounding(name) is not None
            for model, name in ((side.base, one.base.name), (side.tuned, tuned))
        )


def _groups(prepared: Sequence[Prepared]) -> Iterator[_Group]:
    """All matrices that two models have, or more; those of one group can be stacked."""
    tuned = {
        number: {one.base.name: one.tuned for one in side.pairing.matrices}
        for number, side in enumerate(prepared, 1)
    }
    groups: dict[tuple[tuple[int, str], ...], dict[str, WeightPair]] = {}
    for side in prepared:
        for one in side.pairing.matrices:
            name = one.base.name
            key = tuple((i, own[name].dtype) for i, own in tuned.items() if name in own)
            groups.setdefault(key, {}).setdefault(name, one)
    for key, matrices in groups.items():
        if len(key) > 1:
            names = {i: {name: tuned[i][name].name for name in matrices} for i, _ in key}
            models = {i: prepared[i - 1] for i, _ in key}
            yield _Group(models, names, tuple(matrices.values()))
