"""Does a Ray cluster give the report of one machine, whatever happens to its nodes?"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import geoscope
from geoscope.errors import OptionError, Stopped
from geoscope.records import Report
from geoscope.verbs.options import Interrupted, Options, Progress
from geoscope.verbs.pairs import nodes
from geoscope.verbs.pairs.shares import fitting, shares
from tests.helpers.matrices import gaussian, save_model
from tests.helpers.ray_cluster import NODE, ray_cluster
from tests.helpers.running import run

OPTIONS = Options(ks=(2, 4), include=("proj", "norm"))
LAYERS = 12


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("nodes")
    base, tuned = {}, {}
    for i in range(LAYERS):
        key = f"model.layers.{i}.mlp.up_proj.weight"
        base[key] = 0.02 * gaussian(96, 64, seed=i)
        tuned[key] = base[key] + 0.002 * gaussian(96, 64, seed=100 + i)
        key = f"model.layers.{i}.input_layernorm.weight"
        base[key], tuned[key] = gaussian(1, 40, seed=i)[0], gaussian(1, 40, seed=7 + i)[0]
    tuned["model.layers.1.mlp.up_proj.weight"][0, 0] = float("nan")
    return save_model(root / "base", base), save_model(root / "tuned", tuned)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    pytest.importorskip("ray")
    with ray_cluster(nodes=2) as made:
        yield made


def timeless(report: Report) -> str:
    return re.sub(r'"seconds": ?[^,}]*', "", report.dumps())


def test_shares_are_all_of_the_work_and_small(models: tuple[Path, Path]) -> None:
    pairs = geoscope.inspect(*models, options=OPTIONS).pairing.matrices
    many = [replace(pairs[i % LAYERS], name=f"{i}") for i in range(1000)]
    parts = shares(many, fitting(many))
    assert sum(map(len, parts)) == 1000
    assert {pair.name for part in parts for pair in part} == {pair.name for pair in many}
    assert max(map(len, parts)) <= 256
    assert fitting(pairs) == 1
    large = [replace(pair, shape=(28672, 8192)) for pair in pairs]
    assert fitting(large) == LAYERS


def test_what_a_cluster_cannot_take_is_one_line(models: tuple[Path, Path]) -> None:
    tensors = {"model.layers.0.mlp.up_proj.weight": gaussian(8, 8, seed=1)}
    with pytest.raises(OptionError, match="not tensors in memory"):
        geoscope.compare(tensors, tensors, ray="auto")
    done = run("compare", *models, "--ray", "auto", "--part", "1/2", "-o", "x.json")
    assert done.code == 2
    assert "--part and --ray both share out the matrices" in done.err


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["compare", "capacity"])
def test_a_cluster_gives_the_report_of_one_machine(
    models: tuple[Path, Path], cluster: Any, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("ray")
    monkeypatch.setattr(nodes, "fitting", lambda _: 5)
    options = replace(OPTIONS, budget=5000) if kind == "capacity" else OPTIONS
    whole = geoscope.compare(*models, kind=kind, options=options)
    spread = geoscope.compare(*models, kind=kind, options=options, ray=cluster.address)
    assert timeless(spread) == timeless(whole)


@pytest.mark.slow
def test_nodes_that_die_and_come_change_nothing(
    models: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("ray")
    monkeypatch.setattr(nodes, "fitting", lambda _: LAYERS)
    whole = geoscope.compare(*models, options=OPTIONS)
    with ray_cluster(nodes=2) as cluster:
        victim = cluster.add_node(**NODE)

        def on_pair(done: int, total: int, name: str) -> None:
            if done == 2:
                cluster.remove_node(victim, allow_graceful=False)
                cluster.add_node(**NODE)

        progress = Progress(on_pair=on_pair)
        how = {"options": OPTIONS, "progress": progress, "ray": cluster.address}
        spread = geoscope.compare(*models, **how)
    assert timeless(spread) == timeless(whole)


@pytest.mark.slow
def test_a_stop_keeps_what_is_finished_and_a_rerun_continues(
    models: tuple[Path, Path], cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With caches of nodes that are lost: what this machine keeps is enough."""
    pytest.importorskip("ray")
    monkeypatch.setattr(nodes, "fitting", lambda _: 6)
    monkeypatch.setattr(nodes, "cache_there", lambda _: tmp_path / f"node-{time.time_ns()}")
    recalled: list[tuple[int, int]] = []

    def stop(done: int, total: int, name: str) -> None:
        if done >= 4:
            raise Stopped(15)

    how = {"options": OPTIONS, "ray": cluster.address, "cache": tmp_path / "here"}
    with pytest.raises(Interrupted) as stopped:
        geoscope.compare(*models, progress=Progress(on_pair=stop), **how)
    assert stopped.value.report is not None
    done = len(stopped.value.report.layers)
    assert 4 <= done < LAYERS
    again = Progress(on_recalled=lambda *count: recalled.append(count))
    spread = geoscope.compare(*models, progress=again, **how)
    # the matrix with a NaN is never kept
    assert recalled and done - 1 <= recalled[0][0] <= done
    assert timeless(spread) == timeless(geoscope.compare(*models, options=OPTIONS))


@pytest.mark.slow
def test_a_node_without_the_models_or_room_is_told(
    models: tuple[Path, Path], cluster: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("ray")
    words = ["collapse", *models, "--ray", cluster.address, "--no-resume", "-q"]
    done = run(*words, "--max-memory", "64GB")
    assert (done.code, done.err.count("\n")) == (2, 1)
    assert "a task needs 1 cores and 64 GB, and no node has them" in done.err
    monkeypatch.setattr(nodes, "elsewhere", lambda given, commit=None: f"/nowhere{given}")
    done = run(*words)
    assert (done.code, done.err.count("\n")) == (1, 1)
    assert re.search(r"on node \S+: /nowhere/\S+ no such file or folder; every node", done.err)
    monkeypatch.undo()
    monkeypatch.setattr("geoscope.engine.cluster.__version__", "9.9.9")
    done = run(*words)
    assert (done.code, done.err.count("\n")) == (2, 1)
    assert "and this is geoscope 9.9.9; install the same on all nodes" in done.err
