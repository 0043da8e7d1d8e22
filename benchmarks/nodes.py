"""A Ray cluster of a head and three nodes on this machine, beside the same work without it.

    python benchmarks/nodes.py [--family smollm2-135m] [--layers 30] [--nodes 3] [--kills 10]

`compare` of a synthetic pair of a family's shapes three times: in this process, on the cluster,
and on the cluster while nodes are killed at random moments and new ones come. Seconds are those of
the call of the library, files included, imports of this process not; those of the nodes' processes
are in it. The reports have to be the same but for `seconds`, and no worker may take more memory
than its task declared. Ends with 1 where one of that does not hold. One line of JSON for each run.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest import mock

from synthetic import FAMILIES, write

import geoscope
from geoscope import Options, Progress
from geoscope.verbs.pairs import nodes
from geoscope.verbs.pairs.prepare import prepare

NODE = {"num_cpus": 1, "object_store_memory": 120 << 20, "memory": 4 << 30}
# Shares for each node that is killed: most of them are lost in the middle of one.
SHARES_A_KILL = 2
FAULTS: list[str] = []


def told(report: geoscope.Report) -> str:
    return re.sub(r'"seconds": ?[^,}]*', "", report.dumps())


@contextmanager
def started(count: int) -> Iterator[Any]:
    """A cluster whose head computes nothing."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_worker_niceness", "0")  # as the process beside it
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    head = {**NODE, "num_cpus": 0, "include_dashboard": False}
    cluster = import_module("ray.cluster_utils").Cluster(True, head_node_args=head)
    try:
        for _ in range(count):
            cluster.add_node(**NODE)
        yield cluster
    finally:
        cluster.shutdown()


class Memory:
    """Peak resident bytes of every process that works on a task."""

    def __init__(self) -> None:
        self.peaks: dict[int, int] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    @property
    def peak_mb(self) -> int:
        return round(max(self.peaks.values(), default=0) / 1e6)

    def __enter__(self) -> Memory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(0.2):
            for process in Path("/proc").glob("[0-9]*"):
                try:
                    if (process / "cmdline").read_bytes().startswith(b"ray::visit"):
                        status = (process / "status").read_text()
                        peak = re.search(r"VmHWM:\s+(\d+) kB", status)
                        self.peaks[int(process.name)] = 1024 * int(peak[1]) if peak else 0
                except OSError:  # it has ended
                    continue


class Killer:
    """Kills a node and adds one, so many times, each at a random moment between two shares."""

    def __init__(self, cluster: Any, kills: int, seed: int) -> None:
        self.cluster, self.random, self.done = cluster, random.Random(seed), 0
        shares = range(1, SHARES_A_KILL * kills)
        self.at = set(self.random.sample(shares, kills))
        self.shares = 0

    def __call__(self, *_: object) -> None:
        self.shares += 1
        if self.shares in self.at:
            time.sleep(2 * self.random.random())
            victim = self.random.choice(sorted(self.cluster.worker_nodes, key=id))
            self.cluster.remove_node(victim, allow_graceful=False)
            self.cluster.add_node(**NODE)
            self.done += 1


def timed(name: str, compute: Callable[[], geoscope.Report], **facts: Any) -> tuple[float, str]:
    """Seconds, and the report; tells them with the facts, and what workers of a cluster took."""
    load, before = os.getloadavg()[0], time.perf_counter()
    with Memory() as memory:
        report = compute()
    seconds = time.perf_counter() - before
    row = {"run": name, "seconds": round(seconds, 1), "load": round(load, 1), **facts}
    if "declared_mb" in facts:
        row |= {"peak_mb": memory.peak_mb, "memory_kept": 0 < memory.peak_mb <= row["declared_mb"]}
    print(json.dumps(row), flush=True)
    if not row.get("memory_kept", True):
        FAULTS.append(f"{name}: memory")
    return seconds, told(report)


def spread(
    name: str, models: tuple[str, str], address: str, count: int | None, **how: Any
) -> tuple[float, str]:
    """`compare` on the cluster, in so many shares, by default as many as it takes by itself."""
    with mock.patch.object(nodes, "fitting", nodes.fitting if count is None else lambda _: count):
        options = Options(ray=address, jobs=1)
        plan = nodes.spread_survey(prepare(*models, options), options, paired=True)
        facts = {"shares": plan.tasks, "declared_mb": round(plan.memory / 1e6)}
        return timed(name, lambda: geoscope.compare(*models, ray=address, **how), **facts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--family", choices=sorted(FAMILIES), default="smollm2-135m")
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--nodes", type=int, default=3)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder), given.family, given.layers)
        models = (f"{folder}/base", f"{folder}/tuned")
        local, whole = timed("local", lambda: geoscope.compare(*models))
        with started(given.nodes) as cluster:
            ray, same = spread("ray", models, cluster.address, None)
            result = {"ratio": round(ray / local, 2), "same": same == whole}
            print(json.dumps(result), flush=True)
            if given.kills:
                killer = Killer(cluster, given.kills, given.seed)
                how = {"progress": Progress(on_pair=killer)}
                count = SHARES_A_KILL * given.kills
                _, after = spread("kills", models, cluster.address, count, **how)
                result |= {"kills": killer.done, "same_after_kills": after == whole}
    print(json.dumps({**result, "faults": FAULTS}))
    sys.exit(bool(FAULTS) or not (result["same"] and result.get("same_after_kills", True)))


if __name__ == "__main__":
    main()
