"""A run that is watched while a writer saves: whole checkpoints alone, each once."""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import geoscope
from geoscope.errors import CheckpointNotFound, OptionError, ReportError
from geoscope.sources import saves
from geoscope.verbs.series import watch as module
from geoscope.verbs.series.watch import LOG, Observation, scalars, watch
from geoscope.verbs.series.watch_options import WatchOptions
from tests.helpers.matrices import save_model
from tests.helpers.running import run, weights

LONG_AGO = 10_000.0


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return save_model(tmp_path / "base", weights())


def state(step: int) -> dict[str, Tensor]:
    """The weights of a step: a straight line from the base."""
    before, far = weights(), weights(100)
    return {name: before[name] + step / 100 * (far[name] - before[name]) for name in before}


def save(root: Path, step: int, *, said: bool = True) -> Path:
    folder = save_model(root / f"checkpoint-{step}", state(step))
    if said:
        (folder / "trainer_state.json").write_text("{}")
    return folder


def lines(root: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (root / LOG).read_text().splitlines()]


def look(
    root: Path, base: Path | None, interval: float = LONG_AGO, **how: Any
) -> list[Observation]:
    options = WatchOptions(base=base, ks=(2,), device="cpu", **how)  # type: ignore[arg-type]
    return list(watch(root, options=options, once=True, interval=interval))


# --- what is measured ---------------------------------------------------------------------------


def test_each_step_has_the_numbers_of_compare(tmp_path: Path, base: Path) -> None:
    root = tmp_path / "run"
    folders = [save(root, step) for step in (10, 20)]
    found = look(root, base)
    assert [one.step for one in found] == [10, 20]
    for observation, folder in zip(found, folders, strict=True):
        report = geoscope.compare(base, folder, ks=2)
        record = observation.record
        assert record["status"] == "MEASURED" and record["matrices"] == 4
        assert record["verdict"] == report.summary.verdict.code  # type: ignore[union-attr]
        assert record["values"]["relative_update"] == report["relative_update"].value
        assert {**report.summary.model, **record["values"]} == report.summary.model
        mean: list[Any] = [one["relative_update"].value for one in report.layers if one.layer == 1]
        assert record["layers"]["1"]["relative_update"] == pytest.approx(sum(mean) / 2)
    between = geoscope.compare(*folders, kind="anisotropy", ks=2)
    assert found[1].record["before"] == 10 and "before" not in found[0].record
    for key in ("relative_update", "update_sparsity_exact"):
        assert found[1].record["change"][key] == between[key].value
        assert found[1].record["change_nulls"].get(key) == between[key].null
    assert lines(root) == [json.loads(json.dumps(one.record)) for one in found]


def test_metrics_and_steps_are_chosen(tmp_path: Path, base: Path) -> None:
    root = tmp_path / "run"
    for step in (5, 10, 15, 20):
        save(root, step)
    found = look(root, base, every=10, only=("stable_rank", "nss"))
    assert [one.step for one in found] == [10, 20]
    assert set(found[0].record["values"]) == {"update.stable_rank", "nss"}
    named = scalars(found[1].record)
    assert {"geoscope/nss", "geoscope/layer_0/nss", "geoscope/change/relative_update"} <= set(named)
    assert {"geoscope/sync/bytes", "geoscope/layer_0/changed_share"} <= set(named)
    for wrong in ({"every": 0}, {"seconds": 0.0}):
        with pytest.raises(OptionError):
            WatchOptions(**wrong)  # type: ignore[arg-type]


def test_a_budget_takes_a_fixed_sample_of_layers(tmp_path: Path, base: Path) -> None:
    root = tmp_path / "run"
    save(root, 10)
    first = look(root, base, seconds=1e-12)[0].record
    assert first["matrices"] == 2 and first["layers_measured"] in ([0], [1])
    save(root, 20)
    assert look(root, base, seconds=1e-12)[0].record["layers_measured"] == first["layers_measured"]
    shutil.rmtree(root)
    save(root, 10)
    assert "layers_measured" not in look(root, base, seconds=1e6)[0].record


def test_the_depth_profile_is_where_the_energy_lies(tmp_path: Path, base: Path) -> None:
    root = tmp_path / "run"
    save(root, 10)
    both = look(root, base)[0].record["depth"]
    before, after = weights(), state(10)
    energy: dict[str, float] = {"0": 0.0, "1": 0.0}
    for name, one in after.items():
        if "layers" in name and one.dim() == 2:
            energy[name.split(".")[2]] += float((one.double() - before[name].double()).norm()) ** 2
    whole = sum(energy.values())
    assert both["shares"] == pytest.approx({block: e / whole for block, e in energy.items()})
    assert both["centre"] == pytest.approx(energy["1"] / whole)
    assert both["nulls"] == {"0": 0.5, "1": 0.5} and both["centre_null"] == 0.5
    moved = {**before, **{n: one for n, one in after.items() if "layers.1" in n}}
    (save_model(root / "checkpoint-20", moved) / "trainer_state.json").write_text("{}")
    record = look(root, base)[0].record
    assert record["depth"]["shares"] == {"0": 0.0, "1": 1.0}
    assert scalars(record)["geoscope/depth/centre"] == 1.0


