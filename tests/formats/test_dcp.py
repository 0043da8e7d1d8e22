"""Are DCP checkpoints read bit for bit, without running what is in them or believing it?"""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path, PureWindowsPath
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.state_dict_saver import save

from geoscope.errors import CheckpointError, UnsupportedFormat
from geoscope.sources.open import open_checkpoint
from tests.helpers.files import Exploit, assert_equal_bits
from tests.helpers.reading import assert_reads, refusal
from tests.helpers.write_shards import CONFIG, SHAPES, stack, whole

UP = "model.layers.0.mlp.up_proj.weight"
HUGE = 1 << 62


def copy(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "weights"))


def change(folder: Path, edit: Callable[[Metadata], object]) -> None:
    """Edits the metadata with torch's own classes, as they pickle."""
    metadata = FileSystemReader(folder).read_metadata()
    edit(metadata)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


# --- what is read -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "rest"),
    [
        ("checkpoint-5/pytorch_model_fsdp_0", ""),
        ("nested", "; 9 entries beside the model are not"),
        ("flat", ""),
        ("dcp_grid", ""),
        ("nemo/step_1/policy/weights", ""),
    ],
)
def test_the_model_is_found_under_its_own_names(shards: Path, name: str, rest: str) -> None:
    checkpoint = open_checkpoint(str(shards / name))
    assert_reads(checkpoint, whole(1 if "nemo" in name else 0))
    assert checkpoint.notes[0] == f"read from a DCP checkpoint{rest}"
    assert {info.source for info in checkpoint.tensors.values()} == {"*.distcp"}


def test_names_without_the_plan_of_their_nesting(shards: Path, tmp_path: Path) -> None:
    def forget(metadata: Metadata) -> None:
        metadata.planner_data = None

    for name in ("nested", "flat", "dcp_grid"):
        folder = shutil.copytree(shards / name, tmp_path / name)
        change(folder, forget)
        assert set(open_checkpoint(str(folder)).tensors) == set(SHAPES)


def test_columns_squares_scalars_and_turned_tensors(shards: Path) -> None:
    up = whole()[UP]
    expected = {
        "columns": up,
        "square": up,
        "turned": up.T,
        "scalar": torch.tensor(3.5),
        "rows": up[2:5],
        "stack": stack(),
    }
    assert_reads(open_checkpoint(str(shards / "odd")), expected)


def test_config_is_found_beside_and_above(shards: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(shards / "checkpoint-5", tmp_path / "checkpoint-5"))
    (run / "config.json").write_text(json.dumps(CONFIG))
    assert open_checkpoint(str(run / "pytorch_model_fsdp_0")).config == CONFIG
    found = open_checkpoint(str(run))
    assert found.config == CONFIG
    assert found.notes == (
        "weights taken from pytorch_model_fsdp_0/: shards",
        "read from a DCP checkpoint",
    )
    config = {**CONFIG, "quantization_config": {"quant_method": "gptq"}}
    (run / "config.json").write_text(json.dumps(config))
    assert "config.json claims GPTQ" in open_checkpoint(str(run)).notes[-1]


def test_the_optimizer_alone_is_no_model(shards: Path) -> None:
    line = refusal(shards / "optimizer_0")
    assert "a DCP checkpoint without the weights of a model" in line


def test_it_travels_to_another_process(shards: Path) -> None:
    checkpoint = open_checkpoint(str(shards / "flat"))
    assert_equal_bits(pickle.loads(pickle.dumps(checkpoint)).read(UP), whole()[UP])


