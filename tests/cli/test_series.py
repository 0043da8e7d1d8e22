"""The two commands: what they print and write, how they end, and `show` without the checkpoints."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.helpers.running import by_rows
from tests.helpers.running import run as command
from tests.helpers.runs import LLAMA, Run, stored

STEPS = tuple(range(0, 100, 10))


@pytest.fixture(scope="module")
def drifting(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return Run.write(tmp_path_factory.mktemp("drift"), STEPS, drift=1.0, dtype=torch.bfloat16)


def test_it_says_drift_or_diffusion_and_how_far(drifting: Run) -> None:
    done = command("trajectory", drifting.folder, "--base", drifting.base, "--details")
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
    for suffix in (".md", ".csv", ".svg"):
        done = command("show", path, "--out", tmp_path / f"again{suffix}")
        assert done.code == 0, done.err
        assert (tmp_path / f"again{suffix}").stat().st_size > 500
    report = by_rows(json.loads(path.read_text()))
    assert report["kind"] == "trajectory"
    code = report["summary"]["verdict"]["code"]
    for words, status in ((code, 3), ("NOT_A_CODE", 2), ("ON_PRINCIPAL", 2)):
        assert command("show", path, "--fail-on", words).code == status
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
    done = command("trajectory", run.folder, "--base", run.base, "--details")
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
    assert "Prediction of step 100" in done.out
    assert "WITHIN WHAT IS CREDIBLE: 10 steps from step 90" in done.out
    assert "Skill is about weights and not about the model" in done.out
    assert {W.dtype for W in stored(tmp_path / "out").values()} == {torch.bfloat16}
    told = command(*given, "-o", tmp_path / "two", "--method", "damped(linear)", "--json")
    report = json.loads(told.out)
    assert (report["to_step"], report["last_step"], report["method"]) == (100, 90, "damped(linear)")
    assert set(report["tensors"]) == set(LLAMA)


def test_extrapolate_refuses_beyond_the_horizon(tmp_path: Path, drifting: Run) -> None:
    given = "extrapolate", drifting.folder, "--base", drifting.base, "--to-step", "9000"
    done = command(*given, "-o", tmp_path / "out", "--method", "damped(linear)")
    assert done.code == 2
    assert "8910 steps ahead, but damped(linear) is credible only up to" in done.err
    assert "or use --force" in done.err
    assert not (tmp_path / "out").exists()
    done = command(*given, "-o", tmp_path / "out", "--method", "two-point", "--force")
    assert done.code == 0
    assert "BEYOND WHAT IS CREDIBLE: 8910 steps" in done.out


def test_single_entries_on_request(drifting: Run) -> None:
    """RLVR-Linearity's R² against lstsq over every entry; a walk's beside it."""
    given = "trajectory", drifting.folder, "--base", drifting.base, "--no-directions", "--json"
    plain, done = command(*given), command(*given, "--scalar-r2", "all")
    assert done.code == 0, done.err
    assert "scalar_r2_median" not in json.loads(plain.out)["summary"]["model"]
    report = json.loads(done.out)
    values, null = report["summary"]["model"], report["summary"]["nulls"]["scalar_r2_median"]
    t = np.array(STEPS[1:], dtype=float)
    rows = np.concatenate(
        [
            np.stack([(W[name].double() - drifting.models[0][name].double()).numpy().ravel()
                      for W in drifting.models[1:]])
            for name in LLAMA
        ],
        axis=1,
    )  # fmt: skip
    moved = np.ptp(rows, axis=0) > 0
    X = np.stack([np.ones_like(t), t], axis=1)
    fitted = X @ np.linalg.lstsq(X, rows[:, moved], rcond=None)[0]
    left = ((rows[:, moved] - fitted) ** 2).sum(0)
    r2 = 1 - left / ((rows[:, moved] - rows[:, moved].mean(0)) ** 2).sum(0)
    assert values["scalar_r2_median"] == pytest.approx(np.median(r2), abs=2e-4)
    assert values["scalar_r2_share"] == pytest.approx((r2 > 0.7).mean(), abs=1e-3)
    assert values["scalar_r2_kept"] == pytest.approx(moved.mean(), abs=1e-9)
    assert null == pytest.approx(0.44, abs=0.04)
    assert (
        "median R² of an entry" in command(*given[:-1], "--scalar-r2", "published", "--details").out
    )
    refused = command(*given, "--scalar-r2", "some")
    assert refused.code == 2 and "some" in refused.err


def test_vectors_on_request(tmp_path: Path, drifting: Run) -> None:
    path = tmp_path / "pairs.safetensors"
    given = "trajectory", drifting.folder, "--base", drifting.base, "--vectors", path
    done = command(*given)
    assert done.code == 0, done.err
    pairs = load_file(path)
    for name in LLAMA:
        first, last = drifting.models[0][name].double(), drifting.models[-1][name].double()
        U, S, Vh = torch.linalg.svd(last - first)
        u, v, sigma = (pairs[f"{name}.updates.{key}"] for key in ("u", "v", "sigma"))
        assert u.shape == (len(STEPS) - 1, len(first))
        assert float(sigma[-1]) == pytest.approx(float(S[0]), rel=1e-9)
        assert abs(float(u[-1] @ U[:, 0])) == pytest.approx(1, abs=1e-9)
        assert abs(float(v[-1] @ Vh[0])) == pytest.approx(1, abs=1e-9)
        turns = (u[1:] * u[:-1]).sum(-1) + (v[1:] * v[:-1]).sum(-1)
        assert float(turns.min()) >= 0, "signs are aligned"
    assert command(*given).code == 2, "not overwritten without --force"
    assert command(*given, "--force").code == 0
    refused = command(*given[:-1], tmp_path / "other.safetensors", "--no-directions")
    assert refused.code == 2 and "--no-directions" in refused.err
    assert command(*given[:-1], tmp_path / "pairs.npz").code == 2


def test_verbose_tells_how_pairs_were_found(drifting: Run) -> None:
    done = command("trajectory", drifting.folder, "--base", drifting.base, "--json")
    for layer in done.report["layers"]:
        for kind in ("updates", "steps"):
            assert 0 < layer["method"][kind]["bound"] < 1e-9
    words = command("trajectory", drifting.folder, "--base", drifting.base, "--verbose").out
    assert "updates" in words.partition("how each matrix was computed")[2]
