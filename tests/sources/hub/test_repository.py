"""Is a model on the Hub opened by headers alone, fetched shard by shard, and found again offline?

Through the real huggingface_hub against a server on the loopback, each in a process of its own.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.helpers.files import CONFIG, llama, raw_safetensors
from tests.helpers.hub_models import (
    CONFIG_FILE,
    SECRET,
    SHARDS,
    Client,
    digest,
    sharded,
    single,
    wide,
)
from tests.helpers.hub_server import HubServer, Repo, commit_of


@pytest.fixture
def hub() -> Iterator[HubServer]:
    repos = {
        "org/single": Repo(single(llama()), {"step/10": single(llama(1)), "refs/pr/7": single({
            "model.layers.0.pr.weight": torch.zeros(2, 2)})}),
        "org/sharded": Repo(sharded(wide())),
        "org/gated": Repo(single(llama()), gated=True),
    }  # fmt: skip
    with HubServer(repos) as server:
        yield server


@pytest.fixture
def client(hub: HubServer, tmp_path: Path) -> Client:
    return Client(hub, tmp_path / "Zwischenspeicher ä")


# --- opening ------------------------------------------------------------------------------------


def test_a_repository_opens_by_headers_at_one_commit(hub: HubServer, client: Client) -> None:
    found = client("org/single")
    commit = commit_of(hub.repos["org/single"].files)
    assert found["commit"] == commit
    assert found["resolved"] == f"org/single@{commit}"
    assert found["dtype"] == "bfloat16"
    assert found["config"] == CONFIG
    assert found["notes"] == []
    assert found["tensors"] == dict.fromkeys(sorted(llama()), "model.safetensors")
    assert found["shapes"] == {name: list(llama()[name].shape) for name in sorted(llama())}
    assert found["torch"] is False
    assert client.cached() == set()
    asked = [path.split("?")[0] for method, path, _ in hub.log if method == "GET"]
    resolved = [path for path in asked if "/resolve/" in path]
    assert all(f"/resolve/{commit}/" in path for path in resolved)
    assert all(
        "range" in headers
        for method, path, headers in hub.log
        if method == "GET" and path.endswith("model.safetensors")
    )
    assert asked.count("/api/models/org/single") == 1


@pytest.mark.parametrize(
    ("reference", "revision"),
    [("hf://org/single@step%2F10", "step/10"),
     pytest.param("org/single@step/10", "step/10", marks=pytest.mark.slow),
     pytest.param("hf://org/single@refs/pr/7", "refs/pr/7", marks=pytest.mark.slow)],
)  # fmt: skip
def test_a_revision_is_resolved_once(
    hub: HubServer, client: Client, reference: str, revision: str
) -> None:
    commit = commit_of(hub.repos["org/single"].branches[revision])
    assert client(reference)["commit"] == commit
    assert client(f"org/single@{commit}")["commit"] == commit


def test_only_the_shards_that_hold_wanted_tensors_are_fetched(
    hub: HubServer, client: Client
) -> None:
    found = client("org/sharded", r"layers\.1\.", "read")
    size = len(hub.repos["org/sharded"].files[SHARDS[1]])
    assert sorted(set(found["tensors"].values())) == list(SHARDS)
    assert found["to_fetch"] == size
    assert found["left_to_fetch"] == 0
    assert client.cached() == {SHARDS[1]}
    name = "model.layers.1.mlp.up_proj.weight"
    assert found["bits"] == {name: digest(wide()[name])}
    assert {step[0] for step in found["opening"]} == {"config.json", "model.safetensors.index.json"}
    assert found["progress"][0] == [SHARDS[1], 0, size]
    assert found["progress"][-1] == [SHARDS[1], size, size]
    done = [step[1] for step in found["progress"]]
    assert done == sorted(done)
    assert not any("consolidated" in path for _, path, _ in hub.log)


def test_what_is_cached_is_not_fetched_again(hub: HubServer, client: Client) -> None:
    client("org/sharded", "layers")
    hub.log.clear()
    again = client("org/sharded", "layers")
    assert again["to_fetch"] == 0
    assert again["progress"] == []
    assert [path for _, path, _ in hub.log if "/resolve/" in path] == []


def test_a_header_longer_than_the_first_request_is_read(hub: HubServer, client: Client) -> None:
    tensors = {f"model.layers.{i}.{'long' * 30}.weight": torch.zeros(2, 2) for i in range(700)}
    hub.repos["org/long"] = Repo(single(tensors))
    assert len(client("org/long")["tensors"]) == 700


def test_a_folder_of_a_repository_is_a_model(hub: HubServer, client: Client) -> None:
    files = {f"sub/folder/{path}": content for path, content in sharded(wide()).items()}
    hub.repos["org/nested"] = Repo({"README.md": b"", **files})
    found = client("hf://org/nested/sub/folder", r"layers\.0\.")
    assert found["resolved"] == f"org/nested@{found['commit']}/sub/folder"
    assert len(found["tensors"]) == 3
    assert found["progress"][-1][0] == f"sub/folder/{SHARDS[0]}"
    offline = client("hf://org/nested/sub/folder", r"layers\.0\.", HF_HUB_OFFLINE="1")
    assert offline["left_to_fetch"] == 0
    assert offline["tensors"] == found["tensors"]


def test_a_pickle_is_downloaded_to_be_opened(
    hub: HubServer, client: Client, tmp_path: Path
) -> None:
    torch.save(llama(), tmp_path / "weights")
    hub.repos["org/bin"] = Repo(
        {**CONFIG_FILE, "pytorch_model.bin": (tmp_path / "weights").read_bytes()}
    )
    found = client("org/bin", "norm", "read")
    assert found["to_fetch"] == 0
    assert found["opening"][-1][0] == "pytorch_model.bin"
    assert found["bits"]["model.norm.weight"] == digest(llama()["model.norm.weight"])


def test_a_broken_connection_is_resumed_where_it_broke(hub: HubServer, client: Client) -> None:
    """24 MB, because the client keeps what it got in pieces of 10 MB."""
    tensor = torch.arange(12 << 20, dtype=torch.int64).to(torch.bfloat16).reshape(4096, -1)
    hub.repos["org/big"] = Repo(single({"model.layers.0.up.weight": tensor}))
    hub.drop.add("model.safetensors")
    done = client.run("org/big", "up", "read")
    found = json.loads(done.stdout)
    assert found["bits"] == {"model.layers.0.up.weight": digest(tensor)}
    assert not hub.drop
    assert any(headers.get("range") == f"bytes={10 << 20}-" for _, _, headers in hub.log)
    size = len(hub.repos["org/big"].files["model.safetensors"])
    steps = [step[1:] for step in found["progress"]]
    assert steps[0] == [0, size]
    assert steps[-1] == [size, size]
    assert len(steps) > 4
    assert SECRET not in done.stderr


def test_a_server_without_ranges_is_read_all_the_same(hub: HubServer, client: Client) -> None:
    hub.ignore_range = True
    assert len(client("org/sharded")["tensors"]) == 3


def test_the_token_goes_to_the_hub_and_nowhere_else(hub: HubServer, client: Client) -> None:
    client("org/sharded", "layers")
    sent = {path: headers.get("authorization") for _, path, headers in hub.log}
    stored = {path: token for path, token in sent.items() if path.startswith("/blobs/")}
    assert stored
    assert set(stored.values()) == {None}
    asked = {token for path, token in sent.items() if "org/sharded" in path}
    assert asked == {f"Bearer {SECRET}"}
    written = [path for path in client.home.rglob("*") if path.is_file()]
    assert written
    assert not any(SECRET.encode() in path.read_bytes() for path in written)


# --- refused ------------------------------------------------------------------------------------


def test_formats_are_refused_before_anything_large_is_fetched(
    hub: HubServer, client: Client
) -> None:
    quantised = {"config.json": b'{"quantization_config": {"quant_method": "gptq"}}'}
    codes = {"a.codes": torch.zeros(4, 4, dtype=torch.int32)}
    hub.repos["org/gptq"] = Repo({**single({**llama(), **codes}), **quantised})
    assert client("org/gptq")["error"] == (
        "`org/gptq`: weights are GPTQ (quant_method 'gptq' in config.json, tensor a.codes is "
        "int32). geoscope reads fp32, fp16, bf16, FP8 with its scales, MXFP4 and "
        "bitsandbytes 4-bit. Use the checkpoint it was quantised from."
    )
    hub.repos["org/lora"] = Repo({"adapter_config.json": b"{}", "adapter_model.safetensors": b""})
    assert "weights are a PEFT adapter" in client("org/lora")["error"]
    hub.repos["org/gguf"] = Repo({"README.md": b"", "model.gguf": b"GGUF" * 1000})
    assert "weights are GGUF (model.gguf)" in client("org/gguf")["error"]


def test_a_repository_without_weights_lists_what_it_holds(hub: HubServer, client: Client) -> None:
    files = {f"{letter}.txt": b"" for letter in "abcd"}
    hub.repos["org/text"] = Repo(files)
    assert client("org/text")["error"] == (
        f"no weights geoscope can read in org/text@{commit_of(files)}; "
        "found: a.txt, b.txt, c.txt and 1 more"
    )


def test_an_index_that_names_an_absent_shard_is_an_error(hub: HubServer, client: Client) -> None:
    files = sharded(wide())
    del files[SHARDS[2]]
    hub.repos["org/cut"] = Repo(files)
    assert (
        f"the index names {SHARDS[2]}, which is not in the repository (1 tensors)"
        in (client("org/cut")["error"])
    )


@pytest.mark.parametrize(
    ("header", "reason"),
    [(b"no json", "no valid JSON (Expecting value: line 1 column 1 (char 0))"),
     (b"[1]", "the JSON is not a table"),
     (b'{"a": 1}', "a lacks dtype, shape or data_offsets"),
     (b'{"a": {"dtype": "F32", "shape": ["x"], "data_offsets": [0, 4]}}',
      "a has the impossible shape ['x']")],
)  # fmt: skip
def test_a_damaged_header_is_an_error(
    hub: HubServer, client: Client, header: bytes, reason: str
) -> None:
    hub.repos["org/bad"] = Repo({**CONFIG_FILE, "model.safetensors": raw_safetensors(header)})
    found = client("org/bad")
    label = f"org/bad@{commit_of(hub.repos['org/bad'].files)}/model.safetensors"
    assert found["error"] == (
        f"{label}: header is damaged: {reason}; copy or download the file again"
    )
    assert found["kind"] == "CheckpointError"


def test_a_remote_header_is_checked_like_a_local_one(hub: HubServer, client: Client) -> None:
    entry = {"dtype": "F32", "shape": [2, 2], "data_offsets": [8, 24]}
    content = raw_safetensors({"a": entry}, b"\0" * 24)
    hub.repos["org/bad"] = Repo({**CONFIG_FILE, "model.safetensors": content})
    assert "header is damaged: a at byte 8 leaves a hole" in client("org/bad")["error"]


# --- errors of the Hub --------------------------------------------------------------------------


def test_a_gated_repository_says_where_to_accept(client: Client) -> None:
    found = client("org/gated")
    assert found["error"] == (
        "org/gated is gated. Accept the terms at https://huggingface.co/org/gated "
        "and log in (`hf auth login`)."
    )
    assert found["kind"] == "HubNotFound"


@pytest.mark.parametrize("token", [SECRET, ""])
def test_a_repository_that_is_not_there_or_private(client: Client, token: str) -> None:
    assert client("org/nowhere", HF_TOKEN=token)["error"] == (
        "org/nowhere not found, or private. No local path of that name either."
    )


def test_a_revision_that_is_not_there_lists_the_branches(client: Client) -> None:
    assert client("org/single@step/11")["error"] == (
        "no revision step/11 in org/single; branches: main, step/10, refs/pr/7"
    )


def test_a_failing_server_is_named_with_status_and_url(hub: HubServer, client: Client) -> None:
    hub.fail["/api/models/org/single"] = 418
    assert client("org/single")["error"] == (
        f"org/single@main: HTTP 418 from {hub.url}/api/models/org/single; retry, or set HF_ENDPOINT"
    )


def test_a_login_that_is_not_accepted_says_to_log_in_again(hub: HubServer, client: Client) -> None:
    hub.fail["/blobs/"] = 403
    found = client("org/single")
    assert "HTTP 403 from" in found["error"]
    assert "log in again (`hf auth login`)" in found["error"]


def test_a_hub_that_does_not_answer_says_what_to_set(client: Client) -> None:
    found = client("org/single", HF_ENDPOINT="http://127.0.0.1:9")
    local = "no local path of that name, and "
    assert found["error"].startswith(
        f"org/single@main: {local}the connection to the Hub failed (Connect"
    )
    assert found["error"].endswith(
        "retry, or set HF_ENDPOINT, or set HF_HUB_OFFLINE=1 to use what is cached"
    )


def test_a_local_path_asks_no_server(hub: HubServer, client: Client) -> None:
    folder = client.cwd / "org" / "single"
    folder.mkdir(parents=True)
    save_file(llama(1), folder / "model.safetensors")
    found = client("org/single", "norm")
    assert found["resolved"] == str(folder.resolve())
    assert hub.log == []


# --- offline ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "reference", ["org/sharded@main", pytest.param("org/sharded", marks=pytest.mark.slow)]
)
def test_what_was_fetched_is_found_again_offline(
    hub: HubServer, client: Client, reference: str
) -> None:
    online = client("org/sharded", "layers")
    hub.log.clear()
    offline = client(reference, "layers", "read", HF_HUB_OFFLINE="1")
    for key in ("resolved", "commit", "tensors", "config", "dtype"):
        assert offline[key] == online[key]
    assert offline["bits"] == {name: digest(tensor) for name, tensor in wide().items()}
    commit = online["commit"]
    assert client(f"org/sharded@{commit}", HF_HUB_OFFLINE="1")["commit"] == commit
    assert hub.log == []


def test_a_shard_that_is_not_cached_is_named_offline(client: Client) -> None:
    commit = client("org/sharded", r"layers\.0\.")["commit"]
    assert len(client("org/sharded", r"layers\.0\.", HF_HUB_OFFLINE="1")["tensors"]) == 3
    found = client("org/sharded", "layers", HF_HUB_OFFLINE="1")
    assert found["error"] == f"offline, and {SHARDS[1]} of org/sharded@{commit} is not cached."
    assert found["kind"] == "CheckpointNotFound"


def test_a_model_of_which_only_headers_were_read_is_inspected_offline(client: Client) -> None:
    online = client("org/single")
    assert client("org/single", HF_HUB_OFFLINE="1") == {**online, "progress": []}
    assert client("org/single", "norm", HF_HUB_OFFLINE="1")["error"] == (
        f"offline, and model.safetensors of org/single@{online['commit']} is not cached."
    )


def test_a_snapshot_of_another_program_is_read_offline(hub: HubServer, client: Client) -> None:
    """Without the listing that geoscope keeps: what is there is all that is known."""
    client("org/sharded", "layers")
    shutil.rmtree(client.home / "geo scope")
    offline = client("org/sharded", "layers", "read", HF_HUB_OFFLINE="1")
    assert offline["bits"] == {name: digest(tensor) for name, tensor in wide().items()}
    shutil.rmtree(client.home / "geo scope", ignore_errors=True)
    next(client.home.rglob(f"snapshots/*/{SHARDS[1]}")).unlink()
    found = client("org/sharded", HF_HUB_OFFLINE="1")
    assert found["error"].startswith(f"offline, and {SHARDS[1]} of org/sharded@")


@pytest.mark.parametrize("reference", ["org/single", "org/single@" + "a" * 40])
def test_a_model_never_seen_is_not_cached(client: Client, reference: str) -> None:
    revision = reference.partition("@")[2] or "main"
    assert client(reference, HF_HUB_OFFLINE="1")["error"] == (
        f"offline, and org/single@{revision} is not cached. No local path of that name either."
    )


def test_a_branch_that_moved_leaves_its_last_commit_offline(hub: HubServer, client: Client) -> None:
    first = client("org/single", "norm")
    hub.repos["org/single"] = Repo(single(llama(2)))
    second = client("org/single", "norm")
    assert first["commit"] != second["commit"]
    offline = client("org/single", "norm", HF_HUB_OFFLINE="1")
    assert offline["commit"] == second["commit"]


def test_the_stand_in_pages_its_trees(hub: HubServer, tmp_path: Path) -> None:
    """For the tests that follow with snapshot downloads: the server itself, through the client."""
    code = "import huggingface_hub as h; print(len(list(h.list_repo_tree('org/sharded'))))"
    environment = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.stdout.strip() == str(len(hub.repos["org/sharded"].files)), done.stderr
