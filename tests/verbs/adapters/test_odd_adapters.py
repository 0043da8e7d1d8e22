"""Adapters that no loader takes, that were cut or drawn, and blocks that the live model drops."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import geoscope
from geoscope.adapters.peft_names import dropped_names
from geoscope.peft.adapter import read_adapter
from geoscope.verbs.adapters.verify import verify_adapter
from geoscope.verbs.series.follow import follow
from geoscope.verbs.series.options import FollowOptions
from tests.helpers import tiny_models
from tests.helpers.running import run
from tests.helpers.trained import DEPRECATION, adapted, edit, saved

FACTORS = "adapter_model.safetensors"
PREFIX = "base_model.model."

pytestmark = pytest.mark.filterwarnings(f"ignore:{DEPRECATION}:FutureWarning")


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(base, adapter of q_proj and down_proj with random factors)."""
    root = tmp_path_factory.mktemp("plain")
    base = tiny_models.llama(root / "base")
    model = adapted(base, leaves=("q_proj", "down_proj"))
    generator = torch.Generator().manual_seed(2)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator)
    return base, saved(model, root / "adapter")


def changed(
    adapter: Path, out: Path, key: Callable[[str], str], tensor: Callable[[str, Tensor], Tensor]
) -> Path:
    shutil.copytree(adapter, out)
    tensors = load_file(out / FACTORS)
    save_file({key(n): tensor(n, t).contiguous() for n, t in tensors.items()}, out / FACTORS)
    return out


def same(_: str, tensor: Tensor) -> Tensor:
    return tensor


# --- keys that no loader takes --------------------------------------------------------------------

MARKS: dict[str, Callable[[str], str]] = {
    "compiled": lambda key: f"_orig_mod.{key}",
    "ddp": lambda key: f"module.{key}",
    "inside": lambda key: key.replace(".self_attn.", ".self_attn._orig_mod."),
    "fsdp": lambda key: key.replace("layers.0.", "layers.0._fsdp_wrapped_module."),
    "named": lambda key: key.replace("lora_A.", "lora_A.default."),
    "twice": lambda key: PREFIX + key,
    "bare": lambda key: key.removeprefix(PREFIX),
}


@pytest.mark.parametrize("mark", MARKS)
def test_keys_that_loaders_pass_over_fail(
    plain: tuple[Path, Path], tmp_path: Path, mark: str
) -> None:
    base, adapter = plain
    sound = {one.id: one for one in verify_adapter(str(adapter), base=str(base)).checks}
    assert sound["spelling"].ok
    odd = changed(adapter, tmp_path / "odd", MARKS[mark], same)
    found = {one.id: one for one in verify_adapter(str(odd), base=str(base)).checks}
    assert not found["spelling"].ok
    keys, wanted = load_file(odd / FACTORS), load_file(adapter / FACTORS)
    assert found["spelling"].name in set(keys) - set(wanted)


def test_an_adapter_that_was_called_lora_is_named(plain: tuple[Path, Path], tmp_path: Path) -> None:
    odd = changed(plain[1], tmp_path / "odd", lambda key: key.replace(".lora_", "_"), same)
    done = run("verify-adapter", odd, "--base", plain[0])
    assert done.code == 1
    assert "_A.weight and damaged lora_A" in done.err


