"""Do nodes give the same trajectory, prediction and initial adapter as one machine?

Most of it without Ray: shares are computed by the functions of the nodes in this process, job and
answers through pickle, in an order of their own. Then on a cluster, of which nodes die.
"""

from __future__ import annotations

import pickle
import re
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

import geoscope
from geoscope.engine.cluster import Need, Task
from geoscope.errors import OptionError, PairingError, Stopped
from geoscope.records import Report
from geoscope.sources.open import open_checkpoint
from geoscope.verbs import nodes
from geoscope.verbs.adapters import nodes as adapter_nodes
from geoscope.verbs.adapters.options import InitOptions
from geoscope.verbs.adapters.targets import choose_targets
from geoscope.verbs.options import Progress
from geoscope.verbs.series import nodes as series_nodes
from geoscope.verbs.series.memory import memory_of_share, room_of_share, working_bytes
from geoscope.verbs.series.opening import open_followed
from geoscope.verbs.series.options import FollowOptions
from tests.helpers.matrices import gaussian, save_model
from tests.helpers.ray_cluster import NODE, ray_cluster
from tests.helpers.running import run
from tests.helpers.runs import adapter

STEPS = (10, 20, 30, 40)
BLOCKS = 4
INIT: dict[str, dict[str, Any]] = {
    "residual": {"rank": 2},
    "mirror": {"rank": 2, "layout": "mirror"},
    "anchor": {"rank": 2, "method": "pissa", "layout": "anchor"},
    "lora": {"rank": 2, "method": "lora"},
}


class NodesHere:
    """A cluster of this process alone: the last task comes first, through pickle."""

    def __init__(self) -> None:
        self.needs: list[Need] = []

    def cores(self, *, gpus: int = 0) -> int:
        return 1

    def results(
        self, function: Callable[[Any, Any], Any], job: Any, tasks: Sequence[Task]
    ) -> Iterator[tuple[int, Any]]:
        self.needs = [task.need for task in tasks]
        for number in reversed(range(len(tasks))):
            sent = pickle.loads(pickle.dumps((job, tasks[number].argument())))
            yield number, pickle.loads(pickle.dumps(function(*sent)))


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> NodesHere:
    """`ray` means this process, in four shares."""
    made = NodesHere()

    @contextmanager
    def cluster(address: str) -> Iterator[NodesHere]:
        assert address == "here"
        yield made

    monkeypatch.setattr(nodes, "cluster", cluster)
    in_shares(monkeypatch, 4)
    return made


