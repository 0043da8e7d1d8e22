"""Are PyTorch pickles read without running what is in them?"""

from __future__ import annotations

import pickle
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch

from geoscope.errors import CheckpointError, UnsupportedFormat
from geoscope.sources.open import open_checkpoint
from tests.helpers.files import Exploit, assert_equal_bits, llama, write_config, write_index


def test_a_single_file_reads_back_equal_with_and_without_a_buffer(tmp_path: Path) -> None:
    tensors = llama(dtype=torch.float16)
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    write_config(tmp_path)
    checkpoint = open_checkpoint(str(tmp_path))
    assert list(checkpoint.tensors) == sorted(tensors)
    assert checkpoint.ref.storage_dtype == "float16"
    buffer = torch.empty(4096, dtype=torch.uint8)
    for name, expected in tensors.items():
        assert_equal_bits(checkpoint.read(name), expected)
        into = checkpoint.read(name, buffer=buffer)
        assert into.data_ptr() == buffer.data_ptr()
        assert_equal_bits(into, expected)


def test_shards_are_read_through_their_index(tmp_path: Path) -> None:
    tensors = llama()
    names = sorted(tensors)
    weight_map = {}
    for number in (1, 2):
        shard = f"pytorch_model-{number:05d}-of-00002.bin"
        part = {name: tensors[name] for name in names[number - 1 :: 2]}
        torch.save(part, tmp_path / shard)
        weight_map |= dict.fromkeys(part, shard)
    write_index(tmp_path, weight_map, "pytorch_model.bin.index.json")
    checkpoint = open_checkpoint(str(tmp_path))
    assert {name: info.source for name, info in checkpoint.tensors.items()} == weight_map
    for name in names:
        assert_equal_bits(checkpoint.read(name), tensors[name])


@pytest.mark.parametrize("keys", [("state_dict",), ("model",), ("model", "state_dict")])
def test_wrappers_of_training_scripts_are_taken_off(tmp_path: Path, keys: tuple[str, ...]) -> None:
    nested: Any = OrderedDict(llama())
    for key in reversed(keys):
        nested = {key: nested, "epoch": 3}
    torch.save(nested, tmp_path / "ckpt.pt")
    checkpoint = open_checkpoint(str(tmp_path / "ckpt.pt"))
    assert list(checkpoint.tensors) == sorted(llama())
    assert any(f"from the entry '{keys[0]}'" in note for note in checkpoint.notes)


def test_shared_storage_is_tied_to_the_embedding(tmp_path: Path) -> None:
    tensors = llama()
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    storage = torch.zeros(4, 8, dtype=torch.bfloat16)
    tensors["model.layers.0.a.weight"] = storage[:2]
    tensors["model.layers.0.b.weight"] = storage[2:]
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    checkpoint = open_checkpoint(str(tmp_path))
    assert dict(checkpoint.tied_to) == {"lm_head.weight": "model.embed_tokens.weight"}
    assert checkpoint.tied == ("lm_head.weight",)


def test_a_strided_tensor_is_read_in_its_logical_order(tmp_path: Path) -> None:
    weight = torch.arange(12.0).reshape(3, 4)
    torch.save({"layers.0.up.weight": weight.T}, tmp_path / "turned.pth")
    checkpoint = open_checkpoint(str(tmp_path / "turned.pth"))
    assert checkpoint.tensors["layers.0.up.weight"].shape == (4, 3)
    assert_equal_bits(checkpoint.read("layers.0.up.weight"), weight.T.contiguous())


@pytest.mark.parametrize("zipped", [True, False])
def test_an_exploit_is_refused_and_does_not_run(tmp_path: Path, zipped: bool) -> None:
    victim = tmp_path / "created by the exploit"
    content = {"model.layers.0.up.weight": torch.zeros(2, 2), "x": Exploit(victim)}
    torch.save(content, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    with pytest.raises(UnsupportedFormat) as caught:
        open_checkpoint(str(tmp_path))
    assert "loading this file would run code stored in it; convert it to safetensors" in str(
        caught.value
    )
    assert not victim.exists()
    # The control: the same file does run its code where nothing stops it.
    torch.load(tmp_path / "pytorch_model.bin", weights_only=False)
    assert victim.exists()


def test_a_bare_pickle_exploit_is_refused_and_does_not_run(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    (tmp_path / "weights.pt").write_bytes(pickle.dumps({"x": Exploit(victim)}))
    with pytest.raises(CheckpointError):
        open_checkpoint(str(tmp_path / "weights.pt"))
    assert not victim.exists()


def test_the_format_before_torch_1_6_is_read_and_said(tmp_path: Path) -> None:
    tensors = llama()
    torch.save(tensors, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    checkpoint = open_checkpoint(str(tmp_path))
    for name, expected in tensors.items():
        assert_equal_bits(checkpoint.read(name), expected)
    assert any("before 1.6" in note for note in checkpoint.notes)


@pytest.mark.parametrize(
    "content", [b"", b"hello world", b"PK\x03\x04 no archive", b"\x80\x02junk", b"\0" * 64]
)
def test_junk_is_refused_in_one_line(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(content)
    with pytest.raises(CheckpointError, match="no PyTorch file, or a damaged one") as caught:
        open_checkpoint(str(tmp_path))
    assert "\n" not in str(caught.value)


def test_a_truncated_archive_is_refused(tmp_path: Path) -> None:
    torch.save(llama(), tmp_path / "pytorch_model.bin")
    whole = (tmp_path / "pytorch_model.bin").read_bytes()
    (tmp_path / "pytorch_model.bin").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match="damaged"):
        open_checkpoint(str(tmp_path))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ([1, 2], "holds list"),
        ({"epoch": 3}, "holds no tensors among its 1 entries"),
        (torch.zeros(2), "holds Tensor"),
    ],
)
def test_a_pickle_without_a_table_of_tensors_is_refused(
    tmp_path: Path, content: object, reason: str
) -> None:
    torch.save(content, tmp_path / "weights.pt")
    with pytest.raises(CheckpointError, match=reason):
        open_checkpoint(str(tmp_path / "weights.pt"))


def test_entries_that_are_no_tensors_are_counted(tmp_path: Path) -> None:
    content = {**llama(), "step": 7, "sparse": torch.zeros(2, 2).to_sparse()}
    torch.save(content, tmp_path / "weights.pt")
    notes = open_checkpoint(str(tmp_path / "weights.pt")).notes
    assert any("2 entries that are no dense tensors are passed over" in note for note in notes)


@pytest.mark.parametrize(
    "name",
    ["optimizer.pt", "optim_world_size_2_rank_0.pt", "extra_state_world_size_2_rank_0.pt",
     "scheduler.pt", "rng_state_0.pth", "training_args.bin"],
)  # fmt: skip
def test_the_state_of_a_trainer_is_never_opened(tmp_path: Path, name: str) -> None:
    victim = tmp_path / "victim"
    torch.save({"x": Exploit(victim)}, tmp_path / name)
    with pytest.raises(CheckpointError, match="holds trainer state"):
        open_checkpoint(str(tmp_path / name))
    write_index(tmp_path, {"a": name}, "pytorch_model.bin.index.json")
    with pytest.raises(CheckpointError, match="names the shard"):
        open_checkpoint(str(tmp_path))
    assert not victim.exists()
