"""Is an adapter on the Hub fetched alone, at one commit, and opened as its folder would be?"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save

from tests.helpers.forked import run_forked
from tests.helpers.hub_server import HubServer, Repo, commit_of

SCRIPT = """
import json, sys
from geoscope.sources.open import open_adapter
from geoscope.errors import GeoscopeError
try:
    found = open_adapter(sys.argv[1])
    B, A = found.factors(next(iter(found.modules)))
    print(json.dumps({
        "given": found.given, "resolved": found.resolved, "commit": found.commit,
        "base": found.base, "modules": list(found.modules), "A": A.tolist(), "B": B.tolist(),
        "scaling": next(iter(found.modules.values())).scaling, "initial": found.initial,
    }))
except GeoscopeError as error:
    print(json.dumps({"error": str(error), "kind": type(error).__name__}))
"""
A = torch.arange(12, dtype=torch.float32).reshape(2, 6)
B = torch.arange(10, dtype=torch.float32).reshape(5, 2)
CONFIG = {
    "peft_type": "LORA", "r": 2, "lora_alpha": 8, "target_modules": ["q_proj"],
    "base_model_name_or_path": "org/base",
}  # fmt: skip
FACTORS = save({
    "base_model.model.layers.0.q_proj.lora_A.weight": A,
    "base_model.model.layers.0.q_proj.lora_B.weight": B,
})  # fmt: skip
FILES = {
    "adapter_config.json": json.dumps(CONFIG).encode(),
    "adapter_model.safetensors": FACTORS,
}
OTHERS = {"optimizer.pt": b"x" * 4000, "tokenizer.json": b"{}", "README.md": b"words"}


@pytest.fixture
def hub() -> Iterator[HubServer]:
    below = {f"checkpoint-5/{name}": content for name, content in FILES.items()}
    repos = {
        "org/lora": Repo({**FILES, **OTHERS}, {"v2": {**FILES, "note": b"2"}}),
        "org/below": Repo({**OTHERS, **below}),
        "org/gated": Repo(FILES, gated=True),
    }
    with HubServer(repos) as server:
        yield server


class Client:
    def __init__(self, hub: HubServer, home: Path) -> None:
        self.hub, self.home = hub, home

    def __call__(self, reference: str, **settings: str) -> dict[str, Any]:
        environment = {
            "PATH": os.environ.get("PATH", ""),
            "PYTHONPATH": os.pathsep.join(sys.path),
            "HF_ENDPOINT": self.hub.url,
            "HF_HOME": str(self.home / "hf"),
            "GEOSCOPE_CACHE": str(self.home / "geoscope"),
            "HF_HUB_DISABLE_XET": "1",
            **settings,
        }
        done = run_forked(SCRIPT, ["-c", reference], env=environment, cwd=self.home)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)


@pytest.fixture
def client(hub: HubServer, tmp_path: Path) -> Client:
    return Client(hub, tmp_path)


def test_its_two_files_are_fetched_and_nothing_else(hub: HubServer, client: Client) -> None:
    commit = commit_of(hub.repos["org/lora"].files)
    assert client("org/lora") == {
        "given": "org/lora", "resolved": f"org/lora@{commit}", "commit": commit,
        "base": "org/base", "modules": ["layers.0.q_proj"], "scaling": 4.0, "initial": None,
        "A": [A.tolist()], "B": [B.tolist()],
    }  # fmt: skip
    fetched = {path.name for path in client.home.rglob("snapshots/*/*")}
    assert fetched == set(FILES)
    resolved = [path for _, path, _ in hub.log if "/resolve/" in path]
    assert resolved and all(f"/resolve/{commit}/" in path for path in resolved)


def test_a_revision_and_a_folder(hub: HubServer, client: Client) -> None:
    commit = commit_of(hub.repos["org/lora"].branches["v2"])
    assert client("org/lora@v2")["commit"] == commit
    found = client("hf://org/below/checkpoint-5")
    below = commit_of(hub.repos["org/below"].files)
    assert found["resolved"] == f"org/below@{below}/checkpoint-5"
    assert found["A"] == [A.tolist()]


def test_offline_it_is_found_again(hub: HubServer, client: Client) -> None:
    online = client("org/lora")
    hub.log.clear()
    assert client("org/lora", HF_HUB_OFFLINE="1") == online
    assert hub.log == []
    assert client("org/lora@v2", HF_HUB_OFFLINE="1")["error"] == (
        "offline, and org/lora@v2 is not cached. No local path of that name either."
    )


def test_a_repository_without_one_says_where_one_is(hub: HubServer, client: Client) -> None:
    commit = commit_of(hub.repos["org/below"].files)
    assert client("org/below") == {
        "error": f"org/below@{commit}: holds no adapter_config.json; found: README.md, "
        f"optimizer.pt, tokenizer.json; give hf://org/below@{commit}/checkpoint-5",
        "kind": "CheckpointNotFound",
    }
    assert client(f"hf://org/below@{commit}/checkpoint-5")["commit"] == commit


def test_factors_in_shards_or_none(hub: HubServer, client: Client) -> None:
    config = {"adapter_config.json": FILES["adapter_config.json"]}
    shards = {f"adapter_model-0000{i}-of-00002.safetensors": FACTORS for i in (1, 2)}
    hub.repos["org/cut"] = Repo({**config, **shards})
    assert "the factors are in 2 shards" in client("org/cut")["error"]
    hub.repos["org/none"] = Repo(config)
    assert "adapter_config.json without factors" in client("org/none")["error"]


def test_gated_and_absent_repositories(client: Client) -> None:
    assert "org/gated is gated" in client("org/gated")["error"]
    assert client("org/nowhere")["error"] == (
        "org/nowhere not found, or private. No local path of that name either."
    )


def test_a_folder_of_that_name_needs_no_network(hub: HubServer, client: Client) -> None:
    folder = client.home / "org" / "lora"
    folder.mkdir(parents=True)
    for name, content in FILES.items():
        (folder / name).write_bytes(content)
    assert client("org/lora")["resolved"] == str(folder.resolve())
    assert hub.log == []


def test_what_init_adapter_recorded_above_it_is_read_too(hub: HubServer, client: Client) -> None:
    """OUT/geoscope.json stands beside OUT/adapter: without it the start would be counted twice."""
    record = json.dumps({"schema": "geoscope.adapter/1", "layout": "residual"}).encode()
    inside = {f"adapter/{name}": content for name, content in FILES.items()}
    hub.repos["org/ia"] = Repo({"geoscope.json": record, **inside})
    assert client("hf://org/ia/adapter")["initial"] == "its layout is residual"
