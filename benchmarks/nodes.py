"""A Ray cluster of a head and three nodes on this machine, beside the same work without it.

    python benchmarks/nodes.py BASE TUNED [--nodes 3]

Seconds of the call of the library, files included, imports of this process not; those of the
nodes' processes are in it. The reports have to be the same but for `seconds`.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import time
import warnings
from importlib import import_module

import geoscope


def told(report: geoscope.Report) -> str:
    return re.sub(r'"seconds": [^,}]*', "", report.dumps())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("base")
    parser.add_argument("tuned")
    parser.add_argument("--nodes", type=int, default=3)
    given = parser.parse_args()
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    warnings.simplefilter("ignore")
    each = {"num_cpus": 1, "object_store_memory": 120 << 20, "memory": 4 << 30}
    head = {**each, "num_cpus": 0, "include_dashboard": False}
    cluster = import_module("ray.cluster_utils").Cluster(True, head_node_args=head)
    try:
        for _ in range(given.nodes):
            cluster.add_node(**each)
        seconds, reports = {}, {}
        for name, address in (("local", None), ("ray", cluster.address)):
            before = time.perf_counter()
            reports[name] = geoscope.compare(given.base, given.tuned, ray=address)
            seconds[name] = time.perf_counter() - before
        same = told(reports["local"]) == told(reports["ray"])
        print(json.dumps({**seconds, "ratio": seconds["ray"] / seconds["local"], "same": same}))
    finally:
        cluster.shutdown()


if __name__ == "__main__":
    main()
