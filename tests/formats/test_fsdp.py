"""Are the FSDP shards of verl put together bit for bit, and is all that is odd refused?"""

from __future__ import annotations

import json
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from geoscope.errors import CheckpointError, UnsupportedFormat
from geoscope.models.pairing import pair
from geoscope.names import Selection
from geoscope.peft.adapter import Adapter
from geoscope.sources.open import open_checkpoint
from geoscope.sources.shard_folder import open_shard_base, open_shards
from tests.helpers.files import Exploit, assert_equal_bits, write_model
from tests.helpers.reading import assert_reads, refusal
from tests.helpers.write_shards import CONFIG, SHAPES, Q, lora, stack, whole

UP = "model.layers.0.mlp.up_proj.weight"
MERGER = "Run `python -m verl.model_merger merge --backend fsdp --local_dir {} --target_dir OUT`"


def actor(shards: Path, step: int = 0) -> Path:
    return shards / "run" / f"global_step_{step}" / "actor"


def copy(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "actor"))


def rank_file(rank: int, world: int = 4) -> str:
    return f"model_world_size_{world}_rank_{rank}.pt"


def rewrite(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Loads one rank's file, changes its table and saves it again."""
    import torch.distributed.tensor

    table = torch.load(path, weights_only=True)
    change(table)
    torch.save(table, path)


# --- put together -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["run/global_step_0/actor", "grid"])
def test_uneven_and_empty_parts_make_the_whole(shards: Path, name: str) -> None:
    checkpoint = open_checkpoint(str(shards / name))
    assert_reads(checkpoint, whole())
    assert checkpoint.config == CONFIG
    assert checkpoint.tied == ()
    assert checkpoint.ref.storage_dtype == "mixed: bfloat16 7, float32 2"
    assert checkpoint.notes == ("put together from the FSDP shards of 4 ranks",)
    assert {info.source for info in checkpoint.tensors.values()} == {"model_world_size_4_rank_*.pt"}


def test_the_fixture_has_an_empty_part_and_two_replicas(shards: Path) -> None:
    """Else the test above would show nothing."""
    import torch.distributed.tensor

    last = torch.load(actor(shards) / rank_file(3), weights_only=True)
    assert last["model.layers.0.mlp.router.weight"]._local_tensor.shape == (0, 8)
    assert last["model.embed_tokens.weight"]._local_tensor.shape == (6, 8)
    grid = torch.load(shards / "grid" / rank_file(3), weights_only=True)[UP]
    assert grid.device_mesh.mesh_dim_names == ("ddp", "fsdp")
    assert grid._local_tensor.shape == (6, 8)


def test_split_columns_stacks_replicas_and_scalars(shards: Path) -> None:
    up = whole()[UP]
    expected = {
        UP: up,
        "model.layers.0.mlp.gate_proj.weight": up,
        "scale": torch.tensor(3.5),
        "model.layers.0.mlp.experts.down_proj": stack(),
        "model.layers.0.mlp.experts.gate_up_proj": stack(),
    }
    assert_reads(open_checkpoint(str(shards / "columns")), expected)


def test_plain_tensors_are_repeated_or_parts_as_the_config_asks(shards: Path) -> None:
    expected = {
        UP: whole()[UP],
        "model.norm.weight": torch.ones(8),
        "model.layers.0.input_layernorm.weight": torch.ones(8),
        "model.rotary_emb.inv_freq": torch.arange(4.0),
    }
    assert_reads(open_checkpoint(str(shards / "plain")), expected)


def test_plain_parts_need_a_config_that_fits(shards: Path, tmp_path: Path) -> None:
    folder = copy(shards / "plain", tmp_path)
    config = folder / "huggingface" / "config.json"
    config.write_text(json.dumps({**CONFIG, "intermediate_size": 13}))
    words = "with different content on each rank (12 rows in total; "
    assert f"{UP} is a plain tensor {words}needs 13)" in refusal(folder)
    config.write_text("{}")
    assert f"{words}config.json does not tell its rows)" in refusal(folder)
    assert "some.weight is a plain tensor with different" in refusal(shards / "plain_odd")


def test_an_older_mesh_is_read_from_its_attributes(shards: Path, tmp_path: Path) -> None:
    """Older torch pickled a mesh with `mesh`, `mesh_dim_names`, which are properties now."""
    folder = copy(shards / "grid", tmp_path)

    def age(table: dict[str, Any]) -> None:
        for value in table.values():
            mesh = value._spec.mesh  # one for all
            vars(mesh).clear()
            vars(mesh).update(mesh=torch.tensor([[0, 1], [2, 3]]), mesh_dim_names=("ddp", "fsdp"))

    for rank in range(4):
        rewrite(folder / rank_file(rank), age)
    assert_reads(open_checkpoint(str(folder)), whole())


def test_a_checkpoint_of_shards_travels_to_another_process(shards: Path) -> None:
    checkpoint = open_checkpoint(str(actor(shards)))
    again = pickle.loads(pickle.dumps(checkpoint))
    assert_equal_bits(again.read(UP), whole()[UP])


def test_mappings_are_renewed_and_the_numbers_stay(
    shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from geoscope.formats import fsdp

    checkpoint = open_checkpoint(str(actor(shards)))
    loads: list[Path] = []
    load = fsdp._load

    def counted(path: Path, label: str) -> Any:
        loads.append(path)
        return load(path, label)

    monkeypatch.setattr(fsdp, "_load", counted)
    assert_reads(checkpoint, whole())
    assert loads == []
    monkeypatch.setattr(fsdp, "mapped_limit", lambda files: 16 * files)
    assert_reads(checkpoint, whole())
    assert {path.name for path in loads} == {rank_file(rank) for rank in range(4)}


def test_shards_pair_with_the_model_folder_they_came_from(shards: Path, tmp_path: Path) -> None:
    base = open_checkpoint(str(write_model(tmp_path, whole(), CONFIG)))
    pairing = pair(base, open_checkpoint(str(actor(shards, 1))), Selection())
    assert len(pairing.matrices) == 5
    assert pairing.missing == ()


@pytest.mark.slow
def test_no_word_about_process_groups_reaches_the_user(shards: Path) -> None:
    code = (
        "import sys; from geoscope.sources.open import open_checkpoint; "
        "open_checkpoint(sys.argv[1])"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code, str(shards / "grid")],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert (done.stdout, done.stderr) == ("", "")


def test_the_state_of_the_trainer_is_not_opened(shards: Path) -> None:
    """Those files are empty here, and no PyTorch files: opening one would fail."""
    assert (actor(shards) / "optim_world_size_4_rank_0.pt").stat().st_size == 0
    assert open_checkpoint(str(actor(shards))).tensors.keys() == SHAPES.keys()


@pytest.mark.slow
def test_mapped_files_do_not_fill_the_memory(tmp_path: Path) -> None:
    """256 MiB through one buffer of 32 MiB."""
    names = [f"model.layers.{layer}.mlp.up_proj.weight" for layer in range(8)]
    for rank in (0, 1):
        table = {name: torch.full((1 << 11, 1 << 11), float(rank)) for name in names}
        torch.save(table, tmp_path / rank_file(rank, 2))
    config = {**CONFIG, "intermediate_size": 1 << 12}
    (tmp_path / "config.json").write_text(json.dumps(config))
    code = (
        "import sys, torch\n"
        "from pathlib import Path\n"
        "from geoscope.sources.open import open_checkpoint\n"
        "def held():\n"
        "    lines = Path('/proc/self/status').read_text().splitlines()\n"
        "    return next(int(one.split()[1]) for one in lines if one.startswith('VmRSS'))\n"
        "checkpoint = open_checkpoint(sys.argv[1])\n"
        "buffer = torch.ones(32 << 20, dtype=torch.uint8)\n"
        "before, most = held(), 0\n"
        "for name in checkpoint.tensors:\n"
        "    read = checkpoint.read(name, buffer=buffer)\n"
        "    assert (read[0, 0], read[-1, -1]) == (0, 1)\n"
        "    most = max(most, held())\n"
        "print(most - before)\n"
    )
    if not Path("/proc/self/status").exists():
        pytest.skip("needs /proc")
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert int(done.stdout) < 128 << 10  # KiB


# --- refused ------------------------------------------------------------------------------------


def test_partial_sums_are_refused_with_the_merger(shards: Path) -> None:
    line = refusal(shards / "partial", UnsupportedFormat)
    assert "(model.layers.0.mlp.up_proj.weight is Partial on a mesh of ('fsdp',))" in line
    assert MERGER.format(shards / "partial") in line
    assert "(it casts to bf16)" in line


def test_a_mesh_of_tensor_parallelism_is_refused_with_the_merger(shards: Path) -> None:
    line = refusal(shards / "parallel", UnsupportedFormat)
    assert "up_proj.weight is Shard, Shard on a mesh of ('fsdp', 'tp'))" in line
    assert MERGER.format(shards / "parallel") in line


def test_old_sharded_tensors_are_refused_with_the_merger(shards: Path) -> None:
    line = refusal(shards / "old", UnsupportedFormat)
    assert "(model_world_size_4_rank_0.pt is a pickle of ShardedTensor)" in line
    assert MERGER.format(shards / "old") in line


@pytest.mark.parametrize("gone", [[0], [3], [1, 2]])
def test_a_rank_that_is_not_there_is_said_before_anything_is_read(
    shards: Path, tmp_path: Path, gone: list[int]
) -> None:
    folder = copy(actor(shards), tmp_path)
    for rank in range(4):
        (folder / rank_file(rank)).write_bytes(b"unread")
    for rank in gone:
        (folder / rank_file(rank)).unlink()
    names = ", ".join(rank_file(rank) for rank in gone)
    assert f"{len(gone)} of 4 rank files are not there ({names}); still" in refusal(folder)


def test_the_world_size_is_that_of_fsdp_config(shards: Path, tmp_path: Path) -> None:
    folder = copy(actor(shards), tmp_path)
    config = folder / "fsdp_config.json"
    shutil.copy(folder / rank_file(0), folder / rank_file(0, 8))  # of another save
    assert_reads(open_checkpoint(str(folder)), whole())
    config.write_text('{"world_size": 8}')
    assert "7 of 8 rank files are not there" in refusal(folder)
    config.write_text('{"world_size": 16}')
    assert "says 16 ranks, and the shards are of 4" in refusal(folder)
    config.write_text('{"world_size": "4"}')
    assert "world_size is '4', needs a number of ranks" in refusal(folder)
    config.write_text("{")
    assert "fsdp_config.json: cannot be read" in refusal(folder)
    config.write_text("{}")
    assert "holds shards of 2 saves (4 and 8 ranks)" in refusal(folder)
    config.unlink()
    assert "holds shards of 2 saves (4 and 8 ranks)" in refusal(folder)


def damages() -> list[Any]:
    def drop(table: dict[str, Any]) -> None:
        del table[UP]

    def shape(table: dict[str, Any]) -> None:
        table[UP]._local_tensor = table[UP]._local_tensor[:1].clone()

    def columns(table: dict[str, Any]) -> None:
        table[UP]._local_tensor = table[UP]._local_tensor[:, :4].clone()

    def dtype(table: dict[str, Any]) -> None:
        table[UP]._local_tensor = table[UP]._local_tensor.float()

    def plain(table: dict[str, Any]) -> None:
        table[UP] = table[UP]._local_tensor

    def mesh(table: dict[str, Any]) -> None:
        vars(table[UP]._spec.mesh).update(mesh=torch.tensor([0, 1, 3, 2]))

    def beyond(table: dict[str, Any]) -> None:
        vars(table[UP]._spec.mesh).update(mesh=torch.arange(64))

    def junk(table: dict[str, Any]) -> None:
        vars(table[UP]._spec.mesh).update(mesh="none")

    def stretched(table: dict[str, Any]) -> None:
        table[UP]._local_tensor = torch.zeros(1, dtype=torch.bfloat16).expand(3, 8)

    return [
        pytest.param(drop, "hold different tensors", id="dropped"),
        pytest.param(shape, "the pieces hold 80 entries, the tensor 96", id="rows"),
        pytest.param(columns, "the pieces hold 84 entries, the tensor 96", id="columns"),
        pytest.param(dtype, "another dtype than it says", id="dtype"),
        pytest.param(plain, "a DTensor on some ranks and a plain tensor on others", id="plain"),
        pytest.param(mesh, "the ranks differ in its shape, dtype or mesh", id="mesh"),
        pytest.param(beyond, "its mesh has more ranks than the 4 files", id="beyond"),
        pytest.param(junk, "its mesh cannot be read", id="junk"),
        pytest.param(stretched, "rank 2 claims more entries than its file holds", id="stretched"),
    ]


@pytest.mark.parametrize(("change", "reason"), damages())
def test_ranks_that_do_not_fit_together_are_refused(
    shards: Path, tmp_path: Path, change: Callable[[dict[str, Any]], object], reason: str
) -> None:
    folder = copy(actor(shards), tmp_path)
    rewrite(folder / rank_file(2), change)
    assert reason in refusal(folder)


def test_a_cut_file_is_refused(shards: Path, tmp_path: Path) -> None:
    folder = copy(actor(shards), tmp_path)
    path = folder / rank_file(1)
    path.write_bytes(path.read_bytes()[:-100])
    assert f"{rank_file(1)}: no PyTorch file, or a damaged one" in refusal(folder)


def test_a_link_out_of_the_folder_is_refused(shards: Path, tmp_path: Path) -> None:
    folder = copy(actor(shards), tmp_path)
    (folder / rank_file(1)).unlink()
    (folder / rank_file(1)).symlink_to(actor(shards) / rank_file(1))
    assert f"{rank_file(1)} is a link to" in refusal(folder)


@pytest.mark.parametrize("name", [rank_file(0, 1), "pytorch_model.bin", "step_1.pt"])
def test_a_pickle_with_code_is_not_run(tmp_path: Path, name: str) -> None:
    target = tmp_path / "owned"
    (tmp_path / "model").mkdir()
    path = tmp_path / "model" / name
    torch.save({UP: whole()[UP], "x": Exploit(target)}, path)
    line = refusal(path if name == "step_1.pt" else path.parent, UnsupportedFormat)
    assert "loading this file would run code stored in it" in line
    assert not target.exists()
    torch.load(path, weights_only=False)
    assert target.exists()  # so it would have been


@pytest.mark.parametrize("imported", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_one_rank_alone_is_no_file_of_weights(shards: Path, tmp_path: Path, imported: bool) -> None:
    path = tmp_path / "weights.pt"
    shutil.copy(actor(shards) / rank_file(0), path)
    code = "import torch.distributed.tensor\n" if imported else ""
    code += (
        "import sys\nfrom geoscope.sources.open import open_checkpoint\n"
        "try: open_checkpoint(sys.argv[1])\nexcept Exception as error: print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True
    )
    assert done.stdout == (
        f"{path}: holds the parts of one rank only (DTensor). geoscope needs all ranks: give the "
        "folder of model_world_size_*_rank_*.pt files\n"
    )


# --- LoRA runs ----------------------------------------------------------------------------------


def test_a_lora_run_is_no_whole_model(shards: Path, tmp_path: Path) -> None:
    folder = copy(shards / "lora", tmp_path)
    line = refusal(folder, UnsupportedFormat)
    assert line == (
        f"`{folder}`: shards of a LoRA run, base and factors in the same files, where a whole "
        "model is needed. Merge the lora_adapter/ of verl into the base and give the merged folder"
    )


def test_the_base_of_a_lora_run_has_the_names_of_the_model(shards: Path) -> None:
    assert_reads(open_shard_base(shards / "lora", "lora"), whole())


def test_the_factors_of_a_lora_run_are_an_adapter(shards: Path, tmp_path: Path) -> None:
    folder = copy(shards / "lora", tmp_path)
    with pytest.raises(CheckpointError, match=r"whose alpha is not known; copy lora_adapter/"):
        open_shards(folder, str(folder))
    meta = {"r": 2, "lora_alpha": 6, "task_type": "CAUSAL_LM"}
    (folder / "lora_train_meta.json").write_text(json.dumps(meta))
    adapter = open_shards(folder, str(folder))
    assert isinstance(adapter, Adapter)
    assert list(adapter.modules) == [Q]
    assert adapter.modules[Q].scaling == 3
    B, A = adapter.factors(Q)
    prefix = f"base_model.model.{Q}"
    assert_equal_bits(A[0], lora()[f"{prefix}.lora_A.default.weight"])
    assert_equal_bits(B[0], lora()[f"{prefix}.lora_B.default.weight"])
    (folder / "lora_adapter").mkdir()
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 8, "target_modules": ["q_proj"]}
    (folder / "lora_adapter" / "adapter_config.json").write_text(json.dumps(config))
    adapter = open_shards(folder, str(folder))
    assert isinstance(adapter, Adapter)
    assert adapter.modules[Q].scaling == 4


def test_shards_without_factors_are_no_lora_run(shards: Path) -> None:
    with pytest.raises(CheckpointError, match="without factors of an adapter"):
        open_shard_base(actor(shards), "actor")
