"""The runs of the study: starts that leave the base as it is, runs that go on after a kill."""

from __future__ import annotations

import json
from bisect import bisect
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import geoscope
from benchmarks.study import training
from benchmarks.study.design import LEVELS, RATES, Run, boundary, design
from benchmarks.study.measure import numbers_of
from benchmarks.study.methods import METHODS, started, stored_weights
from benchmarks.study.model import (
    Size,
    complete,
    logits,
    matrix_names,
    new_weights,
)
from benchmarks.study.outcomes import outcome
from benchmarks.study.tasks import EOS, PAD, TASKS, Problems, Task, stream
from benchmarks.study.training import Settings, evaluate, trained_run, write_json

SIZE = Size(layers=1, hidden=16, inner=24, heads=2)
SMALL = Settings(size=SIZE, steps=4, save_steps=2, prompts=8, samples=8)


def base_of(folder: Path) -> dict[str, torch.Tensor]:
    weights = new_weights(SIZE, stream(0, 2))
    folder.mkdir(parents=True)
    save_file(weights, folder / "model.safetensors")
    write_json(folder / "record.json", {"accuracy": 0.0, "reward": 0.0, "entropy": 1.0})
    return weights


def test_answers_are_right() -> None:
    prompts, answers = TASKS["addition"].encode(torch.tensor([123456]))
    assert prompts.tolist() == [[3, 2, 1, 10, 6, 5, 4, 11]]
    assert answers.tolist() == [[9, 7, 5, 0, EOS]]
    prompts, answers = TASKS["sorting"].encode(torch.tensor([419250]))
    assert prompts[0, 1:7].tolist() == [0, 5, 2, 9, 1, 4]
    assert answers.tolist() == [[0, 1, 2, 4, 5, 9, EOS]]


def test_held_out_problems_are_never_drawn() -> None:
    problems = Problems("addition", 3)
    sets = [set(part.tolist()) for part in (problems.test, problems.validation, problems.train)]
    assert sum(map(len, sets)) == len(set.union(*sets)) == problems.task.count