# --- when it is whole ---------------------------------------------------------------------------


def test_a_save_without_the_file_that_others_have_waits(tmp_path: Path, base: Path) -> None:
    root = tmp_path / "run"
    save(root, 10)
    half = save(root, 20, said=False)
    assert [one.step for one in look(root, base, interval=0.0)] == [10]
    (half / "trainer_state.json").write_text("{}")
    assert [one.step for one in look(root, base)] == [20]


def test_verl_names_the_last_step_that_is_whole(tmp_path: Path, base: Path) -> None:
    root = tmp_path / "run"
    for step in (10, 20):
        save_model(root / f"global_step_{step}" / "actor" / "huggingface", state(step))
    (root / "latest_checkpointed_iteration.txt").write_text("10")
    assert [one.step for one in look(root, base, interval=0.0)] == [10]
    (root / "latest_checkpointed_iteration.txt").write_text("20")
    assert [one.step for one in look(root, base)] == [20]


def test_a_save_of_which_nothing_is_said_has_to_stand_still(tmp_path: Path, base: Path) -> None:
    root = tmp_path / "run"
    save(root, 10, said=False)
    assert look(root, base) == []
    time.sleep(0.3)
    assert [one.step for one in look(root, base, interval=0.2)] == [10]


def half_a_file(folder: Path) -> None:
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])


def without_a_shard(folder: Path) -> None:
    names = list(state(1))
    placed = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(names)}
    index = {"metadata": {}, "weight_map": placed}
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    first = {name: state(1)[name] for name in names[::2]}
    save_file(first, folder / "model-00001-of-00002.safetensors")


@pytest.mark.parametrize("damage", [half_a_file, without_a_shard])
def test_half_a_checkpoint_that_stands_still_has_no_number(
    tmp_path: Path, base: Path, damage: Callable[[Path], None]
) -> None:
    """As a writer leaves it that was killed; the run goes on and saves the step again."""
    root = tmp_path / "run"
    folder = save(root, 10, said=False)
    damage(folder)
    assert look(root, base, interval=0.0) == []
    assert not (root / LOG).exists()
    shutil.rmtree(folder)
    save(root, 10, said=False)
    (found,) = look(root, base, interval=0.0)
    assert (
        found.record["values"]["relative_update"]
        == geoscope.compare(base, folder)["relative_update"].value
    )


def test_one_that_is_said_to_be_whole_and_is_not_costs_a_line(tmp_path: Path, base: Path) -> None:
    root = tmp_path / "run"
    half_a_file(save(root, 10))
    save(root, 20)
    first, second = look(root, base)
    assert first.record["status"] == "FAILED" and "truncated" in first.record["reason"]
    assert second.record["status"] == "MEASURED"
    assert look(root, base) == []


# --- what goes wrong ----------------------------------------------------------------------------


