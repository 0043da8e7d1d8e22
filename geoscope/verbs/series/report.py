"""From increments and rank-1 paths to a Report of kind `trajectory`.

Sums of increments give module kinds and the model; skill is pooled over matrices, never over their
sum. Ids that are one number a step are series; where docs/methods.md has one number and a series
under one name, the series is `…_by_step`, but `rank1_share`, `gap21` and `direction_cosine` are
series, and their numbers `…_last` and `…_mean`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import reduce
from operator import add
from typing import Any

from torch import Tensor

from geoscope._version import __version__
from geoscope.linalg.small import gram_eigen
from geoscope.names import layer_index, module_kind
from geoscope.records import (
    Coverage,
    LayerRecord,
    Layers,
    Provenance,
    Report,
    Skipped,
    Status,
    Summary,
    Verdict,
)
from geoscope.thresholds import MOTION_THRESHOLDS
from geoscope.trajectory.backtest import Backtest, PredictionProducts, backtest
from geoscope.trajectory.changed import ChangedEntries
from geoscope.trajectory.headline import drift_or_diffusion
from geoscope.trajectory.horizon import credible_horizon
from geoscope.trajectory.increments import Increments
from geoscope.trajectory.methods import PLAIN
from geoscope.trajectory.metric_relation import METRIC_RELATIONS
from geoscope.trajectory.rank1 import Rank1Path, rank1_statistics, rank1_totals
from geoscope.trajectory.scalar_r2 import ScalarR2Counts, scalar_r2_walk
from geoscope.trajectory.spatial_rank1 import spatial_moves
from geoscope.trajectory.statistics import STATISTICS, Statistics, statistics
from geoscope.trajectory.storage_noise import noise_state
from geoscope.trajectory.walk import walk
from geoscope.verbs.series.between import CHANGES, add_changes
from geoscope.verbs.series.depth import add_depth
from geoscope.verbs.series.distance import SeriesDistance
from geoscope.verbs.series.metric import MetricCurve, MetricLink, metric_link
from geoscope.verbs.series.numbers import SeriesNumbers, Steps
from geoscope.verbs.series.options import FollowOptions
from geoscope.verbs.series.tensors import MatchedSeries
from geoscope.verbs.series.traps import series_traps

__all__ = ["IDS", "KIND", "Trajectory", "trajectory_report", "traps_of"]

KIND = "trajectory"
_SKILLS = ("hold", *PLAIN, *(f"damped({name})" for name in PLAIN), "auto")
# Ids of the model's numbers.
IDS = (
    *STATISTICS,
    "base_cosine",
    *CHANGES,
    "depth_centre",
    "rank1_share_last",
    "norm_fraction",
    "scalar_r2_median",
    "scalar_r2_share",
    "scalar_r2_kept",
    *(f"skill@{name}" for name in _SKILLS),
    "horizon",
    "horizon_resolved",
    *METRIC_RELATIONS,
    "pls_r2_mean",
    "pls_skill_mean",
)
_LAST = {"rank1_share": "rank1_share_last", "gap21": "gap21_last"}
_MEAN = {"direction_cosine": "direction_cosine_mean"}
# Entries of the simulated walk behind the null of R²: good to .006, and quick beside the pass.
_NULL_ENTRIES = 1 << 14


@dataclass(frozen=True)
class Trajectory:
    """What the pass over a series keeps: name → increments, leading pairs of Δ_i and of δ_i,
    u_iᵀΔ_τv_j, how the pairs were found, entries by R², and stored entries that changed.
    """

    increments: Mapping[str, Increments]
    paths: Mapping[str, Rank1Path]
    local: Mapping[str, Rank1Path]
    products: Mapping[str, Tensor]
    failed: tuple[Skipped, ...]
    methods: Mapping[str, Mapping[str, Mapping[str, Any]]] = field(default_factory=dict)
    scalar_r2: Mapping[str, ScalarR2Counts] = field(default_factory=dict)
    changed: Mapping[str, ChangedEntries] = field(default_factory=dict)

    def backtest(self, others: Mapping[str, PredictionProducts] | None = None) -> Backtest:
        """Of linear methods, of rank-1 predictions where pairs were taken, and of others."""
        spatial: dict[str, PredictionProducts] = {}
        if self.paths:
            spatial = spatial_moves(self.paths, self.increments, self.products)
        return backtest(self.increments, others={**spatial, **(others or {})})

    @property
    def total(self) -> Increments:
        return reduce(add, self.increments.values())

    def changes(self, names: Sequence[str]) -> ChangedEntries | None:
        """Of these matrices together; None where one has none."""
        known = [self.changed[name] for name in names if name in self.changed]
        return reduce(add, known) if known and len(known) == len(names) else None


def trajectory_report(
    found: MatchedSeries,
    made: Trajectory,
    options: FollowOptions,
    *,
    curve: MetricCurve | None = None,
    distance: SeriesDistance | None = None,
    argv: tuple[str, ...],
    seconds: float,
) -> Report:
    """The report of one series. curve: of a metric, to relate it to. distance: of it from its
    base, which is told before all else.
    """
    base_exact = options.base is not None
    test = made.backtest()
    link = None
    if curve is not None:
        link = metric_link(curve, made.increments, made.paths, seed=options.seed)
        found = replace(found, notes=(*found.notes, link.note))
    traps = traps_of(found, made, base_exact=base_exact)
    if distance is not None:
        traps = (distance.text, *traps)
    skills = {method: test.tensor_skill(method) for method in test.methods}
    layers = tuple(
        _record(name, found, made, skills, link, base_exact=base_exact) for name in made.increments
    )
    ids = tuple(dict.fromkeys(key for layer in layers for key in layer.values))
    failed = tuple(_failed(one, found, ids) for one in made.failed)
    missing = (*found.missing, *(one.name for one in made.failed))
    return Report(
        kind=KIND,
        provenance=Provenance(
            tool_version=__version__,
            argv=argv,
            refs=found.refs,
            device="cpu",
            compute_dtype="float64",
            seed=options.seed,
            parameters=_parameters(found, options, traps),
            seconds=seconds,
        ),
        coverage=Coverage(
            matched=tuple(made.increments),
            skipped=(*found.skipped, *made.failed),
            missing=missing,
        ),
        layers=Layers((*layers, *failed)),
        summary=_summary(
            found, made, test, options, link, layers, traps, distance, base_exact=base_exact
        ),
    )


def _record(
    name: str,
    found: MatchedSeries,
    made: Trajectory,
    skills: Mapping[str, Mapping[str, float | None]],
    link: MetricLink | None,
    *,
    base_exact: bool,
) -> LayerRecord:
    inc = made.increments[name]
    numbers = _of_statistics(statistics(inc, base_exact=base_exact))
    _add_cosine(numbers, inc)
    add_changes(numbers, made.changes([name]))
    if name in made.paths:
        _add_rank1(numbers, name, inc, made, base_exact=base_exact)
    for one, skill in skills.items():
        numbers.put(f"skill@{one}", skill[name])
    _add_scalar_r2(numbers, made, [name], base_exact=base_exact)
    _add_relation(numbers, link, [name])
    return LayerRecord(
        name=name,
        layer=layer_index(name),
        module=module_kind(name),
        shape=found.tensors[name].shape,
        values=numbers.values,
        nulls=numbers.nulls,
        status=numbers.status,
        raw=numbers.raw,
        series=numbers.series,
        method=made.methods.get(name, {}),
        gram=tuple(tuple(row) for row in inc.H.tolist()),
        notes=_grid_notes(inc),
    )


def _grid_notes(inc: Increments) -> tuple[str, ...]:
    """On which grids the checkpoints lie, each with its steps."""
    steps: dict[str, list[str]] = {}
    for step, grid in zip(inc.steps, inc.grids, strict=bool(inc.grids)):
        if grid:
            steps.setdefault(grid, []).append(f"{step:g}")
    return tuple(
        f"{grid}, coarser than its dtype, at step{'s' * (len(at) > 1)} {', '.join(at)}; "
        "ν counts its rounding"
        for grid, at in steps.items()
    )


def _failed(one: Skipped, found: MatchedSeries, ids: Sequence[str]) -> LayerRecord:
    """The row of a matrix without numbers, which says why."""
    status, _, reason = one.reason.partition(": ")
    return LayerRecord(
        name=one.name,
        layer=layer_index(one.name),
        module=module_kind(one.name),
        shape=found.tensors[one.name].shape,
        values=dict.fromkeys(ids),
        status=dict.fromkeys(ids, Status(status)),
        notes=(reason,),
    )


def _of_statistics(found: Statistics) -> SeriesNumbers:
    numbers = SeriesNumbers(
        series={
            f"{key}_by_step" if key in found.values else key: value
            for key, value in found.series.items()
        }
    )
    numbers.add(found)
    return numbers


def _add_cosine(numbers: SeriesNumbers, inc: Increments) -> None:
    """Cosine of the base and each checkpoint, where both were read."""
    if inc.along is not None:
        numbers.series["base_cosine_by_step"] = inc.base_cosines
        numbers.put("base_cosine", inc.base_cosines[-1])
        numbers.nulls["base_cosine"] = 0.0


def _add_rank1(
    numbers: SeriesNumbers, name: str, inc: Increments, made: Trajectory, *, base_exact: bool
) -> None:
    found = rank1_statistics(
        made.paths[name], inc, local=made.local.get(name), base_exact=base_exact
    )
    renamed = _LAST | _MEAN
    numbers.add(found, renamed)
    numbers.series.update(
        {
            f"{key}_by_step" if key in found.values and key not in renamed else key: value
            for key, value in found.series.items()
        }
    )


def _summary(
    found: MatchedSeries,
    made: Trajectory,
    test: Backtest,
    options: FollowOptions,
    link: MetricLink | None,
    layers: Sequence[LayerRecord],
    traps: Sequence[str],
    distance: SeriesDistance | None,
    *,
    base_exact: bool,
) -> Summary:
    total = made.total
    whole = statistics(total, base_exact=base_exact)
    numbers = _of_statistics(whole)
    _add_cosine(numbers, total)
    add_changes(numbers, made.changes([*made.increments]))
    sizes = {name: tensor.shape for name, tensor in found.tensors.items()}
    add_depth(numbers, made.increments, sizes)
    if made.paths:
        _add_totals(numbers, [*made.paths.values()], total, base_exact=base_exact)
    _add_scalar_r2(numbers, made, [*made.increments], base_exact=base_exact)
    for method in test.methods:
        numbers.put(f"skill@{method}", test.skill(method))
    best = test.best()
    horizon = credible_horizon(test, best, seed=options.seed) if best != "hold" else None
    numbers.put("horizon", 0.0 if horizon is None else horizon.steps)
    numbers.put("horizon_resolved", 0.0 if horizon is None else horizon.resolved)
    _add_relation(numbers, link, [*made.increments])
    if link is not None:
        _add_means(numbers, layers)
    numbers.series.update(_paths_of(total))
    for method in test.methods:
        far = credible_horizon(test, method, seed=options.seed, draws=1).distances
        numbers.series[f"skill_by_distance@{method}"] = tuple(each.skill for each in far)
        numbers.series["distance"] = tuple(each.steps for each in far)
    modules = {module_kind(name): None for name in made.increments}
    by_module = {
        module: _module(
            [name for name in made.increments if module_kind(name) == module],
            made,
            link,
            base_exact=base_exact,
        )
        for module in modules
    }
    motion = drift_or_diffusion(whole)
    first = [trap for trap in traps if "jump in" in trap]
    code = motion.code
    if distance is not None and distance.first and options.base is not None:
        code, first = distance.code, [distance.text, *first]
    return Summary(
        model=numbers.values,
        nulls=numbers.nulls,
        modules={key: method.values for key, method in by_module.items()},
        module_nulls={key: method.nulls for key, method in by_module.items()},
        verdict=Verdict(
            code=code,
            share=None,
            shares={},
            flagged=(),
            counts={},
            text=". ".join([*first, motion.text, _foretold(test, best, numbers.values["horizon"])]),
            thresholds=dict(MOTION_THRESHOLDS),
        ),
        steps=found.steps,
        series=numbers.series,
    )


def _foretold(test: Backtest, best: str, horizon: float | None) -> str:
    """How far the run can be foretold, in words."""
    if not bool(test.rolling.any()):
        return "Too few checkpoints to hold any out"
    if best == "hold":
        return "No extrapolator beats holding the last checkpoint"
    skill = test.skill(best)
    words = f"Best held-out: {best}, skill {skill:.2f} over holding the last checkpoint"
    if not horizon:
        return f"{words}; no horizon at which that is credible"
    held_out = f"of {_farthest(test):g} that are held out"
    return f"{words}; credible up to {horizon:g} steps ahead, {held_out}"


def _farthest(test: Backtest) -> float:
    """The largest distance, in steps, that a reported pair has."""
    return float(test.distance[test.rolling].max())


def _module(
    names: Sequence[str], made: Trajectory, link: MetricLink | None, *, base_exact: bool
) -> SeriesNumbers:
    inc = reduce(add, (made.increments[name] for name in names))
    numbers = _of_statistics(statistics(inc, base_exact=base_exact))
    _add_cosine(numbers, inc)
    add_changes(numbers, made.changes(names))
    if paths := [made.paths[name] for name in names if name in made.paths]:
        _add_totals(numbers, paths, inc, base_exact=base_exact)
    _add_scalar_r2(numbers, made, names, base_exact=base_exact)
    _add_relation(numbers, link, names)
    return numbers


def _add_relation(numbers: SeriesNumbers, link: MetricLink | None, names: Sequence[str]) -> None:
    """How these matrices go with the metric, where there is one."""
    if link is None:
        return
    numbers.add(link.of(names))


def _add_means(numbers: SeriesNumbers, layers: Sequence[LayerRecord]) -> None:
    """AlphaRL's average over matrices, of the fit in sample and held out."""
    for key in ("pls_r2", "pls_skill"):
        values = [one for layer in layers if (one := layer.values[key]) is not None]
        numbers.put(f"{key}_mean", math.fsum(values) / len(values) if values else None)
        if nulls := [layer.nulls[key] for layer in layers if key in layer.nulls]:
            numbers.nulls[f"{key}_mean"] = math.fsum(nulls) / len(nulls)


