"""The initial factors of a model, computed on the nodes of a Ray cluster.

A node opens the model by its name, reads the weights of its share, and sends their factors, which
are small. The command itself writes the files, the rewritten base among them: each residual is one
product of factors, and takes no factorisation.
"""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from heapq import nlargest
from typing import Any

from geoscope.arguments import bytes_of
from geoscope.engine import BASELINE, estimate_seconds, one_blas_thread, resolve_devices
from geoscope.engine.cache import ResultCache
from geoscope.engine.cluster import Need
from geoscope.engine.shares import Work, fitting, shared
from geoscope.errors import PairingError
from geoscope.models.checkpoint import Checkpoint
from geoscope.sources.open import open_checkpoint
from geoscope.sources.reference import elsewhere
from geoscope.verbs.adapters.options import InitOptions
from geoscope.verbs.adapters.recall import entry_of
from geoscope.verbs.adapters.starts import COPIES_IN_WORK, Made, Making, computed
from geoscope.verbs.adapters.targets import Target, Targets, choose_targets
from geoscope.verbs.nodes import (
    CarriedCache,
    Share,
    cache_here,
    cache_there,
    device_there,
    digest,
    gpus_of,
    spread,
)

__all__ = ["begin_on_nodes", "begin_share", "shares_of"]

# What is made lies on a node as it is, as JSON for the cache, and as it is sent.
_SENT = 4


@dataclass(frozen=True)
class Job:
    """What all tasks have in common.

    model: as nodes find it.
    of: how many shares there are.
    targets: digest of the weights that get an adapter, which nodes have to come to as well.
    """

    model: str
    options: InitOptions
    of: int
    targets: str


@dataclass(frozen=True)
class Begun:
    """What comes back of a share: name of each weight → its starts, without rewritten matrices."""

    starts: Mapping[str, Made]
    device: str

    @property
    def results(self) -> Mapping[str, Any]:
        """For the cache, those that were recalled among them."""
        every = [start for made in self.starts.values() for start in made]
        return {start.key: entry_of(start.factors) for start in every if start.key is not None}


# --- here -----------------------------------------------------------------------------------------


def begin_on_nodes(
    checkpoint: Checkpoint,
    targets: Targets,
    options: InitOptions,
    on_weight: Callable[[Target, Made], None],
) -> str:
    """The starts of all weights, as they come, from the cluster at `options.ray`; the devices.

    Raises GeoscopeError.
    """
    parts = shares_of(targets)
    devices: dict[str, None] = {}
    job = Job(
        model=elsewhere(checkpoint.ref.given, checkpoint.ref.commit),
        options=replace(
            options, ray=None, device=device_there(options), cache=cache_there(options.cache)
        ),
        of=len(parts),
        targets=_digest(checkpoint, targets),
    )

    def on_share(_: int, share: Begun) -> None:
        devices[share.device] = None
        for name, made in share.starts.items():
            on_weight(targets.weights[name], made)

    def needs(cores: int) -> list[Need]:
        return [Need(cores, _memory(part, options, cores), gpus_of(options)) for part in parts]

    facts = {"model": job.model, "targets": job.targets, "options": job.options.deciding}
    spread(
        options,
        begin_share,
        job,
        needs,
        on_share,
        kept=None if options.cache is None else ResultCache(options.cache),
        facts={**facts, "kind": "init-adapter"},
    )
    return ", ".join(devices)


def shares_of(targets: Targets, of: int | None = None) -> list[tuple[Target, ...]]:
    """The weights in so many shares, by default as many as a cluster takes."""
    weights = list(targets.weights.values())
    works = [_work(target) for target in weights]
    return shared(weights, works, fitting(works) if of is None else of)


def _work(target: Target) -> Work:
    seconds = (target.experts or 1) * estimate_seconds([target], workers=1)
    return Work((target.info.source,), seconds, target.info.nbytes)


def _memory(share: Sequence[Target], options: InitOptions, workers: int) -> int:
    """Bytes that a task asks for: under `max_memory` that, or the least that works."""
    least = BASELINE + _sent_bytes(share, options)
    working = [4 * COPIES_IN_WORK * math.prod(target.info.shape) for target in share]
    if options.max_memory == "min":
        return least + max(working)
    if options.max_memory is not None:
        return bytes_of(options.max_memory, "max_memory", others=", or min")
    return least + sum(nlargest(workers, working))


def _sent_bytes(share: Sequence[Target], options: InitOptions) -> int:
    sides = sum((target.experts or 1) * sum(target.shape) for target in share)
    return _SENT * 4 * options.rank * sides


def _digest(checkpoint: Checkpoint, targets: Targets) -> str:
    told = [(name, each.info.shape, each.info.dtype) for name, each in targets.weights.items()]
    return digest(checkpoint.ref.commit, told)


# --- on a node ------------------------------------------------------------------------------------


def begin_share(job: Job, share: Share) -> Begun:
    """The starts of the weights of one share. Raises GeoscopeError."""
    checkpoint, targets = _opened(pickle.dumps(replace(job, of=0)))
    own, options = shares_of(targets, job.of)[share.number], job.options
    checkpoint.fetch([target.info.name for target in own])
    device = resolve_devices(options.device)[0]
    making = Making(
        checkpoint,
        options,
        device,
        CarriedCache.of(cache_here(options.cache), share),
        rewrites=False,
    )
    room = max(0, share.memory - BASELINE - _sent_bytes(own, options)) // 4
    workers = share.cores if device.type == "cpu" else 1
    with one_blas_thread():
        made = computed(making, own, workers=workers, room=room)
        starts = {target.info.name: each for target, each in zip(own, made, strict=True)}
    return Begun(starts, str(device))


@lru_cache(maxsize=1)
def _opened(job: bytes) -> tuple[Checkpoint, Targets]:
    """The model of a job, opened once a process. Raises GeoscopeError."""
    given: Job = pickle.loads(job)
    checkpoint = open_checkpoint(given.model)
    targets = choose_targets(checkpoint, given.options)
    if _digest(checkpoint, targets) != given.targets:
        raise PairingError(
            f"{checkpoint.ref.resolved} has other tensors there than here; give every node the "
            "same model"
        )
    return checkpoint, targets