def test_a_checkpoint_that_goes_while_it_is_read_costs_a_line(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "run"
    save(root, 10)
    save(root, 20)
    real = module.compare

    def rotated(first: Any, second: Any, **how: Any) -> Any:
        if str(second).endswith("checkpoint-10"):
            shutil.rmtree(second)
        return real(first, second, **how)

    monkeypatch.setattr(module, "compare", rotated)
    found = look(root, base)
    assert [one.record["status"] for one in found] == ["GONE", "MEASURED"]
    assert "change" not in found[1].record
    assert [one["step"] for one in lines(root)] == [10, 20]


def test_one_that_changes_while_it_is_read_is_read_again(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "run"
    folder = save(root, 10)
    real = module.compare
    calls: list[str] = []

    def changing(first: Any, second: Any, **how: Any) -> Any:
        report = real(first, second, **how)
        calls.append(str(second))
        if len(calls) == 1:
            save_file(state(50), folder / "model.safetensors")
        return report

    monkeypatch.setattr(module, "compare", changing)
    assert look(root, base) == []
    (found,) = look(root, base)
    wanted = real(base, folder)["relative_update"].value
    assert found.record["values"]["relative_update"] == wanted


def test_killed_and_started_again_it_leaves_the_same_file(tmp_path: Path, base: Path) -> None:
    steps = (10, 20, 30)
    for name in ("whole", "killed"):
        for step in steps:
            save(tmp_path / name, step)
    look(tmp_path / "whole", base)
    options = WatchOptions(base=str(base), ks=(2,), device="cpu")
    watcher: Any = watch(tmp_path / "killed", options=options, once=True, interval=0.0)
    next(watcher)
    watcher.close()
    with (tmp_path / "killed" / LOG).open("ab") as file:  # what a kill in a write leaves
        file.write(b'{"step": 20, "sta')
    look(tmp_path / "killed", base)
    whole, killed = ((tmp_path / name / LOG).read_bytes() for name in ("whole", "killed"))
    assert whole == killed and len(whole.splitlines()) == 3
    assert look(tmp_path / "killed", base) == []


def test_a_slow_writer_beside_it(tmp_path: Path, base: Path) -> None:
    """Shards out of order, piece by piece, the index first; killed once, and started again."""
    root = tmp_path / "run"
    root.mkdir()
    steps = (10, 20, 30)

    def write(step: int, *, killed: bool = False) -> None:
        whole = state(step)
        names = list(whole)
        placed = {
            name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(names)
        }
        folder = root / f"checkpoint-{step}"
        folder.mkdir(exist_ok=True)
        index = json.dumps({"metadata": {}, "weight_map": placed})
        (folder / "model.safetensors.index.json").write_text(index)
        for shard in (2, 1):
            own = {n: whole[n] for n in names if placed[n].startswith(f"model-0000{shard}")}
            save_file(own, tmp_path / "shard")
            content = (tmp_path / "shard").read_bytes()
            with (folder / f"model-0000{shard}-of-00002.safetensors").open("wb") as file:
                for start in range(0, len(content), 4096):
                    file.write(content[start : start + 4096])
                    file.flush()
                    time.sleep(0.005)
                    if killed and start:
                        return
        (folder / "trainer_state.json").write_text("{}")

    def writer() -> None:
        write(10)
        write(20, killed=True)
        write(20)
        write(30)

    thread = threading.Thread(target=writer)
    thread.start()
    options = WatchOptions(base=str(base), ks=(2,), device="cpu", only=("relative_update",))
    found = list(
        watch(root, options=options, until=30, interval=5.0, sleep=lambda _: time.sleep(0.02))
    )
    thread.join()
    assert [one.step for one in found] == [one["step"] for one in lines(root)] == list(steps)
    for one in found:
        wanted = geoscope.compare(weights(), state(one.step), ks=2)["relative_update"].value
        assert one.record["values"]["relative_update"] == wanted


def test_what_cannot_be_watched_is_told(tmp_path: Path, base: Path) -> None:
    with pytest.raises(CheckpointNotFound, match="no such folder"):
        look(tmp_path / "nowhere", base)
    root = tmp_path / "run"
    save(root, 10)
    with pytest.raises(OptionError, match="no `base` to compare it with"):
        look(root, None)


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("no json", "line 2 is not JSON: Expecting value: line 1 column 1"),
        ("<html>", "line 2 is not JSON: it is a web page"),
        ("[" * 100_000, "it is nested too deep"),
        ("[]", r"line 2 is \[\], and must be a table with a step"),
        ("{}", "line 2 is {}, and must be a table with a step"),
        ('{"step": null}', "line 2 is {'step': null}, and must be a table with a step"),
        ('{"step": 1.5}', "line 2: step is 1.5, and must be a whole number"),
        ('{"step": [20]}', r"line 2: step is \[20\], and must be a whole number"),
        ('{"step": 20, "layers_measured": 3}', "layers_measured is 3, and must be a list"),
        ('{"step": 20, "layers_measured": ["0"]}', "and must be a list of whole numbers"),
    ],
)
def test_a_line_of_another_kind_is_told(tmp_path: Path, base: Path, line: str, told: str) -> None:
    root = tmp_path / "run"
    save(root, 10)
    (root / LOG).write_text(f'{{"step": 4}}\n{line}\n')
    with pytest.raises(ReportError, match=f"{told}.*; move it away, and start again$"):
        look(root, base)
    assert (root / LOG).read_text().endswith(f"\n{line}\n")


def test_files_beside_checkpoints_are_regular_or_not_read(tmp_path: Path, base: Path) -> None:
    root = tmp_path / "run"
    save(root, 10)
    os.mkfifo(root / "latest_checkpointed_iteration.txt")
    assert [one.step for one in look(root, base)] == [10]
    (root / LOG).unlink()
    os.mkfifo(root / LOG)
    with pytest.raises(ReportError, match=r"cannot be read: it is a pipe or a device, .*; move it"):
        look(root, base)


