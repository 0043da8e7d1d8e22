"""Are the branches of a Hub model one series, by one listing, and found again offline?

Through the real huggingface_hub against a server on the loopback, in a process of its own.
"""

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

from tests.helpers.files import CONFIG, llama
from tests.helpers.forked import run_forked
from tests.helpers.hub_server import HubServer, Repo, commit_of

SCRIPT = """
import json, os, sys
from geoscope.sources.metric_file import trainer_state_of
from geoscope.sources.series import open_series
from geoscope.errors import GeoscopeError
try:
    found = open_series(sys.argv[1:])
    for p in found.points if "FETCH" in os.environ else ():
        p.checkpoint.fetch(p.checkpoint.tensors)
    print(json.dumps({
        "points": [[p.step, p.given, p.resolved, p.place, p.kind] for p in found.points],
        "passed": [[s.name, s.reason, s.missing] for s in found.passed_over],
        "state": trainer_state_of(found),
    }))
except GeoscopeError as error:
    print(json.dumps({"error": str(error), "kind": type(error).__name__}))
"""


def files(seed: int, folder: str = "") -> dict[str, bytes]:
    tensors = save(llama(seed), metadata={"format": "pt"})
    stored = {"config.json": json.dumps(CONFIG).encode(), "model.safetensors": tensors}
    return {f"{folder}{name}": content for name, content in stored.items()}


LORA = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
ADAPTER = {
    "adapter_config.json": json.dumps(LORA).encode(),
    "adapter_model.safetensors": save(
        {f"base_model.model.layers.0.q_proj.lora_{one}.weight": torch.ones(shape)
         for one, shape in (("A", (2, 6)), ("B", (5, 2)))}
    ),
}  # fmt: skip


@pytest.fixture
def hub() -> Iterator[HubServer]:
    branches = {
        "step_1000": files(1),
        "step_50": files(2),
        "step_200": files(3),
        "step_300": {"README.md": b"still being written"},
        "draft": files(4),
        "lora-step-9": {"adapter_config.json": b"{}", "adapter_model.safetensors": b""},
    }
    below = {"a/step-1": files(5, "sub/"), "a/step-2": files(6, "sub/")}
    epochs = {"step_1": files(7), "global_step_0001": files(8)}
    repos = {
        "org/run": Repo(files(0), branches),
        "org/below": Repo(files(0), below),
        "org/twice": Repo(files(0), epochs),
        "org/gated": Repo(files(0), {"step_1": files(1)}, gated=True),
    }
    with HubServer(repos) as server:
        yield server


class Client:
    def __init__(self, hub: HubServer, home: Path) -> None:
        self.hub, self.home = hub, home

    def __call__(self, *references: str, **settings: str) -> dict[str, Any]:
        environment = {
            "PATH": os.environ.get("PATH", ""),
            "PYTHONPATH": os.pathsep.join(sys.path),
            "HF_ENDPOINT": self.hub.url,
            "HF_HOME": str(self.home / "hf"),
            "GEOSCOPE_CACHE": str(self.home / "geoscope"),
            "HF_HUB_DISABLE_XET": "1",
            **settings,
        }
        done = run_forked(SCRIPT, ["", *references], env=environment, cwd=self.home)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)


@pytest.fixture
def client(hub: HubServer, tmp_path: Path) -> Client:
    return Client(hub, tmp_path)


def test_branches_of_a_pattern_sorted_as_numbers(hub: HubServer, client: Client) -> None:
    found = client("org/run@step_*")
    branches = hub.repos["org/run"].branches
    assert found["points"] == [
        [step, f"org/run@step_{step}", f"org/run@{commit_of(branches[f'step_{step}'])}",
         "./: model folder on the Hub", "model"]
        for step in (50, 200, 1000)
    ]  # fmt: skip
    ((name, reason, missing),) = found["passed"]
    assert (name, missing) == ("org/run@step_300", True)
    assert reason.startswith("step 300: no weights geoscope can read in org/run@")
    assert found["state"] is None
    assert sum(path.startswith("/api/models/org/run/refs") for _, path, _ in hub.log) == 1


def test_branches_named_one_by_one(client: Client) -> None:
    found = client("org/run@step_200", "org/run@draft", "org/run@step_50")
    assert [point[0] for point in found["points"]] == [50, 200]
    assert [(name, missing) for name, _, missing in found["passed"]] == [("org/run@draft", False)]


