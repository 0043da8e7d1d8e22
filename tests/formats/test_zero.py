"""DeepSpeed ZeRO: the masters of all ranks are one model, as zero_to_fp32.py puts them together."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from geoscope.errors import CheckpointError, UnsupportedFormat
from geoscope.formats.zero import ZeroShards, is_zero
from geoscope.models.checkpoint import Checkpoint
from geoscope.sources.open import open_checkpoint
from geoscope.sources.series import open_series
from tests.helpers.write_zero import write_zero

GROUPS = [
    {"model.embed_tokens.weight": (7, 3), "model.layers.0.self_attn.q_proj.weight": (5, 3)},
    {"model.layers.0.self_attn.q_proj.bias": (5,), "model.norm.weight": (3,)},
]


def drawn(seed: int = 0) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        {name: torch.randn(shape, generator=generator) for name, shape in group.items()}
        for group in GROUPS
    ]


FROZEN = {"model.layers.0.self_attn.o_proj.weight": torch.arange(20.0).reshape(4, 5).bfloat16()}
BUFFERS = {"model.rotary_emb.inv_freq": torch.arange(3.0)}
SHARED = {"lm_head.weight": "model.embed_tokens.weight"}


def whole() -> dict[str, Tensor]:
    found = {name: one for group in drawn() for name, one in group.items()} | FROZEN | BUFFERS
    return {**found, "lm_head.weight": found["model.embed_tokens.weight"]}


def written(folder: Path, stage: int, world: int, **more: Any) -> Path:
    more = {"frozen": FROZEN, "buffers": BUFFERS, "shared": SHARED, **more}
    return write_zero(folder, drawn(), stage=stage, world=world, **more)


def opened(folder: Path) -> Checkpoint:
    return open_checkpoint(str(folder))


CASES = [(1, 1, False), (1, 3, True), (2, 4, False), (2, 4, True), (3, 1, False), (3, 4, False)]


@pytest.mark.parametrize(("stage", "world", "padded"), CASES)
def test_every_tensor_comes_back_bit_by_bit(
    tmp_path: Path, stage: int, world: int, padded: bool
) -> None:
    found = opened(written(tmp_path / "global_step2", stage, world, padded=padded))
    expected = whole()
    assert set(found.tensors) == set(expected)
    assert found.tied_to == SHARED
    told = f"DeepSpeed's shards: ZeRO-{stage} of {world} rank{'s' * (world > 1)}"
    assert any(note.endswith(told) for note in found.notes)
    container = found.source.open(found.tensors["model.norm.weight"].source)
    for name, one in expected.items():
        assert found.tensors[name].shape == tuple(one.shape)
        assert found.read(name).dtype == one.dtype
        assert torch.equal(found.read(name), one) and not found.read(name).requires_grad
        flat = one.reshape(-1)
        assert torch.equal(container.read_part(name, 1, len(flat) - 1), flat[1:-1])


def test_a_parameter_over_the_border_of_two_groups_of_a_rank(tmp_path: Path) -> None:
    """ZeRO-3 may cut the entries of a rank into groups of any size (sub_group_size)."""
    folder = written(tmp_path, 3, 2)
    for file in folder.glob("*_optim_states.pt"):
        names = torch.serialization.get_unsafe_globals_in_checkpoint(file)
        kept: list[Any] = [(type(name.rpartition(".")[2], (int,), {}), name) for name in names]
        with torch.serialization.safe_globals(kept):
            state = torch.load(file, weights_only=True)["optimizer_state_dict"]
        flat = torch.cat(state["fp32_flat_groups"])
        plain = {"zero_stage": 3, "partition_count": 2, "fp32_flat_groups": list(flat.split(4))}
        torch.save({"optimizer_state_dict": plain}, file)
    found = opened(folder)
    assert all(torch.equal(found.read(name), one) for name, one in whole().items())


@pytest.mark.parametrize(("stage", "world", "padded"), CASES)
def test_as_the_converter_of_deepspeed_itself(
    tmp_path: Path, stage: int, world: int, padded: bool
) -> None:
    converter = pytest.importorskip("deepspeed.utils.zero_to_fp32")
    folder = written(tmp_path / "tag", stage, world, padded=padded)
    expected = converter.get_fp32_state_dict_from_zero_checkpoint(tmp_path, tag="tag")
    found = opened(folder)
    assert set(found.tensors) == set(expected)
    assert all(torch.equal(found.read(name).float(), one.float()) for name, one in expected.items())


def test_another_process_maps_the_files_for_itself(tmp_path: Path) -> None:
    folder = written(tmp_path, 3, 2)
    shards = ZeroShards.open(folder, [one.name for one in folder.iterdir()], "x")
    shards.read("model.norm.weight", None)
    again = pickle.loads(pickle.dumps(copy.copy(shards)))
    assert torch.equal(again.read("model.norm.weight", None), whole()["model.norm.weight"])


# --- folders ------------------------------------------------------------------------------------


def test_a_checkpoint_of_the_hf_trainer_names_its_folder(tmp_path: Path) -> None:
    for step in (10, 20):
        folder = tmp_path / f"checkpoint-{step}"
        written(folder / f"global_step{step}", 3, 2)
        (folder / "latest").write_text(f"global_step{step}")
        (folder / "zero_to_fp32.py").touch()
    found = open_series([str(tmp_path)])
    assert found.steps == (10, 20)
    assert found.points[0].place.startswith("global_step10/: DeepSpeed's shards")
    assert opened(tmp_path / "checkpoint-20").ref.resolved.endswith("global_step20")


def test_a_model_beside_the_shards_comes_first(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    written(tmp_path / "_actor" / "global_step4", 2, 2)
    written(tmp_path / "_actor" / "global_step8", 2, 2)
    (tmp_path / "_actor" / "latest").write_text("global_step8")
    (tmp_path / "global_step4_hf").mkdir()
    save_file({"a.weight": torch.ones(2, 2)}, tmp_path / "global_step4_hf" / "model.safetensors")
    found = open_series([str(tmp_path)])
    assert [Path(point.given).name for point in found.points] == ["global_step4_hf", "global_step8"]
    assert any("step 4 is read from" in one.reason for one in found.passed_over)
    assert not any("run folder itself" in one.reason for one in found.passed_over)


# --- what is not read ---------------------------------------------------------------------------


def test_a_rank_that_is_not_there(tmp_path: Path) -> None:
    lost = "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt"
    folder = written(tmp_path, 2, 3, without=[lost])
    with pytest.raises(CheckpointError, match="ZeRO-2 shards of 3 ranks, and 2 files of groups"):
        opened(folder)
    lost = "zero_pp_rank_1_mp_rank_00_model_states.pt"
    with pytest.raises(CheckpointError, match="and 1 of model states are there; still being"):
        opened(written(tmp_path / "third", 3, 2, without=[lost]))


def test_shapes_that_do_not_fill_the_groups(tmp_path: Path) -> None:
    shapes = {"param_shapes": [{"a.weight": torch.Size([50, 3])}, {}]}
    with pytest.raises(CheckpointError, match="copy the checkpoint again"):
        opened(written(tmp_path / "second", 2, 2, extra=shapes))
    with pytest.raises(CheckpointError, match="copy the checkpoint again"):
        opened(written(tmp_path / "third", 3, 2, extra=shapes))


class Settings:
    """A class of a trainer."""


@pytest.mark.parametrize(
    ("extra", "why"),
    [
        ({"args": Settings()}, "mp_rank_00_model_states.pt holds objects of code"),
        ({"ds_autoep_layers": [{"name": "experts"}]}, "its experts are split over the ranks"),
    ],
)
def test_what_needs_the_converter_says_its_command(
    tmp_path: Path, extra: dict[str, Any], why: str
) -> None:
    folder = written(tmp_path / "global_step2", 2, 2, extra=extra)
    with pytest.raises(UnsupportedFormat) as raised:
        opened(folder)
    line = str(raised.value)
    assert f"weights are DeepSpeed ZeRO-1 or ZeRO-2 shards of 2 ranks ({why})" in line
    assert "zero_to_fp32.py" in line and "OUT --safe_serialization --tag global_step2`" in line


@pytest.mark.parametrize(
    "more",
    [
        "zero_pp_rank_0_mp_rank_01_optim_states.pt",
        "expp_rank_0_mp_rank_00_optim_states.pt",
        "layer_0_expert_1_mp_rank_00_model_states.pt",
        "layer_00-model_00-model_states.pt",
    ],
)
def test_other_parallelisms_are_not_taken_for_it(more: str) -> None:
    names = ["zero_pp_rank_0_mp_rank_00_optim_states.pt", "mp_rank_00_model_states.pt"]
    assert is_zero(names)
    assert not is_zero([*names, more])
