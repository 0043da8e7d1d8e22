"""Shares of one work on the nodes of a Ray cluster, or in processes of this machine, and what is
kept of them between runs.

Each verb says what a share is, what it asks of its node, and by which function a node computes it.
What a node computed is kept here, too, under its content, so that a rerun goes on wherever its
tasks then run.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

from geoscope.engine.cache import ResultCache
from geoscope.engine.cluster import Cluster, Need, Task, cluster
from geoscope.engine.processes import Processes, processes
from geoscope.errors import OptionError
from geoscope.folders import results_folder
from geoscope.verbs.choices import Nodes

__all__ = [
    "CarriedCache",
    "Share",
    "Shared",
    "cache_here",
    "cache_there",
    "device_there",
    "digest",
    "gpus_of",
    "in_memory",
    "spread",
]


@dataclass(frozen=True)
class Share:
    """One share of the work, as its node gets it.

    number: from 0.
    memory: bytes that its node may use.
    known: results that may be known of it, by their keys.
    """

    number: int
    memory: int
    cores: int
    known: Mapping[str, Any]


class Shared(Protocol):
    """What comes back of a share."""

    @property
    def results(self) -> Mapping[str, Any]:
        """For the cache, those that were recalled among them, by their keys."""
        ...


A = TypeVar("A", bound=Shared)


@dataclass(frozen=True)
class CarriedCache(ResultCache):
    """A cache that also knows what was sent along, and collects what was taken or kept."""

    known: Mapping[str, Any] = field(default_factory=dict)
    used: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, folder: Path | None, share: Share) -> CarriedCache | None:
        """That of a share; folder: where results are kept on this node, None for nowhere."""
        return None if folder is None else cls(folder, share.known)

    def get(self, key: str) -> dict[str, Any] | None:
        result = self.known.get(key) or super().get(key)
        if result is not None:
            self.used[key] = result
        return result

    def put(self, key: str, result: Mapping[str, Any]) -> None:
        self.used[key] = result
        super().put(key, result)


# --- here -----------------------------------------------------------------------------------------


def spread(
    options: Nodes,
    function: Callable[[Any, Share], A],
    job: Any,
    needs: Callable[[int], Sequence[Need]],
    on_share: Callable[[int, A], None],
    *,
    kept: ResultCache | None,
    facts: Mapping[str, Any],
    count: int = 0,
) -> None:
    """Computes every share on the cluster at `options.ray`, or in `count` processes of this
    machine; on_share(number, what came) as they finish.

    function: what a node computes; the job is its first argument. needs: of each share, from the
    cores of a task. kept: where results are kept here, under facts that name the work.
    Raises GeoscopeError.
    """
    place: AbstractContextManager[Cluster | Processes] = (
        cluster(options.ray) if options.ray is not None else processes(count)
    )
    with place as nodes:
        cores = nodes.cores(gpus=gpus_of(options))
        if options.ray is not None and options.jobs:
            cores = options.jobs
        asked = needs(cores)
        keys = [_share_key(kept, facts, number, len(asked)) for number in range(len(asked))]
        tasks = [
            Task(partial(_share, kept, keys[number], number, need), need)
            for number, need in enumerate(asked)
        ]
        with closing(nodes.results(function, job, tasks)) as answers:
            for number, answer in answers:
                _keep(kept, keys[number], answer.results)
                on_share(number, answer)


def _share_key(
    kept: ResultCache | None, facts: Mapping[str, Any], number: int, of: int
) -> str | None:
    return None if kept is None else kept.key({**facts, "share": [number, of]})


def _share(kept: ResultCache | None, key: str | None, number: int, need: Need) -> Share:
    """The share as it is sent, with what is kept of it."""
    known: dict[str, Any] = {}
    if kept is not None and key is not None:
        keys = (kept.get(key) or {}).get("keys", ())
        found = {each: kept.get(each) for each in keys}
        known = {each: result for each, result in found.items() if result is not None}
    return Share(number, need.memory, need.cores, known)


def _keep(kept: ResultCache | None, key: str | None, results: Mapping[str, Any]) -> None:
    """Each result under its own key, where a run without a cluster finds it, too; and which they
    are under the key of the share."""
    if kept is None or key is None:
        return
    for each, result in results.items():
        kept.put(each, result)
    kept.put(key, {"keys": [*results]})


def gpus_of(options: Nodes) -> int:
    """GPUs that a task asks for."""
    return int(options.device_asked.startswith("cuda"))


def device_there(options: Nodes) -> str:
    """The device that nodes compute on."""
    return "cuda" if gpus_of(options) else "cpu"


def cache_there(cache: Path | None) -> Path | None:
    """The results folder of each node where it is that of this machine."""
    if cache is None:
        return None
    return Path() if cache == results_folder() else cache.absolute()


def digest(*facts: Any) -> str:
    """Of what nodes have to find as it is here."""
    return hashlib.sha256(repr(facts).encode()).hexdigest()


def in_memory() -> OptionError:
    """The error of what nodes cannot open."""
    return OptionError("`ray` takes models by their paths or Hub ids, not tensors in memory")


# --- on a node ------------------------------------------------------------------------------------


def cache_here(cache: Path | None) -> Path | None:
    """The folder that `cache_there` names, on this node."""
    return results_folder() if cache == Path() else cache