def test_a_damaged_adapter_on_the_hub_is_passed_over_by_name(client: Client) -> None:
    found = client("org/run@step_50", "org/run@lora-step-9")
    ((name, reason, missing),) = found["passed"]
    assert (name, missing) == ("org/run@lora-step-9", True)
    assert reason.startswith("step 9: org/run@lora-step-9: peft_type is null; geoscope reads LORA")


def test_adapters_and_models_of_the_hub_are_not_mixed(hub: HubServer, client: Client) -> None:
    old = hub.repos["org/run"]
    hub.repos["org/run"] = Repo(old.files, {**old.branches, "lora-step-9": ADAPTER})
    found = client("org/run@step_50", "org/run@lora-step-9")
    assert found["kind"] == "OptionError"
    assert f"step 9 is an adapter (org/run@{commit_of(ADAPTER)})" in found["error"]


def test_adapters_are_a_series_and_an_old_scaling_of_zero_is_told(
    hub: HubServer, client: Client
) -> None:
    old = {**ADAPTER, "adapter_config.json": json.dumps({**LORA, "lora_alpha": 0}).encode()}
    hub.repos["org/lora"] = Repo({}, {"step_2": ADAPTER, "step_7": ADAPTER, "step_8": old})
    found = client("org/lora@step_*")
    resolved = f"org/lora@{commit_of(ADAPTER)}"
    assert found["points"] == [
        [2, "org/lora@step_2", resolved, "./: adapter on the Hub", "adapter"],
        [7, "org/lora@step_7", resolved, "./: adapter on the Hub", "adapter"],
    ]
    ((name, reason, _),) = found["passed"]
    assert name == "org/lora@step_8" and "lora_alpha is 0: written by an old merger" in reason
    assert client("org/lora@step_*", HF_HUB_OFFLINE="1") == found


def test_branches_with_a_slash_and_a_folder(client: Client) -> None:
    found = client("hf://org/below@a%2Fstep-*/sub")
    assert [point[:2] for point in found["points"]] == [
        [1, "hf://org/below@a%2Fstep-1/sub"],
        [2, "hf://org/below@a%2Fstep-2/sub"],
    ]
    assert client(found["points"][0][1])["points"][0][2] == found["points"][0][2]


def test_the_same_step_in_two_branches(client: Client) -> None:
    found = client("org/twice@*step_*")
    assert found["kind"] == "OptionError"
    assert "org/twice@step_1" in found["error"] and "org/twice@global_step_0001" in found["error"]


def test_a_pattern_that_fits_no_branch_lists_them(client: Client) -> None:
    assert client("org/run@checkpoint-*") == {
        "error": "no branch of org/run matches 'checkpoint-*'; there are: draft, "
        "lora-step-9, main, step_50, step_200, step_300, step_1000",
        "kind": "CheckpointNotFound",
    }


def test_a_repository_that_is_not_there(client: Client) -> None:
    assert "org/none not found" in client("org/none@step_*")["error"]


def test_a_hub_that_refuses_ends_it_and_passes_nothing_over(client: Client) -> None:
    assert "org/gated is gated" in client("org/gated@step_*")["error"]
    assert client("org/run@step_50", "org/run@step_51")["error"].startswith("no revision step_51")


def test_a_hub_that_does_not_answer_ends_it(hub: HubServer, client: Client) -> None:
    hub.fail["revision/step_200"] = 503
    found = client("org/run@step_*")
    assert "HTTP 503" in found["error"]


def test_offline_the_branches_of_the_cache(hub: HubServer, client: Client) -> None:
    client("org/run@step_50")
    known = client("org/run@step_*", HF_HUB_OFFLINE="1")
    assert [point[0] for point in known["points"]] == [50]  # by its header alone
    assert client("org/none@step_*", HF_HUB_OFFLINE="1")["error"] == (
        "no branch of org/none matches 'step_*' (offline: only cached branches are known); "
        "there are: none"
    )
    fetched = client("org/run@step_*0", FETCH="1")
    hub.log.clear()
    found = client("org/run@step_*", HF_HUB_OFFLINE="1")
    assert found["points"] == fetched["points"]
    assert hub.log == []


def test_a_path_with_that_name_needs_no_network(hub: HubServer, client: Client) -> None:
    for step in (3, 20):
        folder = client.home / "org" / f"run@step_{step}"
        folder.mkdir(parents=True)
        for name, content in files(step).items():
            (folder / name).write_bytes(content)
    found = client("org/run@step_*")
    assert hub.log == []
    assert "is a checkpoint with a step number" in found["error"]  # `run@step_3` tells none