def test_cached_sampling_is_the_whole_forward_pass() -> None:
    weights, prompts = new_weights(SIZE, stream(1, 2)), torch.arange(12).view(2, 6)
    tokens, entropy = complete(weights, prompts, 4, SIZE, samples=3, generator=stream(1, 3))
    assert len({tuple(row) for row in tokens.tolist()}) > 2
    sequences = torch.cat([prompts.repeat_interleave(3, 0), tokens], dim=1)
    scores, _ = logits(weights, sequences[:, :-1], SIZE)
    logprobs = scores[:, -4:].log_softmax(-1)
    free, expected = tokens != PAD, -(logprobs.exp() * logprobs).sum(-1)
    torch.testing.assert_close(entropy[free], expected[free], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", METHODS)
def test_a_start_leaves_the_model_as_it_is(name: str) -> None:
    size = Size(layers=1, hidden=32, inner=40, heads=2)
    base = new_weights(size, stream(0, 2))
    weights = started(name, base, size, seed=0).weights()
    for key in base:
        torch.testing.assert_close(weights[key].detach(), base[key], rtol=1e-5, atol=1e-5)


@pytest.fixture
def stopping(monkeypatch: pytest.MonkeyPatch) -> str:
    """A task that a model without training solves now and then: end at once."""

    def encode(problems: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        digits = torch.stack([problems % 10, problems // 10 % 10], dim=1)
        return digits, torch.full((len(problems), 1), EOS)

    monkeypatch.setitem(TASKS, "stopping", Task(4096, 1e-3, encode))
    return "stopping"


def test_a_run_that_was_killed_goes_on_to_the_same_bytes(
    tmp_path: Path, stopping: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, calls = Run("lora-r2", 1e-2, stopping, 0, True), []

    def killed(*what: Any) -> dict[str, float]:
        calls.append(what)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return evaluate(*what)

    for root in (tmp_path / "whole", tmp_path / "cut"):
        base_of(root / "bases" / run.base)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(training, "evaluate", killed)
        trained_run(run, tmp_path / "cut", SMALL)
    folders = [tmp_path / root / "runs" / run.name for root in ("whole", "cut")]
    assert not (folders[1] / "record.json").exists()
    for root in (tmp_path / "whole", tmp_path / "cut"):
        trained_run(run, root, SMALL)
    ends = [load_file(each / "checkpoint-4" / "adapter_model.safetensors") for each in folders]
    start = load_file(folders[0] / "start" / "adapter_model.safetensors")
    assert all(torch.equal(ends[0][key], ends[1][key]) for key in start)
    assert not any(torch.equal(ends[0][key], start[key]) for key in start)
    curves = [json.loads((each / "record.json").read_text())["curve"] for each in folders]
    assert curves[0] == curves[1] and [point["step"] for point in curves[0]] == [2, 4]


@pytest.mark.parametrize("name", ["lora-r2", "full"])
def test_geoscope_reads_the_update_that_was_trained(
    name: str, tmp_path: Path, stopping: str
) -> None:
    run = Run(name, 1e-2, stopping, 0, False)
    base = base_of(tmp_path / "bases" / run.base)
    trained_run(run, tmp_path, SMALL)
    folder = tmp_path / "runs" / run.name
    weights = stored_weights(name, base, folder / "start", folder / "checkpoint-4")
    moved = total = 0.0
    for matrix in (f"{each}.weight" for each in matrix_names(SIZE)):
        moved += float((weights[matrix] - base[matrix]).detach().double().square().sum())
        total += float(base[matrix].double().square().sum())
    base_folder = tmp_path / "bases" / run.base
    report = geoscope.compare(base_folder, folder / "checkpoint-4", ks=2, jobs=1)
    assert moved > 0
    assert report["relative_update"].value == pytest.approx((moved / total) ** 0.5, rel=1e-5)


def test_all_statistics_are_taken_of_a_start_that_is_not_zero(tmp_path: Path) -> None:
    size = Size(layers=1, hidden=32, inner=40, heads=2)
    base = new_weights(size, stream(0, 2))
    save_file(base, tmp_path / "model.safetensors")
    trained, folders = started("geora-residual", base, size, seed=0), []
    trained.save(tmp_path / "start", tmp_path)
    for step in (10, 20, 30):
        for each in trained.parameters.values():
            each.data += 1e-3 * torch.randn(each.shape, generator=stream(step, 9))
        folders.append(tmp_path / f"checkpoint-{step}")
        trained.save(folders[-1], tmp_path)
    numbers = numbers_of(tmp_path, folders, "geora-residual", tmp_path / "start", steps="10,20,30")
    size_of_it = numbers["relative_update"]
    assert isinstance(size_of_it, float) and 0 < size_of_it < 0.1  # not that of the start, ≈ .3
    assert numbers["trajectory.relative_update"] == pytest.approx(size_of_it, rel=1e-6)
    assert numbers["beyond.distorted.angle"] is not None
    assert numbers["capacity.k90_share"] is not None


def test_the_design_is_balanced() -> None:
    runs = list(design(4))
    assert len({run.name for run in runs}) == len(runs) == 4 * LEVELS * len(METHODS) + 33
    for facts in ("method", "task", "seed"):
        with_kl = Counter(getattr(run, facts) for run in runs if run.kl)
        without = Counter(getattr(run, facts) for run in runs if not run.kl)
        assert all(abs(with_kl[key] - without[key]) <= 2 for key in with_kl | without)
    assert {(run.task, run.seed) for run in runs[:55]} == {("addition", 0)}
    assert [run.task for run in runs[55:59]] == ["addition", "sorting", "addition", "sorting"]


def test_the_boundary_lies_between_two_rates_of_each_method() -> None:
    for method in METHODS:
        rates = sorted(run.rate for run in boundary() if run.method == method)
        places = {bisect(RATES[method], rate) for rate in rates}
        assert len(rates) == 3 and len(places) == 1 and 0 < places.pop() < LEVELS


def row(accuracies: list[float], entropy: float = 0.4, finite: str = "1") -> dict[str, str]:
    steps = range(0, 121, 10)
    curve = [accuracies[0], *[max(accuracies)] * 11, accuracies[-1]]
    table = {f"accuracy_{step}": str(a) for step, a in zip(steps, curve, strict=True)}
    return table | {"entropy_0": "0.4", "entropy_120": str(entropy), "finite": finite}


@pytest.mark.parametrize(
    ("facts", "expected"),
    [
        (row([0.5, 0.39]), "collapsed"),
        (row([0.5, 0.9], finite="0"), "collapsed"),
        (row([0.5, 0.55], entropy=0.01), "collapsed"),
        (row([0.5, 0.7], entropy=0.01), "learned"),
        (row([0.5, 0.8, 0.65]), "unstable"),
        (row([0.5, 0.7], entropy=0.9), "unstable"),
        (row([0.5, 0.65]), "learned"),
        (row([0.5, 0.55]), "idle"),
        (row([0.5, 0.42]), "idle"),
    ],
)
def test_outcomes_follow_the_rules(facts: dict[str, str], expected: str) -> None:
    assert outcome(facts) == expected
