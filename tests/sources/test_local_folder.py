"""Which files of a folder are read, which are left alone, and what is said about a broken one?"""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file, save_model

from geoscope.errors import CheckpointError, CheckpointNotFound, OptionError
from geoscope.foreign import shown
from geoscope.sources.open import open_checkpoint
from geoscope.sources.reference import HubReference, base_and_adapter, parse_reference
from tests.helpers.files import (
    CONFIG,
    assert_equal_bits,
    llama,
    model_of,
    write_config,
    write_index,
    write_model,
    write_sharded,
    zeros,
)

SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


def refusal(reference: Path | str) -> str:
    """The one line with which a reference is refused."""
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(str(reference))
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- a folder that is in order ------------------------------------------------------------------


def test_a_folder_with_spaces_and_umlauts_opens_by_its_headers(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "Schritt 100 – größer", llama())
    checkpoint = open_checkpoint(str(folder))
    assert checkpoint.ref.given == str(folder)
    assert checkpoint.ref.resolved == str(folder.resolve())
    assert checkpoint.ref.commit is None
    assert checkpoint.ref.storage_dtype == "bfloat16"
    assert checkpoint.config == CONFIG
    assert checkpoint.notes == ()
    assert list(checkpoint.tensors) == sorted(llama())
    info = checkpoint.tensors["model.layers.0.mlp.down_proj.weight"]
    assert (info.shape, info.dtype, info.nbytes) == ((8, 12), "bfloat16", 192)
    assert (info.source, info.transposed) == ("model.safetensors", False)
    assert checkpoint.bytes_to_fetch(checkpoint.tensors) == 0
    checkpoint.fetch(checkpoint.tensors)


def test_mixed_storage_is_counted(tmp_path: Path) -> None:
    tensors = llama()
    tensors["model.norm.weight"] = tensors["model.norm.weight"].float()
    tensors["step"] = torch.tensor(3)
    checkpoint = model_of(tmp_path, tensors)
    assert checkpoint.ref.storage_dtype == f"mixed: bfloat16 {len(tensors) - 2}, float32 1"


def test_shards_are_read_through_the_index_and_only_what_it_names(tmp_path: Path) -> None:
    tensors = llama()
    weight_map = write_sharded(tmp_path, tensors)
    del weight_map["lm_head.weight"]
    write_index(tmp_path, weight_map)
    (tmp_path / "consolidated.safetensors").write_bytes(b"never opened")
    (tmp_path / "original").mkdir()
    (tmp_path / "original" / "consolidated.00.pth").write_bytes(b"never opened")
    checkpoint = open_checkpoint(str(tmp_path))
    assert {name: info.source for name, info in checkpoint.tensors.items()} == weight_map
    for name in weight_map:
        assert_equal_bits(checkpoint.read(name), tensors[name])


def test_a_single_file_beside_an_index_wins_and_is_said(tmp_path: Path) -> None:
    write_sharded(tmp_path, llama(0))
    tensors = llama(1)
    write_model(tmp_path, tensors)
    checkpoint = open_checkpoint(str(tmp_path))
    assert checkpoint.notes == (
        "model.safetensors is read; model.safetensors.index.json beside it is not looked at",
    )
    assert_equal_bits(checkpoint.read("lm_head.weight"), tensors["lm_head.weight"])


def test_safetensors_are_preferred_to_pickles(tmp_path: Path) -> None:
    write_model(tmp_path, llama())
    (tmp_path / "pytorch_model.bin").write_bytes(b"never opened")
    assert open_checkpoint(str(tmp_path)).tensors["lm_head.weight"].source == "model.safetensors"


def test_the_only_file_of_another_name_is_read_and_said(tmp_path: Path) -> None:
    save_file(llama(), tmp_path / "weights final.safetensors")
    checkpoint = open_checkpoint(str(tmp_path))
    assert checkpoint.notes[0] == (
        "weights final.safetensors is read, the only .safetensors file there"
    )
    assert "no config.json at hand" in checkpoint.notes[1]
    assert checkpoint.config == {}


