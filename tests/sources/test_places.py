"""Which weights below a folder does a command on one model take, and does it say so?"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from geoscope.errors import CheckpointError, GeoscopeError
from geoscope.sources.open import open_checkpoint
from geoscope.sources.places import Place, choose, find_places, where
from geoscope.sources.series import open_series
from geoscope.sources.signs import Kind
from tests.helpers.files import assert_equal_bits, llama, write_config, write_model
from tests.helpers.reading import assert_reads
from tests.helpers.running import run
from tests.helpers.step_folders import Q, adapter
from tests.helpers.write_shards import CONFIG, whole

WEIGHT = f"{Q}.weight"


def note(folder: Path) -> str:
    """The first remark, which is that about the place."""
    return open_checkpoint(str(folder)).notes[0]


def refusal(folder: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(str(folder))
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    "folder",
    ["actor", "huggingface", "actor/huggingface", "hf_model", "policy/weights",
     "policy/weights/model"],
)  # fmt: skip
def test_a_model_folder_is_found_in_every_usual_place(tmp_path: Path, folder: str) -> None:
    write_model(tmp_path / folder, llama(3))
    checkpoint = open_checkpoint(str(tmp_path))
    assert checkpoint.ref.given == str(tmp_path)
    assert checkpoint.ref.resolved == str(tmp_path / folder)
    assert_equal_bits(checkpoint.read(WEIGHT), llama(3)[WEIGHT])
    assert checkpoint.notes == (f"weights taken from {folder}/: model folder",)


def test_a_folder_of_another_name_is_pointed_at_and_not_taken(tmp_path: Path) -> None:
    write_model(tmp_path / "merged", llama())
    assert "no weights here, but in merged/" in refusal(tmp_path)


def test_shards_come_before_the_model_folder_and_naming_that_overrides(
    shards: Path, tmp_path: Path
) -> None:
    step = Path(shutil.copytree(shards / "run" / "global_step_2", tmp_path / "global_step_2"))
    write_model(step / "actor" / "huggingface", whole(1), CONFIG)
    assert_reads(open_checkpoint(str(step)), whole(2))
    assert note(step) == (
        "weights taken from actor/: shards, chosen over the model folder in actor/huggingface/"
    )
    assert note(step / "actor") == (
        "weights taken from ./: shards, chosen over the model folder in huggingface/"
    )
    named = open_checkpoint(str(step / "actor" / "huggingface"))
    assert_reads(named, whole(1))
    assert named.notes == ()


def test_weights_right_in_the_folder_that_was_named_come_first(tmp_path: Path) -> None:
    """The output of verl's merger: a model, and the adapter below it."""
    write_model(tmp_path, llama(1))
    adapter(tmp_path / "lora_adapter")
    assert_equal_bits(open_checkpoint(str(tmp_path)).read(WEIGHT), llama(1)[WEIGHT])
    assert note(tmp_path) == (
        "weights taken from ./: model folder, chosen over the adapter in lora_adapter/"
    )


def test_an_adapter_below_is_no_whole_model(tmp_path: Path) -> None:
    adapter(tmp_path / "actor" / "lora_adapter")
    write_model(tmp_path / "actor" / "huggingface", llama())
    line = refusal(tmp_path)
    assert line.startswith(f"`{tmp_path}/actor/lora_adapter`: weights are a PEFT adapter (")
    assert line.endswith(f" Or give {tmp_path}/actor/huggingface to take the full weights.")
    assert open_checkpoint(str(tmp_path / "actor" / "huggingface")).tensors


def test_an_adapter_that_was_not_saved_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "actor" / "lora_adapter").mkdir(parents=True)
    write_model(tmp_path / "actor" / "huggingface", llama())
    assert refusal(tmp_path) == (
        "adapter folder without `adapter_model.safetensors` "
        f"({tmp_path}/actor/lora_adapter); give {tmp_path}/actor/huggingface to take the full "
        "weights"
    )


def test_the_order_of_choice(tmp_path: Path) -> None:
    """Each kind goes before those after it, wherever they lie."""
    write_config_at(tmp_path / "huggingface")
    (tmp_path / "hf_model").mkdir()
    (tmp_path / "hf_model" / "model.gguf").touch()
    assert choose(find_places(tmp_path)) is None
    (tmp_path / "dist_ckpt").mkdir()
    (tmp_path / "dist_ckpt" / "common.pt").touch()
    zero = tmp_path / "global_step1"
    zero.mkdir()
    (tmp_path / "latest").write_text(zero.name)
    order = [
        (Kind.ZERO, lambda: (zero / "zero_pp_rank_0_mp_rank_00_optim_states.pt").touch()),
        (Kind.MEGATRON, lambda: (tmp_path / "dist_ckpt" / ".metadata").touch()),
        (Kind.MODEL, lambda: write_model(tmp_path, llama())),
        (Kind.SHARDS, lambda: (tmp_path / "actor" / "model_world_size_1_rank_0.pt").touch()),
        (Kind.NO_FACTORS, lambda: (tmp_path / "actor" / "lora_adapter").mkdir()),
        (Kind.ADAPTER, lambda: adapter(tmp_path / "policy" / "weights")),
    ]
    (tmp_path / "actor").mkdir()
    for kind, make in order:
        make()
        chosen = choose(find_places(tmp_path))
        assert chosen is not None and chosen.kind is kind
    places = find_places(tmp_path)
    assert {one.kind for one in places} == set(Kind)
    assert where(Place("policy/weights", Kind.ADAPTER), places).startswith(
        "policy/weights/: adapter, chosen over the model folder in ./, "
    )


