"""Is each trainer's run folder read as the series that it is, every trap said in one line?"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from geoscope.errors import CheckpointError, CheckpointNotFound, GeoscopeError, OptionError
from geoscope.sources.series import Series, open_series
from tests.helpers.files import CONFIG, llama, write_config, write_model, write_sharded
from tests.helpers.step_folders import Q, adapter


def model(folder: Path, seed: int = 0) -> Path:
    return write_model(folder, {f"{Q}.weight": llama(seed)[f"{Q}.weight"]})


def touch(path: Path, text: str = "") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def configuration(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    write_config(folder, CONFIG)
    return folder


def opened(*references: Path | str, steps: Sequence[int] | None = None) -> Series:
    return open_series([str(one) for one in references], steps=steps)


def reasons(series: Series) -> dict[str, str]:
    """Last part of the name → why it was passed over."""
    for one in series.passed_over:
        assert "\n" not in one.reason
    return {Path(one.name).name: one.reason for one in series.passed_over}


def lost(series: Series) -> set[str]:
    return {Path(one.name).name for one in series.passed_over if one.missing}


def fails(kind: type[GeoscopeError], *references: Path | str, **options: Any) -> str:
    with pytest.raises(kind) as caught:
        opened(*references, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- arguments ----------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path: Path) -> Path:
    for step in (200, 1000, 40):
        model(tmp_path / "my run" / f"checkpoint-{step}", step)
    return tmp_path / "my run"


def test_steps_are_sorted_as_numbers_whatever_the_order(run: Path) -> None:
    folders = [str(one) for one in run.iterdir()]
    expected = opened(run)
    assert expected.steps == (40, 200, 1000)
    assert (expected.kind, expected.unit, expected.notes) == ("model", "step", ())
    for seed in range(4):
        random.Random(seed).shuffle(folders)
        found = opened(*folders)
        assert found.steps == expected.steps
        assert [one.given for one in found.points] == [one.given for one in expected.points]
        assert found.passed_over == expected.passed_over


def test_each_point_reads_its_own_weights(run: Path) -> None:
    for point in opened(run).points:
        assert point.checkpoint is not None and point.adapter is None
        assert point.place == "./: model folder"
        assert point.resolved == str(run.resolve() / f"checkpoint-{point.step}")
        assert torch.equal(point.checkpoint.read(f"{Q}.weight"), llama(point.step)[f"{Q}.weight"])


def test_a_glob_that_the_shell_left_alone(run: Path) -> None:
    assert opened(run / "checkpoint-*").steps == (40, 200, 1000)
    assert opened(run / "checkpoint-[12]*").steps == (200, 1000)
    message = fails(CheckpointNotFound, run / "step-*")
    assert message.endswith("step-*: no file or folder of that pattern")


def test_a_folder_with_the_signs_of_a_glob_in_its_name(tmp_path: Path) -> None:
    assert opened(model(tmp_path / "run [1]" / "step_3")).steps == (3,)


def test_what_a_glob_of_the_shell_brings_along_is_listed(run: Path) -> None:
    touch(run / "trainer_log.jsonl")
    touch(run / "checkpoint-40" / "optimizer.pt")
    (run / "runs").mkdir()
    model(run / "checkpoint-final")
    (run / "latest").symlink_to(run / "nothing")
    found = opened(*run.iterdir(), run / "checkpoint-40" / "optimizer.pt")
    assert found.steps == (40, 200, 1000)
    assert reasons(found) == {
        "trainer_log.jsonl": "a file without weights",
        "optimizer.pt": "a file without weights",
        "runs": "a folder without weights",
        "checkpoint-final": "no step number in its name; set the steps by hand with `steps`",
        "latest": "no step number in its name; set the steps by hand with `steps`",
    }
    assert lost(found) == set()


def test_broken_links_of_a_glob_stay_on_this_disk(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (run / "latest").symlink_to(run / "nothing")
    (run / "checkpoint-50").symlink_to(run / "nothing")
    monkeypatch.chdir(run.parent)
    found = opened("my run/*")
    assert found.steps == (40, 200, 1000)
    assert reasons(found) == {
        "latest": "no step number in its name; set the steps by hand with `steps`",
        "checkpoint-50": "step 50: my run/checkpoint-50: neither a file nor a folder",
    }
    assert lost(found) == {"checkpoint-50"}


def test_a_run_folder_lists_what_has_no_number(run: Path) -> None:
    model(run)
    model(run / "checkpoint-final")
    found = opened(run)
    assert found.steps == (40, 200, 1000)
    hint = "no step number in its name; set the steps by hand with `steps` to use it"
    assert reasons(found) == {
        "checkpoint-final": hint,
        "my run": f"weights of the run folder itself: {hint}",
    }


def test_a_run_folder_among_others_is_no_checkpoint(run: Path, tmp_path: Path) -> None:
    found = opened(run, model(tmp_path / "step_1"))
    assert found.steps == (1,)
    assert reasons(found) == {"my run": "a run folder with steps of its own; give it alone"}


def test_the_folder_above_runs_names_them(run: Path, tmp_path: Path) -> None:
    message = fails(CheckpointError, tmp_path)
    assert message.endswith("a folder without weights; steps are in my run)")


def test_folders_above_the_run_tell_no_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model(tmp_path / "step_2" / "run" / "base")
    model(tmp_path / "step_2" / "run" / "checkpoint-7")
    assert opened(tmp_path / "step_2" / "run").steps == (7,)
    monkeypatch.chdir(tmp_path / "step_2" / "run")
    found = opened("base", "checkpoint-7")
    assert found.steps == (7,)
    assert list(reasons(found)) == ["base"]
    monkeypatch.chdir("checkpoint-7")
    assert opened(".").steps == (7,)


def test_the_same_step_twice_names_both(run: Path, tmp_path: Path) -> None:
    other = model(tmp_path / "other" / "global_step_0200")
    message = fails(OptionError, *run.iterdir(), other)
    assert message.startswith("step 200 is there twice: ")
    assert str(other) in message and str(run / "checkpoint-200") in message


def test_one_place_given_twice_counts_once(run: Path) -> None:
    one = run / "checkpoint-40"
    found = opened(one, f"{one}/", run / "checkpoint-200")
    assert found.steps == (40, 200)
    (skipped,) = found.passed_over
    assert skipped.reason.startswith("given twice, as ") and not skipped.missing


def test_steps_by_hand_replace_the_names(run: Path) -> None:
    final = model(run / "checkpoint-final")
    found = opened(final, run / "checkpoint-40", steps=[300, 7])
    assert [(one.step, Path(one.given).name) for one in found.points] == [
        (7, "checkpoint-40"),
        (300, "checkpoint-final"),
    ]
    assert "has 2 numbers for 1 checkpoints" in fails(OptionError, final, steps=[1, 2])
    assert "has -1; steps are whole" in fails(OptionError, final, steps=[-1])
    assert "step 5 is there twice" in fails(OptionError, final, run / "checkpoint-40", steps=[5, 5])


def test_epochs_and_steps_are_not_mixed(run: Path) -> None:
    epoch = model(run.parent / "epoch_1")
    message = fails(OptionError, epoch, run / "checkpoint-40")
    assert message.startswith(f"{epoch} counts epochs and {run / 'checkpoint-40'} steps; ")
    assert opened(epoch, run / "checkpoint-40", steps=[1, 2]).steps == (1, 2)


def test_models_and_adapters_are_not_mixed(run: Path) -> None:
    message = fails(OptionError, adapter(run / "checkpoint-50"), run / "checkpoint-40")
    assert message.startswith("step 50 is an adapter (")
    assert "and step 40 a full model (" in message


def test_files_of_weights_have_steps_too(run: Path) -> None:
    loose = run / "step_5.safetensors"
    save_file({f"{Q}.weight": torch.ones(8, 8)}, loose)
    found = opened(loose, run / "checkpoint-40" / "model.safetensors")
    assert found.steps == (5, 40)
    assert found.points[0].place == "step_5.safetensors: file of weights, named itself"
    factors = adapter(run / "checkpoint-60") / "adapter_model.safetensors"
    assert opened(factors).points[0].place == "adapter_model.safetensors: adapter, named itself"


@pytest.mark.parametrize("name", ["nothing/here", "./nothing"])
def test_a_path_that_is_not_there_is_an_error(name: str, run: Path) -> None:
    fails(CheckpointNotFound, run / "checkpoint-40", run / name)


def test_nothing_given_or_nothing_left(tmp_path: Path) -> None:
    assert "give their folders" in fails(OptionError)
    message = fails(CheckpointError, touch(tmp_path / "a.txt"), model(tmp_path / "base"))
    assert message == (
        f"none of the given paths is a checkpoint with a step number ({tmp_path}/a.txt: a file "
        "without weights, "
        f"{tmp_path}/base: no step number in its name; set the steps by hand with `steps`)"
    )


# --- the folders of each trainer ----------------------------------------------------------------


def verl(run: Path, fill: Callable[[Path], object]) -> Path:
    for step in (5, 10, 100):
        actor = run / f"global_step_{step}" / "actor"
        shards(actor, step)
        touch(run / f"global_step_{step}" / "data.pt")
        fill(actor)
    touch(run / "latest_checkpointed_iteration.txt", "100")
    return run


def shards(actor: Path, step: int) -> Path:
    """Of one rank, where nothing is split."""
    touch(actor / "fsdp_config.json", '{"world_size": 1}')
    weights = {f"{Q}.weight": llama(step)[f"{Q}.weight"]}
    torch.save(weights, actor / "model_world_size_1_rank_0.pt")
    return actor


def test_trl_adapters(tmp_path: Path) -> None:
    for step in (60, 120, 1200):
        adapter(tmp_path / f"checkpoint-{step}")
        touch(tmp_path / f"checkpoint-{step}" / "optimizer.pt")
        touch(tmp_path / f"checkpoint-{step}" / "trainer_state.json", "{}")
    found = opened(tmp_path)
    assert (found.steps, found.kind) == ((60, 120, 1200), "adapter")
    point = found.points[0]
    assert point.adapter is not None and list(point.adapter.modules) == [Q]
    assert (point.place, point.checkpoint) == ("./: adapter", None)


def test_verl_with_a_model_folder_beside_the_shards(tmp_path: Path) -> None:
    found = opened(verl(tmp_path, lambda actor: model(actor / "huggingface")))
    assert (found.steps, found.kind) == ((5, 10, 100), "model")
    place = "actor/: shards, chosen over the model folder in actor/huggingface/"
    for point in found.points:
        assert point.place == place
        assert point.checkpoint is not None
        assert torch.equal(point.checkpoint.read(f"{Q}.weight"), llama(point.step)[f"{Q}.weight"])
    named = opened(*(one / "actor" / "huggingface" for one in tmp_path.glob("global_step_*")))
    assert named.points[0].place == "./: model folder"


def test_shards_of_a_lora_run_are_adapters(tmp_path: Path) -> None:
    for step in (1, 2):
        actor = tmp_path / f"global_step_{step}" / "actor"
        touch(actor / "lora_train_meta.json", '{"r": 2, "lora_alpha": 4}')
        names = [f"base_model.model.{Q}.lora_{side}.default.weight" for side in "AB"]
        factors = dict(zip(names, (torch.ones(2, 8), torch.ones(8, 2)), strict=True))
        factors[f"base_model.model.{Q}.base_layer.weight"] = torch.ones(8, 8)
        torch.save(factors, actor / "model_world_size_1_rank_0.pt")
    found = opened(tmp_path)
    assert (found.steps, found.kind) == ((1, 2), "adapter")
    assert found.points[0].place == "actor/: shards, read as an adapter"
    (tmp_path / "global_step_2" / "actor" / "lora_train_meta.json").unlink()
    found = opened(tmp_path)
    assert found.steps == (1,)
    assert "whose alpha is not known" in reasons(found)["global_step_2"]


def test_verl_takes_the_adapter_before_all_else(tmp_path: Path) -> None:
    def fill(actor: Path) -> None:
        adapter(actor / "lora_adapter")
        model(actor / "huggingface")

    found = opened(verl(tmp_path, fill))
    assert found.kind == "adapter"
    assert found.points[0].place == (
        "actor/lora_adapter/: adapter, chosen over the shards in actor/, "
        "the model folder in actor/huggingface/"
    )
    named = opened(*(one / "actor" / "huggingface" for one in tmp_path.glob("global_step_*")))
    assert (named.steps, named.kind) == ((5, 10, 100), "model")
    assert named.points[0].place == "./: model folder"


def test_merged_folder_of_verl_with_its_adapter(tmp_path: Path) -> None:
    model(tmp_path / "step_1")
    adapter(tmp_path / "step_1" / "lora_adapter")
    place = "lora_adapter/: adapter, chosen over the model folder in ./"
    assert opened(tmp_path / "step_1").points[0].place == place
    assert opened(tmp_path / "step_1" / "model.safetensors").kind == "model"


def test_openrlhf(tmp_path: Path) -> None:
    for step in (20, 100):
        model(tmp_path / f"global_step{step}_hf")
    for step in (20, 100, 120):
        touch(tmp_path / "_actor" / f"global_step{step}" / "mp_rank_00_model_states.pt")
    touch(tmp_path / "_actor" / "latest", "global_step100")
    found = opened(tmp_path)
    assert found.steps == (20, 100)
    assert lost(found) == {"global_step120"}  # the others have their _hf
    assert reasons(found)["global_step120"].startswith("step 120: ")
    assert "DeepSpeed ZeRO shards (mp_rank_00_model_states.pt)" in reasons(found)["global_step120"]


@pytest.mark.parametrize("below", ["policy/weights", "policy/weights/model"])
@pytest.mark.parametrize("write", [model, adapter])
def test_nemo_rl(tmp_path: Path, below: str, write: Callable[[Path], Path]) -> None:
    for step in (2, 10):
        write(tmp_path / f"step_{step}" / below)
        touch(tmp_path / f"step_{step}" / "policy" / "tokenizer" / "tokenizer.json", "{}")
        touch(tmp_path / f"step_{step}" / "config.yaml")
    found = opened(tmp_path)
    assert found.steps == (2, 10)
    assert found.kind == write.__name__
    assert found.points[0].place.startswith(f"{below}/: ")


@pytest.mark.parametrize(
    ("file", "called"),
    [
        ("policy/weights/iter_0000002/common.pt", "a Megatron checkpoint"),
        ("actor/dist_ckpt/common.pt", "a Megatron checkpoint"),
        ("global_step2/zero_to_fp32.py", "DeepSpeed ZeRO shards"),
    ],
)
def test_shards_that_are_not_read_are_named(tmp_path: Path, file: str, called: str) -> None:
    touch(tmp_path / "step_2" / file)
    model(tmp_path / "step_3")
    found = opened(tmp_path)
    assert found.steps == (3,)
    assert f"weights are {called} (" in reasons(found)["step_2"]
    assert lost(found) == {"step_2"}


def test_next_and_alpharl(tmp_path: Path) -> None:
    model(tmp_path / "next" / "global_step_30" / "hf_model")
    touch(tmp_path / "next" / "global_step_30_delta_svd_matrix" / "u.pt")
    assert opened(tmp_path / "next").points[0].place == "hf_model/: model folder"
    for step in (2, 10):
        model(tmp_path / "alpha" / f"GRPO-step-{step}")
    assert opened(tmp_path / "alpha").steps == (2, 10)


def test_torchtune_counts_epochs(tmp_path: Path) -> None:
    for epoch in (0, 2, 10):
        write_sharded(tmp_path / f"epoch_{epoch}", llama())
    found = opened(tmp_path)
    assert (found.steps, found.unit) == ((0, 2, 10), "epoch")
    assert found.notes == ("the numbers of this series are epochs, not steps",)


# --- traps --------------------------------------------------------------------------------------


def trap(folder: Path, tmp_path: Path) -> str:
    """Why the step in `folder` is passed over, beside one that is fine."""
    fine = adapter(tmp_path / "step_1")
    found = opened(fine, folder)
    assert found.steps == (1,)
    assert lost(found) == {folder.name}
    return reasons(found)[folder.name]


def test_configuration_without_weights(tmp_path: Path) -> None:
    actor = shards(tmp_path / "global_step_2" / "actor", 2)
    configuration(actor / "huggingface")
    assert opened(tmp_path / "global_step_2").points[0].place == "actor/: shards"
    with pytest.raises(CheckpointError) as caught:
        opened(actor / "huggingface")
    assert "`huggingface/` holds configuration only; weights are in the shards" in str(caught.value)


@pytest.mark.parametrize(
    ("file", "reason"),
    [
        ("actor/model_world_size_2_rank_0.pt", "1 of 2 rank files are not there"),
        ("policy/weights/__0_0.distcp", ".distcp files without .metadata"),
    ],
)
def test_shards_that_are_still_being_written(tmp_path: Path, file: str, reason: str) -> None:
    touch(tmp_path / "step_2" / file)
    assert reason in trap(tmp_path / "step_2", tmp_path)


def test_configuration_alone(tmp_path: Path) -> None:
    folder = configuration(tmp_path / "step_2" / "huggingface").parent
    assert "huggingface` holds configuration only (config.json)" in trap(folder, tmp_path)


def test_a_folder_without_anything(tmp_path: Path) -> None:
    (tmp_path / "step_2").mkdir()
    assert "no weights geoscope can read; found: no files" in trap(tmp_path / "step_2", tmp_path)


@pytest.mark.parametrize("config", [True, False])
def test_an_adapter_folder_without_factors(tmp_path: Path, config: bool) -> None:
    folder = tmp_path / "step_2"
    model(folder / "actor" / "huggingface")
    if config:
        adapter(folder / "actor" / "lora_adapter")
        (folder / "actor" / "lora_adapter" / "adapter_model.safetensors").unlink()
    else:
        (folder / "actor" / "lora_adapter").mkdir()
    assert trap(folder, tmp_path) == (
        "step 2: adapter folder without `adapter_model.safetensors` "
        f"({folder}/actor/lora_adapter); give {folder}/actor/huggingface to take the full weights"
    )
    assert opened(folder / "actor" / "huggingface").kind == "model"


def test_a_half_written_adapter(tmp_path: Path) -> None:
    file = adapter(tmp_path / "step_2") / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-20])
    assert trap(tmp_path / "step_2", tmp_path).startswith("step 2: ")


def test_factors_without_a_config(tmp_path: Path) -> None:
    (adapter(tmp_path / "step_2") / "adapter_config.json").unlink()
    assert "holds no adapter_config.json" in trap(tmp_path / "step_2", tmp_path)


def test_lora_alpha_of_an_old_merger(tmp_path: Path) -> None:
    folder = adapter(tmp_path / "step_2", lora_alpha=0)
    assert trap(folder, tmp_path) == (
        f"step 2: {folder}: lora_alpha is 0: written by an old merger; set it in "
        "adapter_config.json to the alpha of the training"
    )


def test_a_shard_that_is_not_there(tmp_path: Path) -> None:
    folder = tmp_path / "step_2"
    write_sharded(folder, llama())
    (folder / "model-00002-of-00002.safetensors").unlink()
    assert trap(folder, tmp_path) == (
        f"step 2: `{folder}`: the index names model-00002-of-00002.safetensors, which is not there "
        "(9 tensors); the checkpoint is still being written, was cut, or rotated away: copy the "
        "shard"
    )
