"""A Ray cluster of several nodes in one machine, which tells nobody of itself."""

from __future__ import annotations

import importlib
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

__all__ = ["NODE", "ray_cluster"]

# One core, and as much as Ray asks of a node at least.
NODE = {"num_cpus": 1, "object_store_memory": 120 << 20, "memory": 4 << 30}


@contextmanager
def ray_cluster(nodes: int = 2) -> Iterator[Any]:
    """A head that computes nothing, and so many nodes; `address` is what --ray takes."""
    quiet = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
    with mock.patch.dict(os.environ, quiet), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Ray's own
        utils = importlib.import_module("ray.cluster_utils")
        head = {**NODE, "num_cpus": 0, "include_dashboard": False}
        cluster = utils.Cluster(initialize_head=True, head_node_args=head)
        try:
            for _ in range(nodes):
                cluster.add_node(**NODE)
            yield cluster
        finally:
            cluster.shutdown()
