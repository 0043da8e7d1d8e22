"""The tensors of a series, measured on the nodes of a Ray cluster.

A node opens the checkpoints by their names, reads the tensors of its share at every step, and sends
what the pass keeps: products of the steps, and leading pairs.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from geoscope.engine.cache import ResultCache
from geoscope.engine.cluster import Need
from geoscope.engine.shares import Work, fitting, shared
from geoscope.errors import PairingError
from geoscope.sources.reference import elsewhere
from geoscope.sources.series import SeriesPoint
from geoscope.verbs.nodes import (
    CarriedCache,
    Share,
    cache_here,
    cache_there,
    digest,
    in_memory,
    spread,
)
from geoscope.verbs.options import Progress
from geoscope.verbs.series.measuring import Passed, measure_tensors
from geoscope.verbs.series.memory import memory_of_share, room_of_share
from geoscope.verbs.series.opening import open_followed
from geoscope.verbs.series.options import FollowOptions
from geoscope.verbs.series.recall import entry_of
from geoscope.verbs.series.tensors import AdapterTensor, MatchedSeries, SeriesTensor

__all__ = ["measure_on_nodes", "measure_share", "shares_of"]

# Seconds of one core: a step of a tensor whatever its size, and a byte that is read; of single
# matrices in bf16 with sides of 64 to 3072, four steps each, within 1.5 ×.
_A_STEP, _A_BYTE = 0.02, 2.5e-8


@dataclass(frozen=True)
class Job:
    """What all tasks have in common.

    references: the checkpoints as nodes find them, their steps in the options.
    in_parts: as of `open_followed`.
    steps: with that of the base.
    of: how many shares there are.
    series: digest of the tensors, which nodes have to come to as well.
    """

    references: tuple[str, ...]
    options: FollowOptions
    in_parts: bool
    steps: tuple[int, ...]
    of: int
    series: str


@dataclass(frozen=True)
class Followed:
    """What comes back of a share."""

    passed: Passed

    @property
    def results(self) -> Mapping[str, Any]:
        """For the cache, those that were recalled among them."""
        passed = self.passed
        return {key: entry_of(passed.kept[name]) for name, key in passed.keys.items()}


# --- here -----------------------------------------------------------------------------------------


def measure_on_nodes(found: MatchedSeries, options: FollowOptions, progress: Progress) -> Passed:
    """As `measure_tensors` of all, on the cluster at `options.ray`. Raises GeoscopeError."""
    job = _job(found, options)
    parts = shares_of(found, job.of)
    whole, passed, recalled = len(found.tensors), Passed(), 0

    def on_share(_: int, share: Followed) -> None:
        nonlocal recalled
        passed.kept.update(share.passed.kept)
        passed.failed.update(share.passed.failed)
        recalled += share.passed.recalled
        last = next(reversed([*share.passed.kept, *share.passed.failed]), "")
        progress.on_pair(len(passed.kept) + len(passed.failed), whole, last)

    def needs(cores: int) -> list[Need]:
        return [Need(cores, memory_of_share(part, found.steps, options, cores)) for part in parts]

    places = {"references": list(job.references), "series": job.series}
    spread(
        options,
        measure_share,
        job,
        needs,
        on_share,
        kept=None if options.cache is None else ResultCache(options.cache),
        facts={**places, "kind": "trajectory", "options": job.options.deciding},
    )
    return replace(passed, recalled=recalled)


def shares_of(found: MatchedSeries, of: int | None = None) -> list[tuple[SeriesTensor, ...]]:
    """The tensors in so many shares, by default as many as a cluster takes."""
    tensors = list(found.tensors.values())
    works = [_work(tensor, len(found.steps) - 1) for tensor in tensors]
    return shared(tensors, works, fitting(works) if of is None else of)


def _work(tensor: SeriesTensor, steps: int) -> Work:
    stored = [checkpoint.tensors[name] for checkpoint, name in tensor.places]
    factors = tensor.factors if isinstance(tensor, AdapterTensor) else ()
    nbytes = sum(info.nbytes for info in (*stored, *factors))
    files = tuple(info.source for info in stored)
    return Work(files, steps * _A_STEP + nbytes * _A_BYTE, nbytes)


def _job(found: MatchedSeries, options: FollowOptions) -> Job:
    points = found.series.points
    start, base = options.initial_adapter, options.base
    if not isinstance(start, str | None) or not found.is_named:
        raise in_memory()
    if any(point.place == "in memory" for point in points):
        raise in_memory()
    commit = None if found.base is None else found.base.ref.commit
    return Job(
        references=tuple(elsewhere(point.given, _commit(point)) for point in points),
        options=replace(
            options,
            ray=None,
            base=None if base is None else elsewhere(base, commit),
            initial_adapter=None if start is None else elsewhere(start),
            steps=",".join(str(point.step) for point in points),
            metrics=None,
            metric=None,
            cache=cache_there(options.cache),
        ),
        in_parts=found.in_parts,
        steps=found.steps,
        of=len(shares_of(found)),
        series=_digest(found),
    )


def _commit(point: SeriesPoint) -> str | None:
    model = point.checkpoint if point.adapter is None else point.adapter
    return None if model is None else model.ref.commit


def _digest(found: MatchedSeries) -> str:
    """Of the tensors at every step, and of the commits of all checkpoints."""
    commits = [_commit(point) for point in found.series.points]
    told = [(name, tensor.shape, tensor.stored) for name, tensor in found.tensors.items()]
    return digest(found.series.kind, commits, told)


# --- on a node ------------------------------------------------------------------------------------


def measure_share(job: Job, share: Share) -> Followed:
    """The tensors of one share. Raises GeoscopeError."""
    found = _opened(pickle.dumps(replace(job, of=0)))
    tensors = shares_of(found, job.of)[share.number]
    passed = measure_tensors(
        tensors,
        job.steps,
        job.options,
        Progress(),
        CarriedCache.of(cache_here(job.options.cache), share),
        workers=share.cores,
        room=room_of_share(tensors, job.steps, job.options, share.memory),
    )
    return Followed(passed)


@lru_cache(maxsize=1)
def _opened(job: bytes) -> MatchedSeries:
    """The series of a job, opened once a process. Raises GeoscopeError."""
    given: Job = pickle.loads(job)
    found = open_followed(given.references, given.options, in_parts=given.in_parts)
    if _digest(found) != given.series:
        raise PairingError(
            f"{given.references[0]} … {given.references[-1]} have other tensors there than here; "
            "give every node the same checkpoints"
        )
    return found
