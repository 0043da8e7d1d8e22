"""A series of adapters: the modules that all of them have with one shape, and their base."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from geoscope.adapters.peft_names import expert_name
from geoscope.errors import OptionError, PairingError
from geoscope.models.checkpoint import Checkpoint
from geoscope.models.split import split
from geoscope.names import NameMap, Selection, in_natural_order
from geoscope.peft.adapter import Adapter
from geoscope.peft.module import AdapterModule
from geoscope.records import ModelRef, Skipped
from geoscope.sources.series import Series, SeriesPoint
from geoscope.verbs.adapters.changes import changes_of
from geoscope.verbs.adapters.names import BasePaths, base_paths, named_as_base
from geoscope.verbs.series.adapted import as_models, not_predicted, of_a_base
from geoscope.verbs.series.model_series import model_series
from geoscope.verbs.series.options import FollowOptions
from geoscope.verbs.series.start import INITIAL, after_start, equal_adapters, has_no_update
from geoscope.verbs.series.tensors import AdapterTensor, MatchedSeries, SeriesTensor, lost_steps

__all__ = ["adapter_series"]


def adapter_series(
    series: Series,
    options: FollowOptions,
    whole: Checkpoint | None,
    initial: Adapter | None,
    *,
    in_parts: bool,
) -> MatchedSeries:
    """The series of adapters, by the modules that all of them have with one shape.

    whole: the base as stored, None where it is not read.
    initial: the adapter before training, where it did not start at zero.
    in_parts: of adapters whose updates are not products, followed as the models that they make.
    Raises OptionError, PairingError, UnsupportedFormat.
    """
    adapters = _checked(series, options, initial)
    names = NameMap(options.map_name)
    laid = _laid(adapters, initial, whole, names, options)
    if any(of_a_base(adapter) is not None for adapter in laid.adapters):
        if not in_parts:
            raise not_predicted(adapters[0])
        made = as_models(series, whole, laid.initial, names)
        return model_series(made, options, whole, in_parts=True)
    series = _from_start(series, laid.adapters, laid.initial)
    laid = replace(laid, adapters=laid.adapters[-len(series.points) :])
    chosen = _chosen_modules(laid.every, options.selection)
    if not chosen.names:
        raise PairingError(_no_common_module(laid.adapters, chosen))
    weights = laid.weights(chosen.names)
    last, base = laid.adapters[-1], laid.base
    sent = sum(info.nbytes for one in last.modules.values() for info in one.stored)
    notes = [*series.notes, *last.notes]
    notes.append(
        f"a weight sync sends the adapter itself, {sent} bytes: no share of changed entries"
    )
    if base is None:
        notes.append("the base is not read, so its size is not known: no relative update")
    return MatchedSeries(
        steps=(series.start or 0, *series.steps),
        tensors=_tensors(laid, chosen.names, weights),
        refs=(ModelRef.not_read(last.base) if base is None else base.ref, last.ref),
        points=tuple(point.given for point in series.points),
        skipped=(*series.passed_over, *chosen.skipped),
        missing=(*chosen.missing, *lost_steps(series)),
        notes=tuple(notes),
        series=series,
        base=base,
        in_parts=in_parts,
    )


def _checked(
    series: Series, options: FollowOptions, initial: Adapter | None
) -> tuple[Adapter, ...]:
    """The adapters of the series. Raises for what cannot be followed by its factors."""
    adapters = tuple(point.adapter for point in series.points if point.adapter is not None)
    if options.scalar_r2 is not None:
        raise OptionError(
            "`scalar_r2` is of the entries of whole models; an adapter's update is never made dense"
        )
    if initial is None:
        _refuse_unknown_start(adapters[0])
    return adapters


@dataclass(frozen=True)
class _Laid:
    """Adapters under the names of their base, with what it tells.

    base: in parts; None where it is not read. paths: of its modules.
    """

    adapters: tuple[Adapter, ...]
    initial: Adapter | None
    base: Checkpoint | None
    paths: BasePaths | None

    @property
    def every(self) -> tuple[Adapter, ...]:
        return (*self.adapters, *([] if self.initial is None else [self.initial]))

    def weights(self, names: Sequence[str]) -> dict[str, list[tuple[str, ...]]]:
        """Module → of each expert the tensors of the base that it adapts."""
        if self.base is None or self.paths is None:
            return {}
        first = self.adapters[0]
        return {
            name: _weights_of(first.modules[name], first, self.base, self.paths) for name in names
        }


def _laid(
    adapters: tuple[Adapter, ...],
    initial: Adapter | None,
    whole: Checkpoint | None,
    names: NameMap,
    options: FollowOptions,
) -> _Laid:
    if whole is None:
        return _Laid(adapters, initial, None, None)
    if whole.is_adapted:
        raise OptionError(
            f"{options.base}: a model with an adapter over it; adapters are followed from the "
            "model itself: give that as `base`"
        )
    base = split(whole)
    paths = base_paths(whole, base)
    over = tuple(_over_base(adapter, base, paths, names) for adapter in adapters)
    start = None if initial is None else _over_base(initial, base, paths, names)
    return _Laid(over, start, base, paths)


def _tensors(
    laid: _Laid, names: Sequence[str], weights: Mapping[str, list[tuple[str, ...]]]
) -> dict[str, SeriesTensor]:
    """One tensor for each matrix of a module, in natural order."""
    tensors: dict[str, SeriesTensor] = {}
    for name in in_natural_order(names):
        module = laid.adapters[0].modules[name]
        for expert in range(module.experts):
            rows = weights[name][expert] if name in weights else ()
            places = tuple((laid.base, row) for row in rows if laid.base is not None)
            called = expert_name(name, expert) if module.is_stack and module.experts > 1 else name
            tensors[called] = AdapterTensor(
                called, module.shape, name, expert, laid.adapters, laid.initial, places
            )
    return tensors


def _from_start(series: Series, adapters: Sequence[Adapter], initial: Adapter | None) -> Series:
    """The adapters after the one before training, or after one without an update.

    adapters: those of the series, with what the base tells.
    """
    of_point = dict(zip((point.given for point in series.points), adapters, strict=True))

    def is_start(point: SeriesPoint) -> bool:
        adapter = of_point[point.given]
        return has_no_update(adapter) if initial is None else equal_adapters(initial, adapter)

    after = after_start(series, is_start, "the base" if initial is None else INITIAL)
    if not after.points:
        raise OptionError(f"{series.points[0].given}: one adapter makes no series; give more")
    return after


def _refuse_unknown_start(adapter: Adapter) -> None:
    """An adapter that did not start at zero, without the one that it started from."""
    if adapter.initial is not None:
        raise OptionError(
            f"{adapter.given}: {adapter.initial}. Its update is therefore not s·B·A alone: "
            "give the adapter as it was before training as `initial_adapter`"
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