@pytest.mark.slow
def test_a_tensor_costs_its_own_memory(tmp_path: Path) -> None:
    """Reading into a buffer allocates next to nothing, whatever the size of the tensor."""
    big = torch.arange(24 << 20, dtype=torch.int32).reshape(-1, 1 << 10).view(torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is one process
        save({"layers.0.up.weight": big}, checkpoint_id=tmp_path / "big", no_dist=True)
    code = (
        "import resource, sys, torch\n"
        "from geoscope.sources.open import open_checkpoint\n"
        "checkpoint = open_checkpoint(sys.argv[1])\n"
        "buffer = torch.ones(96 << 20, dtype=torch.uint8)\n"
        "name = 'layers.0.up.weight'\n"
        "checkpoint.read_part(name, 0, 1)\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "tensor = checkpoint.read(name, buffer=buffer)\n"
        "after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "assert tensor.view(torch.int32)[-1, -1] == (24 << 20) - 1\n"
        "print(after - before)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "big")],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert int(done.stdout) < 16 << 10  # KiB, of 96 MiB


# --- what is not believed -----------------------------------------------------------------------


def test_a_metadata_pickle_with_code_is_not_run(shards: Path, tmp_path: Path) -> None:
    folder = copy(shards / "flat", tmp_path)
    victim = tmp_path / "owned"

    def plant(metadata: Metadata) -> None:
        metadata.planner_data = Exploit(victim)

    change(folder, plant)
    line = refusal(folder, UnsupportedFormat)
    assert f".metadata: loading it needs `{os.system.__module__}.system`, which DCP" in line
    assert not victim.exists()
    FileSystemReader(folder).read_metadata()  # torch runs it
    assert victim.exists()


@pytest.mark.parametrize(
    "name", ["builtins.eval", "torch.load", "torch.hub.load", "torch.Tensor", "os.system",
             "torch.distributed.checkpoint.metadata.os", "pathlib.os"],
)  # fmt: skip
def test_no_other_name_passes(tmp_path: Path, name: str) -> None:
    module, _, leaf = name.rpartition(".")
    raw = b"\x80\x04\x8c" + bytes([len(module)]) + module.encode()
    raw += b"\x8c" + bytes([len(leaf)]) + leaf.encode() + b"\x93."
    (tmp_path / ".metadata").write_bytes(raw)
    assert f"loading it needs `{name}`" in refusal(tmp_path, UnsupportedFormat)


def test_a_piece_with_code_is_not_run(shards: Path, tmp_path: Path) -> None:
    folder = copy(shards / "flat", tmp_path)
    victim = tmp_path / "owned"

    def plant(metadata: Metadata) -> None:
        torch.save({"x": Exploit(victim), "y": torch.zeros(2)}, folder / "__9_9.distcp")
        index = MetadataIndex(UP, (0, 0))
        metadata.storage_data[index].relative_path = "__9_9.distcp"
        metadata.storage_data[index].offset = 0
        metadata.storage_data[index].length = (folder / "__9_9.distcp").stat().st_size

    change(folder, plant)
    checkpoint = open_checkpoint(str(folder))
    with pytest.raises(CheckpointError, match="is damaged: no stored tensor"):
        checkpoint.read(UP)
    assert not victim.exists()
    torch.load(folder / "__9_9.distcp", weights_only=False)
    assert victim.exists()


@pytest.mark.parametrize(
    "file", ["../flat/__0_0.distcp", "/etc/passwd", "..", ".", "", "a/b.distcp", "C:x", "a\\b", 3]
)
def test_a_file_outside_of_the_folder_is_refused(shards: Path, tmp_path: Path, file: Any) -> None:
    folder = copy(shards / "flat", tmp_path)

    def point(metadata: Metadata) -> None:
        metadata.storage_data[MetadataIndex(UP, (0, 0))].relative_path = file

    change(folder, point)
    assert f"{UP} is placed in {file!r}, which is not a file of this folder" in refusal(folder)


def test_a_link_out_of_the_folder_is_refused(shards: Path, tmp_path: Path) -> None:
    folder = copy(shards / "flat", tmp_path)
    (folder / "__1_0.distcp").unlink()
    (folder / "__1_0.distcp").symlink_to(shards / "flat" / "__1_0.distcp")
    assert "__1_0.distcp is a link to" in refusal(folder)


def _sizes(metadata: Metadata) -> list[Any]:
    record = metadata.state_dict_metadata[UP]
    assert isinstance(record, TensorStorageMetadata)
    return [record, *record.chunks]


def edits() -> list[Any]:
    def claims(metadata: Metadata) -> None:
        record, *chunks = _sizes(metadata)
        record.size = torch.Size([HUGE, 8])
        record.chunks = [chunks[0]]
        chunks[0].sizes = torch.Size([HUGE, 8])

    def pieces(metadata: Metadata) -> None:
        _sizes(metadata)[0].size = torch.Size([HUGE, 8])

    def small(metadata: Metadata) -> None:
        _sizes(metadata)[0].size = torch.Size([6, 8])

    def overlap(metadata: Metadata) -> None:
        _, one, other, *_ = _sizes(metadata)
        metadata.storage_data[MetadataIndex(UP, (1, 0))] = metadata.storage_data.pop(
            MetadataIndex(UP, tuple(other.offsets))
        )
        other.offsets = torch.Size([1, 0])
        assert one.offsets == torch.Size([0, 0])

    def negative(metadata: Metadata) -> None:
        _sizes(metadata)[1].sizes = torch.Size([-3, 8])

    def flat(metadata: Metadata) -> None:
        _sizes(metadata)[1].sizes = torch.Size([24])

    def lost(metadata: Metadata) -> None:
        del metadata.storage_data[MetadataIndex(UP, (0, 0))]

    def before(metadata: Metadata) -> None:
        metadata.storage_data[MetadataIndex(UP, (0, 0))].offset = -5

    def beyond(metadata: Metadata) -> None:
        metadata.storage_data[MetadataIndex(UP, (0, 0))].length = HUGE

    def packed(metadata: Metadata) -> None:
        metadata.storage_data[MetadataIndex(UP, (0, 0))].transform_descriptors = ["zstd"]

    def listed(metadata: Metadata) -> None:
        metadata.state_dict_metadata = []  # type: ignore[assignment]

    def torn(metadata: Metadata) -> None:
        metadata.storage_data = None

    def bare(metadata: Metadata) -> None:
        _sizes(metadata)[0].properties = None

    return [
        pytest.param(claims, f"{UP} claims {HUGE * 16} bytes, ", id="claims"),
        pytest.param(pieces, "the pieces hold 96 entries, the tensor", id="pieces"),
        pytest.param(small, "a piece at [6, 0] of size [3, 8] sticks out", id="small"),
        pytest.param(overlap, "two pieces overlap", id="overlap"),
        pytest.param(negative, "has the impossible size (-3, 8)", id="negative"),
        pytest.param(flat, "has other dimensions than the tensor", id="flat"),
        pytest.param(lost, f"no file is named for a piece of {UP}", id="lost"),
        pytest.param(before, "has the impossible size (-5, ", id="before"),
        pytest.param(beyond, "file is incomplete", id="beyond"),
        pytest.param(packed, f"{UP} is stored compressed (['zstd'])", id="packed"),
        pytest.param(listed, "it does not have the format of DCP", id="listed"),
        pytest.param(torn, "it does not have the format of DCP", id="torn"),
        pytest.param(bare, "it does not have the format of DCP", id="bare"),
    ]


@pytest.mark.parametrize(("edit", "reason"), edits())
def test_metadata_that_contradicts_itself_is_refused(
    shards: Path, tmp_path: Path, edit: Callable[[Metadata], object], reason: str
) -> None:
    folder = copy(shards / "flat", tmp_path)
    change(folder, lambda metadata: None)
    open_checkpoint(str(folder))  # written again as it was, it opens
    change(folder, edit)
    assert reason in refusal(folder)


@pytest.mark.parametrize(
    "raw",
    [b"", b"junk", b"\x80\x04", b"\x80\x04N.", b"\x80\x02r\xff\xff\xff\x7fN.",
     b"\x80\x04\x8e\xff\xff\xff\xff\xff\xff\xff\x3f.", b"\x80\x04}."],
    ids=["empty", "junk", "cut", "none", "memo", "bytes", "table"],
)  # fmt: skip
def test_a_broken_metadata_is_refused(tmp_path: Path, raw: bytes) -> None:
    (tmp_path / ".metadata").write_bytes(raw)
    assert ".metadata: damaged: " in refusal(tmp_path)


def test_pieces_of_another_kind_than_said(shards: Path, tmp_path: Path) -> None:
    folder = copy(shards / "flat", tmp_path)

    def retype(metadata: Metadata) -> None:
        _sizes(metadata)[0].properties = TensorProperties(dtype=torch.float16)

    change(folder, retype)
    with pytest.raises(CheckpointError, match=r"it is bfloat16 \[3, 8\], needs float16 \[3, 8\]"):
        open_checkpoint(str(folder)).read(UP)


def test_a_piece_that_is_not_what_was_saved(shards: Path, tmp_path: Path) -> None:
    folder = copy(shards / "flat", tmp_path)
    path = folder / "__0_0.distcp"
    path.write_bytes(b"\x00" * path.stat().st_size)
    with pytest.raises(CheckpointError, match="is damaged: no archive of one tensor; copy"):
        open_checkpoint(str(folder)).read(UP)


def test_absent_files_are_named(shards: Path, tmp_path: Path) -> None:
    folder = copy(shards / "flat", tmp_path)
    (folder / "__3_0.distcp").unlink()
    assert "__3_0.distcp missing, of 4 .distcp files. The checkpoint is still" in refusal(folder)
    (folder / ".metadata").unlink()
    assert ".distcp files without .metadata, which is written last" in refusal(folder)


def test_metadata_from_another_system_opens(shards: Path, tmp_path: Path) -> None:
    """A path of Windows cannot be made here, and need not be."""
    folder = copy(shards / "flat", tmp_path)

    def path(metadata: Metadata) -> None:
        assert metadata.storage_meta is not None
        metadata.storage_meta.checkpoint_id = PureWindowsPath("C:/runs")
        metadata.state_dict_metadata["step"] = BytesStorageMetadata()

    change(folder, path)
    assert set(open_checkpoint(str(folder)).tensors) == set(SHAPES)


def test_empty_chunks_are_passed_over(shards: Path, tmp_path: Path) -> None:
    folder = copy(shards / "flat", tmp_path)
    name = "model.layers.0.mlp.router.weight"

    def empty(metadata: Metadata) -> None:
        record = metadata.state_dict_metadata[name]
        assert isinstance(record, TensorStorageMetadata)
        record.chunks.append(ChunkStorageMetadata(torch.Size([3, 0]), torch.Size([0, 8])))
        first = metadata.storage_data[MetadataIndex(name, (0, 0))]
        metadata.storage_data[MetadataIndex(name, (3, 0))] = first

    change(folder, empty)
    assert_equal_bits(open_checkpoint(str(folder)).read(name), whole()[name])
