"""Spectra of the update by step, from the engine that compares pairs.

Each checkpoint is compared with the base, so that the numbers are those of `compare`. That costs as
much as so many comparisons.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

from geoscope.errors import OptionError
from geoscope.models.checkpoint import Checkpoint
from geoscope.records import LayerRecord, Layers, Report, Steps
from geoscope.verbs.options import Options, Progress
from geoscope.verbs.pairs.compare import compare, measure_adapter
from geoscope.verbs.series.options import FollowOptions
from geoscope.verbs.series.tensors import MatchedSeries

__all__ = ["RANKS", "is_of", "step_reports", "with_ranks"]

# Without their @k. ρ and ν by step are among the statistics of a series.
RANKS = (
    "update.stable_rank",
    "update.effective_rank",
    "update.top_share",
    "spectral_share",
    "spectral_lift",
    "energy_two_sided",
    "lift",
    "angle_left_mean",
    "angle_right_mean",
    "rank_ratio",
    "effective_rank_share",
)


def is_of(key: str, wanted: Sequence[str]) -> bool:
    """Whether an id is one of those, which may lack their @k and the role `update.`."""
    bare = key.partition("@")[0]
    return any(bare in (one.partition("@")[0], f"update.{one}") for one in wanted)


def step_reports(
    found: MatchedSeries,
    options: FollowOptions,
    progress: Progress,
    *,
    start: Checkpoint | None,
) -> list[tuple[Report, ...]]:
    """Of each checkpoint after the base the reports on it; of adapters that of `capacity`, too.

    start: the base, where it is open and not a reference in the options. Without a base adapters
    are measured alone. Raises GeoscopeError.
    """
    points = found.series.points[-(len(found.steps) - 1) :]
    if any(point.adapter is not None and point.place == "in memory" for point in points):
        raise OptionError(
            "`spectra` reads adapters from their folders, and these are in memory; save them, or "
            "compare each with its base"
        )
    base: Any = start or options.base
    if base is None and found.series.kind == "model":
        base = found.series.points[0].checkpoint
    how = {"options": _pair_options(options), "progress": progress}
    reports: list[tuple[Report, ...]] = []
    for point in points:
        model = point.checkpoint or point.resolved
        kinds = ("compare", "capacity") if found.series.kind == "adapter" else ("compare",)
        if base is None:
            alone = ("anisotropy", "capacity")
            reports.append(tuple(measure_adapter(model, kind, **how) for kind in alone))
        else:
            reports.append(tuple(compare(base, model, kind=kind, **how) for kind in kinds))
    return reports


def _pair_options(options: FollowOptions) -> Options:
    """Those of a comparison that both have."""
    own = {each.name for each in fields(Options)}
    shared = [each.name for each in fields(options) if each.name in own]
    return Options(**{name: getattr(options, name) for name in shared})


def with_ranks(report: Report, steps: Sequence[Sequence[Report]]) -> Report:
    """The report with RANKS of the last step and their series, `<id>_by_step` and `<id>_null`."""
    summary, last = report.summary, steps[-1]
    whole = [_merged([one.summary.model for one in step]) for step in steps]
    nulls = [_merged([one.summary.nulls for one in step]) for step in steps]
    modules, module_nulls = (
        {
            name: {**own, **_ranks(_merged([getattr(one.summary, part)[name] for one in last]))}
            for name, own in getattr(summary, part).items()
        }
        for part in ("modules", "module_nulls")
    )
    return replace(
        report,
        provenance=replace(report.provenance, device=last[0].provenance.device),
        layers=_with_layers(report.layers, steps),
        summary=replace(
            summary,
            model={**summary.model, **_ranks(whole[-1])},
            nulls={**summary.nulls, **_ranks(nulls[-1])},
            modules=modules,
            module_nulls=module_nulls,
            series={**summary.series, **_series(whole, nulls)},
        ),
    )


def _merged(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    return {key: value for row in rows for key, value in row.items()}


def _ranks(numbers: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in numbers.items() if is_of(key, RANKS)}


def _series(
    values: Sequence[Mapping[str, float | None]], nulls: Sequence[Mapping[str, float]]
) -> dict[str, Steps]:
    found: dict[str, Steps] = {}
    for key in _ranks(_merged(values)):
        found[f"{key}_by_step"] = tuple(row.get(key) for row in values)
        beside = tuple(row.get(key) for row in nulls)
        if any(one is not None for one in beside):
            found[f"{key}_null"] = beside
    return found


def _with_layers(layers: Layers, steps: Sequence[Sequence[Report]]) -> Layers:
    by_name = [
        {part: _by_name(step, part) for part in ("values", "nulls", "status", "raw")}
        for step in steps
    ]
    return Layers(_with_rows(one, by_name) for one in layers)


def _by_name(step: Sequence[Report], part: str) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for report in step:
        for row in report.layers:
            found.setdefault(_bare(row.name), {}).update(_ranks(getattr(row, part)))
    return found


def _bare(name: str) -> str:
    return name.removesuffix(".weight")


def _with_rows(
    layer: LayerRecord, steps: Sequence[Mapping[str, Mapping[str, Mapping[str, Any]]]]
) -> LayerRecord:
    rows = [
        {part: by_name.get(_bare(layer.name), {}) for part, by_name in step.items()}
        for step in steps
    ]
    added = {part: {**getattr(layer, part), **own} for part, own in rows[-1].items()}
    series = _series([row["values"] for row in rows], [row["nulls"] for row in rows])
    return replace(layer, **added, series={**layer.series, **series})
