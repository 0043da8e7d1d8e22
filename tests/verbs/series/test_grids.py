"""A series of quantised checkpoints counts the rounding of their grid in every step."""

from __future__ import annotations

from pathlib import Path

import pytest

import geoscope
from tests.helpers.matrices import gaussian, save_model
from tests.helpers.quantisers import GRIDS

NAME = "model.layers.0.mlp.up_proj.weight"


def test_the_rounding_of_each_checkpoint_is_that_of_its_grid(tmp_path: Path) -> None:
    quantise, told = GRIDS["int8 row"]
    W = gaussian(256, 128, seed=0)
    errors = []
    for step in range(4):
        stored = quantise(W) if step else W
        errors.append(float((stored - W).square().sum()))
        save_model(tmp_path / f"checkpoint-{step}", {NAME: stored.float()})
        W = W + gaussian(256, 128, seed=step + 1, sd=2e-5)
    report = geoscope.follow([str(tmp_path)])
    (layer,) = report.layers
    expected = [
        ((errors[i] + errors[i - 1]) / layer.gram[i - 1][i - 1]) ** 0.5 for i in range(1, 4)
    ]
    measured = layer.series["step_precision_ratio_by_step"]
    assert measured == pytest.approx(expected, rel=0.1)
    assert layer.notes == (
        f"{told}, coarser than its dtype, at steps 1, 2, 3; ν counts its rounding",
    )
