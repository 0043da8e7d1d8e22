"""verify-adapter on what is more than plain LoRA: keys, shapes, and what PEFT makes of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from geoscope.errors import CheckpointError
from geoscope.verbs.adapters.verify import verify_adapter
from tests.helpers import tiny_models
from tests.helpers.peft_adapters import peft, quietly
from tests.helpers.trained import DEPRECATION

pytestmark = pytest.mark.filterwarnings(f"ignore:{DEPRECATION}:FutureWarning")

LINEAR = ["q_proj", "down_proj"]
CASES: dict[str, Callable[[], Any]] = {
    "IA3": lambda: peft.IA3Config(target_modules=LINEAR, feedforward_modules=["down_proj"]),
    "VeRA": lambda: peft.VeraConfig(r=3, target_modules=LINEAR),
    "OFT": lambda: peft.OFTConfig(oft_block_size=4, r=0, target_modules=LINEAR),
    "MiSS": lambda: peft.MissConfig(r=4, target_modules=LINEAR),
    "LoHa": lambda: peft.LoHaConfig(r=2, target_modules=LINEAR),
    "TinyLoRA": lambda: peft.TinyLoraConfig(r=2, u=3, target_modules=LINEAR),
    "HRA": lambda: peft.HRAConfig(r=2, target_modules=LINEAR),
}


def saved(root: Path, case: str) -> tuple[Path, Path]:
    """A model, and an adapter of it with random parameters."""
    base = tiny_models.llama(root / "base")
    model = quietly(lambda: peft.get_peft_model(tiny_models.live(base), CASES[case]()))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(root / "adapter")
    return base, root / "adapter"


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("case", CASES)
def test_what_can_be_checked_is(tmp_path: Path, case: str) -> None:
    base, folder = saved(tmp_path, case)
    found = verify_adapter(folder, base=base, with_peft=True)
    assert found.ok, [check for check in found.checks if not check.ok]
    by_id = {check.id: check for check in found.checks}
    assert by_id["layout"].text == f"{case} on its base, 4 modules"
    assert by_id["vllm"].is_warning and case in by_id["vllm"].text
    enabled = by_id["peft-enabled"].worst
    assert enabled is not None and enabled > 1e-3
    assert by_id["peft-disabled"].worst == 0


@pytest.mark.parametrize("case", ["IA3", "OFT", "LoHa", "HRA"])
def test_a_module_that_lacks_fails(tmp_path: Path, case: str) -> None:
    base, folder = saved(tmp_path, case)
    file = folder / "adapter_model.safetensors"
    kept = {name: one for name, one in load_file(file).items() if "layers.1.mlp" not in name}
    save_file(kept, file)
    found = verify_adapter(folder, base=base)
    (check,) = [one for one in found.checks if not one.ok]
    assert check.id == "keys" and check.name == "model.layers.1.mlp.down_proj"


@pytest.mark.parametrize("case", ["IA3", "OFT", "MiSS", "LoHa"])
def test_another_model_is_told(tmp_path: Path, case: str) -> None:
    _, folder = saved(tmp_path, case)
    other = tiny_models.llama(tmp_path / "other", hidden_size=24, intermediate_size=30)
    try:
        found = verify_adapter(folder, base=other)
    except CheckpointError as error:
        assert "give the model that the adapter was trained on" in str(error)
    else:
        assert [one.id for one in found.checks if not one.ok] == ["shapes"]
