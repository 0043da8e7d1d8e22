"""The tensors of a series, ready to be read: which they are, and how each changes step by step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from operator import add
from typing import Protocol

import torch

from geoscope.adapters.peft_names import module_paths
from geoscope.analysis.fetching import fetch
from geoscope.analysis.follow_options import FollowOptions
from geoscope.analysis.models import in_parts as parts_of
from geoscope.analysis.models import open_model
from geoscope.analysis.options import Progress
from geoscope.checkpoints import Checkpoint, pair
from geoscope.checkpoints.peft.adapted import AdaptedCheckpoint
from geoscope.checkpoints.peft.adapter import Adapter, open_adapter
from geoscope.checkpoints.peft.module import AdapterModule
from geoscope.checkpoints.series import Series, open_series
from geoscope.checkpoints.split import common_config
from geoscope.checkpoints.steps import given_steps
from geoscope.errors import OptionError, PairingError, UnsupportedFormat, first_names
from geoscope.linalg import Operand, Product
from geoscope.linalg.factor_update import squared_noise
from geoscope.names import NameMap, in_natural_order
from geoscope.records import ModelRef, Skipped
from geoscope.trajectory.factor_series import Factor, FactorSeries
from geoscope.trajectory.increments import (
    Increments,
    increments_of_products,
    increments_of_weights,
)
from geoscope.trajectory.scalar_r2 import ScalarR2, ScalarR2Counts

__all__ = ["AdapterTensor", "Change", "Followed", "ModelTensor", "SeriesTensor", "open_followed"]

Change = Operand | Product

# Bytes of all checkpoints' entries of a block in fp64: what a pass over a tensor costs in memory.
_BLOCK_BYTES = 64 << 20


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
    references: Sequence[str],
    options: FollowOptions,
    progress: Progress | None = None,
    *,
    in_parts: bool = True,
) -> Followed:
    """The series and its base, matched tensor by tensor; data of the Hub is fetched.

    in_parts: fused and stacked tensors of models in parts; without it as they are stored.
    Raises OptionError, CheckpointError, PairingError.
    """
    progress = progress or Progress()
    steps = None if options.steps is None else given_steps(options.steps)
    series = open_series(
        references, steps=steps, alpha=options.lora_alpha, on_progress=progress.on_download
    )
    if series.kind == "adapter":
        return _of_adapters(series, options, progress)
    if options.initial_adapter is not None:
        raise OptionError("`initial_adapter` is for series of adapters; these are whole models")
    if options.lora_alpha is not None:
        raise OptionError("`lora_alpha` is for series of adapters; these are whole models")
    return _of_models(series, options, progress, in_parts=in_parts)


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
        # What FP8 rounded away does not show in the entries, which are read as fp32.
        rounded = [one.rounding(name) for one, name in self.places]
        rounding = tuple(
            energy if known is None else known**2
            for energy, known in zip(found.rounding, rounded, strict=True)
        )
        return replace(found, rounding=rounding)

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
    series: Series, options: FollowOptions, progress: Progress, *, in_parts: bool
) -> Followed:
    models = [point.checkpoint for point in series.points]
    checkpoints = [one for one in models if one is not None]
    steps = list(series.steps)
    if options.base is not None:
        base = open_model(options.base, on_progress=progress.on_download)
        if steps[0] <= 0:
            raise OptionError(
                f"{series.points[0].given}: step {steps[0]} stands beside `base`, which is step 0; "
                "leave one of them out"
            )
        steps = [0, *steps]
    else:
        base, checkpoints = checkpoints[0], checkpoints[1:]
    if not checkpoints:
        raise OptionError(
            f"{series.points[0].given}: one checkpoint makes no series; give more, or `base`"
        )
    notes: tuple[str, ...] = ()
    if in_parts:
        config = common_config(base, *checkpoints)
        whole, (base, *checkpoints) = base, [parts_of(one, config) for one in (base, *checkpoints)]
        notes = base.notes[len(whole.notes) :]
    rules = NameMap(options.map_name)
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
        steps=tuple(steps),
        tensors=tensors,
        refs=(base.ref, checkpoints[-1].ref),
        points=tuple(point.given for point in series.points),
        skipped=(*series.passed_over, *pairings[0].skipped),
        missing=(*in_natural_order(absent), *_lost_steps(series)),
        notes=(*series.notes, *notes),
        series=series,
        base=base,
    )


def _lost_steps(series: Series) -> tuple[str, ...]:
    """Checkpoints that could not be read, and whose step no other has."""
    return tuple(one.name for one in series.passed_over if one.missing)


def _places(tensor: SeriesTensor) -> tuple[tuple[Checkpoint, str], ...]:
    assert isinstance(tensor, ModelTensor)
    return tensor.places


# --- adapters -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class AdapterTensor:
    """Updates from factors; nothing is made dense."""

    name: str
    shape: tuple[int, int]
    adapters: tuple[Adapter, ...]
    initial: Adapter | None
    base: tuple[Checkpoint, str] | None

    def increments(self, steps: Sequence[float]) -> Increments:
        return increments_of_products(
            steps, self.updates(), rounding=self.rounding(), base_energy=self.base_energy()
        )

    def rounding(self) -> tuple[float, ...]:
        """N_0 … N_T: what storing the factors rounded away of each product, 0 of no start."""
        every = [self.initial, *self.adapters]
        return tuple(0.0 if one is None else _rounding(one, self.name) for one in every)

    def base_energy(self) -> float:
        """‖W_0‖², 0 where the base is not known."""
        if self.base is None:
            return 0.0
        checkpoint, name = self.base
        return float(Operand(checkpoint.read(name)[None]).norm()) ** 2

    def grams(self) -> FactorSeries | None:
        """All updates through the Gram matrices of their factors; None where ranks differ."""
        start = None if self.initial is None else _factor(self.initial, self.name)
        return FactorSeries.of([_factor(one, self.name) for one in self.adapters], start)

    def changes(self) -> Iterator[tuple[Change, Change]]:
        before: Product | None = None
        for update in self.updates():
            yield update, update if before is None else update - before
            before = update

    def updates(self) -> list[Product]:
        """Δ_1 … Δ_T, each a stack of one."""
        start = None if self.initial is None else _product(self.initial, self.name)
        found = [_product(one, self.name) for one in self.adapters]
        return found if start is None else [one - start for one in found]


def _factor(adapter: Adapter, module: str) -> Factor:
    """The module's factors as matrices; stacks are not followed."""
    B, A = adapter.factors(module)
    return B[0], A[0], adapter.modules[module].scaling