def write_config_at(folder: Path) -> None:
    folder.mkdir()
    write_config(folder)


def test_shards_and_a_model_side_by_side(shards: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(shards / "grid", tmp_path / "both"))
    write_model(folder, whole(1), CONFIG)
    assert_reads(open_checkpoint(str(folder)), whole())
    assert note(folder) == ("weights taken from ./: shards, chosen over the model folder in ./")
    assert_reads(open_checkpoint(str(folder / "model.safetensors")), whole(1))


# --- the same in a series -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("run", "steps", "place"),
    [
        ("run", (0, 1, 2, 3), "actor/: shards"),
        ("nemo", (1, 2, 3), "policy/weights/: shards"),
    ],
)
def test_a_run_of_shards_is_a_series(
    shards: Path, run: str, steps: tuple[int, ...], place: str
) -> None:
    series = open_series([str(shards / run)])
    assert (series.steps, series.kind, series.passed_over) == (steps, "model", ())
    for point in series.points:
        assert point.place == place
        assert point.checkpoint is not None
        assert_reads(point.checkpoint, whole(point.step))


def test_accelerate_writes_dcp_below_its_checkpoints(shards: Path) -> None:
    (point,) = open_series([str(shards / "checkpoint-5")]).points
    assert (point.step, point.place) == (5, "pytorch_model_fsdp_0/: shards")


@pytest.mark.parametrize(
    ("file", "called", "hint"),
    [
        ("_actor/global_step20/mp_rank_00_model_states.pt", "DeepSpeed ZeRO shards",
         "OUT --safe_serialization --tag global_step20`"),
        ("policy/weights/iter_0000002/common.pt", "a Megatron checkpoint", "--backend megatron"),
        ("actor/dist_ckpt/common.pt", "a Megatron checkpoint", "--backend megatron"),
    ],
)  # fmt: skip
def test_formats_that_are_not_read_are_named_from_above(
    tmp_path: Path, file: str, called: str, hint: str
) -> None:
    path = tmp_path / file
    path.parent.mkdir(parents=True)
    path.touch()
    with pytest.raises(GeoscopeError) as caught:
        open_checkpoint(str(path.parent))
    assert f"weights are {called} ({path.name})" in str(caught.value)
    assert hint in str(caught.value)


def test_a_run_of_verl_is_told_by_its_steps(shards: Path) -> None:
    line = refusal(shards / "run")
    assert "no weights here, but in global_step_0/, global_step_1/, global_step_2/ and 1" in line


# --- as a user ----------------------------------------------------------------------------------


def test_commands_read_shards(shards: Path, tmp_path: Path) -> None:
    """FSDP against the model folder of the same step: no update; against the next: the same as
    from model folders."""
    base = write_model(tmp_path / "base", whole(), CONFIG)
    tuned = write_model(tmp_path / "tuned", whole(1), CONFIG)
    asked = ("--json", "--no-resume")
    same = run("collapse", base, shards / "run" / "global_step_0", *asked).report
    assert [one["status"]["energy_left@1"] for one in same["layers"]] == ["ZERO_UPDATE"] * 5
    folders = (tuned, shards / "run" / "global_step_1", shards / "nemo" / "step_1")
    results = [run("collapse", base, one, *asked).report["layers"] for one in folders]
    assert len(results[0]) == 5
    assert results[0] == results[1] == results[2]
    assert results[0] != same["layers"]


def test_an_adapter_starts_from_shards_and_knows_their_hashes(shards: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(shards / "run" / "global_step_0", tmp_path / "global_step_0"))
    out = tmp_path / "out"
    assert run("init-adapter", folder, "-o", out, "--layout", "residual", "--rank", "2").code == 0
    names = [f"model_world_size_4_rank_{rank}.pt" for rank in range(4)]
    assert list(json.loads((out / "geoscope.json").read_text())["base"]["sha256"]) == names
    residual = open_checkpoint(str(out / "residual"))
    assert residual.config == CONFIG
    assert_equal_bits(residual.read("lm_head.weight"), whole()["lm_head.weight"])
    checked = run("verify-adapter", out)
    assert (checked.code, "12 hashes of geoscope.json agree" in checked.out) == (0, True)
    path = folder / "actor" / names[2]
    path.write_bytes(path.read_bytes() + b"\0" * 8)
    changed = run("verify-adapter", out)
    assert changed.code == 1
    assert names[2] in changed.out
