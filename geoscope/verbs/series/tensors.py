"""The tensors of a series, ready to be read: which they are, and how each changes step by step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from operator import add
from typing import Protocol

import torch

from geoscope.adapters.peft_names import expert_name
from geoscope.errors import OptionError, PairingError, UnsupportedFormat
from geoscope.linalg import Operand, Product
from geoscope.linalg.factor_update import squared_noise
from geoscope.linalg.grids import Grid, grid_of
from geoscope.models.checkpoint import Checkpoint
from geoscope.models.pairing import pair
from geoscope.models.split import common_config, split
from geoscope.models.ungathered import refuse_ungathered
from geoscope.names import NameMap, Selection, in_natural_order
from geoscope.peft.adapter import Adapter
from geoscope.peft.module import AdapterModule
from geoscope.records import ModelRef, Skipped
from geoscope.sources.memory import Opened
from geoscope.sources.open import open_adapter
from geoscope.sources.series import Series, SeriesPoint, open_series, series_in_memory
from geoscope.sources.steps import given_steps
from geoscope.trajectory.factor_series import Factor, FactorSeries
from geoscope.trajectory.increments import (
    Increments,
    increments_of_products,
    increments_of_weights,
)
from geoscope.trajectory.scalar_r2 import ScalarR2, ScalarR2Counts
from geoscope.verbs.adapters.changes import changes_of
from geoscope.verbs.adapters.names import BasePaths, base_paths, named_as_base
from geoscope.verbs.fetching import fetch
from geoscope.verbs.models import in_parts as parts_of
from geoscope.verbs.models import open_model
from geoscope.verbs.options import Progress
from geoscope.verbs.series.options import FollowOptions
from geoscope.verbs.series.start import (
    after_start,
    equal_adapters,
    equal_models,
    has_no_update,
)

__all__ = ["AdapterTensor", "Change", "Followed", "ModelTensor", "SeriesTensor", "open_followed"]

Change = Operand | Product

# Bytes of all checkpoints' entries of a block in fp64: what a pass over a tensor costs in memory.
_BLOCK_BYTES = 64 << 20
_BASE, _INITIAL = "the base (`base`)", "the adapter before training (`initial_adapter`)"


class SeriesTensor(Protocol):
    """One weight matrix over the series."""

    @property
    def name(self) -> str: ...

    @property
    def shape(self) -> tuple[int, int]: ...

    def increments(self, steps: Sequence[float]) -> Increments:
        """H and what belongs to it, in one pass over the files."""
        ...

    def changes(self) -> Iterator[tuple[Change, Change]]:
        """(Δ_i, δ_i) of every checkpoint, one after the other."""
        ...


@dataclass(frozen=True)
class Followed:
    """A series that can be followed. steps: t_0 of the base, then of every checkpoint. tensors:
    name → tensor, in natural order. refs: of the base and of the last checkpoint.
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


def open_followed(
    references: Sequence[Opened],
    options: FollowOptions,
    progress: Progress | None = None,
    *,
    start: Checkpoint | None = None,
    in_parts: bool = True,
) -> Followed:
    """The series and its base, matched tensor by tensor; data of the Hub is fetched.

    start: the base, where it is open already and not a reference in the options.
    in_parts: fused and stacked tensors of models in parts; without it as they are stored.
    Raises OptionError, CheckpointError, PairingError.
    """
    progress = progress or Progress()
    steps = None if options.steps is None else given_steps(options.steps)
    base, initial = start, None
    if start is None and options.base is not None:
        base = open_model(options.base, on_progress=progress.on_download)
    if options.initial_adapter is not None:
        initial = open_adapter(
            options.initial_adapter, alpha=options.lora_alpha, on_progress=progress.on_download
        )
    places = [one for one in references if isinstance(one, str)]
    if len(places) == len(references):
        series = open_series(
            places,
            steps=steps,
            alpha=options.lora_alpha,
            starts=_starts(base, initial),
            on_progress=progress.on_download,
        )
    elif places:
        raise OptionError("references: paths and models in memory make no one series; open all")
    else:
        series = series_in_memory([one for one in references if not isinstance(one, str)], steps)
    if series.kind == "adapter":
        return _of_adapters(series, options, progress, base, initial)
    if options.initial_adapter is not None:
        raise OptionError("`initial_adapter` is for series of adapters; these are whole models")
    if options.lora_alpha is not None:
        raise OptionError("`lora_alpha` is for series of adapters; these are whole models")
    return _of_models(series, options, progress, base, in_parts=in_parts)


