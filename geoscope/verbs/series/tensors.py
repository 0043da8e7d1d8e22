"""The tensors of a series, ready to be read: which they are, and how each changes step by step."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from itertools import pairwise
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

__all__ = [
    "AdapterTensor",
    "AsStored",
    "Change",
    "MatchedSeries",
    "ModelTensor",
    "SeriesTensor",
    "lost_steps",
]

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
        """H. Of weights that files store rounding is 0 until `AsStored` fills it in."""
        if self.is_made:
            return replace(self._increments(steps), grids=("",) * len(self.places))
        return self._increments(steps, rounding=(0.0,) * len(self.places))

    def _increments(
        self, steps: Sequence[float], rounding: Sequence[float] | None = None
    ) -> Increments:
        found = (increments_of_weights(steps, part, rounding=rounding) for part in self._parts())
        return reduce(add, found)

    def _parts(self, *, row: int = 1) -> Iterator[list[torch.Tensor]]:
        """Entries of every checkpoint, in the order of the files; whole rows of so many."""
        entries = math.prod(self.shape)
        room = _MADE_BYTES if self.is_made else _BLOCK_BYTES  # a part costs the whole to make
        width = max(1, room // (8 * len(self.places)) // row) * row
        for start in range(0, entries, width):
            end = min(start + width, entries)
            parts = [checkpoint.read_part(name, start, end) for checkpoint, name in self.places]
            yield [part.double() for part in parts] if self.is_made else parts

    @property
    def is_turned(self) -> bool:
        """Whether files hold it as (in, out)."""
        checkpoint, name = self.places[0]
        return checkpoint.tensors[name].transposed

    def stored_rows(self) -> Iterator[list[torch.Tensor]]:
        """Rows of every checkpoint as files hold them, (c, n), or (c, m) where it is turned."""
        row = self.shape[0] if self.is_turned else self.shape[1]
        for parts in self._parts(row=row):
            yield [part.reshape(-1, row) for part in parts]

    def is_finite(self, number: int) -> bool:
        """Whether all entries of a checkpoint are, the base being 0."""
        checkpoint, name = self.places[number]
        return bool(torch.isfinite(checkpoint.read(name)).all())

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

    def changes(self, stored: AsStored | None = None) -> Iterator[tuple[Change, Change]]:
        """(Δ_i, δ_i) of every checkpoint. stored: gets each weight as its file holds it, the base
        first."""
        base: torch.Tensor | None = None
        before: torch.Tensor | None = None
        for checkpoint, name in self.places:
            weight = checkpoint.read(name)
            if stored is not None:
                stored.add(weight, checkpoint.rounding(name))
            if base is None or before is None:
                base = before = weight[None]
                continue
            yield Operand(weight[None], base), Operand(weight[None], before)
            before = weight[None]

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


class AsStored:
    """What the stored entries of a series of weights tell: rounding, and which of them changed."""

    def __init__(self) -> None:
        self._sides: list[Side] = []
        self._grids: list[Grid | None] = []
        self._value_bytes: list[int | None] = []  # of an entry; None of codes
        self._changes: list[StepChange] = []
        self._before: torch.Tensor | None = None

    def add(self, weight: torch.Tensor, codes: Quantisation | None) -> None:
        """The next checkpoint, the base first. codes: what storing them rounded away, where a file
        holds codes; else the entries tell the grid that they lie on."""
        if codes is not None:
            grid = Grid(f"{codes.name} grid", codes.size**2)
            self._sides.append(replace(side(weight), quantisation=codes))
        else:
            grid = grid_of(weight)
            self._sides.append(replace(side(weight), grid=grid))
        self._grids.append(grid)
        self._value_bytes.append(weight.dtype.itemsize if codes is None else None)
        if self._before is not None:
            self._changes.append(changed_step(self._before, weight))
        self._before = weight

    def told(self, found: Increments, entries: int) -> tuple[Increments, ChangedEntries]:
        """The increments of all of them with their rounding, and what changed from step to step."""
        storage = [one.noise**2 for one in self._sides]
        rounding = map(_rounding_of, storage, self._grids)
        grids = ("" if grid is None else grid.name for grid in self._grids)
        sizes = (found.H.diagonal() / entries).sqrt().tolist()
        expected = [
            expected_change(before, after, rms)
            for (before, after), rms in zip(pairwise(self._sides), sizes, strict=True)
        ]
        changed = ChangedEntries.of(entries, self._changes, expected, self._value_bytes[1:])
        return replace(found, rounding=tuple(rounding), grids=tuple(grids)), changed


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
