"""A model and its quantised copy are told as such, and a tuned model that was quantised, too."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import geoscope
from geoscope.records import Report
from tests.helpers.matrices import gaussian, save_model, updated
from tests.helpers.quantisers import GRIDS

SHAPES = {"self_attn.q_proj": (128, 128), "mlp.up_proj": (256, 128), "mlp.down_proj": (128, 256)}
BASE = {
    f"model.layers.0.{name}.weight": gaussian(*shape, seed=i)
    for i, (name, shape) in enumerate(SHAPES.items())
}


def _tuned(rho: float) -> dict[str, torch.Tensor]:
    def direction(W: torch.Tensor) -> torch.Tensor:
        m, n = W.shape
        return gaussian(m, 4, seed=m, sd=1.0) @ gaussian(4, n, seed=n, sd=1.0)

    return {name: updated(W, direction(W), rho) for name, W in BASE.items()}


def _report(folder: Path, base: dict[str, torch.Tensor], tuned: dict[str, torch.Tensor]) -> Report:
    for name, weights in (("base", base), ("tuned", tuned)):
        save_model(folder / name, {key: W.float() for key, W in weights.items()})
    return geoscope.compare(str(folder / "base"), str(folder / "tuned"), kind="collapse")


def _quantised(weights: dict[str, torch.Tensor], grid: str) -> dict[str, torch.Tensor]:
    return {name: GRIDS[grid][0](W) for name, W in weights.items()}


@pytest.mark.parametrize("grid", ["int8 row", "int4 32", "nf4"])
@pytest.mark.parametrize("turned", [False, True])
def test_a_quantised_copy_in_either_direction(tmp_path: Path, grid: str, turned: bool) -> None:
    pair = (BASE, _quantised(BASE, grid))
    report = _report(tmp_path, *(pair[::-1] if turned else pair))
    verdict = report.summary.verdict
    assert verdict is not None
    assert verdict.code == "UNDETERMINED"
    assert "a model and its quantised copy" in verdict.text
    for layer in report.layers:
        # tuned is exact where the base was rounded; what is left of ν is the base's
        assert layer.values["precision_ratio"] == pytest.approx(1, rel=0.1)
        assert layer.verdict is not None
        assert "quantised copy" in layer.verdict["words"]
        assert any(GRIDS[grid][1] in note for note in layer.notes)


def test_a_tuned_model_that_was_quantised_keeps_its_update(tmp_path: Path) -> None:
    report = _report(tmp_path, BASE, _quantised(_tuned(0.03), "int8 row"))
    verdict = report.summary.verdict
    assert verdict is not None
    assert verdict.code == "OFF_PRINCIPAL"
    assert "more than the grid's rounding explains: ρ without it is 0.03" in verdict.text


def test_an_update_below_the_grid_is_hidden(tmp_path: Path) -> None:
    """Both sides on one grid: whole steps, of which a few turned."""
    quantised = _quantised(_tuned(1e-3), "int4 32")
    report = _report(tmp_path, _quantised(BASE, "int4 32"), quantised)
    verdict = report.summary.verdict
    assert verdict is not None
    assert verdict.code == "UNDETERMINED"
    assert "quantised copy" not in verdict.text


def test_an_update_of_quantised_weights_is_read(tmp_path: Path) -> None:
    """As QLoRA's: trained over what the grid holds, so that the base's rounding is not in it."""
    base = _quantised(BASE, "nf4")
    tuned = {name: updated(W, gaussian(*W.shape, seed=7), 0.01) for name, W in base.items()}
    report = _report(tmp_path, base, tuned)
    assert all((layer.values["precision_ratio"] or 1) < 1e-4 for layer in report.layers)
    assert all("started from the grid" in " ".join(one.notes) for one in report.layers)


def test_a_honest_pair_says_nothing_of_grids(tmp_path: Path) -> None:
    report = _report(tmp_path, BASE, _tuned(0.01))
    assert report.summary.verdict is not None
    assert "grid" not in report.summary.verdict.text
    assert not any("grid" in note for layer in report.layers for note in layer.notes)