def _rounding(adapter: Adapter, module: str) -> float:
    scaling = torch.tensor([[adapter.modules[module].scaling]], dtype=torch.float64)
    return float(squared_noise(*adapter.factors(module), scaling))


def _product(adapter: Adapter, module: str) -> Product:
    return Product.of(*adapter.factors(module), adapter.modules[module].scaling)


def _of_adapters(series: Series, options: FollowOptions, progress: Progress) -> Followed:
    adapters = tuple(point.adapter for point in series.points if point.adapter is not None)
    if options.scalar_r2 is not None:
        raise OptionError(
            "`scalar_r2` is of the entries of whole models; an adapter's update is never made dense"
        )
    initial = None
    if options.initial_adapter is not None:
        initial = open_adapter(
            options.initial_adapter, alpha=options.lora_alpha, on_progress=progress.on_download
        )
    else:
        _refuse_unknown_start(adapters[0])
    if series.steps[0] <= 0:
        raise OptionError(
            f"{series.points[0].given}: step {series.steps[0]} is that of the base; leave it out, "
            "or give it as `initial_adapter`"
        )
    every = [*adapters, *([] if initial is None else [initial])]
    for one in every:
        _refuse_updates_of_a_base(one)
    selection = options.selection
    names: list[str] = []
    skipped = list(series.passed_over)
    missing: list[str] = []
    for name, module in adapters[0].modules.items():
        shapes = {one.modules[name].shape for one in every if name in one.modules}
        reason = selection.reason_against(f"{name}.weight", in_default_scope=True, scope_reason="")
        if reason is not None:
            skipped.append(Skipped(name, reason))
        elif module.is_stack:
            skipped.append(Skipped(name, "stacked experts are not followed yet", missing=True))
            missing.append(name)
        elif len(shapes) != 1 or not all(name in one.modules for one in every):
            missing.append(name)
        else:
            names.append(name)
    if not names:
        raise PairingError(
            f"{adapters[0].given}: no module is in all {len(adapters)} adapters with one shape"
        )
    base, weights = None, dict[str, tuple[Checkpoint, str]]()
    if options.base is not None:
        base = open_model(options.base, on_progress=progress.on_download)
        if isinstance(base, AdaptedCheckpoint):
            raise OptionError(
                f"{options.base}: a model with an adapter over it; adapters are followed from the "
                "model itself: give that as `base`"
            )
        weights = _weights_of(base, {name: adapters[0].modules[name] for name in names})
        fetch([(base, [name for _, name in weights.values()])], progress)
    tensors: dict[str, SeriesTensor] = {
        name: AdapterTensor(
            name, adapters[0].modules[name].shape, adapters, initial, weights.get(name)
        )
        for name in in_natural_order(names)
    }
    last = adapters[-1]
    first = ModelRef.not_read(last.base) if base is None else base.ref
    notes = list(series.notes)
    if base is None:
        notes.append("without --base the size of the base is not known: no relative update")
    return Followed(
        steps=(0, *series.steps),
        tensors=tensors,
        refs=(first, last.ref),
        points=tuple(point.given for point in series.points),
        skipped=tuple(skipped),
        missing=(*missing, *_lost_steps(series)),
        notes=tuple(notes),
        series=series,
        base=base,
    )


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


def _weights_of(
    base: Checkpoint, modules: Mapping[str, AdapterModule]
) -> dict[str, tuple[Checkpoint, str]]:
    """Module → its weight in the base. Raises PairingError for one that the base lacks, or has in
    another shape."""
    live = module_paths(list(base.tensors), base.config).paths
    by_path = {path: name for name, path in live.items()}
    for name, module in modules.items():
        info = base.tensors.get(by_path.get(name, ""))
        if info is not None and not module.fits(info.shape):
            raise PairingError(
                f"{base.ref.given}: {name} is {info.shape}, and adapted as {module.shape}; give "
                "the model that the adapters were trained on"
            )
    if lacking := [name for name in modules if name not in by_path]:
        raise PairingError(
            f"{base.ref.given}: lacks {len(lacking)} modules of the adapters: "
            f"{first_names(lacking)}; give the model that they were trained on"
        )
    return {name: (base, by_path[name]) for name in modules}
