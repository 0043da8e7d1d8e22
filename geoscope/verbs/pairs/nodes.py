"""The matrices of one tuned model beside its base, measured on the nodes of a Ray cluster or in
processes of this machine.

A task is a share of the matrices (`shares.py`). Its node opens the models by their names, reads
what it needs, and sends rows, as parts have them.
"""

from __future__ import annotations

import pickle
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from geoscope.engine import asked_memory, estimate_seconds, needed_memory
from geoscope.engine.cache import ResultCache
from geoscope.engine.cluster import CORES, Need
from geoscope.errors import PairingError, Stopped
from geoscope.models.checkpoint import fetch_all
from geoscope.records import LayerRecord, ModelRef, Survey, WeightPair
from geoscope.sources.reference import elsewhere
from geoscope.verbs.nodes import (
    CarriedCache,
    Share,
    cache_here,
    cache_there,
    device_there,
    digest,
    gpus_of,
    in_memory,
    spread,
)
from geoscope.verbs.options import Interrupted, Options, Progress
from geoscope.verbs.pairs.alone import prepare_alone
from geoscope.verbs.pairs.measuring import Work, measure_pairs
from geoscope.verbs.pairs.prepare import (
    Prepared,
    entry_bytes,
    prepare,
    share_memory,
    survey,
    within,
)
from geoscope.verbs.pairs.rows import PartMatrix, matrix_of, part_of
from geoscope.verbs.pairs.shares import fitting, shares

__all__ = ["measure_on_nodes", "measure_share", "spread_survey"]


@dataclass(frozen=True)
class Job:
    """What all tasks have in common.

    base, tuned: as nodes find them; base None for an adapter alone.
    of: how many shares there are.
    pairing: digest of the tensors that correspond, which nodes have to come to as well.
    """

    base: str | None
    tuned: str
    kind: str
    options: Options
    of: int
    pairing: str


@dataclass(frozen=True)
class Measured:
    """What comes back. results: for the cache, those that were recalled among them."""

    matrices: tuple[PartMatrix, ...]
    vectors: tuple[LayerRecord, ...]
    device: str
    results: Mapping[str, Any]
    recalled: int


# --- here -----------------------------------------------------------------------------------------


def measure_on_nodes(
    prepared: Prepared,
    kind: str,
    options: Options,
    progress: Progress,
    kept: ResultCache | None,
) -> Work:
    """As `measure_pairs`, on the cluster at `options.ray` or in as many processes as `prepared`
    says. Raises GeoscopeError."""
    if options.ray is None:
        fetch_all(prepared.wanted)
    job = _job(prepared, kind, options)
    parts = shares(prepared.pairing.matrices, job.of)
    done: list[Measured] = []
    whole = len(prepared.pairing.matrices)

    def on_share(number: int, share: Measured) -> None:
        done.append(share)
        last = parts[number][-1].name if parts[number] else ""
        progress.on_pair(sum(len(each.matrices) for each in done), whole, last)

    models = {"base": job.base, "tuned": job.tuned, "pairing": job.pairing}
    facts = {**models, "kind": kind, "options": job.options.deciding}
    interrupted = None
    try:
        spread(
            options,
            measure_share,
            job,
            lambda cores: _needs(prepared, options, cores=cores),
            on_share,
            kept=kept,
            facts=facts,
            count=prepared.processes,
        )
    except (KeyboardInterrupt, Stopped) as stop:
        interrupted = getattr(stop, "signum", int(signal.SIGINT))
    if recalled := sum(share.recalled for share in done):
        progress.on_recalled(recalled, whole)
    return _joined(prepared, kind, options, done, interrupted)


def _needs(prepared: Prepared, options: Options, *, cores: int) -> list[Need]:
    """What each task asks of its node. cores: of a task."""
    pairs = prepared.pairing.matrices
    parts = shares(pairs, fitting(pairs))
    if options.ray is None:
        memory = share_memory(pairs, entry_bytes(options))
        return [Need(cores, memory) for _ in parts]
    return [Need(cores, _memory(share, options, cores), gpus_of(options)) for share in parts]


