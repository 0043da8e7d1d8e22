"""The pass over the tensors of a series: fetched, let in as memory allows, measured."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextvars import copy_context
from dataclasses import dataclass, field

from geoscope.engine import Gate, one_blas_thread
from geoscope.engine.cache import Recalled, ResultCache
from geoscope.errors import NonFiniteError, NumericsError
from geoscope.models.checkpoint import Checkpoint
from geoscope.records import Status
from geoscope.verbs.fetching import fetch
from geoscope.verbs.options import Progress
from geoscope.verbs.series.memory import working_bytes
from geoscope.verbs.series.options import FollowOptions
from geoscope.verbs.series.passes import Kept
from geoscope.verbs.series.recall import recalled_or_measured
from geoscope.verbs.series.tensors import SeriesTensor

__all__ = ["Passed", "measure_tensors"]


@dataclass(frozen=True)
class Passed:
    """What the pass keeps, by the names of the tensors.

    failed: status and reason of those without numbers.
    keys: of those that the cache holds.
    recalled: how many an earlier run had finished.
    """

    kept: dict[str, Kept] = field(default_factory=dict[str, Kept])
    failed: dict[str, str] = field(default_factory=dict[str, str])
    keys: dict[str, str] = field(default_factory=dict[str, str])
    recalled: int = 0


def measure_tensors(
    tensors: Iterable[SeriesTensor],
    steps: Sequence[float],
    options: FollowOptions,
    progress: Progress,
    cache: ResultCache | None,
    *,
    workers: int,
    room: int,
) -> Passed:
    """room: bytes of the tensors that are in work at a time; one is always let in."""
    # The largest first: the last to finish is then a small one.
    order = sorted(tensors, key=lambda tensor: -math.prod(tensor.shape))
    fetch(_wanted(order), progress)
    gate, passed, recalled = Gate(room), Passed(), 0

    def measure(tensor: SeriesTensor) -> Recalled[Kept]:
        with gate.let_in(working_bytes(tensor)):
            return recalled_or_measured(tensor, steps, options, cache)

    with one_blas_thread(), ThreadPoolExecutor(max(1, workers)) as pool:
        jobs = {pool.submit(copy_context().run, measure, tensor): tensor.name for tensor in order}
        try:
            for number, job in enumerate(as_completed(jobs), start=1):
                name = jobs[job]
                try:
                    found = job.result()
                except NumericsError as error:
                    passed.failed[name] = _told(error)
                else:
                    passed.kept[name] = found.result
                    recalled += found.is_recalled
                    if found.key is not None:
                        passed.keys[name] = found.key
                progress.on_pair(number, len(jobs), name)
        finally:
            for job in jobs:
                job.cancel()
    return Passed(passed.kept, passed.failed, passed.keys, recalled)


def _wanted(tensors: Iterable[SeriesTensor]) -> list[tuple[Checkpoint, list[str]]]:
    """Every checkpoint with the tensors that are read of it."""
    wanted: dict[int, tuple[Checkpoint, list[str]]] = {}
    for tensor in tensors:
        for checkpoint, name in tensor.places:
            wanted.setdefault(id(checkpoint), (checkpoint, []))[1].append(name)
    return [*wanted.values()]


def _told(error: NumericsError) -> str:
    """Status and reason, as of a matrix that is not compared."""
    is_broken = isinstance(error, NonFiniteError)
    status = Status.NON_FINITE if is_broken else Status.NOT_CONVERGED
    return f"{status.value}: {error}"