def test_keys_that_peft_has_no_module_for_fail(plain: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = plain
    more = tmp_path / "more"
    shutil.copytree(adapter, more)
    tensors = load_file(more / FACTORS)
    save_file({**tensors, f"{PREFIX}score.weight": torch.ones(1, 16)}, more / FACTORS)
    edit(more, modules_to_save=["score"])
    for folder, ok in ((adapter, True), (more, False)):
        checks = verify_adapter(str(folder), base=str(base), with_peft=True).checks
        loads = next(one for one in checks if one.id == "peft-loads")
        assert loads.ok is ok
        assert ok or "score.weight" in loads.text


def test_a_tied_head_is_a_warning(tmp_path: Path) -> None:
    base = tiny_models.qwen2_tied(tmp_path / "base")
    folder = tmp_path / "adapter"
    with pytest.warns(UserWarning, match="tie_word_embeddings"):
        model = adapted(base, leaves=("q_proj", "lm_head"))
        saved(model, folder)
    verified = verify_adapter(str(folder), base=str(base))
    assert verified.ok
    assert [one.id for one in verified.checks if one.is_warning] == ["tied"]


# --- blocks that the live model drops -------------------------------------------------------------


@pytest.mark.parametrize("block", ["model.layers.2.", "mtp.layers.0."])
def test_blocks_that_the_live_model_drops_are_left_out(tmp_path: Path, block: str) -> None:
    base, out = tiny_models.llama(tmp_path / "base"), tmp_path / "out"
    tensors: dict[str, Tensor] = {}
    for file in base.glob("*.safetensors*"):
        tensors |= load_file(file) if file.suffix == ".safetensors" else {}
        file.unlink()
    further = {
        name.replace("model.layers.0.", block): tensor.clone()
        for name, tensor in tensors.items()
        if "layers.0." in name
    }
    further[f"{block}eh_proj.weight"] = torch.ones(16, 32)
    save_file({**tensors, **further}, base / "model.safetensors", metadata={"format": "pt"})
    done = run("init-adapter", base, "--method", "pissa", "-r", "4", "-o", out)
    assert done.code == 0, done.err
    assert "multi-token prediction" in done.err
    adapter = load_file(out / "adapter" / FACTORS)
    assert not [key for key in adapter if block in key]
    residual = load_file(out / "residual" / "model.safetensors")
    assert all(torch.equal(residual[name], tensor) for name, tensor in further.items())
    assert verify_adapter(str(out), with_peft=True).ok
    # the negative control: factors for such a block are used by no module
    key = f"{PREFIX}{block}self_attn.q_proj"
    more = {f"{key}.lora_A.weight": torch.ones(4, 16), f"{key}.lora_B.weight": torch.ones(16, 4)}
    save_file({**adapter, **more}, out / "adapter" / FACTORS)
    failed = {one.id for one in verify_adapter(str(out), with_peft=True).checks if not one.ok}
    assert {"keys", "peft-loads"} <= failed


@pytest.mark.parametrize(
    ("name", "config", "is_dropped"),
    [
        ("model.layers.61.mlp.up_proj.weight", {"num_hidden_layers": 61}, True),
        ("model.layers.60.mlp.up_proj.weight", {"num_hidden_layers": 61}, False),
        ("model.layers.61.mlp.up_proj.weight", {}, False),
        ("model.language_model.layers.4.a.weight", {"text_config": {"num_hidden_layers": 4}}, True),
        ("model.visual.blocks.9.a.weight", {"text_config": {"num_hidden_layers": 4}}, False),
        ("model.decoder.layers.9.a.weight", {"num_hidden_layers": 4}, False),
        ("mtp.fc.weight", {"num_hidden_layers": 4}, True),
        ("model.mtp_layers.0.a.weight", {}, True),
        ("transformer.h.4.attn.c_attn.weight", {"n_layer": 4}, True),
    ],
)
def test_what_the_live_model_drops(name: str, config: dict[str, Any], is_dropped: bool) -> None:
    assert dropped_names([name], config) == ((name,) if is_dropped else ())


# --- how an adapter began, and what lies beside it ------------------------------------------------


def test_factors_of_which_most_rows_are_zero_are_told(
    plain: tuple[Path, Path], tmp_path: Path
) -> None:
    base, adapter = plain

    def cut(name: str, tensor: Tensor) -> Tensor:
        if "lora_B" in name:
            tensor[2:] = 0
        return tensor

    def zero(name: str, tensor: Tensor) -> Tensor:
        return tensor * 0 if "lora_B" in name else tensor

    for name, change, is_told in (("cut", cut, True), ("new", zero, False), ("ok", same, False)):
        folder = changed(adapter, tmp_path / name, str, change)
        for command in (("capacity", folder), ("collapse", base, folder)):
            assert ("exactly zero" in run(*command).err) is is_told


def test_a_start_that_was_drawn_is_told_and_taken_off(
    plain: tuple[Path, Path], tmp_path: Path
) -> None:
    base, adapter = plain
    drawn = changed(adapter, tmp_path / "drawn", str, same)
    edit(drawn, init_lora_weights=False)
    for command in (("capacity", drawn), ("collapse", base, drawn)):
        assert "both factors were drawn at random" in run(*command).err
    with_start = run("collapse", base, drawn, "--initial-adapter", adapter)
    assert "drawn at random" not in with_start.err
    assert "drawn at random" not in run("collapse", base, adapter).err


def test_where_only_an_adapter_makes_sense_that_beside_a_model_is_taken(
    plain: tuple[Path, Path], tmp_path: Path
) -> None:
    base, adapter = plain
    both = Path(shutil.copytree(base, tmp_path / "both"))
    for name in ("adapter_config.json", FACTORS):
        shutil.copy(adapter / name, both)
    found, alone = (run("capacity", one, "--json") for one in (both, adapter))
    assert found.report["layers"] == alone.report["layers"]
    assert "the adapter is taken" in found.err
    assert len(geoscope.compare(base, both, kind="collapse").layers) == 14  # there the model


MLX = {"model.layers.0.self_attn.q_proj.lora_a": (16, 4)}
MISTRAL = {"layers.0.attention.wq.lora_A.weight": (4, 16)}
TINKER = {f"{PREFIX}model.layers.0.mlp.experts.w1.lora_{side}.weight": (2, 4, 4) for side in "AB"}


@pytest.mark.parametrize(
    ("file", "shapes", "config", "called", "way_out"),
    [
        ("adapters.safetensors", MLX, {"fine_tune_type": "lora"}, "mlx-lm", "mlx_lm.fuse"),
        ("lora.safetensors", MISTRAL, None, "mistral-finetune", "save_adapters"),
        (FACTORS, TINKER, {"peft_type": "LORA", "r": 4, "lora_alpha": 4}, "Tinker", "build_hf"),
    ],
)
def test_adapters_of_others_are_refused_by_their_name(
    tmp_path: Path, file: str, shapes: dict[str, Any], config: Any, called: str, way_out: str
) -> None:
    save_file({name: torch.ones(shape) for name, shape in shapes.items()}, tmp_path / file)
    if called == "mlx-lm":
        save_file({"x": torch.ones(1)}, tmp_path / f"0000100_{file}")
    if config is not None:
        (tmp_path / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    done = run("capacity", tmp_path)
    assert done.code == 1
    assert called in done.err
    assert way_out in done.err


# --- series of stacked experts --------------------------------------------------------------------


WIDTH: dict[str, Any] = {"moe_intermediate_size": 12}


def stacks(folder: Path, seed: int) -> Path:
    """An adapter on both stacks of a block of four experts, rank 2."""
    generator = torch.Generator().manual_seed(seed)
    holder = f"{PREFIX}model.layers.0.mlp.experts"
    tensors: dict[str, Tensor] = {}
    for inner, (m, n) in ((".base_layer", (24, 16)), ("", (16, 12))):
        tensors[f"{holder}{inner}.lora_A.weight"] = torch.randn(8, n, generator=generator)
        tensors[f"{holder}{inner}.lora_B.weight"] = torch.randn(m, 8, generator=generator)
    folder.mkdir(parents=True)
    config = {
        "peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": [],
        "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    }  # fmt: skip
    save_file(tensors, folder / FACTORS)
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def test_a_series_on_stacked_experts_is_followed_expert_by_expert(tmp_path: Path) -> None:
    folders = [stacks(tmp_path / f"checkpoint-{i}", i) for i in (1, 2, 3, 4)]
    base = tiny_models.qwen3_moe(tmp_path / "base", **WIDTH)
    report = follow([str(one) for one in folders], options=FollowOptions(base=str(base)))
    assert len(report.layers) == 8
    weights = {n: t for one in base.glob("*.safetensors") for n, t in load_file(one).items()}
    tensors = load_file(folders[-1] / FACTORS)
    key = f"{PREFIX}model.layers.0.mlp.experts.base_layer.lora_"
    for layer in (one for one in report.layers if "gate_up" in one.name):
        expert = int(layer.name.split(".")[-2])
        A = tensors[f"{key}A.weight"].double()[2 * expert : 2 * expert + 2]
        B = tensors[f"{key}B.weight"].double()[:, expert::4]
        block = f"model.layers.0.mlp.experts.{expert}"
        parts = [weights[f"{block}.{leaf}.weight"].double() for leaf in ("gate_proj", "up_proj")]
        expected = float((2 * B @ A).norm() / torch.cat(parts).norm())
        assert layer.values["relative_update"] == pytest.approx(expected, rel=1e-9)


def test_a_predicted_adapter_on_stacked_experts(tmp_path: Path) -> None:
    folders = [stacks(tmp_path / f"checkpoint-{i}", i) for i in (1, 2, 3)]
    out = tmp_path / "out"
    done = run(
        "extrapolate", *folders, "--to-step", "4", "--method", "hold", "-o", out, "--force",
        "--base", tiny_models.qwen3_moe(tmp_path / "base", **WIDTH),
    )  # fmt: skip
    assert done.code == 0, done.err
    last, found = (read_adapter(one) for one in (folders[-1], out))
    for name, module in last.modules.items():
        update, predicted = (
            one.modules[name].scaling * (B.double() @ A.double())
            for one in (last, found)
            for B, A in [one.factors(name)]
        )
        assert module.experts == 4
        torch.testing.assert_close(predicted, update, rtol=1e-5, atol=1e-5)


def test_a_series_without_a_common_module_says_why(tmp_path: Path) -> None:
    folders = [stacks(tmp_path / f"checkpoint-{i}", i) for i in (1, 2)]
    tensors = load_file(folders[1] / FACTORS)
    moved = {name.replace("layers.0", "layers.1"): tensor for name, tensor in tensors.items()}
    save_file(moved, folders[1] / FACTORS)
    done = run("trajectory", *folders)
    assert done.code == 1
    assert "in 1 of 2 adapters" in done.err