def test_a_line_break_of_another_alphabet_ends_no_line(tmp_path: Path, base: Path) -> None:
    root = tmp_path / "run"
    save(root, 10)
    (root / LOG).write_text('{"step": 4, "reason": "a\u2028b\x85c"}\n')
    assert [one.step for one in look(root, base)] == [10]
    assert [one.step for one in look(root, base)] == []


def test_times_of_entries_count_and_not_those_of_contents(tmp_path: Path) -> None:
    """A copy that keeps the time of the file is new all the same."""
    folder = save(tmp_path / "run", 10, said=False)
    for file in folder.iterdir():
        os.utime(file, (0, 0))
    (found,) = saves.saves_of(tmp_path / "run")
    assert time.time() - found.changed < 60


# --- adapters -----------------------------------------------------------------------------------


def test_a_run_of_adapters_is_measured_from_its_factors(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from geoscope.peft.adapted import AdaptedCheckpoint

    root = tmp_path / "run"
    draws = torch.Generator().manual_seed(1)
    A, B = torch.randn(2, 24, generator=draws), torch.randn(24, 2, generator=draws)
    for step in (1, 2):
        folder = root / f"checkpoint-{step}"
        folder.mkdir(parents=True)
        path = "base_model.model.model.layers.0.self_attn.q_proj"
        factors = {f"{path}.lora_A.weight": A, f"{path}.lora_B.weight": 1e-3 * step * B}
        save_file(factors, folder / "adapter_model.safetensors")
        config = {
            "peft_type": "LORA",
            "r": 2,
            "lora_alpha": 2,
            "base_model_name_or_path": str(base),
        }
        (folder / "adapter_config.json").write_text(json.dumps(config))
        (folder / "trainer_state.json").write_text("{}")
    dense: list[str] = []
    read = AdaptedCheckpoint.read

    def watched(self: AdaptedCheckpoint, name: str, **how: Any) -> Tensor:
        if self.is_difference or self.start is not None:
            dense.append(name)
        return read(self, name, **how)

    monkeypatch.setattr(AdaptedCheckpoint, "read", watched)
    first, second = look(root, base, only=("relative_update",))
    one, two = (each.record["values"]["relative_update"] for each in (first, second))
    W = weights()["model.layers.0.self_attn.q_proj.weight"].double()
    assert one == pytest.approx(float(1e-3 * (B.double() @ A.double()).norm() / W.norm()), rel=1e-6)
    assert two == pytest.approx(2 * one, rel=1e-6)
    assert second.record["change"]["update.stable_rank"] is not None
    assert second.record["changed"]["sync"] is None  # it is the adapter that a sync sends
    assert dense == []
    shutil.rmtree(root / "nothing", ignore_errors=True)
    (root / LOG).unlink()
    alone = look(root, None, only=("stable_rank",))
    assert [each.record["values"]["update.stable_rank"] for each in alone] == pytest.approx(
        [first.report["stable_rank"].value] * 2  # type: ignore[index]
    )


# --- the command --------------------------------------------------------------------------------


def test_the_command_prints_a_line_a_step(tmp_path: Path, base: Path) -> None:
    root = tmp_path / "run"
    save(root, 10)
    save(root, 20)
    how = ("--base", base, "--once", "--k", "2", "--device", "cpu")
    done = run("watch", root, *how)
    assert done.code == 0 and f"watching {root}" in done.err
    first, second = done.out.splitlines()
    assert first.startswith("step 10: ") and "stable rank" in first and "since" not in first
    assert (
        "since 10: ρ" in second and "% (" in second and "of entries changed, a sync sends" in second
    )
    assert run("watch", root, *how).out == ""
    (root / LOG).unlink()
    told = run("watch", root, *how, "--json")
    assert [json.loads(line)["step"] for line in told.out.splitlines()] == [10, 20]


def test_a_condition_ends_it_or_runs_a_command(tmp_path: Path, base: Path) -> None:
    root = tmp_path / "run"
    save(root, 10)
    save(root, 20)
    how = ("--base", base, "--once", "--k", "2", "--device", "cpu")
    fail = ("--fail-on", "relative_update>1e-9")
    done = run("watch", root, *how, *fail)
    assert done.code == 3 and len(lines(root)) == 1
    assert "step 10: --fail-on: relative_update>1e-9" in done.err
    (root / LOG).unlink()
    command = f"echo $GEOSCOPE_STEP >> {tmp_path}/told"
    assert run("watch", root, *how, *fail, "--on-fail", command).code == 0
    assert (tmp_path / "told").read_text() == "10\n20\n"
    refused = run("watch", root, *how, "--log", "nonsense")
    assert refused.code == 2 and "not one of tensorboard, wandb, trackio, mlflow" in refused.err