def test_an_adapter_beside_the_weights_is_said(tmp_path: Path) -> None:
    write_model(tmp_path, llama())
    save_file(zeros(a=(2, 2)), tmp_path / "adapter_model.safetensors")
    (note,) = open_checkpoint(str(tmp_path)).notes
    assert (
        note
        == "model.safetensors is read; the adapter beside it (adapter_model.safetensors) is not"
    )


def test_one_file_is_a_reference_of_its_own(tmp_path: Path) -> None:
    path = write_model(tmp_path / "a b", llama()) / "model.safetensors"
    checkpoint = open_checkpoint(str(path))
    assert checkpoint.config == {}
    assert "one file, no config at hand" in checkpoint.notes[0]
    assert checkpoint.ref.resolved == str(path.resolve())
    assert list(checkpoint.tensors) == sorted(llama())


def test_one_shard_alone_is_said_to_be_one(tmp_path: Path) -> None:
    write_sharded(tmp_path, llama())
    checkpoint = open_checkpoint(str(tmp_path / SHARDS[0]))
    assert f"{SHARDS[0]} is one of 2 shards; only it is read" in checkpoint.notes


def test_a_hub_cache_with_its_links_is_a_folder_like_any_other(tmp_path: Path) -> None:
    cache = tmp_path / "models--org--name"
    snapshot = cache / "snapshots" / ("a" * 40)
    write_sharded(snapshot, llama())
    (cache / "blobs").mkdir()
    for number, shard in enumerate(SHARDS):
        (snapshot / shard).rename(cache / "blobs" / f"hash{number}")
        (snapshot / shard).symlink_to(Path("../../blobs") / f"hash{number}")
    for reference in (snapshot, snapshot / SHARDS[0]):
        checkpoint = open_checkpoint(str(reference))
        checkpoint.read(next(iter(checkpoint.tensors)))


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_a_checkpoint_travels_to_another_process(tmp_path: Path, kind: str) -> None:
    tensors = llama()
    if kind == "safetensors":
        write_model(tmp_path, tensors)
    else:
        torch.save(tensors, tmp_path / "pytorch_model.bin")
    checkpoint = open_checkpoint(str(tmp_path))
    checkpoint.read("lm_head.weight")
    parcel = pickle.dumps(checkpoint)
    assert_equal_bits(pickle.loads(parcel).read("lm_head.weight"), tensors["lm_head.weight"])
    assert len(parcel) < 10_000


# --- a folder that is not in order --------------------------------------------------------------


def test_an_index_that_names_an_absent_shard_names_it_with_its_tensors(tmp_path: Path) -> None:
    weight_map = write_sharded(tmp_path, llama())
    (tmp_path / SHARDS[1]).unlink()
    count = list(weight_map.values()).count(SHARDS[1])
    line = refusal(tmp_path)
    assert f"the index names {SHARDS[1]}, which is not there ({count} tensors)" in line


def test_an_index_that_names_an_absent_tensor_is_refused(tmp_path: Path) -> None:
    weight_map = write_sharded(tmp_path, llama())
    write_index(tmp_path, {**weight_map, "model.layers.9.up.weight": SHARDS[0]})
    line = refusal(tmp_path)
    assert "places 1 tensors in shards that lack them" in line
    assert f"model.layers.9.up.weight in {SHARDS[0]}" in line


@pytest.mark.parametrize(
    "shard",
    ["../model.safetensors", "/etc/model.safetensors", "sub/model.safetensors", "..",
     "C:model.safetensors", "a\\model.safetensors", "", "model.py", "optim_1.pt", 3, None],
)  # fmt: skip
def test_a_shard_outside_of_the_folder_is_refused(tmp_path: Path, shard: Any) -> None:
    write_model(tmp_path.parent, {"a": torch.zeros(2, 2)}, None)
    write_index(tmp_path, {"a": shard})
    assert f"names the shard {shown(shard)}" in refusal(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {}}'])
