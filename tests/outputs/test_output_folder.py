"""Is an output folder either complete or not loadable, whatever happens on the way?"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from geoscope.errors import CheckpointError
from geoscope.formats.safetensors_writer import FilePlan, TensorPlan
from geoscope.outputs.model_folder import INDEX, plan_model
from geoscope.outputs.model_folder import write_model as write_again
from geoscope.outputs.output_folder import OutputFolder, travelling_files, travels
from geoscope.sources.open import open_checkpoint
from tests.helpers.files import llama, write_model, write_sharded

LOCK = ".geoscope-lock"
PLAN = FilePlan({"a": TensorPlan("float32", (4,))})
SIZES = {"model.safetensors": PLAN.nbytes, "config.json": 2, "README.md": 5}


def fill(out: OutputFolder) -> None:
    out.write("config.json", b"{}")
    with out.tensors("model.safetensors", PLAN) as writer:
        writer.write("a", torch.ones(4))
    out.write("README.md", b"hello")


def names(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_a_folder_holds_what_was_planned(tmp_path: Path) -> None:
    out = OutputFolder(tmp_path / "a b" / "out", SIZES)
    assert not (tmp_path / "a b").exists()  # checks write nothing
    with out:
        fill(out)
        assert names(out.path) == {"model.safetensors", "README.md", LOCK}  # the rest waits
    assert names(out.path) == set(SIZES)


def test_an_error_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), OutputFolder(tmp_path / "out", SIZES) as out:
        fill(out)
        raise RuntimeError
    assert not (tmp_path / "out").exists()


def test_an_error_takes_back_our_files_alone(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/notes.md").write_text("mine")
    with (
        pytest.raises(RuntimeError),
        OutputFolder(tmp_path / "out", SIZES, force=True) as out,
    ):
        fill(out)
        raise RuntimeError
    assert names(tmp_path / "out") == {"notes.md"}


def test_what_was_planned_has_to_be_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"not written: model\.safetensors"):
        with OutputFolder(tmp_path / "out", SIZES) as out:
            out.write("config.json", b"{}")
            out.write("README.md", b"hello")
    assert names(tmp_path / "out") == {"README.md"}
    with pytest.raises(ValueError, match="other is not planned"):
        with OutputFolder(tmp_path / "two", SIZES) as out:
            out.write("other", b"")


def refused(path: Path, words: str, sizes: dict[str, int] = SIZES, **options: object) -> None:
    """The folder is refused in one line, and nothing was touched."""
    before = names(path.parent)
    with pytest.raises(CheckpointError, match=words) as caught:
        OutputFolder(path, sizes, **options)  # pyright: ignore[reportArgumentType]
    assert "\n" not in str(caught.value)
    assert names(path.parent) == before


def test_a_folder_that_is_not_empty_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with OutputFolder(tmp_path / "out", SIZES) as out:  # empty is fine
        fill(out)
    refused(tmp_path / "out", r"is not empty \(README.md, config.json, model.safetensors\); give")
    (tmp_path / "file").write_text("")
    refused(tmp_path / "file", "is a file")


def test_force_replaces_what_is_written_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "out"
    for _ in range(2):
        with OutputFolder(path, SIZES, force=True) as out:
            assert not (path / "config.json").exists()  # the old weights are not loadable now
            fill(out)
        (path / "notes.txt").write_text("mine")
    assert names(path) == {*SIZES, "notes.txt"}
    assert (path / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize(
    "name", ["model-00001-of-00002.safetensors", "pytorch_model.bin", INDEX, "adapter_config.json"]
)
def test_force_does_not_write_beside_foreign_weights(tmp_path: Path, name: str) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_text("")
    refused(tmp_path / "out", f"a loader would read {name} together with", force=True)


@pytest.mark.parametrize("part", ["residual", "adapter", "anchor"])
def test_force_does_not_write_beside_another_layout(tmp_path: Path, part: str) -> None:
    """Its folders do not hold planned files, and are looked into all the same."""
    (tmp_path / "out" / part).mkdir(parents=True)
    (tmp_path / "out" / part / "README.md").write_text("mine")
    OutputFolder(tmp_path / "out", SIZES, force=True)
    (tmp_path / "out" / part / "adapter_model.safetensors").write_text("")
    refused(tmp_path / "out", f"would read {part}/adapter_model.safetensors together", force=True)


def test_an_input_is_never_written_to(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", llama())
    for given in (model, model / "model.safetensors"):
        refused(model, "holds the input", force=True, inputs=(given,))
    (tmp_path / "link").symlink_to(model)
    refused(tmp_path / "link", "holds the input", force=True, inputs=(model,))
    inside = {"model/config.json": 2}
    refused(tmp_path, "holds the input", inside, force=True, inputs=(model,))


def test_the_disk_is_measured_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1_500))
    refused(
        tmp_path / "out", r"5\.00 GB will be written, but only 1\.50 kB are free", {"a": 5 * 10**9}
    )
    with OutputFolder(tmp_path / "out", {"a": 1_500}) as out:
        out.write("a", b"as much as there is")


def test_what_lies_on_the_disk_meanwhile_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1_500))
    OutputFolder(tmp_path / "out", {"a": 1_000}, meanwhile=500)
    words = r"1\.00 kB will be written, plus 501 bytes temporarily, but only 1\.50 kB are free"
    refused(tmp_path / "out", words, {"a": 1_000}, meanwhile=501)


def test_a_place_that_cannot_be_written_to_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    refused(tmp_path / "file" / "out", "file is a file; give another output folder")
    monkeypatch.setattr("os.access", lambda *_: False)  # root may write anywhere
    refused(tmp_path / "a" / "out", f"{tmp_path} is not writable; give another output folder")


def test_parts_of_a_killed_run_are_removed(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".model.safetensors.4.geoscope-part").write_text("half")
    with OutputFolder(tmp_path / "out", SIZES, force=True) as out:
        fill(out)
    assert names(tmp_path / "out") == set(SIZES)


# --- a process that is killed ---------------------------------------------------------------------

# Writes version 2 over version 1, in a child that kills itself at the k-th line of our code, for
# one k after the other until a child comes to the end. Prints what stood there after each.
WRITER = """
import collections, json, os, shutil, signal, sys, torch
from pathlib import Path
from geoscope.outputs.output_folder import OutputFolder
from geoscope.formats.safetensors_file import SafetensorsFile
from geoscope.formats.safetensors_writer import FilePlan, TensorPlan

