"""Every sign that a series is not what it seems gets its line, and a sound run none."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from geoscope.trajectory.increments import Increments
from geoscope.verbs.series.follow import follow
from geoscope.verbs.series.options import FollowOptions
from geoscope.verbs.series.traps import series_traps
from tests.helpers.runs import Run, lora_run, steps_of

STEPS = (0, 10, 20, 30, 40, 50)


def notes(*given: str | Path, **options: str | None) -> list[str]:
    found = follow([str(one) for one in given], options=FollowOptions(jobs=1, **options))  # pyright: ignore[reportArgumentType]
    lines = found.provenance.parameters["notes"]
    assert all("\n" not in line for line in lines)
    usual = ("the base is not read", "a weight sync sends the adapter itself")
    return [line for line in lines if not line.startswith(usual)]


def copy(source: Path, place: Path) -> None:
    shutil.rmtree(place)
    shutil.copytree(source, place)


def traps(lengths: list[float], steps: list[float], *, adapters: bool = False) -> tuple[str, ...]:
    """Of orthogonal increments of these lengths, stored without rounding."""
    H = torch.tensor(lengths, dtype=torch.float64).square().diag()
    total = Increments((0.0, *steps), H, (0.0,) * (len(steps) + 1), 1.0)
    return series_traps(total, adapters=adapters, base_exact=True)


@pytest.mark.parametrize("drift", [0.0, 1.0])
def test_a_sound_run_has_no_remark(tmp_path: Path, drift: float) -> None:
    run = Run.write(tmp_path, (0, 1, 2, 50, 60, 500), drift=drift, rho=0.03, dtype=torch.bfloat16)
    found = [note for note in notes(run.folder, base=str(run.base)) if "TOO_FAR" not in note]
    assert found == []


def test_a_name_rule_without_effect_is_said(tmp_path: Path) -> None:
    run = Run.write(tmp_path, STEPS)
    rules = FollowOptions(jobs=1, base=str(run.base), map_name=("^nowhere=else", "^model=model"))
    told = follow([str(run.folder)], options=rules).provenance.parameters["notes"]
    assert [line for line in told if "map_name" in line] == [
        "`map_name` ^nowhere=else: changes no name",
        "`map_name` ^model=model: changes no name",
    ]


def test_merged_directories_that_equal_the_base_are_said(tmp_path: Path) -> None:
    run = Run.write(tmp_path, STEPS)
    for place in run.points:
        copy(run.base, place)
    (line,) = notes(run.folder, base=str(run.base))
    expected = "merged directory equals the base; did you mean `lora_adapter/`?"
    assert line == f"every step: {expected}"


def test_the_first_checkpoints_may_equal_the_base(tmp_path: Path) -> None:
    run = Run.write(tmp_path, STEPS)
    for place in run.points[:2]:
        copy(run.base, place)
    (line,) = notes(run.folder, base=str(run.base))
    assert line.startswith("steps 10, 20: merged directory equals the base")


def test_identical_checkpoints_are_said(tmp_path: Path) -> None:
    run = Run.write(tmp_path, STEPS)
    copy(run.points[2], run.points[3])
    (line,) = notes(run.folder, base=str(run.base))
    assert line == "steps 30 and 40 are identical: duplicate save"


def test_a_run_resumed_from_another_base_is_said(tmp_path: Path) -> None:
    run = Run.write(tmp_path / "one", STEPS, rho=1e-3)
    other = Run.write(tmp_path / "other", STEPS, rho=1e-3, seed=1)
    for mine, foreign in zip(run.points[3:], other.points[3:], strict=True):
        copy(foreign, mine)
    (line,) = [note for note in notes(run.folder, base=str(run.base)) if "jump" in note]
    assert line.startswith("step 40: jump in ‖ΔW‖, ")
    assert line.endswith("resumed from another base")


def test_an_adapter_that_did_not_start_at_zero_is_said(tmp_path: Path) -> None:
    _, folder, initial = lora_run(tmp_path, STEPS, from_zero=False)
    (line,) = notes(folder)
    assert line.startswith("step 10: jump in ‖ΔW‖, ")
    assert line.endswith("an adapter that did not start at zero: give `initial_adapter`")
    assert notes(folder, initial_adapter=str(initial)) == []


def test_an_adapter_that_did_not_move_is_said(tmp_path: Path) -> None:
    _, folder, initial = lora_run(tmp_path, STEPS, from_zero=True)
    copy(initial, folder / "checkpoint-10")
    assert notes(folder) == ["step 10: the adapter's update is zero; saved before training?"]
    copy(folder / "checkpoint-40", folder / "checkpoint-50")
    assert notes(folder)[1:] == ["steps 40 and 50 are identical: duplicate save"]


def test_increments_below_rounding_are_said(tmp_path: Path) -> None:
    run = Run.write(tmp_path, STEPS, rho=2e-4, dtype=torch.bfloat16)
    (line,) = notes(run.folder, base=str(run.base))
    assert line.startswith("steps 10, 20, 30 and 2 more: increments below rounding, ν(δ) up to ")
    wide = Run.write(tmp_path / "fp32", STEPS, rho=2e-4)
    assert notes(*steps_of(wide.points), base=str(wide.base)) == []


@pytest.mark.parametrize("power", [0.5, 1.0], ids=["walk", "drift"])
def test_spacing_alone_is_no_jump(power: float) -> None:
    gaps = [1.0, *[1000.0] * 6, 1.0]
    steps = [sum(gaps[: i + 1]) for i in range(len(gaps))]
    lengths = [0.01 * gap**power for gap in gaps]
    assert traps(lengths, steps) == ()
    lengths[2] *= 11
    (line,) = traps(lengths, steps)
    assert line.startswith("step 2001: jump in ‖ΔW‖, 11 × as fast as the median step")


def test_steps_that_did_not_move_do_not_lower_the_median() -> None:
    found = traps([0.0, 1.0, 0.0, 0.0, 1.1, 0.0], [1, 2, 3, 4, 5, 6])
    assert not any("jump" in line for line in found)
    assert sum("identical" in line for line in found) == 3
    assert traps([1.0], [10.0]) == ()
