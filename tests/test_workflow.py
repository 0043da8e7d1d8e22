"""The workflow for pull requests: it is YAML, and its shell steps do what its page says."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from geoscope.demo import unpack
from tests.helpers.matrices import gaussian, save_model

PAGE = Path(__file__).parents[1] / "docs/how-to/pull-request.md"


@pytest.fixture(scope="module")
def job() -> dict[str, Any]:
    (block,) = re.findall(r"^```yaml\n(.*?)^```$", PAGE.read_text("utf-8"), re.M | re.S)
    workflow = yaml.safe_load(block)
    assert workflow[True] == "pull_request"  # YAML 1.1 reads `on` so
    assert workflow["permissions"] == {"contents": "read", "pull-requests": "write"}
    (job,) = workflow["jobs"].values()
    return job


def step(job: dict[str, Any], name: str) -> dict[str, Any]:
    (found,) = [one for one in job["steps"] if one.get("name") == name]
    return found


def done(job: dict[str, Any], name: str, folder: Path, **variables: str) -> int:
    """Runs a step as GitHub does: bash that ends at the first error."""
    own = {"GITHUB_STEP_SUMMARY": str(folder / "summary.md"), **job["env"], **variables}
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    shell = ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", step(job, name)["run"]]
    ended = subprocess.run(
        shell, cwd=folder, env={**os.environ, "PATH": path, **own}, check=False, capture_output=True
    )
    return ended.returncode


def test_every_step_does_something_and_reports_come_whatever_the_verdict(job: Any) -> None:
    assert all(("uses" in one) != ("run" in one) for one in job["steps"])
    assert set(job["env"]) == {"BASE", "MODEL"}
    for name in ("summary", "comment"):
        assert step(job, name)["if"] == "always()" and "report.md" in step(job, name)["run"]


@pytest.mark.slow
def test_the_steps_show_the_verdict_on_the_demo(job: dict[str, Any], tmp_path: Path) -> None:
    unpack(tmp_path / "demo")
    models = {"BASE": "demo/base", "MODEL": "demo/grpo/checkpoint-320"}
    assert done(job, "verdict", tmp_path, **models) == 0
    assert done(job, "summary", tmp_path) == 0
    text = (tmp_path / "summary.md").read_text(encoding="utf-8")
    assert text.startswith("# Base and tuned compared") and "NO COLLAPSE, MIXED" in text
    assert len(text) < 65_536  # what a comment may hold


@pytest.mark.slow
def test_a_collapse_fails_the_step_and_is_told(job: dict[str, Any], tmp_path: Path) -> None:
    name = "model.layers.0.self_attn.q_proj.weight"
    base = gaussian(64, 64, seed=1)
    save_model(tmp_path / "base", {name: base})
    save_model(
        tmp_path / "model",
        {name: base + 0.05 * gaussian(64, 1, seed=2) @ torch.ones(1, 64, dtype=base.dtype)},
    )
    assert done(job, "verdict", tmp_path, BASE="base", MODEL="model") == 3
    assert done(job, "summary", tmp_path) == 0
    assert "RANK_COLLAPSE" in (tmp_path / "summary.md").read_text(encoding="utf-8")
