"""Many small matrices are measured in processes of this machine: the same report, its memory, and
what is kept of it."""

from __future__ import annotations

import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import geoscope
from geoscope import Options, Report
from geoscope.errors import Stopped
from geoscope.verbs.options import Interrupted, Progress
from geoscope.verbs.pairs import nodes, prepare
from tests.helpers.matrices import gaussian, save_model

EXPERTS = 5
SHARES = 4


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("experts")
    base = {
        f"model.layers.0.mlp.experts.{i}.{leaf}.weight": gaussian(*shape, seed=7 * i + len(leaf))
        for i in range(EXPERTS)
        for leaf, shape in (("gate_proj", (40, 24)), ("down_proj", (24, 40)))
    }
    base["model.layers.0.input_layernorm.weight"] = 1 + gaussian(1, 24, seed=3)[0]
    tuned = {
        name: W + 1e-3 * gaussian(1, W.numel(), seed=len(name)).view_as(W)
        for name, W in base.items()
    }
    for name, weights in (("base", base), ("tuned", tuned)):
        save_model(root / name, {key: W.bfloat16() for key, W in weights.items()})
    return root


@pytest.fixture
def _processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """They pay for these few matrices, too, in four shares."""
    monkeypatch.setattr(prepare, "_WORTH_PROCESSES", 0.0)
    monkeypatch.setattr(nodes, "fitting", lambda _: SHARES)


def compared(root: Path, progress: Progress | None = None, **named: Any) -> Report:
    options = Options(**{"jobs": 2, "cache": None, "ks": (4,), **named})
    sides = (str(root / "base"), str(root / "tuned"))
    return geoscope.compare(*sides, options=options, progress=progress)


def told(report: Report) -> str:
    return replace(report, provenance=replace(report.provenance, seconds=0.0)).dumps()


def test_the_report_is_that_of_threads(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = told(compared(root))
    used: list[int] = []
    monkeypatch.setattr(prepare, "_WORTH_PROCESSES", 0.0)
    monkeypatch.setattr(nodes, "fitting", lambda _: SHARES)
    whole = nodes.spread

    def spread(*given: Any, **named: Any) -> None:
        used.append(named["count"])
        whole(*given, **named)

    monkeypatch.setattr(nodes, "spread", spread)
    assert told(compared(root)) == expected
    assert used == [2]


@pytest.mark.slow
@pytest.mark.usefixtures("_processes")
def test_what_was_finished_is_recalled(root: Path, tmp_path: Path) -> None:
    recalled: list[int] = []

    def stop(_done: int, _of: int, _name: str) -> None:
        raise Stopped(signal.SIGINT)

    with pytest.raises(Interrupted) as interrupted:
        compared(root, Progress(on_pair=stop), cache=tmp_path)
    assert interrupted.value.report is None or len(interrupted.value.report.layers) < 2 * EXPERTS
    progress = Progress(on_recalled=lambda count, _of: recalled.append(count))
    assert told(compared(root, progress, cache=tmp_path)) == told(compared(root))
    assert recalled[0] > 0
    recalled.clear()
    compared(root, progress, cache=tmp_path)
    assert recalled == [2 * EXPERTS]


@pytest.mark.usefixtures("_processes")
def test_the_memory_that_is_asked_for_says_how_many(root: Path) -> None:
    sides = (str(root / "base"), str(root / "tuned"))

    def planned(**named: Any) -> tuple[int, int]:
        found = prepare.prepare(*sides, Options(cache=None, **named))
        return found.processes, found.memory

    count, memory = planned(jobs=3, max_memory="8GB")
    assert count == 3
    each = (memory - prepare.BASELINE) // 3
    assert each > prepare.BASELINE
    assert planned(jobs=3, max_memory=str(memory - 1)) == (2, prepare.BASELINE + 2 * each)
    assert planned(jobs=3, max_memory="min")[0] == 0
    assert planned(jobs=1)[0] == 0
    assert planned(jobs=3, max_memory="8GB", ray="auto")[0] == 0


def test_few_matrices_are_left_to_threads(root: Path) -> None:
    sides = (str(root / "base"), str(root / "tuned"))
    assert prepare.prepare(*sides, Options(jobs=3, cache=None)).processes == 0


@pytest.mark.usefixtures("_processes")
def test_tensors_in_memory_are_left_to_threads(root: Path) -> None:
    base = geoscope.open_checkpoint(str(root / "base"))
    tuned = geoscope.open_checkpoint(str(root / "tuned"))
    assert prepare.prepare(base, tuned, Options(jobs=3, cache=None)).processes == 0
