"""The tensors of a series, ready to be read: which they are, and how each changes step by step."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from operator import add
from typing import Protocol

import torch

from geoscope.linalg import Operand, Product
from geoscope.linalg.changes import Side, side
from geoscope.linalg.factor_update import squared_noise
from geoscope.linalg.grids import Grid, grid_of
from geoscope.models.checkpoint import Checkpoint
from geoscope.peft.adapter import Adapter
from geoscope.records import ModelRef, Quantisation, Skipped, TensorInfo
from geoscope.sources.series import Series
from geoscope.trajectory.changed import (
    ChangedEntries,
    StepChange,
    changed_step,
    expected_change,
)
from geoscope.trajectory.factor_series import Factor, FactorSeries
from geoscope.trajectory.increments import (
    Increments,
    increments_of_products,
    increments_of_weights,
)
from geoscope.trajectory.scalar_r2 import ScalarR2, ScalarR2Counts

__all__ = ["AdapterTensor", "Change", "MatchedSeries", "ModelTensor", "SeriesTensor", "lost_steps"]

Change = Operand | Product

# Bytes of all checkpoints' entries of a block in fp64: what a pass over a tensor costs in memory.
_BLOCK_BYTES = 64 << 20
# The same where weights are made of an adapter and its base.
_MADE_BYTES = 1 << 30


class SeriesTensor(Protocol):
    """One weight matrix over the series."""

    @property
    def name(self) -> str: ...

    @property
    def shape(self) -> tuple[int, int]: ...

    @property
    def places(self) -> tuple[tuple[Checkpoint, str], ...]:
        """What is read of checkpoints."""
        ...

    @property
    def stored(self) -> tuple[str, ...]:
        """Every stored part as headers tell it: its shape and dtype."""
        ...

    def increments(self, steps: Sequence[float]) -> Increments:
        """H and what belongs to it, in one pass over the files."""
        ...

    def changes(self) -> Iterator[tuple[Change, Change]]:
        """(Δ_i, δ_i) of every checkpoint, one after the other."""
        ...


@dataclass(frozen=True)
class MatchedSeries:
    """A series that can be followed.

    steps: t_0 of the base, then of every checkpoint.
    tensors: name → tensor, in natural order.
    refs: of the base and of the last checkpoint.
    in_parts: whether fused and stacked tensors of models are in parts.
    is_named: whether the base is one that its reference opens again.
    """

    steps: tuple[int, ...]
    tensors: Mapping[str, SeriesTensor]
    refs: tuple[ModelRef, ...]
    points: tuple[str, ...]
    skipped: tuple[Skipped, ...]
    missing: tuple[str, ...]
    notes: tuple[str, ...]
    series: Series
    base: Checkpoint | None
    in_parts: bool = True
    is_named: bool = True


@dataclass(frozen=True)
class ModelTensor:
    """A weight in whole models: (checkpoint, name there) at every step, the base first.

    is_made: whether every later one is the base with an adapter, in fp64: what storing the base
    rounded away is in all of them, and no noise of a change.
    """

    name: str
    shape: tuple[int, int]
    places: tuple[tuple[Checkpoint, str], ...]
    is_made: bool = False

    @property
    def stored(self) -> tuple[str, ...]:
        return tuple(_told(checkpoint.tensors[name]) for checkpoint, name in self.places)

    def increments(self, steps: Sequence[float]) -> Increments:
        return self.increments_and_changes(steps)[0]

    def increments_and_changes(
        self, steps: Sequence[float]
    ) -> tuple[Increments, ChangedEntries | None]:
        """H, and what changed from step to step; None of weights that no file stores."""
        if self.is_made:
            return replace(self._increments(steps), grids=("",) * len(self.places)), None
        # What storing rounded away is counted with the stored values below.
        found = self._increments(steps, rounding=(0.0,) * len(self.places))
        stored, steps_changed = self._stored()
        found = replace(
            found,
            rounding=tuple(_rounding_of(one.side.noise**2, one.grid) for one in stored),
            grids=tuple("" if one.grid is None else one.grid.name for one in stored),
        )
        sizes = (found.H.diagonal() / (self.shape[0] * self.shape[1])).sqrt().tolist()
        expected = [
            expected_change(before.side, after.side, rms)
            for before, after, rms in zip(stored, stored[1:], sizes, strict=False)
        ]
        entries, sent = math.prod(self.shape), [one.value_bytes for one in stored[1:]]
        return found, ChangedEntries.of(entries, steps_changed, expected, sent)

    def _stored(self) -> tuple[list[_Stored], list[StepChange]]:
        """Every checkpoint as its file holds it, and the changes between neighbours."""
        stored: list[_Stored] = []
        changes: list[StepChange] = []
        before: torch.Tensor | None = None
        for checkpoint, name in self.places:
            weight = checkpoint.read(name)
            stored.append(_Stored.of(weight, checkpoint.rounding(name)))
            if before is not None:
                changes.append(changed_step(before, weight))
            before = weight
        return stored, changes

    def _increments(
        self, steps: Sequence[float], rounding: Sequence[float] | None = None
    ) -> Increments:
        found = (increments_of_weights(steps, part, rounding=rounding) for part in self._parts())
        return reduce(add, found)

    def _parts(self) -> Iterator[list[torch.Tensor]]:
        """Entries of every checkpoint, in the order of the files."""
        entries = math.prod(self.shape)
        room = _MADE_BYTES if self.is_made else _BLOCK_BYTES  # a part costs the whole to make
        width = max(1, room // (8 * len(self.places)))
        for start in range(0, entries, width):
            end = min(start + width, entries)
            parts = [checkpoint.read_part(name, start, end) for checkpoint, name in self.places]
            yield [part.double() for part in parts] if self.is_made else parts

    def scalar_r2(self, steps: Sequence[float], *, published_filter: bool) -> ScalarR2Counts:
        """Entries by their R² on a line in t, in a pass of its own; see `ScalarR2`."""
        found: ScalarR2Counts | None = None
        for part in self._parts():
            base, *series = (weights.double() for weights in part)
            block = ScalarR2(steps[1:], published_filter=published_filter)
            for t, weights in zip(steps[1:], series, strict=True):
                block.add(t, weights - base)
            found = block.counts() if found is None else found + block.counts()
        assert found is not None
        return found

    def changes(self) -> Iterator[tuple[Change, Change]]:
        first, *others = self.places
        base = first[0].read(first[1])[None]
        before = base
        for one, name in others:
            weight = one.read(name)[None]
            yield Operand(weight, base), Operand(weight, before)
            before = weight

    def spans(self, count: int) -> Iterator[Operand]:
        """W_{i+count} − W_i of i = 1 … T − count, for what predicts so many checkpoints ahead."""
        places = self.places[1:]
        for (one, name), (other, later) in zip(places, places[count:], strict=False):
            yield Operand(other.read(later)[None], one.read(name)[None])


# --- adapters -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class AdapterTensor:
    """Updates from factors; nothing is made dense.

    module: of the adapters. expert: which matrix of it, of stacked experts. places: parts of the
    weight in the base, whose squares add up.
    """

    name: str
    shape: tuple[int, int]
    module: str
    expert: int
    adapters: tuple[Adapter, ...]
    initial: Adapter | None
    places: tuple[tuple[Checkpoint, str], ...]

    @property
    def factors(self) -> tuple[TensorInfo, ...]:
        """Headers of the factors, all experts of a stack together."""
        every = self.adapters if self.initial is None else (self.initial, *self.adapters)
        return tuple(info for one in every for info in one.modules[self.module].stored)

    @property
    def stored(self) -> tuple[str, ...]:
        weights = [checkpoint.tensors[name] for checkpoint, name in self.places]
        return tuple(map(_told, (*self.factors, *weights)))

    def increments(self, steps: Sequence[float]) -> Increments:
        return increments_of_products(
            steps, self.updates(), rounding=self.rounding(), base_energy=self.base_energy()
        )

    def rounding(self) -> tuple[float, ...]:
        """N_0 … N_T: what storing the factors rounded away of each product, 0 of no start."""
        every = [self.initial, *self.adapters]
        return tuple(0.0 if one is None else _rounding(self._factor(one)) for one in every)

    def base_energy(self) -> float:
        """‖W_0‖², 0 where the base is not known."""
        return sum(float(Operand(one.read(name)[None]).norm()) ** 2 for one, name in self.places)

    def grams(self) -> FactorSeries | None:
        """All updates through the Gram matrices of their factors; None where ranks differ."""
        start = None if self.initial is None else self._factor(self.initial)
        return FactorSeries.of([self._factor(adapter) for adapter in self.adapters], start)

    def changes(self) -> Iterator[tuple[Change, Change]]:
        before: Product | None = None
        for update in self.updates():
            yield update, update if before is None else update - before
            before = update

    def updates(self) -> list[Product]:
        """Δ_1 … Δ_T, each a stack of one."""
        start = None if self.initial is None else _product(self._factor(self.initial))
        found = [_product(self._factor(adapter)) for adapter in self.adapters]
        return found if start is None else [one - start for one in found]

    def _factor(self, adapter: Adapter) -> Factor:
        B, A = adapter.factors(self.module)
        return B[self.expert], A[self.expert], adapter.modules[self.module].scaling


@dataclass(frozen=True)
class _Stored:
    """A weight as a file stores it.

    grid: on which it lies; codes are known from their file.
    value_bytes: of an entry; None of codes.
    """

    side: Side
    grid: Grid | None
    value_bytes: int | None

    @classmethod
    def of(cls, weight: torch.Tensor, known: Quantisation | None) -> _Stored:
        if known is not None:
            grid = Grid(f"{known.name} grid", known.size**2)
            return cls(replace(side(weight), quantisation=known), grid, None)
        grid = grid_of(weight)
        return cls(replace(side(weight), grid=grid), grid, weight.dtype.itemsize)


def _told(info: TensorInfo) -> str:
    return f"{info.dtype} {info.shape}"


def _rounding_of(storage: float, grid: Grid | None) -> float:
    """Σ of the squared rounding of a weight: of storing its entries, and of its grid."""
    return storage if grid is None else storage + grid.energy


def _rounding(factor: Factor) -> float:
    B, A, scaling = factor
    whole = torch.tensor([[scaling]], dtype=torch.float64)
    return float(squared_noise(B[None], A[None], whole))


def _product(factor: Factor) -> Product:
    B, A, scaling = factor
    return Product.of(B[None], A[None], scaling)


def lost_steps(series: Series) -> tuple[str, ...]:
    """Checkpoints that could not be read, and whose step no other has."""
    return tuple(one.name for one in series.passed_over if one.missing)