plan = FilePlan({"a": TensorPlan("float32", (8,)), "b": TensorPlan("bfloat16", (3,))})
names = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
INDEX, CONFIG = "model.safetensors.index.json", "config.json"
sizes = dict.fromkeys(names, plan.nbytes) | {INDEX: 2, CONFIG: 2, "tokenizer.json": 2}

def write(folder, version):
    with OutputFolder(folder, sizes, force=True) as out:
        for name in (CONFIG, INDEX, "tokenizer.json"):
            out.write(name, b"v%d" % version)
        for name in names:
            with out.tensors(name, plan) as writer:
                writer.write("a", torch.full((8,), float(version)))
                writer.write("b", torch.full((3,), float(version)).bfloat16())

def versions(folder):
    found = {(folder / name).read_text() for name in (CONFIG, INDEX, "tokenizer.json")}
    for name in names:
        file = SafetensorsFile.open(folder / name, name)
        found |= {f"v{int(number)}" for key in "ab" for number in file.read(key, None).unique()}
    return found

def state(folder):
    if not (folder / CONFIG).exists() or not (folder / INDEX).exists():
        return "cannot be loaded"
    found = versions(folder)
    return "complete " + found.pop() if len(found) == 1 else f"mixed {sorted(found)} at line {k}"

def trace(frame, event, argument):
    global lines
    if "geoscope" not in frame.f_code.co_filename:
        return None
    lines += event == "line"
    if lines > k:
        os.kill(os.getpid(), signal.SIGKILL)
    return trace

root, again = Path(sys.argv[1]), sys.argv[2] == "again"
states, k = collections.Counter(), 0
while True:
    folder = root / str(k)
    if again:
        write(folder, 1)
    child = os.fork()
    if child == 0:
        lines = 0
        sys.settrace(trace)
        write(folder, 2)
        os._exit(0)
    ended = os.waitpid(child, 0)[1] == 0
    states[state(folder)] += 1
    shutil.rmtree(folder, ignore_errors=True)
    if ended:
        break
    k += 5