def _starts(base: Checkpoint | None, initial: Adapter | None) -> dict[str, str]:
    """Where what a series starts from lies → what it is."""
    found = {} if base is None else {base.ref.resolved: _BASE}
    return found if initial is None else {**found, initial.resolved: _INITIAL}


# --- whole models ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class ModelTensor:
    """A weight in whole models: (checkpoint, name there) at every step, the base first."""

    name: str
    shape: tuple[int, int]
    places: tuple[tuple[Checkpoint, str], ...]

    def increments(self, steps: Sequence[float]) -> Increments:
        entries = self.shape[0] * self.shape[1]
        width = max(1, _BLOCK_BYTES // (8 * len(self.places)))
        parts = (
            increments_of_weights(
                steps,
                [
                    one.read_part(name, start, min(start + width, entries))
                    for one, name in self.places
                ],
            )
            for start in range(0, entries, width)
        )
        found = reduce(add, parts)
        grids = [_grid(one, name) for one, name in self.places]
        return replace(
            found,
            rounding=tuple(map(_rounding_of, found.rounding, grids)),
            grids=tuple("" if one is None else one.name for one in grids),
        )

    def scalar_r2(self, steps: Sequence[float], *, published_filter: bool) -> ScalarR2Counts:
        """Entries by their R² on a line in t, in a pass of its own; see `ScalarR2`."""
        entries = self.shape[0] * self.shape[1]
        width = max(1, _BLOCK_BYTES // (8 * len(self.places)))
        found: ScalarR2Counts | None = None
        for start in range(0, entries, width):
            end = min(start + width, entries)
            base, *series = (one.read_part(name, start, end).double() for one, name in self.places)
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


def _of_models(
    series: Series,
    options: FollowOptions,
    progress: Progress,
    start: Checkpoint | None,
    *,
    in_parts: bool,
) -> Followed:
    rules = NameMap(options.map_name)
    series, base, checkpoints = _from_base(series, start, rules)
    steps = series.steps if start is None else (series.start or 0, *series.steps)
    notes: tuple[str, ...] = ()
    if in_parts:
        config = common_config(base, *checkpoints)
        whole, (base, *checkpoints) = base, [parts_of(one, config) for one in (base, *checkpoints)]
        notes = base.notes[len(whole.notes) :]
    notes += rules.notes(name for one in (base, *checkpoints) for name in one.tensors)
    pairings = [pair(base, one, options.selection, rules) for one in checkpoints]
    names = [{one.name: one for one in found.matrices} for found in pairings]
    common = [name for name in names[0] if all(name in found for found in names)]
    absent = {name for found in names for name in found} - set(common)
    absent |= {name for found in pairings for name in found.missing}
    if not common:
        raise PairingError(
            f"{base.ref.given}: no matrix is in all {len(checkpoints)} checkpoints with one shape; "
            "see `geoscope inspect` on the first and the last"
        )
    tensors: dict[str, SeriesTensor] = {}
    for name in in_natural_order(common):
        pairs = [found[name] for found in names]
        places = (
            (base, pairs[0].base.name),
            *((one, two.tuned.name) for one, two in zip(checkpoints, pairs, strict=True)),
        )
        if len({one.tensors[stored].transposed for one, stored in places}) > 1:
            absent.add(name)
            continue
        m, n = pairs[0].shape
        tensors[name] = ModelTensor(name, (m, n), places)
    wanted = (
        (one, [stored for tensor in tensors.values() for c, stored in _places(tensor) if c is one])
        for one in (base, *checkpoints)
    )
    fetch(wanted, progress)
    return Followed(
        steps=steps,
        tensors=tensors,
        refs=(base.ref, checkpoints[-1].ref),
        points=tuple(point.given for point in series.points),
        skipped=(*series.passed_over, *pairings[0].skipped),
        missing=(*in_natural_order(absent), *_lost_steps(series)),
        notes=(*series.notes, *notes),
        series=series,
        base=base,
    )


def _from_base(
    series: Series, base: Checkpoint | None, names: NameMap
) -> tuple[Series, Checkpoint, list[Checkpoint]]:
    """The series, its base, and the models after that; without a base the first one is it."""
    if base is not None:
        refuse_ungathered(base)
        series = after_start(
            series,
            lambda point: (
                point.checkpoint is not None and equal_models(base, point.checkpoint, names)
            ),
            _BASE,
        )
    found = [point.checkpoint for point in series.points if point.checkpoint is not None]
    if base is None and len(found) > 1:
        return series, found[0], found[1:]
    if base is None or not found:
        given = [point.given for point in series.points] or [one.name for one in series.passed_over]
        raise OptionError(f"{given[-1]}: one checkpoint makes no series; give more, or `base`")
    return series, base, found


def _lost_steps(series: Series) -> tuple[str, ...]:
    """Checkpoints that could not be read, and whose step no other has."""
    return tuple(one.name for one in series.passed_over if one.missing)


def _places(tensor: SeriesTensor) -> tuple[tuple[Checkpoint, str], ...]:
    assert isinstance(tensor, ModelTensor)
    return tensor.places


# --- adapters -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class AdapterTensor:
    """Updates from factors; nothing is made dense.

    module: of the adapters. expert: which matrix of it, of stacked experts. base: parts of the
    weight in the base, whose squares add up.
    """

    name: str
    shape: tuple[int, int]
    module: str
    expert: int
    adapters: tuple[Adapter, ...]
    initial: Adapter | None
    base: tuple[tuple[Checkpoint, str], ...]

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
        return sum(float(Operand(one.read(name)[None]).norm()) ** 2 for one, name in self.base)

    def grams(self) -> FactorSeries | None:
        """All updates through the Gram matrices of their factors; None where ranks differ."""
        start = None if self.initial is None else self._factor(self.initial)
        return FactorSeries.of([self._factor(one) for one in self.adapters], start)

    def changes(self) -> Iterator[tuple[Change, Change]]:
        before: Product | None = None
        for update in self.updates():
            yield update, update if before is None else update - before
            before = update

    def updates(self) -> list[Product]:
        """Δ_1 … Δ_T, each a stack of one."""
        start = None if self.initial is None else _product(self._factor(self.initial))
        found = [_product(self._factor(one)) for one in self.adapters]
        return found if start is None else [one - start for one in found]

    def _factor(self, adapter: Adapter) -> Factor:
        B, A = adapter.factors(self.module)
        return B[self.expert], A[self.expert], adapter.modules[self.module].scaling


def _grid(checkpoint: Checkpoint, name: str) -> Grid | None:
    """The grid that a weight lies on; FP8 blocks do not show in the entries, read as fp32."""
    known = checkpoint.rounding(name)
    if known is not None:
        return Grid("FP8 grid in blocks", known**2)
    return grid_of(checkpoint.read(name))


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


def _of_adapters(
    series: Series,
    options: FollowOptions,
    progress: Progress,
    whole: Checkpoint | None,
    initial: Adapter | None,
) -> Followed:
    adapters = tuple(point.adapter for point in series.points if point.adapter is not None)
    if options.scalar_r2 is not None:
        raise OptionError(
            "`scalar_r2` is of the entries of whole models; an adapter's update is never made dense"
        )
    if initial is None:
        _refuse_unknown_start(adapters[0])
    every = [*adapters, *([] if initial is None else [initial])]
    for one in every:
        _refuse_updates_of_a_base(one)
    series = _from_start(series, initial)
    adapters = adapters[-len(series.points) :]
    base = None
    if whole is not None:
        base = split(whole)
        if whole.is_adapted:
            raise OptionError(
                f"{options.base}: a model with an adapter over it; adapters are followed from the "
                "model itself: give that as `base`"
            )
    rules = NameMap(options.map_name)
    paths = None if whole is None else base_paths(whole, base)
    if base is not None and paths is not None:
        adapters = tuple(_over_base(one, base, paths, rules) for one in adapters)
        initial = None if initial is None else _over_base(initial, base, paths, rules)
    every = (*adapters, *([] if initial is None else [initial]))
    chosen = _chosen_modules(every, options.selection)
    if not chosen.names:
        raise PairingError(_no_common_module(adapters, chosen))
    skipped, missing = [*series.passed_over, *chosen.skipped], chosen.missing
    weights: dict[str, list[tuple[str, ...]]] = {}
    if base is not None and paths is not None:
        weights = {
            name: _weights_of(adapters[0].modules[name], adapters[0], base, paths)
            for name in chosen.names
        }
        fetch([(base, [name for one in weights.values() for row in one for name in row])], progress)
    tensors: dict[str, SeriesTensor] = {}
    for name in in_natural_order(chosen.names):
        module = adapters[0].modules[name]
        for expert in range(module.experts):
            rows = weights[name][expert] if name in weights else ()
            places = tuple((base, row) for row in rows if base is not None)
            called = expert_name(name, expert) if module.is_stack and module.experts > 1 else name
            tensors[called] = AdapterTensor(
                called, module.shape, name, expert, adapters, initial, places
            )
    last = adapters[-1]
    first = ModelRef.not_read(last.base) if base is None else base.ref
    notes = [*series.notes, *adapters[-1].notes]
    if base is None:
        notes.append("without `base` the size of the base is not known: no relative update")
    return Followed(
        steps=(series.start or 0, *series.steps),
        tensors=tensors,
        refs=(first, last.ref),
        points=tuple(point.given for point in series.points),
        skipped=tuple(skipped),
        missing=(*missing, *_lost_steps(series)),
        notes=tuple(notes),
        series=series,
        base=base,
    )


def _from_start(series: Series, initial: Adapter | None) -> Series:
    """The adapters after the one before training, or after one without an update."""

    def is_start(point: SeriesPoint) -> bool:
        assert point.adapter is not None  # a series has one kind
        if initial is None:
            return has_no_update(point.adapter)
        return equal_adapters(initial, point.adapter)

    found = after_start(series, is_start, "the base" if initial is None else _INITIAL)
    if not found.points:
        raise OptionError(f"{series.points[0].given}: one adapter makes no series; give more")
    return found


def _refuse_updates_of_a_base(adapter: Adapter) -> None:
    """An adapter whose updates are no products of factors by themselves."""
    of_base = [module for module in adapter.modules.values() if module.kind == "base"]
    if of_base:
        raise UnsupportedFormat(
            f"{adapter.given}: {of_base[0].called} is not followed by its factors alone; merge "
            "every step into the base (PeftModel.merge_and_unload) and give the merged folders"
        )


def _refuse_unknown_start(adapter: Adapter) -> None:
    """An adapter that did not start at zero, without the one that it started from."""
    if adapter.initial is not None:
        raise OptionError(
            f"{adapter.given}: {adapter.initial}, so its update is not s·B·A; give "
            "the adapter before training as `initial_adapter`"
        )


@dataclass(frozen=True)
class _Chosen:
    """Modules that all adapters have with one shape; what was left out; what only some have so.

    reasons: of a missing one, why."""

    names: tuple[str, ...]
    skipped: tuple[Skipped, ...]
    missing: tuple[str, ...]
    reasons: Mapping[str, str]


def _chosen_modules(every: Sequence[Adapter], selection: Selection) -> _Chosen:
    names: list[str] = []
    skipped: list[Skipped] = []
    reasons: dict[str, str] = {}
    for name in dict.fromkeys(name for one in every for name in one.modules):
        reason = selection.reason_against(f"{name}.weight", in_default_scope=True, scope_reason="")
        held = [one.modules[name] for one in every if name in one.modules]
        if reason is not None:
            skipped.append(Skipped(name, reason))
        elif len(held) < len(every):
            reasons[name] = f"in {len(held)} of {len(every)} adapters"
        elif len(shapes := {(one.experts, one.shape) for one in held}) > 1:
            reasons[name] = f"of {len(shapes)} shapes"
        else:
            names.append(name)
    return _Chosen(tuple(names), tuple(skipped), tuple(reasons), reasons)


def _no_common_module(adapters: Sequence[Adapter], chosen: _Chosen) -> str:
    given = adapters[0].given
    if not chosen.reasons:
        return f"{given}: no module passes `include`, `exclude` and `layers`"
    name, reason = next(iter(chosen.reasons.items()))
    return (
        f"{given}: no module is in all {len(adapters)} adapters with one shape; first {name}, "
        f"{reason}"
    )


def _over_base(adapter: Adapter, base: Checkpoint, paths: BasePaths, names: NameMap) -> Adapter:
    """The adapter under the names of the base, with what the base tells."""
    return named_as_base(adapter, paths, names)[0].with_base(paths.every, base.config)


def _weights_of(
    module: AdapterModule, adapter: Adapter, base: Checkpoint, paths: BasePaths
) -> list[tuple[str, ...]]:
    """Of each expert (of a module: of the one) the tensors of the base in parts that it adapts.

    Raises PairingError for a module that the base lacks, or has in another shape."""
    alone = replace(adapter, modules={module.name: module}, replaced={}, rows={}, vectors={})
    found: list[list[str]] = [[] for _ in range(module.experts)]
    for name, change in changes_of(alone, paths, base).by_name.items():
        found[change.expert].append(name if name in base.tensors else base.tied_to[name])
    return [tuple(one) for one in found]