def test_a_broken_index_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(text)
    assert "model.safetensors.index.json: " in refusal(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", "3"])
def test_a_broken_config_is_refused(tmp_path: Path, text: str) -> None:
    (write_model(tmp_path, llama()) / "config.json").write_text(text)
    assert "config.json: " in refusal(tmp_path)


def test_weights_that_are_a_link_to_nothing_are_told_from_none(tmp_path: Path) -> None:
    (write_model(tmp_path, llama()) / "model.safetensors").unlink()
    assert "holds configuration only" in refusal(tmp_path)
    (tmp_path / "model.safetensors").symlink_to("blobs/gone")
    assert "model.safetensors` is no file: a link to nothing" in refusal(tmp_path)


def test_a_link_that_leaves_the_folder_is_refused(tmp_path: Path) -> None:
    elsewhere = write_model(tmp_path / "elsewhere", llama())
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model.safetensors").symlink_to(elsewhere / "model.safetensors")
    line = refusal(tmp_path / "model")
    assert "model.safetensors is a link to" in line
    assert "outside of the folder" in line
    inside = tmp_path / "inside"
    write_model(inside, llama())
    (inside / "model.safetensors").rename(inside / "blob")
    (inside / "model.safetensors").symlink_to("blob")
    open_checkpoint(str(inside))


def test_several_files_without_an_index_are_not_guessed_at(tmp_path: Path) -> None:
    for name in ("one", "two"):
        save_file(llama(), tmp_path / f"{name}.safetensors")
    line = refusal(tmp_path)
    assert "2 .safetensors files (one.safetensors, two.safetensors)" in line
    assert "no model.safetensors.index.json" in line


def test_one_shard_of_several_in_a_folder_is_no_model(tmp_path: Path) -> None:
    write_sharded(tmp_path, llama())
    (tmp_path / "model.safetensors.index.json").unlink()
    (tmp_path / SHARDS[1]).unlink()
    assert f"{SHARDS[0]} is one of 2 shards" in refusal(tmp_path)


def test_configuration_beside_fsdp_shards_says_where_the_weights_are(tmp_path: Path) -> None:
    huggingface = tmp_path / "actor" / "huggingface"
    huggingface.mkdir(parents=True)
    write_config(huggingface)
    (tmp_path / "actor" / "model_world_size_2_rank_0.pt").touch()
    assert refusal(huggingface) == (
        "`huggingface/` holds configuration only; weights are in the shards beside it: give "
        f"{tmp_path}/actor"
    )


def test_configuration_alone_is_called_that(tmp_path: Path) -> None:
    write_config(tmp_path)
    assert "holds configuration only (config.json)" in refusal(tmp_path)


def test_an_empty_folder_and_one_of_other_files_list_what_is_there(tmp_path: Path) -> None:
    assert "no weights geoscope can read; found: no files" in refusal(tmp_path)
    for name in ("a.txt", "b.txt", "c.txt", "d.txt"):
        (tmp_path / name).touch()
    assert "found: a.txt, b.txt, c.txt and 1 more" in refusal(tmp_path)


def test_the_publishers_own_layout_is_never_opened_by_itself(tmp_path: Path) -> None:
    save_file(llama(), tmp_path / "consolidated.safetensors")
    assert "only consolidated.safetensors, in the publisher's own layout" in refusal(tmp_path)
    assert open_checkpoint(str(tmp_path / "consolidated.safetensors")).tensors


def test_weights_further_down_are_pointed_at(tmp_path: Path) -> None:
    write_model(tmp_path / "merged", llama())
    assert "no weights here, but in merged/; give the folder that is meant" in refusal(tmp_path)
    run = tmp_path / "run"
    (run / "adapter").mkdir(parents=True)
    (run / "adapter" / "adapter_config.json").touch()
    for step in (1000, 200, 20, 3):
        write_model(run / f"checkpoint-{step}", llama())
    expected = "checkpoint-3/, checkpoint-20/, checkpoint-200/ and 1 more"
    assert f"no weights here, but in {expected}; give" in refusal(run)


def test_a_weight_file_without_tensors_is_refused(tmp_path: Path) -> None:
    write_model(tmp_path, {})
    assert "holds no tensors" in refusal(tmp_path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "model.safetensors")
    assert "neither a file nor a folder" in refusal(tmp_path / "model.safetensors")
    assert "found: no files" in refusal(tmp_path)


def test_a_name_that_is_not_there_is_an_error_with_its_name(tmp_path: Path) -> None:
    checkpoint = model_of(tmp_path, llama())
    with pytest.raises(CheckpointError, match=r"holds no tensor lm_tail\.weight"):
        checkpoint.read("lm_tail.weight")
    with pytest.raises(CheckpointError, match=r"holds no tensor lm_tail\.weight"):
        checkpoint.fetch(["lm_tail.weight"])


# --- orientation and ties -----------------------------------------------------------------------


def gpt2() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    shapes = {
        "wte.weight": (20, 4),
        "wpe.weight": (8, 4),
        "h.0.attn.c_attn.weight": (4, 12),
        "h.0.attn.c_attn.bias": (12,),
        "h.0.attn.c_proj.weight": (4, 4),
        "h.0.mlp.c_fc.weight": (4, 16),
        "h.0.mlp.c_proj.weight": (16, 4),
        "ln_f.weight": (4,),
    }
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


@pytest.mark.parametrize("model_type", ["gpt2", "openai-gpt", "imagegpt", "decision_transformer"])
def test_conv1d_weights_are_turned_once(tmp_path: Path, model_type: str) -> None:
    tensors = gpt2()
    checkpoint = model_of(tmp_path, tensors, model_type=model_type)
    turned = {name for name, info in checkpoint.tensors.items() if info.transposed}
    assert turned == {
        f"h.0.{module}.weight"
        for module in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    }
    assert checkpoint.notes == ()
    buffer = torch.empty(4096, dtype=torch.uint8)
    for name, expected in tensors.items():
        wanted = expected.T if name in turned else expected
        assert checkpoint.tensors[name].shape == tuple(wanted.shape)
        assert torch.equal(checkpoint.read(name), wanted)
        into = checkpoint.read(name, buffer=buffer)
        assert torch.equal(into, wanted)
        assert into.data_ptr() == buffer.data_ptr()


def test_without_a_config_the_shape_tells_conv1d_and_it_is_said(tmp_path: Path) -> None:
    path = write_model(tmp_path, gpt2()) / "model.safetensors"
    checkpoint = open_checkpoint(str(path))
    assert checkpoint.tensors["h.0.mlp.c_fc.weight"].shape == (16, 4)
    assert any("stored (in, out), from the shape of c_attn" in note for note in checkpoint.notes)


def test_linear_layers_under_conv1d_names_stay_as_they_are(tmp_path: Path) -> None:
    tensors = {
        name: tensor.T.contiguous() if ".c_" in name and tensor.dim() == 2 else tensor
        for name, tensor in gpt2().items()
    }
    checkpoint = model_of(tmp_path, tensors, model_type="gpt2")
    assert not any(info.transposed for info in checkpoint.tensors.values())
    assert any("stored (out, in), from the shape of c_attn" in note for note in checkpoint.notes)


def test_a_tied_head_is_known_by_the_config_stored_or_not(tmp_path: Path) -> None:
    tensors = llama()
    tie = {"lm_head.weight": "model.embed_tokens.weight"}
    assert model_of(tmp_path / "a", tensors).tied_to == {}
    assert model_of(tmp_path / "b", tensors, tie_word_embeddings=False).tied_to == {}
    assert model_of(tmp_path / "c", tensors, tie_word_embeddings=True).tied_to == tie
    nested = {"tie_word_embeddings": True}
    assert model_of(tmp_path / "d", tensors, text_config=nested).tied_to == tie
    del tensors["lm_head.weight"]
    assert model_of(tmp_path / "e", tensors).tied_to == tie
    assert model_of(tmp_path / "f", tensors, tie_word_embeddings=False).tied_to == {}
    assert model_of(tmp_path / "g", tensors, architectures=["LlamaModel"]).tied_to == {}


def test_repeats_dropped_by_safetensors_are_tied(tmp_path: Path) -> None:
    model = torch.nn.Module()
    model.first = torch.nn.Linear(3, 3, bias=False)
    model.second = torch.nn.Linear(3, 3, bias=False)
    model.second.weight = model.first.weight
    save_model(model, str(tmp_path / "model.safetensors"))
    checkpoint = open_checkpoint(str(tmp_path))
    assert sorted([*checkpoint.tensors, *checkpoint.tied]) == ["first.weight", "second.weight"]


# --- references ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reference", "expected"),
    [
        ("org/name", ("org/name", None, "")),
        ("org/name@main", ("org/name", "main", "")),
        ("org/name@refs/pr/7", ("org/name", "refs/pr/7", "")),
        ("org/name@feature/x", ("org/name", "feature/x", "")),
        ("hf://org/name", ("org/name", None, "")),
        ("hf://org/name/", ("org/name", None, "")),
        ("hf://org/name/sub/folder", ("org/name", None, "sub/folder")),
        ("hf://org/name@v1/sub", ("org/name", "v1", "sub")),
        ("hf://org/name@feature%2Fx/sub", ("org/name", "feature/x", "sub")),
        ("hf://org/name@refs/pr/7/sub", ("org/name", "refs/pr/7", "sub")),
        ("hf://org/name@refs/convert/parquet", ("org/name", "refs/convert/parquet", "")),
        ("hf://org/name/a@b", ("org/name", None, "a@b")),
    ],
)
def test_hub_references(reference: str, expected: tuple[str, str | None, str]) -> None:
    assert parse_reference(reference) == HubReference(reference, *expected)