def _add_totals(
    numbers: SeriesNumbers, paths: Sequence[Rank1Path], inc: Increments, *, base_exact: bool
) -> None:
    """Shares of several tensors together; inc: of all of them."""
    totals = rank1_totals(paths)
    state = noise_state(inc, base_exact=base_exact)
    numbers.series["rank1_share"] = totals.rank1_share
    numbers.series["norm_fraction"] = totals.norm_fraction
    for key, value, null in (
        ("rank1_share_last", totals.final_share, totals.null_share[-1]),
        ("norm_fraction", totals.final_fraction, totals.null_fraction[-1]),
    ):
        if key in numbers.series:
            numbers.series[f"{key}_by_step"] = numbers.series.pop(key)
        numbers.put(key, value, state if value is not None else Status.NOT_APPLICABLE)
        if null is not None:
            numbers.nulls[key] = null


def _add_scalar_r2(
    numbers: SeriesNumbers, made: Trajectory, names: Sequence[str], *, base_exact: bool
) -> None:
    """RLVR-Linearity over the entries of these matrices, where it was asked for."""
    counts = [made.scalar_r2[name] for name in names if name in made.scalar_r2]
    if not counts:
        return
    together = reduce(add, counts)
    inc = reduce(add, (made.increments[name] for name in names if name in made.scalar_r2))
    null = scalar_r2_walk(inc, entries=_NULL_ENTRIES)
    state = noise_state(inc, base_exact=base_exact)
    for key, value, expected in (
        ("scalar_r2_median", together.median, null.median),
        ("scalar_r2_share", together.share_linear, null.share_linear),
        ("scalar_r2_kept", together.kept_fraction, None),
    ):
        floor = Status.OK if expected is None else state
        numbers.put(key, value, Status.NOT_APPLICABLE if value is None else floor)
        if expected is not None:
            numbers.nulls[key] = expected