print(json.dumps(states))
"""


@pytest.mark.slow
@pytest.mark.parametrize("before", ["new", "again"])
def test_a_killed_process_leaves_nothing_half_written(tmp_path: Path, before: str) -> None:
    """Killed at every fifth line of code, over nothing and over an older version of itself."""
    result = subprocess.run(
        [sys.executable, "-c", WRITER, str(tmp_path), before],
        capture_output=True,
        text=True,
        check=True,
    )
    states: dict[str, int] = json.loads(result.stdout)
    old = {"complete v1"} if before == "again" else set()
    assert set(states) == {"cannot be loaded", "complete v2", *old}
    assert states["cannot be loaded"] > 30


# --- small files ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        *("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"),
        *("special_tokens_map.json", "vocab.txt", "vocab.json", "merges.txt", "tokenizer.model"),
        *("chat_template.jinja", "LICENSE", "LICENSE.txt", "preprocessor_config.json"),
        *("added_tokens.json", "vocab.bpe"),
    ],
)
def test_configuration_and_tokenizer_travel(name: str) -> None:
    assert travels(name)


@pytest.mark.parametrize(
    "name",
    [
        *("model.safetensors", INDEX, "pytorch_model.bin", "pytorch_model.bin.index.json"),
        *("tf_model.h5", "flax_model.msgpack", "model.onnx", "model.gguf", "tokenizer.safetensors"),
        *("adapter_config.json", "adapter_model.safetensors", "trainer_state.json", "README.md"),
        *("training_args.bin", "geoscope.json", ".gitattributes", "modeling_x.py", "optimizer.pt"),
    ],
)
def test_weights_adapters_and_states_stay(name: str) -> None:
    assert not travels(name)


def test_links_out_of_the_folder_are_not_followed(tmp_path: Path) -> None:
    model, elsewhere = tmp_path / "model", tmp_path / "secret.json"
    model.mkdir()
    elsewhere.write_text("{}")
    (model / "config.json").write_text("{}")
    (model / "a.json").symlink_to(elsewhere)
    (model / "b.json").symlink_to(model / "config.json")
    (model / "c.json").mkdir()
    found, notes = travelling_files(model)
    assert list(found) == ["b.json", "config.json"]
    assert notes == ("a.json is a link out of the folder and is not copied",)


def test_links_into_the_blobs_of_a_hub_cache_are(tmp_path: Path) -> None:
    (tmp_path / "snapshots" / "abc").mkdir(parents=True)
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "123").write_text("{}")
    (tmp_path / "snapshots" / "abc" / "config.json").symlink_to(tmp_path / "blobs" / "123")
    found, notes = travelling_files(tmp_path / "snapshots" / "abc")
    assert list(found) == ["config.json"]
    assert notes == ()


def test_small_files_are_copied_byte_for_byte(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(bytes(range(256)))
    (tmp_path / "config.json").write_bytes(b'{"a":\r\n 1}')
    sizes = {"in/tokenizer.model": 256, "in/config.json": 10}
    with OutputFolder(tmp_path / "out", sizes) as out:
        for name in sizes:
            out.copy(name, tmp_path / Path(name).name)
        assert names(out.path) == {"in/tokenizer.model", LOCK}
    assert (tmp_path / "out/in/tokenizer.model").read_bytes() == bytes(range(256))
    assert (tmp_path / "out/in/config.json").read_bytes() == b'{"a":\r\n 1}'
    with pytest.raises(CheckpointError, match="cannot be read"):
        with OutputFolder(tmp_path / "two", {"a.txt": 1}) as out:
            out.copy("a.txt", tmp_path / "absent.txt")


# --- whole models ---------------------------------------------------------------------------------


def rewritten(
    model: Path, out: Path, replaced: dict[str, torch.Tensor]
) -> tuple[dict[str, str], tuple[str, ...]]:
    checkpoint = open_checkpoint(str(model))
    dtypes = {name: str(one.dtype).removeprefix("torch.") for name, one in replaced.items()}
    plan = plan_model(checkpoint, dtypes, {"layout": "residual"})
    with OutputFolder(out, {f"residual/{k}": v for k, v in plan.sizes.items()}) as folder:
        write_again(folder, "residual", checkpoint, plan, replaced.get)
    return dict(plan.sources), plan.notes


def test_shards_keep_their_names_and_other_tensors_their_bytes(tmp_path: Path) -> None:
    tensors = llama() | {"model.count": torch.arange(5), "model.f8": torch.ones(3, 3).half()}
    weight_map = write_sharded(tmp_path / "model", tensors, 3)
    name = "model.layers.1.mlp.down_proj.weight"
    new = torch.randn(8, 12, generator=torch.Generator().manual_seed(3))
    sources, notes = rewritten(tmp_path / "model", tmp_path / "out", {name: new})
    assert notes == ()
    assert sources == {file: file for file in weight_map.values()}
    folder = tmp_path / "out/residual"
    index = json.loads((folder / INDEX).read_text())
    assert index["weight_map"] == dict(sorted(weight_map.items()))
    after = tensors | {name: new}
    assert index["metadata"]["total_size"] == sum(one.nbytes for one in after.values())
    (folder / "config.json").write_text("{}")
    back = open_checkpoint(str(folder))
    assert set(back.tensors) == set(after)
    for one, tensor in after.items():
        assert back.tensors[one].dtype == str(tensor.dtype).removeprefix("torch.")
        assert torch.equal(back.read(one), tensor)


@pytest.mark.parametrize(
    ("shards", "expected"),
    [
        (["pytorch_model.bin"], ["model.safetensors"]),
        (
            ["pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"],
            ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"],
        ),
    ],
)
def test_pickles_become_safetensors_under_their_stem(
    tmp_path: Path, shards: list[str], expected: list[str]
) -> None:
    tensors = llama()
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    weight_map: dict[str, str] = {}
    for i, shard in enumerate(shards):
        part = {name: tensors[name] for name in sorted(tensors)[i :: len(shards)]}
        torch.save(part, model / shard)
        weight_map |= dict.fromkeys(part, shard)
    if len(shards) > 1:
        text = json.dumps({"metadata": {}, "weight_map": weight_map})
        (model / "pytorch_model.bin.index.json").write_text(text)
    sources, notes = rewritten(model, tmp_path / "out", {})
    assert sources == dict(zip(expected, shards, strict=True))
    assert notes and f"{shards[0]} as {expected[0]}" in notes[0]
    back = open_checkpoint(str(tmp_path / "out/residual"))
    assert all(torch.equal(back.read(name), one) for name, one in tensors.items())


def test_a_single_file_of_another_name_gets_the_usual_one(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", llama())
    (model / "model.safetensors").rename(model / "weights.safetensors")
    sources, notes = rewritten(model, tmp_path / "out", {})
    assert sources == {"model.safetensors": "weights.safetensors"}
    assert "weights.safetensors as model.safetensors" in notes[0]


def test_inputs_stay_as_they_are(tmp_path: Path) -> None:
    write_sharded(tmp_path / "model", llama(), 3)
    before = {path: path.read_bytes() for path in (tmp_path / "model").iterdir()}
    rewritten(tmp_path / "model", tmp_path / "out", {"lm_head.weight": torch.zeros(32, 8)})
    assert {path: path.read_bytes() for path in (tmp_path / "model").iterdir()} == before


def test_a_folder_is_written_by_one_run_at_a_time(tmp_path: Path) -> None:
    first, second = (OutputFolder(tmp_path / "out", SIZES) for _ in range(2))
    with first:
        with pytest.raises(CheckpointError, match="another run writes it"), second:
            pass
        fill(first)
    with pytest.raises(CheckpointError, match="is not empty"), second:  # checked again
        pass
    assert names(first.path) == set(SIZES)


def test_the_lock_of_a_killed_run_holds_nobody(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / LOCK).touch()
    with OutputFolder(tmp_path / "out", SIZES) as out:
        fill(out)
    assert names(out.path) == set(SIZES)