@pytest.mark.parametrize(
    "reference",
    ["", " ", "org/name@a@b", "org/name@", "org/name@../x", "org/name@step_*", "org/name@a b",
     "hf://", "hf://name", "hf://org/name@", "hf://datasets/org/name", "hf://org/name/a//b",
     "hf://org/name/../x", "https://huggingface.co/org/name", "or g/name"],
)  # fmt: skip
def test_a_reference_outside_of_the_grammar_is_a_usage_error(reference: str) -> None:
    with pytest.raises(OptionError, match=r"write PATH, org/name\[@revision\], hf://"):
        parse_reference(reference)


@pytest.mark.parametrize(
    "reference", ["gpt2", "./org/name", "/no/such/path", "~/no such", "a/b/c", "org/name/", "x\0y"]
)
def test_a_path_that_is_not_there_is_not_looked_for_on_the_hub(reference: str) -> None:
    with pytest.raises(CheckpointNotFound, match="no such file or folder"):
        parse_reference(reference)


@pytest.mark.parametrize(
    ("reference", "expected"),
    [
        ("org/base+org/adapter@v1", ("org/base", "org/adapter@v1")),
        ("org/base@main+hf://org/adapter/sub", ("org/base@main", "hf://org/adapter/sub")),
        ("org/base", None),
    ],
)
def test_base_and_adapter_are_two_references(
    reference: str, expected: tuple[str, str] | None
) -> None:
    assert base_and_adapter(reference) == expected