def spread_survey(prepared: Prepared, options: Options, *, paired: bool) -> Survey:
    """What `--dry-run` shows of work on a cluster: its tasks, and what the largest takes."""
    cores = options.jobs or CORES
    needs = _needs(prepared, options, cores=cores)
    parts = shares(prepared.pairing.matrices, len(needs))
    return replace(
        survey(prepared, paired=paired),
        memory=max((need.declared for need in needs), default=0),
        workers=cores,
        seconds=max(estimate_seconds(part, workers=cores) for part in parts),
        tasks=len(needs),
    )


def _memory(share: Sequence[WeightPair], options: Options, cores: int) -> int:
    if options.max_memory is not None:
        return asked_memory(share, options.max_memory)
    return needed_memory(share, workers=cores, entry_bytes=entry_bytes(options))


def _job(prepared: Prepared, kind: str, options: Options) -> Job:
    start = options.initial_adapter
    if prepared.given is None or not isinstance(start, str | None):
        raise in_memory()
    base, tuned = prepared.given
    return Job(
        base=None if base is None else elsewhere(base, prepared.base.ref.commit),
        tuned=elsewhere(tuned, prepared.tuned.ref.commit),
        kind=kind,
        options=replace(
            options,
            ray=None,
            device=device_there(options),
            initial_adapter=None if start is None else elsewhere(start),
            cache=cache_there(options.cache),
        ),
        of=fitting(prepared.pairing.matrices),
        pairing=_digest(prepared),
    )


def _digest(prepared: Prepared) -> str:
    """Of what corresponds to what, and of the commits of both models."""
    sides = [prepared.base.ref.commit, prepared.tuned.ref.commit]
    pairs = (*prepared.pairing.matrices, *prepared.pairing.vectors)
    told = [(pair.name, pair.shape, pair.base.dtype, pair.tuned.dtype) for pair in pairs]
    return digest(sides, told)


def _joined(
    prepared: Prepared,
    kind: str,
    options: Options,
    done: Sequence[Measured],
    interrupted: int | None,
) -> Work:
    known = {matrix.record.name: matrix for share in done for matrix in share.matrices}
    devices = dict.fromkeys(share.device for share in done)
    return Work(
        matrices=tuple(
            matrix_of(pair, known[pair.name], kind, options)
            for pair in prepared.pairing.matrices
            if pair.name in known
        ),
        vectors=tuple(vector for share in done for vector in share.vectors),
        interrupted=interrupted,
        device=", ".join(devices) or None,
    )


# --- on a node ------------------------------------------------------------------------------------


def measure_share(job: Job, share: Share) -> Measured:
    """The matrices of one share; norms and biases come with the first. Raises GeoscopeError."""
    prepared = _opened(pickle.dumps(replace(job, of=0)))
    cache = cache_here(job.options.cache)
    options = replace(job.options, cache=cache, jobs=share.cores)
    own = shares(prepared.pairing.matrices, job.of)[share.number]
    vectors = prepared.pairing.vectors if share.number == 0 else ()
    sized = replace(prepared, workers=share.cores, memory=share.memory)
    if prepared.devices[0].type != "cpu":
        sized = replace(prepared, workers=len(prepared.devices))
    carried = CarriedCache.of(cache, share) if options.budget is None else None
    narrow = within(sized, own, vectors, options)
    work = measure_pairs(narrow, job.kind, options, Progress(), carried)
    if work.interrupted is not None:
        raise Interrupted(None, work.interrupted)
    return Measured(
        matrices=tuple(map(part_of, work.matrices)),
        vectors=work.vectors,
        device=prepared.device,
        results={} if carried is None else dict(carried.used),
        recalled=sum(matrix.recalled for matrix in work.matrices),
    )


@lru_cache(maxsize=1)
def _opened(job: bytes) -> Prepared:
    """The models of a job, opened once a process. Raises GeoscopeError."""
    given: Job = pickle.loads(job)
    options = replace(given.options, jobs=None, cache=None)
    if given.base is None:
        prepared = prepare_alone(given.tuned, options)
    else:
        prepared = prepare(given.base, given.tuned, options)
    if _digest(prepared) != given.pairing:
        raise PairingError(
            f"{_named(prepared.base.ref)} and {_named(prepared.tuned.ref)} have other tensors "
            "there than here; give every node the same models"
        )
    return prepared


def _named(ref: ModelRef) -> str:
    return ref.resolved if ref.is_read else ref.given
