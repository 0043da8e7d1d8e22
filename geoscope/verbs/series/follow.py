"""What a run does step by step: one pass over every tensor, then everything from what it keeps."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from geoscope.arguments import Place, path_of
from geoscope.engine import cores
from geoscope.engine.cache import ResultCache
from geoscope.errors import NumericsError
from geoscope.models.checkpoint import Checkpoint
from geoscope.records import Report, Skipped
from geoscope.sources.memory import Model, as_model_or_reference, as_models_or_references
from geoscope.verbs.choices import chosen
from geoscope.verbs.models import open_model
from geoscope.verbs.options import Progress
from geoscope.verbs.series.distance import series_distance
from geoscope.verbs.series.measuring import Passed, measure_tensors
from geoscope.verbs.series.memory import room_for_tensors
from geoscope.verbs.series.metric import metric_curve
from geoscope.verbs.series.nodes import measure_on_nodes
from geoscope.verbs.series.opening import open_followed
from geoscope.verbs.series.options import FollowOptions
from geoscope.verbs.series.ranks import step_reports, with_ranks
from geoscope.verbs.series.report import Trajectory, trajectory_report
from geoscope.verbs.series.tensors import MatchedSeries
from geoscope.verbs.series.vectors import write_vectors

__all__ = ["follow", "measure_series", "with_base"]


def follow(
    references: Model | Sequence[Model],
    *,
    base: Model | None = None,
    options: FollowOptions | None = None,
    vectors: Place | None = None,
    progress: Progress | None = None,
    argv: Sequence[str] = (),
    **named: Any,
) -> Report:
    """The trajectory of a series of checkpoints: statistics, rank-1 paths, held-out skill.

    references: one, or several: folders in any order, one run folder, globs, `repo@step_*`; or
    state dicts, modules, open checkpoints, with `steps`. base: as in `FollowOptions`, or such a
    model.
    vectors: a safetensors file to write the leading pairs into, see `write_vectors`. argv: the
    words of the command, for the report. named: fields of `FollowOptions`, in place of those in
    `options`. Raises GeoscopeError.

    >>> follow(["runs/grpo"], options=FollowOptions(base="base/"))  # doctest: +SKIP
    """
    options, start = with_base(chosen(FollowOptions, options, named), base)
    started = time.perf_counter()
    progress = progress or Progress()
    file = None if vectors is None else path_of(vectors, "vectors")
    found = open_followed(
        as_models_or_references(references, "references"), options, progress, start=start
    )
    curve, notes = metric_curve(found.series, options)
    found = replace(found, notes=(*found.notes, *notes))
    made = measure_series(found, options, progress)
    if file is not None:
        write_vectors(file, made, found.steps)
    spectra = step_reports(found, options, progress, start=start) if options.spectra else []
    report = trajectory_report(
        found,
        made,
        options,
        curve=curve,
        distance=series_distance(found, made.increments),
        argv=tuple(argv),
        seconds=time.perf_counter() - started,
    )
    return with_ranks(report, spectra) if spectra else report


def with_base(
    options: FollowOptions, base: Model | None
) -> tuple[FollowOptions, Checkpoint | None]:
    """The options that name the base, and the base itself where it is open."""
    model = None if base is None else as_model_or_reference(base, "base")
    if model is None or isinstance(model, str):
        return options if model is None else replace(options, base=model), None
    whole = open_model(model)
    return replace(options, base=whole.ref.given), whole


def measure_series(found: MatchedSeries, options: FollowOptions, progress: Progress) -> Trajectory:
    """Increments and rank-1 paths of every tensor; those that fail are named with the reason.

    With a cache what an earlier run finished is recalled. Tensors are let in as memory allows.
    """
    measure = _measured_here if options.ray is None else measure_on_nodes
    passed = measure(found, options, progress)
    if passed.recalled:
        progress.on_recalled(passed.recalled, len(found.tensors))
    failed = [
        Skipped(name, passed.failed[name], missing=True)
        for name in found.tensors
        if name in passed.failed
    ]
    if not passed.kept:
        first = f"{failed[0].name}: {failed[0].reason}"
        raise NumericsError(f"no tensor of the series could be followed; {first}")
    kept = {name: passed.kept[name] for name in found.tensors if name in passed.kept}
    return Trajectory(
        increments={name: one.increments for name, one in kept.items()},
        paths={name: one.path for name, one in kept.items() if one.path is not None},
        local={name: one.local for name, one in kept.items() if one.local is not None},
        products={name: one.products for name, one in kept.items() if one.products is not None},
        methods={name: one.method for name, one in kept.items() if one.method is not None},
        scalar_r2={name: one.scalar_r2 for name, one in kept.items() if one.scalar_r2 is not None},
        changed={name: one.changed for name, one in kept.items() if one.changed is not None},
        failed=tuple(failed),
    )


def _measured_here(found: MatchedSeries, options: FollowOptions, progress: Progress) -> Passed:
    workers = options.jobs or cores()
    return measure_tensors(
        found.tensors.values(),
        found.steps,
        options,
        progress,
        None if options.cache is None else ResultCache(options.cache),
        workers=workers,
        room=room_for_tensors(found, options, workers),
    )
