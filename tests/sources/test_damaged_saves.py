"""Saves that went wrong, and files beside one another: each is named, with the way out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from geoscope.errors import CheckpointError, PairingError
from geoscope.models.pairing import pair
from geoscope.models.prefixes import joining_rule
from geoscope.names import NameMap, Selection
from geoscope.sources.open import open_checkpoint
from geoscope.sources.series import open_series
from tests.helpers.files import assert_equal_bits, llama, write_config, write_model
from tests.helpers.running import run
from tests.helpers.step_folders import Q

WEIGHT = f"{Q}.weight"
UNGATHERED = (
    "a ZeRO-3 save that was not gathered; save with stage3_gather_16bit_weights_on_model_save, or "
    "run zero_to_fp32.py on the DeepSpeed checkpoint"
)


# --- tensors of size 0 --------------------------------------------------------------------------


def emptied(folder: Path, *names: str) -> Path:
    tensors = llama(1)
    chosen = names or tuple(tensors)
    return write_model(
        folder, {k: v if k not in chosen else v.new_empty(0) for k, v in tensors.items()}
    )


def failure(base: Path, tuned: Path) -> str:
    with pytest.raises(PairingError) as caught:
        pair(open_checkpoint(str(base)), open_checkpoint(str(tuned)), Selection())
    return str(caught.value)


@pytest.mark.parametrize("turned", [False, True])
def test_an_ungathered_save_is_named_on_either_side(tmp_path: Path, turned: bool) -> None:
    whole, empty = write_model(tmp_path / "whole", llama()), emptied(tmp_path / "empty")
    sides = (empty, whole) if turned else (whole, empty)
    assert f"`{empty}`: " in failure(*sides) and UNGATHERED in failure(*sides)


@pytest.mark.parametrize("both", [False, True])
def test_empty_matrices_are_missing_with_their_reason(tmp_path: Path, both: bool) -> None:
    whole = write_model(tmp_path / "whole", llama())
    empty = emptied(tmp_path / "empty", WEIGHT)
    base, tuned = (open_checkpoint(str(one)) for one in (empty if both else whole, empty))
    found = pair(base, tuned, Selection())
    assert found.missing == (WEIGHT,)
    (skipped,) = [one for one in found.skipped if one.name == WEIGHT]
    side = "base and tuned" if both else "tuned"
    assert skipped.reason == f"empty in {side}: {UNGATHERED}" and skipped.missing
    assert any(UNGATHERED in note for note in tuned.notes)


def test_writing_commands_refuse_them(tmp_path: Path) -> None:
    empty = emptied(tmp_path / "empty", WEIGHT)
    done = run("init-adapter", empty, "-r", "2", "-o", tmp_path / "out")
    assert done.code == 1 and UNGATHERED in done.err
    assert not (tmp_path / "out").exists()


def test_such_a_step_is_lost_and_told(tmp_path: Path) -> None:
    for step in (1, 2):
        write_model(tmp_path / f"step_{step}", llama(step))
    emptied(tmp_path / "step_3", WEIGHT)
    found = open_series([str(tmp_path)])
    assert found.steps == (1, 2)
    assert UNGATHERED in found.passed_over[0].reason and found.passed_over[0].missing


# --- leading parts of names ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mine", "theirs", "rule"),
    [
        ("bert.", "", r"^bert\.="),
        ("", "bert.", r"^bert\.="),
        ("student.model.", "", r"^student\.model\.="),
        ("student.", "teacher.", r"^student\.=teacher."),
    ],
)
def test_the_rule_that_is_proposed_joins_them(
    tmp_path: Path, mine: str, theirs: str, rule: str
) -> None:
    names = [f"encoder.layer.{i}.dense.weight" for i in range(4)]
    base = write_model(tmp_path / "base", {**{f"{mine}{n}": torch.ones(4, 4) for n in names},
                                           "cls.weight": torch.ones(4, 4)})  # fmt: skip
    tuned = write_model(tmp_path / "tuned", {f"{theirs}{n}": torch.ones(4, 4) for n in names})
    assert f"give `map_name` '{rule}', under which 4 of them agree" in failure(base, tuned)
    one, other = open_checkpoint(str(base)), open_checkpoint(str(tuned))
    assert len(pair(one, other, Selection(), NameMap((rule,))).matrices) == 4


def test_no_rule_for_other_architectures() -> None:
    assert joining_rule(["a.0.x", "a.1.y", "a.2.z"], ["b.0.u", "b.1.v", "b.2.w"]) is None


# --- several sets of weights in a folder --------------------------------------------------------


def shards(folder: Path, variant: str = "", seed: int = 1, *, index: bool = True) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    write_config(folder)
    tensors = llama(seed)
    half, stem = len(tensors) // 2, f"model.{variant}" if variant else "model"
    table: dict[str, str] = {}
    for i, part in enumerate((list(tensors)[:half], list(tensors)[half:])):
        name = f"{stem}-{i + 1:05}-of-00002.safetensors"
        save_file({k: tensors[k] for k in part}, folder / name, metadata={"format": "pt"})
        table |= dict.fromkeys(part, name)
    suffix = f".{variant}.json" if variant else ".json"
    if index:
        path = folder / f"model.safetensors.index{suffix}"
        path.write_text(json.dumps({"weight_map": table}))
    return folder


def test_a_variant_in_shards_is_read(tmp_path: Path) -> None:
    found = open_checkpoint(str(shards(tmp_path, "fp16")))
    assert_equal_bits(found.read(WEIGHT), llama(1)[WEIGHT])
    assert "model.safetensors.index.fp16.json is read, the only index there" in found.notes


def test_two_variants_are_named(tmp_path: Path) -> None:
    shards(shards(tmp_path, "fp16"), "fp32", 2)
    with pytest.raises(CheckpointError, match="holds several sets of weights") as caught:
        open_checkpoint(str(tmp_path))
    assert f"{tmp_path}/model.safetensors.index.fp16.json" in str(caught.value)
    chosen = open_checkpoint(str(tmp_path / "model.safetensors.index.fp32.json"))
    assert_equal_bits(chosen.read(WEIGHT), llama(2)[WEIGHT])


def test_an_index_is_a_reference(tmp_path: Path) -> None:
    """A stray file of codes beside it would be read for the folder, and is named."""
    shards(tmp_path)
    codes = {f"{WEIGHT}.absmax": torch.zeros(4), WEIGHT: torch.zeros(8, 1, dtype=torch.uint8)}
    save_file(codes, tmp_path / "model.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(str(tmp_path))
    assert str(caught.value).endswith(
        f"{tmp_path}/model.safetensors was read; give {index} for the shards beside it."
    )
    found = open_checkpoint(str(index))
    assert_equal_bits(found.read(WEIGHT), llama(1)[WEIGHT])
    (tmp_path / "step_5").mkdir()
    series = open_series([str(shards(tmp_path / "step_5") / index.name)])
    assert series.steps == (5,)


def test_an_index_of_another_save(tmp_path: Path) -> None:
    shards(tmp_path, index=False)
    table = {"weight_map": {WEIGHT: "model-00001-of-00004.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(table))
    with pytest.raises(CheckpointError, match="are of another save: copy the index") as caught:
        open_checkpoint(str(tmp_path))
    assert "model-00001-of-00002.safetensors, model-00002-of-00002" in str(caught.value)