def _paths_of(total: Increments) -> dict[str, Steps]:
    """The run in its own two leading temporal directions, and a walk in its own."""
    found: dict[str, Steps] = {}
    for prefix, inc in (("", total), ("walk_", walk(total))):
        values, vectors = gram_eigen(inc.G)
        coordinates = (vectors * values.sqrt()).T
        last = coordinates[:, -1:]
        coordinates = coordinates * last.sign().where(last != 0, last.new_ones(()))
        for place, row in enumerate(coordinates[:2].tolist(), start=1):
            found[f"{prefix}component{place}"] = tuple(row)
    return found


def traps_of(found: MatchedSeries, made: Trajectory, *, base_exact: bool) -> tuple[str, ...]:
    """Signs that the series is not what it seems, one line each."""
    adapters = found.series.kind == "adapter"
    return series_traps(made.total, adapters=adapters, base_exact=base_exact)


def _parameters(
    found: MatchedSeries, options: FollowOptions, traps: Sequence[str]
) -> dict[str, Any]:
    return {
        "base": options.base,
        "initial_adapter": options.start_name,
        "lora_alpha": options.lora_alpha,
        "points": list(found.points),
        "places": [point.place for point in found.series.points],
        "unit": found.series.unit,
        "directions": options.directions,
        "scalar_r2": options.scalar_r2,
        "spectra": options.spectra,
        "include": list(options.include),
        "exclude": list(options.exclude),
        "layers": None if options.layers is None else sorted(options.layers),
        "map_name": list(options.map_name),
        **({"allow_vocab_resize": True} if options.allow_vocab_resize else {}),
        "notes": [*found.notes, *traps],
    }
