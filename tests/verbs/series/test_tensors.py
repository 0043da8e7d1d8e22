"""Series of fused, stacked and FP8 models: followed in parts, extrapolated as they are stored."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from geoscope.errors import UnsupportedFormat
from geoscope.models.split import split
from geoscope.sources.open import open_checkpoint
from geoscope.verbs.series.extrapolate import extrapolate
from geoscope.verbs.series.follow import follow
from geoscope.verbs.series.options import FollowOptions
from tests.helpers.matrices import gaussian, save_model

Weights = dict[str, Tensor]
QKV = "model.layers.0.self_attn.qkv_proj.weight"
STACK = "model.layers.0.mlp.experts.gate_up_proj"
DOWN = "model.layers.0.mlp.experts.down_proj"
PHI3 = {"model_type": "phi3", "num_attention_heads": 4, "num_key_value_heads": 2}
STEPS = (0, 10, 20, 30, 40, 50, 60)


def at(step: int) -> Weights:
    """A base that drifts along one direction, with some noise, in fp32."""
    shapes = {QKV: (64, 32), STACK: (3, 48, 32), DOWN: (3, 32, 24)}
    found = {}
    for i, (name, shape) in enumerate(shapes.items()):
        flat = (shape[0], shape[1]) if len(shape) == 2 else (shape[0] * shape[1], shape[2])
        drift, noise = gaussian(*flat, seed=10 + i), gaussian(*flat, seed=100 * step + i)
        moved = gaussian(*flat, seed=i) + 1e-3 * step * drift + (1e-3 * noise if step else 0)
        found[name] = moved.reshape(shape).float()
    return found


def series(
    root: Path, stored: Callable[[Weights], Weights] = lambda one: one, **config: object
) -> tuple[list[str], FollowOptions]:
    folders = [
        save_model(root / f"checkpoint-{step}", stored(at(step)), config={**PHI3, **config})
        for step in STEPS
    ]
    return [str(one) for one in folders[1:]], FollowOptions(base=str(folders[0]), directions=False)


def test_a_series_is_followed_part_by_part(tmp_path: Path) -> None:
    points, options = series(tmp_path)
    chosen = replace(options, include=("k_proj", r"experts\.1\.up", r"experts\.2\.down"))
    report = follow(points, options=chosen)
    layers = {one.name: one for one in report.layers}
    prefix = "model.layers.0"
    assert len(layers) == 3
    steps = [at(step) for step in STEPS]
    for name, part in (
        (f"{prefix}.self_attn.k_proj.weight", lambda one: one[QKV][32:48]),
        (f"{prefix}.mlp.experts.1.up_proj.weight", lambda one: one[STACK][1, 24:]),
        (f"{prefix}.mlp.experts.2.down_proj.weight", lambda one: one[DOWN][2]),
    ):
        matrices = [part(one).double() for one in steps]
        moves = torch.stack([(b - a).reshape(-1) for a, b in pairwise(matrices)])
        torch.testing.assert_close(torch.tensor(layers[name].gram).double(), moves @ moves.T)
    noted = report.provenance.parameters["notes"]
    assert "qkv_proj is compared as q_proj, k_proj, v_proj" in noted


def test_an_extrapolated_model_has_the_tensors_of_the_series(tmp_path: Path) -> None:
    points, options = series(tmp_path)
    extrapolate(points, 70, tmp_path / "out", method="linear", options=options, force=True)
    written = load_file(tmp_path / "out" / "model.safetensors")
    last = at(STEPS[-1])
    assert {name: one.shape for name, one in written.items()} == {
        name: one.shape for name, one in last.items()
    }
    assert not torch.equal(written[QKV], last[QKV])


def fp8(tensors: Weights) -> Weights:
    """The fused weight in one FP8 block."""
    W = tensors[QKV]
    scale = W.abs().max() / 448
    return {QKV: (W / scale).to(torch.float8_e4m3fn), f"{QKV}_scale_inv": scale.reshape(1, 1)}


def test_the_rounding_of_fp8_checkpoints_is_that_of_their_blocks(tmp_path: Path) -> None:
    quantization = {"quantization_config": {"quant_method": "fp8"}}
    points, options = series(tmp_path, fp8, **quantization)
    report = follow(points, options=options)
    base, *models = (split(open_checkpoint(str(one))) for one in (options.base, *points))
    for layer in report.layers:
        known = [one.rounding(layer.name) for one in models]
        lost = sum(0 if each is None else each.size**2 for each in known)
        start = base.read(layer.name).double()
        moved = sum(float((one.read(layer.name) - start).square().sum()) for one in models)
        # The entries, which are read as fp32, would tell 5e-7; the base counts as exact.
        assert layer.values["precision_ratio"] == pytest.approx((lost / moved) ** 0.5, rel=1e-6)
        assert lost / moved > 0.1


def test_an_fp8_series_is_not_extrapolated(tmp_path: Path) -> None:
    points, options = series(tmp_path, fp8, quantization_config={"quant_method": "fp8"})
    with pytest.raises(UnsupportedFormat, match="block-scaled FP8"):
        extrapolate(points, 70, tmp_path / "out", options=options)
    assert not (tmp_path / "out").exists()
