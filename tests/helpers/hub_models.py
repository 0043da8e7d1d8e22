"""Models for the server of hub_server.py, and a client in a process of its own."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from tests.helpers import hub_client
from tests.helpers.files import CONFIG
from tests.helpers.forked import run_forked
from tests.helpers.hub_server import HubServer

SECRET = "hf_aVeryPrivateToken"
SHARDS = tuple(f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3))
CONFIG_FILE = {"config.json": json.dumps(CONFIG).encode()}

Tensors = dict[str, torch.Tensor]


def wide() -> Tensors:
    """Tensors large enough for the redirect of large files and for a break in the middle."""
    generator = torch.Generator().manual_seed(11)
    return {
        f"model.layers.{layer}.mlp.up_proj.weight": torch.randn(
            200, 200, generator=generator, dtype=torch.float32
        ).bfloat16()
        for layer in range(3)
    }


def sharded(tensors: Tensors) -> dict[str, bytes]:
    names = sorted(tensors)
    parts = {shard: {name: tensors[name] for name in names[i::3]} for i, shard in enumerate(SHARDS)}
    weight_map = {name: shard for shard, part in parts.items() for name in part}
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    return {
        **CONFIG_FILE,
        **{shard: save(part, metadata={"format": "pt"}) for shard, part in parts.items()},
        "model.safetensors.index.json": json.dumps(index).encode(),
        "consolidated.safetensors": b"never opened" * 500,
    }


def single(tensors: Tensors) -> dict[str, bytes]:
    return {**CONFIG_FILE, "model.safetensors": save(tensors, metadata={"format": "pt"})}


class Client:
    """Runs hub_client against a server, with a cache and a token of its own."""

    def __init__(self, hub: HubServer, home: Path) -> None:
        self.hub = hub
        self.home = home
        self.cwd = home / "cwd"
        self.cwd.mkdir(parents=True)

    def __call__(
        self, reference: str, wanted: str = "", how: str = "fetch", **settings: str
    ) -> dict[str, Any]:
        done = self.run(reference, wanted, how, **settings)
        assert done.returncode == 0, done.stderr
        assert SECRET not in done.stdout + done.stderr
        assert done.stderr == ""
        return json.loads(done.stdout)

    def run(
        self, reference: str, wanted: str, how: str, **settings: str
    ) -> subprocess.CompletedProcess[str]:
        environment = {
            "PATH": os.environ.get("PATH", ""),
            "PYTHONPATH": os.pathsep.join(sys.path),
            "HF_ENDPOINT": self.hub.url,
            "HF_HOME": str(self.home / "hugging face"),
            "GEOSCOPE_CACHE": str(self.home / "geo scope"),
            "HF_TOKEN": SECRET,
            "HF_HUB_DISABLE_XET": "1",
            **settings,
        }
        argv = [hub_client.__file__, reference, wanted, how]
        program = Path(hub_client.__file__).read_text(encoding="utf-8")
        torch = how.startswith(("read", "parts"))  # which import it
        return run_forked(program, argv, env=environment, cwd=self.cwd, torch=torch, geoscope=True)

    def cached(self) -> set[str]:
        """Names of the weight files in the cache."""
        return {path.name for path in self.home.rglob("snapshots/**/*.safetensors")}


def digest(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest()
