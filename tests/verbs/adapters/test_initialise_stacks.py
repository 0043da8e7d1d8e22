"""init-adapter on experts that the files hold in stacks, as `target_parameters` of PEFT."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from geoscope.adapters.geora import geora
from geoscope.errors import CheckpointError, OptionError
from geoscope.peft.adapter import read_adapter
from geoscope.peft.folder import adapter_folder
from geoscope.sources.open import open_checkpoint
from geoscope.verbs.adapters.convert import conversion_of
from geoscope.verbs.adapters.converted import write_conversion
from geoscope.verbs.adapters.initialise import initialise
from geoscope.verbs.adapters.options import InitOptions
from geoscope.verbs.adapters.verify import verify_adapter
from tests.helpers import tiny_models

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is:FutureWarning")
CHOICES: dict[str, dict[str, Any]] = {
    "residual": {"layout": "residual"},
    "mirror": {"layout": "mirror"},
    "anchor": {"layout": "anchor"},
    "rlpo": {"method": "rlpo"},
    "lora": {"method": "lora"},
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    apart = tiny_models.qwen3_moe(root / "apart", num_hidden_layers=1)
    return {
        "apart": apart,
        "qwen3_moe": tiny_models.stacked(root / "qwen3_moe", apart),
        "gpt_oss": tiny_models.gpt_oss(root / "gpt_oss"),
    }


def updates(folder: Path, base: Path) -> dict[str, Tensor]:
    """Module → s·B·A of each of its matrices, (E, out, in)."""
    checkpoint = open_checkpoint(str(base))
    known = {name.removesuffix(".weight"): one for name, one in checkpoint.tensors.items()}
    adapter = read_adapter(folder).with_base(known, checkpoint.config)
    found: dict[str, Tensor] = {}
    for name, one in adapter.modules.items():
        B, A = adapter.factors(name)
        found[name] = one.scaling * (B.double() @ A.double())
    return found


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("model", ["qwen3_moe", "gpt_oss"])
def test_the_output_is_the_model_and_verifies(
    models: dict[str, Path], tmp_path: Path, model: str, choice: str
) -> None:
    options = InitOptions(rank=3, **CHOICES[choice])
    made = initialise(models[model], tmp_path / "out", options)
    found = verify_adapter(tmp_path / "out", with_peft=True)
    assert found.ok, [check for check in found.checks if not check.ok]
    names = made.report.coverage.matched
    assert sum(".experts." in name for name in names) == 4 * 2
    assert {layer.name for layer in made.report.layers} == set(names)
    config = read_adapter(adapter_folder(tmp_path / "out").adapter).config
    assert config["target_parameters"] == ["down_proj", "gate_up_proj"]
    assert any("PEFT 0.19" in note for note in made.card.notes)


@pytest.mark.parametrize("model", ["qwen3_moe", "gpt_oss"])
def test_every_expert_has_its_own_start(
    models: dict[str, Path], tmp_path: Path, model: str
) -> None:
    initialise(models[model], tmp_path / "out", InitOptions(rank=3, layout="anchor"))
    found = updates(tmp_path / "out/adapter", models[model])
    checkpoint = open_checkpoint(str(models[model]))
    for leaf in ("gate_up_proj", "down_proj"):
        name = f"model.layers.0.mlp.experts.{leaf}"
        stored = checkpoint.read(name)
        stack = stored.mT if model == "gpt_oss" else stored
        for expert, W in enumerate(stack):
            start = geora(W, 3)
            truth = start.scaling * (start.B.double() @ start.A.double())
            assert torch.allclose(found[name][expert], truth, atol=1e-6)


def test_what_is_trained_converts_to_the_original(models: dict[str, Path], tmp_path: Path) -> None:
    initialise(models["gpt_oss"], tmp_path / "out", InitOptions(rank=2))
    start = updates(tmp_path / "out/adapter", models["gpt_oss"])
    file = tmp_path / "trained/adapter_model.safetensors"
    file.parent.mkdir()
    factors = load_file(tmp_path / "out/adapter/adapter_model.safetensors")
    generator = torch.Generator().manual_seed(1)
    save_file(
        {k: one + 0.01 * torch.randn(one.shape, generator=generator) for k, one in factors.items()},
        file,
    )
    config = tmp_path / "out/adapter/adapter_config.json"
    (file.parent / config.name).write_bytes(config.read_bytes())
    trained = updates(file.parent, models["gpt_oss"])
    conversion = conversion_of(tmp_path / "out", file.parent, base=str(models["gpt_oss"]))
    write_conversion(conversion, tmp_path / "plain")
    plain = updates(tmp_path / "plain", models["gpt_oss"])
    assert plain.keys() == trained.keys()
    for name, update in plain.items():
        assert torch.allclose(update, trained[name] - start[name], atol=1e-5)


def test_one_stack_of_square_experts_says_how_it_is_packed(
    models: dict[str, Path], tmp_path: Path
) -> None:
    """(4, 16, 16): nothing but peft_version tells A·B from its transpose."""
    options = InitOptions(rank=2, method="rlpo", targets=("down_proj", "q_proj"))
    initialise(models["qwen3_moe"], tmp_path / "out", options)
    assert verify_adapter(tmp_path / "out", with_peft=True).ok
    config = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert config["target_parameters"] == ["down_proj"]
    assert config["peft_version"] == "0.19.0"
    assert "gate_up_proj" not in str(updates(tmp_path / "out", models["qwen3_moe"]))


def test_a_part_of_the_layers_is_named_in_full(tmp_path: Path) -> None:
    folder = tiny_models.stacked(tmp_path / "two", tiny_models.qwen3_moe(tmp_path / "apart"))
    initialise(folder, tmp_path / "out", InitOptions(rank=2, method="rlmo", layers=frozenset({1})))
    config = json.loads((tmp_path / "out/adapter_config.json").read_text())
    names = [f"model.layers.1.mlp.experts.{leaf}" for leaf in ("down_proj", "gate_up_proj")]
    assert config["target_parameters"] == names
    assert verify_adapter(tmp_path / "out", with_peft=True).ok


def test_namesakes_beside_stacks_are_refused(tmp_path: Path) -> None:
    made = tiny_models.qwen3_moe(tmp_path / "apart", mlp_only_layers=[0])
    folder = tiny_models.stacked(tmp_path / "model", made)
    with pytest.raises(OptionError, match=r"mlp\.\w+_proj.* beside stacked experts: PEFT takes"):
        initialise(folder, tmp_path / "out", InitOptions(rank=2))
    assert not (tmp_path / "out").exists()
    options = InitOptions(rank=2, method="rlpo", exclude=(r"layers\.0\.mlp",))
    initialise(folder, tmp_path / "out", options)
    assert verify_adapter(tmp_path / "out", with_peft=True).ok


def test_a_family_that_peft_packs_otherwise_is_refused(
    models: dict[str, Path], tmp_path: Path
) -> None:
    """As Llama 4: (in, out), of a class that does not say so."""
    folder = tmp_path / "model"
    folder.mkdir()
    for file in models["gpt_oss"].iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "llama4_text"}))
    with pytest.raises(CheckpointError, match=r"stored as \(in, out\), but PEFT reads"):
        initialise(folder, tmp_path / "out", InitOptions(rank=2))
