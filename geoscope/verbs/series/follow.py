"""What a run does step by step: one pass over every tensor, then everything from what it keeps."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextvars import copy_context
from dataclasses import replace
from typing import Any

import torch

from geoscope.arguments import Place, path_of
from geoscope.engine import Gate, one_blas_thread
from geoscope.errors import NonFiniteError, NumericsError
from geoscope.models.checkpoint import Checkpoint
from geoscope.records import Report, Skipped, Status
from geoscope.sources.memory import Model, as_model_or_reference, as_models_or_references
from geoscope.verbs.choices import chosen
from geoscope.verbs.models import open_model
from geoscope.verbs.options import Progress
from geoscope.verbs.series.distance import series_distance
from geoscope.verbs.series.memory import room_for_tensors, working_bytes
from geoscope.verbs.series.metric import metric_curve
from geoscope.verbs.series.opening import open_followed
from geoscope.verbs.series.options import FollowOptions
from geoscope.verbs.series.passes import Kept
from geoscope.verbs.series.recall import recalled_or_measured
from geoscope.verbs.series.report import Trajectory, trajectory_report
from geoscope.verbs.series.tensors import MatchedSeries, SeriesTensor
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
    return trajectory_report(
        found,
        made,
        options,
        curve=curve,
        distance=series_distance(found, made.increments),
        argv=tuple(argv),
        seconds=time.perf_counter() - started,
    )


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
    recalled = 0
    kept: dict[str, Kept] = {}
    failed: list[Skipped] = []
    workers = options.jobs or torch.get_num_threads()
    gate = Gate(room_for_tensors(found, options, workers))

    def job_of(one: SeriesTensor) -> tuple[Kept, bool]:
        with gate.let_in(working_bytes(one)):
            return recalled_or_measured(one, found.steps, options)

    with one_blas_thread(), ThreadPoolExecutor(max(1, workers)) as pool:
        # The largest first: the last to finish is then a small one.
        order = sorted(found.tensors.values(), key=lambda one: -math.prod(one.shape))
        jobs = {pool.submit(copy_context().run, job_of, one): one for one in order}
        try:
            for number, job in enumerate(as_completed(jobs), start=1):
                one = jobs[job]
                try:
                    kept[one.name], is_recalled = job.result()
                    recalled += is_recalled
                except NumericsError as error:
                    failed.append(Skipped(one.name, _told(error), missing=True))
                progress.on_pair(number, len(jobs), one.name)
        finally:
            for job in jobs:
                job.cancel()
    if recalled:
        progress.on_recalled(recalled, len(jobs))
    if not kept:
        first = f"{failed[0].name}: {failed[0].reason}"
        raise NumericsError(f"no tensor of the series could be followed; {first}")
    names = [name for name in found.tensors if name in kept]
    return Trajectory(
        increments={name: kept[name].increments for name in names},
        paths={name: path for name in names if (path := kept[name].path) is not None},
        local={name: path for name in names if (path := kept[name].local) is not None},
        products={name: one for name in names if (one := kept[name].products) is not None},
        methods={name: one for name in names if (one := kept[name].method) is not None},
        scalar_r2={name: one for name in names if (one := kept[name].scalar_r2) is not None},
        failed=tuple(failed),
    )


def _told(error: NumericsError) -> str:
    """Status and reason, as of a matrix that is not compared."""
    is_broken = isinstance(error, NonFiniteError)
    status = Status.NON_FINITE if is_broken else Status.NOT_CONVERGED
    return f"{status.value}: {error}"
