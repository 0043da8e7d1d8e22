"""A predicted model of the real format loads in transformers and computes with its weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from geoscope.verbs.series.extrapolate import extrapolate
from geoscope.verbs.series.options import FollowOptions
from tests.helpers import tiny_models

STEPS = (10, 20, 30, 40, 60)


@pytest.mark.parametrize("family", [tiny_models.llama, tiny_models.gpt2, tiny_models.qwen2_tied])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_the_prediction_of_a_line_is_its_next_model(
    tmp_path: Path, family: Callable[..., Path], dtype: torch.dtype
) -> None:
    """W_t = W_0 + t·V in every matrix: the model of step 80 is known."""
    base = family(tmp_path / "base", dtype=dtype)
    generator = torch.Generator().manual_seed(1)
    files = [load_file(path) for path in sorted(base.glob("*.safetensors"))]
    speed = {
        name: 1e-3 * torch.randn(W.shape, generator=generator) if _followed(name, W) else W * 0
        for weights in files
        for name, W in weights.items()
    }

    def write(step: int) -> Path:
        folder = family(tmp_path / f"run/checkpoint-{step}", dtype=dtype)
        for path in sorted(folder.glob("*.safetensors")):
            moved = {
                name: (W.float() + step * speed[name].float()).to(dtype)
                for name, W in load_file(path).items()
            }
            save_file(moved, path, metadata={"format": "pt"})
        return folder

    for step in STEPS:
        write(step)
    extrapolate(
        [str(tmp_path / "run")], 80, tmp_path / "out", method="linear",
        options=FollowOptions(base=str(base), jobs=1), force=True,
    )  # fmt: skip
    made, truth = tiny_models.live(tmp_path / "out"), tiny_models.live(write(80))
    assert next(made.parameters()).dtype == next(truth.parameters()).dtype
    tolerance = 1e-4 if dtype == torch.float32 else 5e-2
    for (name, found), (_, expected) in zip(
        made.state_dict().items(), truth.state_dict().items(), strict=True
    ):
        torch.testing.assert_close(
            found, expected, rtol=tolerance, atol=tolerance,
            msg=lambda text, name=name: f"{name}: {text}",
        )  # fmt: skip


def _followed(name: str, W: torch.Tensor) -> bool:
    return W.ndim == 2 and not any(part in name for part in ("embed", "wte", "wpe", "lm_head"))
