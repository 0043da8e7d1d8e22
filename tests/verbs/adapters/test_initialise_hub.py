"""init-adapter on a Hub id: real HTTP through huggingface_hub, against a server on the loopback."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from tests.helpers import tiny_models
from tests.helpers.forked import GEOSCOPE, run_forked
from tests.helpers.hub_server import HubServer, Repo, commit_of

CHOICES = {
    "residual": ("--layout", "residual"),
    "mirror": ("--layout", "mirror"),
    "anchor": ("--layout", "anchor"),
    "rlpo": ("--method", "rlpo"),
}


@pytest.mark.slow
@pytest.mark.parametrize("choice", CHOICES)
def test_a_model_on_the_hub_gets_every_layout(tmp_path: Path, choice: str) -> None:
    source = tiny_models.llama(tmp_path / "source")
    files = {path.name: path.read_bytes() for path in source.iterdir()}
    files["tokenizer.model"] = bytes(range(256))  # no text: it has to come byte for byte
    with HubServer({"org/tiny": Repo(files)}) as hub:
        environment = {
            "PATH": os.environ.get("PATH", ""),
            "PYTHONPATH": os.pathsep.join(sys.path),
            "HF_ENDPOINT": hub.url,
            "HF_HOME": str(tmp_path / "hub"),
            "GEOSCOPE_CACHE": str(tmp_path / "cache"),
            "HF_HUB_DISABLE_XET": "1",
            "OPENBLAS_NUM_THREADS": "1",
        }
        words = ["geoscope", "init-adapter", "org/tiny@main", "--rank", "4", "--layers", "0", "-q"]
        words += ["-o", "out", *CHOICES[choice]]
        done = run_forked(GEOSCOPE, words, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    out = tmp_path / "out"
    for name in ("config.json", "generation_config.json", "tokenizer.model"):
        if choice == "residual":
            assert (out / "residual" / name).read_bytes() == files[name]
    record = json.loads((out / "geoscope.json").read_text())
    assert record["base"]["reference"] == "org/tiny"
    assert record["base"]["commit"] == commit_of(files)
    assert len(record["matrices"]) == 7
    words = ["geoscope", "verify-adapter", str(out), "--base", str(source)]
    found = run_forked(GEOSCOPE, words, env=os.environ, cwd=tmp_path)
    assert found.returncode == 0, found.stdout + found.stderr
