"""Series of adapters that are no products, or tell their sides only with the base.

The oracle is the same series as whole models, merged by PEFT in fp64.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from geoscope.errors import OptionError, UnsupportedFormat
from geoscope.records import Report
from geoscope.verbs.series.extrapolate import extrapolate
from geoscope.verbs.series.follow import follow
from geoscope.verbs.series.options import FollowOptions
from tests.helpers.peft_adapters import merged, peft

LINEAR = ["q_proj", "down_proj"]
STEPS = (1, 2, 3, 4)
CASES: dict[str, Callable[[], Any]] = {
    "dora": lambda: peft.LoraConfig(r=2, lora_alpha=6, target_modules=LINEAR, use_dora=True),
    "ia3": lambda: peft.IA3Config(target_modules=LINEAR, feedforward_modules=["down_proj"]),
    "oft": lambda: peft.OFTConfig(oft_block_size=4, r=0, target_modules=LINEAR),
    "boft": lambda: peft.BOFTConfig(boft_block_size=4, target_modules=LINEAR),
    "hra": lambda: peft.HRAConfig(r=2, target_modules=LINEAR),
    "miss": lambda: peft.MissConfig(r=4, target_modules=LINEAR),
    "loha": lambda: peft.LoHaConfig(r=2, alpha=2, target_modules=LINEAR),
    "lokr": lambda: peft.LoKrConfig(r=2, alpha=2, target_modules=LINEAR),
    "vera": lambda: peft.VeraConfig(r=3, target_modules=LINEAR, projection_prng_key=7),
}
KEYS = ("update_norm", "drift_fraction", "straightness", "temporal_pc1", "rank1_share_last")
PRODUCTS = ("miss", "loha", "lokr", "vera")


def moved_to(step: int) -> Callable[[Any], None]:
    """A walk from the parameters that the helper draws, in every one that trains."""

    def move(adapted: Any) -> None:
        with torch.no_grad():
            for at in range(1, step + 1):
                generator = torch.Generator().manual_seed(at)
                for parameter in adapted.parameters():
                    if parameter.requires_grad:
                        drawn = torch.randn(parameter.shape, generator=generator)
                        parameter.add_(0.1 * drawn.to(parameter.dtype))

    return move


def saved(folder: Path, tensors: dict[str, Tensor], dtype: torch.dtype) -> str:
    folder.mkdir(parents=True)
    file = folder / "model.safetensors"
    save_file({name: one.to(dtype).contiguous() for name, one in tensors.items()}, file)
    (folder / "config.json").write_text('{"model_type": "llama", "tie_word_embeddings": false}')
    return str(folder)


def made(root: Path, case: str) -> tuple[str, list[str], list[str]]:
    """The base in bf16, the adapters, and the merged models in fp64."""
    adapters, models, base = [], [], ""
    for step in STEPS:
        folder = root / f"adapters/checkpoint-{step}"
        one = merged(
            folder, "llama", CASES[case], dtype=torch.bfloat16, before_saving=moved_to(step)
        )
        adapters.append(str(folder))
        models.append(saved(root / f"models/checkpoint-{step}", one.tuned, torch.float64))
        base = base or saved(root / "base", one.base, torch.bfloat16)
    return base, adapters, models


def values(report: Report) -> dict[str, dict[str, Any]]:
    return {one.name.removesuffix(".weight"): dict(one.values) for one in report.layers}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_a_series_of_adapters_is_that_of_the_merged_models(tmp_path: Path, case: str) -> None:
    base, adapters, models = made(tmp_path, case)
    options = FollowOptions(base=base)
    report = follow(adapters, options=options)
    truth = values(follow(models, options=options))
    found = values(report)
    assert len(found) == 4 and report.coverage.missing == ()
    for name, row in found.items():
        for key in KEYS:
            assert row[key] == pytest.approx(truth[name][key], rel=1e-6), (name, key)
    told = [note for note in report.provenance.parameters["notes"] if "in fp64" in note]  # pyright: ignore
    assert bool(told) is (case not in PRODUCTS)


def test_matrices_that_are_not_adapted_are_left_out(tmp_path: Path) -> None:
    """And the rounding of the base, in bf16, is in every step: it is not noise of one."""
    base, adapters, _ = made(tmp_path, "oft")
    report = follow(adapters, options=FollowOptions(base=base))
    left = {one.name: one.reason for one in report.coverage.skipped}
    assert left["model.layers.0.self_attn.k_proj.weight"] == "not adapted"
    assert set(report.coverage.matched).isdisjoint(left)
    for row in values(report).values():
        assert row["precision_ratio"] < 1e-12


@pytest.mark.parametrize("case", ["dora", "miss"])
def test_without_the_base_one_line_asks_for_it(tmp_path: Path, case: str) -> None:
    base, adapters, _ = made(tmp_path, case)
    with pytest.raises(OptionError, match=r"cannot be computed without .* give that as `base`$"):
        follow(adapters)
    if case == "dora":
        with pytest.raises(UnsupportedFormat, match="DoRA is not predicted by its factors alone"):
            extrapolate(adapters, 5, tmp_path / "out", options=FollowOptions(base=base))
