"""The two commands: what they print and write, how they end, and `show` without the checkpoints."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from analysis_series.runs import LLAMA, Run, stored
from cli.running import run as command

STEPS = tuple(range(0, 100, 10))


@pytest.fixture(scope="module")
def drifting(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return Run.write(tmp_path_factory.mktemp("drift"), STEPS, drift=1.0, dtype=torch.bfloat16)


def test_it_says_drift_or_diffusion_and_how_far(drifting: Run) -> None:
    done = command("trajectory", drifting.folder, "--base", drifting.base)
    assert done.code == 0, done.err
    words = " ".join(done.out.split())
    assert "mostly drift" in words
    assert "credible up to" in words
    for line in ("drift or diffusion", "temporal rank 1", "spatial rank 1", "held-out skill"):
        assert line in done.out
    assert "COMPLETE" in done.out
    assert "nan" not in done.out.lower()


def test_show_needs_no_checkpoints(tmp_path: Path, drifting: Run) -> None:
    shutil.copytree(drifting.base.parent, tmp_path / "mine")
    given = "trajectory", tmp_path / "mine/run", "--base", tmp_path / "mine/base"
    path = tmp_path / "report.json"
    printed = command(*given, "--out", path)
    assert printed.code == 0, printed.err
    shutil.rmtree(tmp_path / "mine")
    shown = command("show", path)
    assert shown.code == 0, shown.err
    assert shown.out == printed.out
    for suffix in (".md", ".csv", ".svg", ".png"):
        done = command("show", path, "--out", tmp_path / f"again{suffix}")
        assert done.code == 0, done.err
        assert (tmp_path / f"again{suffix}").stat().st_size > 500
    report = json.loads(path.read_text())
    assert report["kind"] == "trajectory"
    assert len(report["layers"][0]["gram"]) == len(STEPS) - 1


def test_any_order_prints_the_same(drifting: Run) -> None:
    points = [*drifting.points]
    one = command("trajectory", *points, "--base", drifting.base, "--no-directions")
    two = command("trajectory", *reversed(points), "--base", drifting.base, "--no-directions")
    assert one.code == 0
    assert one.out == two.out


def test_missing_matrices_are_partial_and_strict_refuses_them(tmp_path: Path) -> None:
    run = Run.write(tmp_path, STEPS, drift=0.5)
    name = next(iter(LLAMA))
    weights = {key: W for key, W in run.models[2].items() if key != name}
    Run.of(tmp_path, (0, 20), [run.models[0], weights], shards=2)
    given = "trajectory", run.folder, "--base", run.base, "--no-directions"
    done = command(*given)
    assert done.code == 0
    assert "PARTIAL" in done.out
    assert name in done.out
    strict = command(*given, "--strict")
    assert strict.code == 1
    assert f"1 matrices not followed: {name}" in strict.err


@pytest.mark.parametrize("steps", [(0, 10), (0, 10, 20), (0, 10, 20, 30)])
def test_few_checkpoints_are_printed_with_what_does_not_apply(
    tmp_path: Path, steps: tuple[int, ...]
) -> None:
    run = Run.write(tmp_path, steps, drift=0.5)
    done = command("trajectory", run.folder, "--base", run.base)
    assert done.code == 0
    assert "NOT_APPLICABLE" in done.out


def test_fail_on_ends_with_three(drifting: Run) -> None:
    given = "trajectory", drifting.folder, "--base", drifting.base, "--no-directions", "-q"
    assert command(*given, "--fail-on", "DRIFT").code == 3
    assert command(*given, "--fail-on", "NO_DRIFT").code == 0
    assert command(*given, "--fail-on", "drift_fraction>0.2").code == 3


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--steps", "10,20"), "--steps has 2 numbers"),
        (("--initial-adapter", "x"), "--initial-adapter is for series of adapters"),
        (("--jobs", "0"), "--jobs 0"),
    ],
)
def test_refusals_are_one_line(drifting: Run, words: tuple[str, ...], said: str) -> None:
    done = command("trajectory", *drifting.points, "--base", drifting.base, *words)
    assert done.code == 2
    assert said in done.err
    assert done.err.count("\n") == 1


def test_extrapolate_writes_and_says_what_skill_means(tmp_path: Path, drifting: Run) -> None:
    given = "extrapolate", drifting.folder, "--base", drifting.base, "--to-step", "100"
    done = command(*given, "-o", tmp_path / "out")
    assert done.code == 0, done.err
    assert "step 100 from checkpoints up to step 90" in done.out
    assert "skill is about weights and not about the model" in done.out
    assert {W.dtype for W in stored(tmp_path / "out").values()} == {torch.bfloat16}
    told = command(*given, "-o", tmp_path / "two", "--method", "damped(linear)", "--json")
    report = json.loads(told.out)
    assert (report["to_step"], report["last_step"], report["method"]) == (100, 90, "damped(linear)")
    assert set(report["tensors"]) == set(LLAMA)


def test_extrapolate_refuses_beyond_the_horizon(tmp_path: Path, drifting: Run) -> None:
    given = "extrapolate", drifting.folder, "--base", drifting.base, "--to-step", "9000"
    done = command(*given, "-o", tmp_path / "out", "--method", "damped(linear)")
    assert done.code == 2
    assert "8910 steps ahead: damped(linear) is credible up to" in done.err
    assert "or --force" in done.err
    assert not (tmp_path / "out").exists()
    done = command(*given, "-o", tmp_path / "out", "--method", "two-point", "--force")
    assert done.code == 0
    assert "asked for 8910" in done.out
