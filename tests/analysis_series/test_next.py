"""NExt through files: trained, backtested and written, in seconds because it trains little here."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from matrices import gaussian, save_model
from safetensors.torch import load_file

from geoscope.analysis.extrapolate import extrapolate
from geoscope.analysis.follow_options import FollowOptions
from geoscope.errors import OptionError

NAME = "model.layers.{}.mlp.up_proj.weight"


def run_of(root: Path, steps: tuple[int, ...]) -> list[str]:
    """Two matrices that drift along one direction each, in fp32; the base is step 0."""
    for step in (0, *steps):
        tensors = {"model.norm.weight": torch.ones(6)}
        for i in range(2):
            direction = torch.outer(gaussian(8, 1, seed=i)[:, 0], gaussian(6, 1, seed=9 + i)[:, 0])
            noise = gaussian(8, 6, seed=100 * step + i, sd=1e-4)
            tensors[NAME.format(i)] = (
                gaussian(8, 6, seed=50 + i) + step * direction + noise
            ).float()
        save_model(root / (f"checkpoint-{step}" if step else "base"), tensors)
    return [str(root / f"checkpoint-{step}") for step in steps]


def test_the_step_is_rank_one_and_scales_with_the_family(tmp_path: Path) -> None:
    points = run_of(tmp_path, (10, 20, 30, 40, 50))
    options = FollowOptions(base=str(tmp_path / "base"))
    made = extrapolate(
        points, tmp_path / "out", 60, method="next", options=options, extend=(0.5, 1.0),
        training=5, force=True,
    )  # fmt: skip
    assert set(made.counts) == {"next"}
    last = load_file(tmp_path / "checkpoint-50" / "model.safetensors")
    half, whole = (load_file(tmp_path / "out" / c / "model.safetensors") for c in ("c0.5", "c1"))
    for i in range(2):
        name = NAME.format(i)
        step = whole[name].double() - last[name].double()
        values = torch.linalg.svdvals(step)
        assert float(values[1]) < 1e-5 * float(last[name].norm())
        torch.testing.assert_close(
            half[name].double() - last[name].double(), step / 2, atol=2e-6, rtol=0
        )
    assert torch.equal(whole["model.norm.weight"], last["model.norm.weight"])


def test_the_plain_prediction_is_the_family_at_its_distance(tmp_path: Path) -> None:
    points = run_of(tmp_path, (10, 20, 30, 40, 50))
    options = FollowOptions(base=str(tmp_path / "base"))
    given = {"method": "next", "options": options, "training": 5, "force": True}
    extrapolate(points, tmp_path / "plain", 60, **given)  # type: ignore[arg-type]
    extrapolate(points, tmp_path / "family", 60, extend=(1.0,), **given)  # type: ignore[arg-type]
    plain, family = (
        load_file(tmp_path / place / "model.safetensors") for place in ("plain", "family/c1")
    )
    assert all(torch.equal(plain[name], family[name]) for name in plain)


def test_what_next_cannot_take_is_one_line(tmp_path: Path) -> None:
    points = run_of(tmp_path, (10, 20, 30, 50, 90))
    options = FollowOptions(base=str(tmp_path / "base"))
    with pytest.raises(OptionError, match="equally spaced"):
        extrapolate(points, tmp_path / "out", 100, method="next", options=options, training=2)
    with pytest.raises(OptionError, match="needs 4"):
        extrapolate(points[:3], tmp_path / "out", 100, method="next", options=options, training=2)
    with pytest.raises(OptionError, match="`method` next"):
        extrapolate(points, tmp_path / "out", 100, options=options, extend=(1.0,))
    assert not (tmp_path / "out").exists()
