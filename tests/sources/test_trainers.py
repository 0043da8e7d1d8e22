"""Layouts of trainers: verl's Megatron with its manifest, sub-folders of any name, Hub caches."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from geoscope.errors import CheckpointError, OptionError
from geoscope.sources.open import open_checkpoint
from geoscope.sources.series import open_series
from geoscope.sources.trainers import FOLDERS
from tests.helpers.files import assert_equal_bits, llama, write_model
from tests.helpers.step_folders import Q, adapter

WEIGHT = f"{Q}.weight"


def manifest(folder: Path, model: str = "model/huggingface", **backend: bool) -> None:
    """As verl writes it."""
    folder.mkdir(parents=True, exist_ok=True)
    contents = {"model": {"path": model, "format": "huggingface", "backend": "mbridge"}}
    written = {"schema_version": 2, "framework": "megatron", "backend": backend}
    (folder / "ckpt_contents.json").write_text(json.dumps({**written, "contents": contents}))


@pytest.mark.parametrize("folder", [row.folder for row in FOLDERS])
def test_every_row_of_the_table_is_found(tmp_path: Path, folder: str) -> None:
    write_model(tmp_path / folder, llama(3))
    checkpoint = open_checkpoint(str(tmp_path)) if "lora" not in folder else None
    if checkpoint is not None:
        assert_equal_bits(checkpoint.read(WEIGHT), llama(3)[WEIGHT])


@pytest.mark.parametrize("root", ["", "actor/"])
def test_megatron_of_verl_with_its_manifest(tmp_path: Path, root: str) -> None:
    for step in (1, 2):
        save = tmp_path / f"global_step_{step}" / root
        write_model(save / "model/huggingface", llama(step))
        manifest(save)
    found = open_series([str(tmp_path)])
    assert found.steps == (1, 2)
    assert found.notes == (
        f"weights of every step taken from {root}model/huggingface/: model folder",
    )


def test_a_save_without_the_manifest_is_doubted(tmp_path: Path) -> None:
    write_model(tmp_path / "actor/model/huggingface", llama())
    (note, *_) = open_checkpoint(str(tmp_path)).notes
    assert note.endswith(
        "without ckpt_contents.json, which verl writes last: is the save complete?"
    )


def test_the_manifest_says_where(tmp_path: Path) -> None:
    write_model(tmp_path / "actor/exported/hf", llama(5))
    manifest(tmp_path / "actor", "exported/hf")
    assert_equal_bits(open_checkpoint(str(tmp_path)).read(WEIGHT), llama(5)[WEIGHT])


@pytest.mark.parametrize("path", ["../outside", "/etc", 3, None])
def test_a_manifest_leads_nowhere_else(tmp_path: Path, path: str) -> None:
    write_model(tmp_path / "outside", llama())
    manifest(tmp_path / "run/actor", path)
    with pytest.raises(CheckpointError):
        open_checkpoint(str(tmp_path / "run"))


def test_the_base_of_a_lora_run_is_not_taken_for_the_model(tmp_path: Path) -> None:
    """Megatron's bridge writes the base; the adapter is in the shards."""
    write_model(tmp_path / "actor/model/huggingface", llama())
    shards = tmp_path / "actor/model/dist_ckpt"
    shards.mkdir()
    (shards / "common.pt").touch()
    manifest(tmp_path / "actor", peft=True)
    with pytest.raises(CheckpointError, match="weights are a Megatron checkpoint"):
        open_checkpoint(str(tmp_path))


# --- sub-folders of any name ------------------------------------------------------------------


def steps(root: Path, *folders: str) -> list[str]:
    for step in (10, 20, 30):
        for folder in folders:
            write_model(root / f"step_{step}" / folder, llama(step))
    return [str(root)]


@pytest.mark.parametrize("folder", ["policy", "trainer", "mine", "out/deep/er", "out/actor"])
def test_one_sub_folder_of_every_step_is_taken(tmp_path: Path, folder: str) -> None:
    found = open_series(steps(tmp_path, folder))
    assert found.steps == (10, 20, 30)
    assert found.notes == (f"weights of every step taken from {folder}/: model folder",)
    assert found.points[0].given == str(tmp_path / "step_10")


def test_a_step_without_weights_is_lost_and_no_obstacle(tmp_path: Path) -> None:
    given = steps(tmp_path, "mine")
    (tmp_path / "step_40" / "mine").mkdir(parents=True)
    found = open_series(given)
    assert found.steps == (10, 20, 30)
    assert [one.missing for one in found.passed_over] == [True]


def test_two_sub_folders_are_named_and_not_guessed(tmp_path: Path) -> None:
    with pytest.raises(OptionError) as caught:
        open_series(steps(tmp_path, "value", "mine"))
    first = tmp_path / "step_10"
    assert str(caught.value) == (
        "every step has weights in several sub-folders (mine/, value/); choose one and give it "
        "for each step: "
        f"{first}/mine or {first}/value"
    )


def test_steps_that_differ_are_not_joined(tmp_path: Path) -> None:
    write_model(tmp_path / "step_10" / "one", llama())
    write_model(tmp_path / "step_20" / "two", llama())
    with pytest.raises(CheckpointError, match="no weights here, but in one/"):
        open_series([str(tmp_path)])


def test_an_adapter_in_the_same_sub_folder(tmp_path: Path) -> None:
    for step in (1, 2):
        adapter(tmp_path / f"step_{step}" / "export")
    found = open_series([str(tmp_path)])
    assert (found.kind, found.steps) == ("adapter", (1, 2))


# --- Hub caches ---------------------------------------------------------------------------------


def cached(root: Path, *commits: str, main: str | None = None) -> Path:
    folder = root / "models--org--tiny"
    for seed, commit in enumerate(commits):
        write_model(folder / "snapshots" / commit, llama(seed))
    (folder / "refs").mkdir(parents=True)
    if main is not None:
        (folder / "refs" / "main").write_text(main)
    return folder


def test_the_main_snapshot_stands_for_the_folder(tmp_path: Path) -> None:
    folder = cached(tmp_path, "a" * 40, "b" * 40, main="b" * 40)
    checkpoint = open_checkpoint(str(folder))
    assert_equal_bits(checkpoint.read(WEIGHT), llama(1)[WEIGHT])
    assert checkpoint.notes == (f"weights taken from snapshots/{'b' * 40}/: model folder",)
    assert checkpoint.ref.resolved == str(folder / "snapshots" / ("b" * 40))


def test_the_only_snapshot_does_too(tmp_path: Path) -> None:
    assert open_checkpoint(str(cached(tmp_path, "a" * 40))).tensors


def test_between_snapshots_nothing_is_guessed(tmp_path: Path) -> None:
    folder = cached(tmp_path, "a" * 40, "b" * 40)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(str(folder))
    assert "the folder of org/tiny in a Hub cache" in str(caught.value)
    assert f"give one: {folder}/snapshots/{'a' * 40}, " in str(caught.value)


def test_a_cache_names_its_models(tmp_path: Path) -> None:
    cached(tmp_path, "a" * 40)
    with pytest.raises(CheckpointError, match="give a model of it by its name, as org/tiny"):
        open_checkpoint(str(tmp_path))
    with pytest.raises(CheckpointError, match="without a snapshot; give org/none to download"):
        (tmp_path / "models--org--none/snapshots").mkdir(parents=True)
        open_checkpoint(str(tmp_path / "models--org--none"))