@pytest.mark.parametrize("reference", ["org/base+adapter", "+org/adapter", "org/base+"])
def test_a_mark_with_no_reference_on_one_side_is_a_usage_error(reference: str) -> None:
    with pytest.raises(OptionError, match="neither a path nor base"):
        base_and_adapter(reference)


def test_a_plus_in_the_name_of_a_folder_is_no_mark(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a+b", "c+d"):
        (tmp_path / name).mkdir()
    assert base_and_adapter("./a+b") is None
    assert base_and_adapter("./a+b+./c+d") == ("./a+b", "./c+d")


def test_an_existing_path_wins_over_a_hub_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_model(tmp_path / "org" / "name@v1@x", llama())
    monkeypatch.chdir(tmp_path)
    checkpoint = open_checkpoint("org/name@v1@x")
    assert checkpoint.ref.resolved == str((tmp_path / "org" / "name@v1@x").resolve())


LOCAL = """
import json, socket, sys
def refuse(*args, **kwargs):
    raise AssertionError("network")
socket.socket.connect = socket.getaddrinfo = refuse
from geoscope.models.pairing import pair
from geoscope.sources.open import open_checkpoint
from geoscope.names import Selection
one = open_checkpoint(sys.argv[1])
pairing = pair(one, one, Selection())
heavy = [name for name in ("torch", "huggingface_hub", "numpy") if name in sys.modules]
print(json.dumps([len(pairing.matrices), heavy]))
"""


def test_local_headers_need_no_network_no_hub_library_and_no_torch(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "a b", llama())
    done = subprocess.run(
        [sys.executable, "-c", LOCAL, str(folder)],
        capture_output=True, text=True, check=True, timeout=60,
        env={"PYTHONPATH": ":".join(sys.path)},
    )  # fmt: skip
    assert json.loads(done.stdout) == [14, []]
    assert done.stderr == ""