def in_shares(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    for module in (series_nodes, adapter_nodes):
        monkeypatch.setattr(module, "fitting", lambda _: count)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, a run of models, one of adapters, and a base of stacked experts."""
    root = tmp_path_factory.mktemp("series")
    base = {
        f"model.layers.{i}.{name}.weight": 0.02 * gaussian(*shape, seed=31 * i + len(name))
        for i in range(BLOCKS)
        for name, shape in (("mlp.up_proj", (40, 24)), ("self_attn.q_proj", (24, 24)))
    }
    save_model(root / "base", base)
    for step in STEPS:
        save_model(root / "run" / f"checkpoint-{step}", moved(base, step))
        adapter(root / "lora" / f"checkpoint-{step}", factors(step), alpha=6)
    return root


def moved(base: dict[str, Tensor], step: int) -> dict[str, Tensor]:
    """A drift and some noise; the last matrix cannot be followed."""
    made = {
        name: W
        + 1e-4 * step * gaussian(*W.shape, seed=len(name))
        + 1e-4 * gaussian(*W.shape, seed=step)
        for name, W in base.items()
    }
    if step == STEPS[-1]:
        made[f"model.layers.{BLOCKS - 1}.mlp.up_proj.weight"][0, 0] = float("nan")
    return made


def factors(step: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Name → B, A of rank 3."""
    return {
        f"model.layers.{i}.self_attn.q_proj": (
            1e-3 * step * gaussian(24, 3, seed=i),
            gaussian(3, 24, seed=100 + i) + 1e-2 * gaussian(3, 24, seed=step + i),
        )
        for i in range(BLOCKS)
    }


def told(report: Report) -> str:
    return re.sub(r'"seconds": ?[^,}]*', "", report.dumps())


def content(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


# --- the plan -----------------------------------------------------------------------------------


def test_shares_of_a_series_are_all_of_it_and_their_memory_is_kept_to(root: Path) -> None:
    options = FollowOptions(base=str(root / "base"))
    found = open_followed([str(root / "run")], options)
    parts = series_nodes.shares_of(found, 5)
    assert sorted(tensor.name for part in parts for tensor in part) == sorted(found.tensors)
    assert len(series_nodes.shares_of(found)) == 1
    for part in parts:
        working = sorted(map(working_bytes, part), reverse=True)
        memory = memory_of_share(part, found.steps, options, 2)
        assert room_of_share(part, found.steps, options, memory) == sum(working[:2])
        least = replace(options, max_memory="min")
        memory = memory_of_share(part, found.steps, least, 2)
        assert room_of_share(part, found.steps, least, memory) == working[0]
        bound = replace(options, max_memory="2GB")
        assert memory_of_share(part, found.steps, bound, 2) == 2 * 10**9


def test_shares_of_a_base_are_all_of_it(root: Path) -> None:
    targets = choose_targets(open_checkpoint(str(root / "base")), InitOptions(rank=2))
    parts = adapter_nodes.shares_of(targets, 5)
    assert sorted(each.info.name for part in parts for each in part) == sorted(targets.weights)
    assert len(adapter_nodes.shares_of(targets)) == 1


def test_models_in_memory_are_refused(root: Path) -> None:
    base, model = (open_checkpoint(str(root / name)) for name in ("base", "run/checkpoint-10"))
    with pytest.raises(OptionError, match="not tensors in memory"):
        geoscope.follow([model, model], base=str(root / "base"), steps="1,2", ray="auto")
    with pytest.raises(OptionError, match="not tensors in memory"):
        geoscope.follow([str(root / "run")], base=base, ray="auto")


def test_a_cluster_that_does_not_answer_leaves_nothing_behind(root: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray")
    words = ("init-adapter", root / "base", "-r", "2", "-o", tmp_path / "out", "-q")
    done = run(*words, "--ray", "127.0.0.1:1")
    assert (done.code, done.err.count("\n")) == (2, 1)
    assert "no Ray cluster answers there" in done.err
    assert not (tmp_path / "out").exists()


# --- what nodes compute, in this process ----------------------------------------------------------


@pytest.mark.parametrize(
    ("runs", "how"),
    [
        ("run", {"base": "base", "scalar_r2": "all"}),
        ("run", {"directions": False}),
        ("lora", {"base": "base"}),
        ("lora", {}),
    ],
)
def test_nodes_give_the_trajectory_of_one_machine(
    root: Path, here: NodesHere, runs: str, how: dict[str, Any]
) -> None:
    how = how | ({"base": str(root / "base")} if "base" in how else {})
    spread = geoscope.follow(str(root / runs), ray="here", **how)
    assert len(here.needs) == 4
    assert told(spread) == told(geoscope.follow(str(root / runs), **how))


def test_nodes_are_told_the_start_that_was_taken_out(root: Path, here: NodesHere) -> None:
    """The base among the checkpoints is step 5, and no node sees it."""
    save_model(root / "from" / "checkpoint-5", weights_of(root / "base"))
    points = [root / "from" / "checkpoint-5", *(root / "run" / f"checkpoint-{s}" for s in STEPS)]
    how: dict[str, Any] = {"base": str(points[0])}
    whole = geoscope.follow(points, **how)
    assert told(geoscope.follow(points, ray="here", **how)) == told(whole)
    (note,) = whole.provenance.parameters["notes"]
    assert "is the base; taken out of the series, as its start" in note


def weights_of(folder: Path) -> dict[str, Tensor]:
    checkpoint = open_checkpoint(str(folder))
    return {name: checkpoint.read(name) for name in checkpoint.tensors}


def test_other_tensors_on_a_node_are_told(
    root: Path, here: NodesHere, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        series_nodes, "elsewhere", lambda given, _: given.replace("/run/", "/lora/")
    )
    with pytest.raises(PairingError, match="have other tensors there than here"):
        geoscope.follow(str(root / "run"), ray="here")


def test_nodes_give_the_prediction_of_one_machine(
    root: Path, here: NodesHere, tmp_path: Path
) -> None:
    for name, ray in (("whole", None), ("spread", "here")):
        options = FollowOptions(base=str(root / "base"), exclude="3.mlp", ray=ray)
        geoscope.extrapolate(str(root / "run"), 41, tmp_path / name, options=options, force=True)
    found = {name: content(tmp_path / name) for name in ("whole", "spread")}
    assert found["whole"]["model.safetensors"] == found["spread"]["model.safetensors"]


@pytest.mark.parametrize("choice", INIT)
def test_nodes_give_the_adapter_of_one_machine(
    root: Path, here: NodesHere, tmp_path: Path, choice: str
) -> None:
    made = []
    for ray in (None, "here"):
        done = geoscope.init_adapter(
            root / "base", tmp_path / "out", InitOptions(**INIT[choice]), ray=ray, force=True
        )
        made.append((content(tmp_path / "out"), told(done.report)))
    assert made[0] == made[1]
    assert len(here.needs) == 4


def test_stacked_experts_come_back_as_they_were(here: NodesHere, tmp_path: Path) -> None:
    """Factors of a stack wait as PEFT packs them, and are taken apart for the rewritten base."""
    stacks = {"gate_up_proj": (2 * 40, 24), "down_proj": (24, 40)}
    weights = {
        f"model.layers.0.mlp.experts.{name}": 0.02 * gaussian(4 * m, n, seed=m).reshape(4, m, n)
        for name, (m, n) in stacks.items()
    }
    config = {"model_type": "qwen3_moe", "num_experts": 4, "hidden_size": 24}
    save_model(tmp_path / "base", weights, config=config)
    made = []
    for ray in (None, "here"):
        geoscope.init_adapter(
            tmp_path / "base", tmp_path / "out", rank=3, include="experts", ray=ray, force=True
        )
        made.append(content(tmp_path / "out"))
    assert made[0] == made[1]


@pytest.mark.parametrize("verb", ["trajectory", "init-adapter"])
def test_a_stop_keeps_what_is_finished(
    root: Path, here: NodesHere, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verb: str
) -> None:
    """Also where the caches of the nodes are lost, and where a rerun takes no cluster."""
    monkeypatch.setattr(
        f"geoscope.verbs.{'series' if verb == 'trajectory' else 'adapters'}.nodes.cache_there",
        lambda _: tmp_path / f"node-{time.time_ns()}",
    )
    recalled: list[int] = []

    def compute(**how: Any) -> str:
        if verb == "trajectory":
            return told(geoscope.follow(str(root / "run"), **how))
        made = geoscope.init_adapter(root / "base", tmp_path / "out", rank=2, force=True, **how)
        return told(made.report)

    def stop(done: int, _total: int, _name: str) -> None:
        if done >= 4:
            raise Stopped(signal.SIGINT)

    kept: dict[str, Any] = {"cache": tmp_path / "here"}
    with pytest.raises(Stopped):
        compute(ray="here", progress=Progress(on_pair=stop), **kept)
    assert not (tmp_path / "out").exists()
    again = Progress(on_recalled=lambda count, _total: recalled.append(count))
    spread = compute(ray="here", progress=again, **kept)
    assert 3 <= recalled[0] < 2 * BLOCKS - 1
    assert spread == compute()
    # the matrix with a NaN is never kept
    assert compute(progress=again, **kept) == spread
    assert recalled[1] == 2 * BLOCKS - (verb == "trajectory")


# --- a cluster ----------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_cluster_of_which_nodes_die_gives_the_same(
    root: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """And Ray writes nothing of it where a report may be read."""
    pytest.importorskip("ray")
    in_shares(monkeypatch, 2 * BLOCKS)
    whole = geoscope.follow(str(root / "run"), base=str(root / "base"))
    alone = geoscope.init_adapter(root / "base", tmp_path / "out", rank=2)
    files = content(tmp_path / "out")
    with ray_cluster(nodes=2) as cluster:
        victims = [cluster.add_node(**NODE)]

        def on_pair(done: int, total: int, name: str) -> None:
            if done == 2:
                cluster.remove_node(victims.pop(), allow_graceful=False)
                victims.append(cluster.add_node(**NODE))

        how: dict[str, Any] = {"progress": Progress(on_pair=on_pair), "ray": cluster.address}
        spread = geoscope.follow(str(root / "run"), base=str(root / "base"), **how)
        assert told(spread) == told(whole)
        made = geoscope.init_adapter(root / "base", tmp_path / "out", rank=2, force=True, **how)
        assert content(tmp_path / "out") == files
        assert told(made.report) == told(alone.report)
        assert capsys.readouterr().out == ""
        monkeypatch.setattr(adapter_nodes, "elsewhere", lambda given, _: f"/nowhere{given}")
        words = ("init-adapter", root / "base", "-r", "2", "-o", tmp_path / "new", "-q")
        done = run(*words, "--ray", cluster.address, "--no-resume")
        assert (done.code, done.err.count("\n")) == (1, 1)
        assert re.search(r"on node \S+: /nowhere/\S+ no such file or folder; every node", done.err)
        assert not (tmp_path / "new").exists()
