"""Where an adapter began, and what its numbers are over the bases that it may be given with."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import geoscope
from geoscope.sources.open import open_checkpoint
from tests.helpers import tiny_models
from tests.helpers.merged import CASES, Made, by_name, lora, made, moved, tuned_weights
from tests.helpers.running import run

OPTIONS = geoscope.Options(ks=(2, 4))
NORM = "update.frobenius_norm"


def norm(*models: object, **options: Any) -> float:
    """‖ΔW‖ of all matrices."""
    given = geoscope.Options(ks=(2, 4), **options)
    report = geoscope.compare(*map(str, models), kind="anisotropy", options=given)
    return float(report.summary.model[NORM] or 0)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    checkpoint = open_checkpoint(str(folder))
    return {name: checkpoint.read(name).double() for name in checkpoint.tensors}


# --- the residual layout of init-adapter --------------------------------------------------------


@pytest.fixture(scope="module")
def residual(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, float]:
    """(base, run/adapter after training, ‖ΔW‖ against the base), as init-adapter lays it out."""
    root = tmp_path_factory.mktemp("residual")
    base = tiny_models.llama(root / "base")
    done = run("init-adapter", base, "--rank", "3", "-o", root / "ia")
    assert done.code == 0, done.err
    tuned = root / "run" / "adapter"
    shutil.copytree(root / "ia/adapter", tuned)
    (tuned / "README.md").unlink()
    tensors = load_file(tuned / "adapter_model.safetensors")
    generator = torch.Generator().manual_seed(0)
    for name, one in tensors.items():
        one += 0.05 * torch.randn(one.shape, generator=generator)
        assert name
    save_file(tensors, tuned / "adapter_model.safetensors", metadata={"format": "pt"})
    config = json.loads((tuned / "adapter_config.json").read_text())
    before, relieved, squares = weights(base), weights(root / "ia/residual"), 0.0
    for name, weight in before.items():
        prefix = f"base_model.model.{name.removesuffix('.weight')}"
        if f"{prefix}.lora_B.weight" in tensors:
            B, A = (tensors[f"{prefix}.lora_{side}.weight"].double() for side in "BA")
            merged = relieved[name] + config["lora_alpha"] / config["r"] * B @ A
            squares += float((merged - weight).square().sum())
    return base, tuned, squares**0.5


def test_over_the_original_the_start_is_found_and_taken_off(
    residual: tuple[Path, Path, float],
) -> None:
    base, tuned, truth = residual
    assert norm(base, tuned) == pytest.approx(truth, rel=1e-4)


def test_over_its_own_base_nothing_more_is_taken_off(residual: tuple[Path, Path, float]) -> None:
    base, tuned, truth = residual
    own = base.parent / "ia/residual"
    assert norm(base, f"{own}+{tuned}") == pytest.approx(truth, rel=1e-4)
    assert norm(tuned, base) == pytest.approx(truth, rel=1e-4), "alone it is its base with it"


def test_a_relative_name_of_the_base_is_told_from_the_adapter(
    residual: tuple[Path, Path, float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, tuned, truth = residual
    other = tuned.parent / "relative"
    shutil.copytree(tuned, other, dirs_exist_ok=True)
    config = json.loads((other / "adapter_config.json").read_text())
    relative = json.dumps({**config, "base_model_name_or_path": "../../ia/residual"})
    (other / "adapter_config.json").write_text(relative)
    monkeypatch.chdir(tmp_path)
    assert norm(base, other) == pytest.approx(truth, rel=1e-4)
    # Siblings by what the names mean, however they are spelled.
    assert norm(f"{base.parent}/ia/residual+{tuned}", other) == 0


# --- --initial-adapter and --lora-alpha ---------------------------------------------------------


@pytest.fixture(scope="module")
def pissa(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return made(
        tmp_path_factory.mktemp("pissa"), tiny_models.llama, lora(init_lora_weights="pissa"),
        train=moved, dtype=torch.float32,
    )  # fmt: skip


def test_a_start_is_of_one_adapter(pissa: Made) -> None:
    given = ("--initial-adapter", pissa.start)
    for models, words in (
        ((pissa.adapter, pissa.adapter), "2 tuned models are adapters"),
        ((pissa.merged,), "none is one"),
    ):
        done = run("compare", pissa.base, *models, *given)
        assert done.code == 2 and words in done.err


def test_the_anchor_keeps_its_own_start(pissa: Made, tmp_path: Path) -> None:
    plain = made(tmp_path, *CASES["lora"])
    given = ("--k", "2,4", "--json", "--initial-adapter", pissa.start)
    beside = run("compare", pissa.base, pissa.adapter, *given, "--anchor", plain.adapter)
    assert beside.code == 0, beside.err
    ratio = beside.report["summary"]["anchor"]["ratios"]["relative_update"]
    alone = by_name(geoscope.compare(pissa.base, plain.adapter, kind="anisotropy", options=OPTIONS))
    size = sum((one.values[NORM] or 0) ** 2 for one in alone.values()) ** 0.5
    own = norm(pissa.base, pissa.adapter, initial_adapter=str(pissa.start))
    assert ratio == pytest.approx(own / size, rel=1e-6)


def test_alpha_is_of_the_start_and_of_the_base_s_adapter_too(pissa: Made) -> None:
    one = norm(pissa.base, pissa.adapter, initial_adapter=str(pissa.start))
    two = norm(pissa.base, pissa.adapter, initial_adapter=str(pissa.start), lora_alpha=10)
    assert two == pytest.approx(2 * one, rel=1e-9), "alpha is 5 in the config"


def test_a_start_of_zero_changes_no_number(tmp_path: Path) -> None:
    case = made(tmp_path, *CASES["lora"])
    given = ("capacity", case.base, case.adapter, "--json")
    plain, started = run(*given), run(*given, "--initial-adapter", case.start)
    assert plain.report["summary"]["model"] == started.report["summary"]["model"]


def test_dora_with_a_start_is_refused(tmp_path: Path) -> None:
    case = made(
        tmp_path, tiny_models.llama, lora(use_dora=True, init_lora_weights="pissa"),
        train=moved, dtype=torch.float32,
    )  # fmt: skip
    done = run("anisotropy", case.base, case.adapter, "--initial-adapter", case.start)
    assert done.code == 2 and "DoRA with a start" in done.err


def test_a_start_of_another_run_is_refused_before_the_work(pissa: Made, tmp_path: Path) -> None:
    other = made(tmp_path, tiny_models.llama, lora(target_modules=["q_proj"]))
    done = run(
        "anisotropy", pissa.base, pissa.adapter, "--initial-adapter", other.adapter, "--dry-run"
    )
    assert done.code == 2 and "is not adapted there" in done.err


def test_capacity_says_nothing_of_a_start_that_is_counted_twice(
    pissa: Made, tmp_path: Path
) -> None:
    silent = tmp_path / "silent"
    shutil.copytree(pissa.adapter, silent)
    config = json.loads((silent / "adapter_config.json").read_text())
    (silent / "adapter_config.json").write_text(json.dumps({**config, "init_lora_weights": True}))
    verdict = run("capacity", pissa.base, silent, "--json").report["summary"]["verdict"]
    assert verdict["code"] == "UNDETERMINED"


# --- what an adapter changes beside factors -----------------------------------------------------


def test_an_adapted_head_of_a_tied_base_is_compared_with_the_embedding(tmp_path: Path) -> None:
    case = made(tmp_path, tiny_models.qwen2_tied, lora(target_modules=["q_proj", "lm_head"]))
    report = geoscope.compare(case.base, case.adapter, kind="anisotropy", options=OPTIONS)
    assert report.coverage.missing == ()
    assert len(report.layers) == 2
    found = tuned_weights(case.base, case.adapter, include=("lm_head",))
    adapter = load_file(case.adapter / "adapter_model.safetensors")
    A, B = (adapter[f"base_model.model.lm_head.lora_{side}.weight"].double() for side in "AB")
    embedding = weights(case.base)["model.embed_tokens.weight"]
    expected = embedding + 5 / 3 * B @ A
    assert (found["lm_head.weight"] - expected).abs().max() <= 1e-9 * expected.abs().max()


def test_replaced_parts_of_fused_tensors_are_compared(tmp_path: Path) -> None:
    config = lora(target_modules=["o_proj"], modules_to_save=["qkv_proj"])
    case = made(tmp_path, tiny_models.phi3, config)
    found = by_name(geoscope.compare(case.base, case.adapter, kind="anisotropy", options=OPTIONS))
    expected = geoscope.compare(case.base, case.merged, kind="anisotropy", options=OPTIONS)
    for name, one in by_name(expected).items():
        if size := one.values[NORM]:
            assert found[name].values[NORM] == pytest.approx(size, rel=1e-9)
    assert sum(".self_attn.q_proj." in name for name in found) == 2


def test_what_the_base_has_no_tensor_of_makes_it_partial(tmp_path: Path) -> None:
    """Whole experts, saved as the stacks of the live model, over one file entry an expert."""
    config = lora(target_modules=["q_proj"], modules_to_save=["experts"])
    case = made(tmp_path, tiny_models.qwen3_moe, config)
    report = geoscope.compare(case.base, case.adapter, kind="anisotropy", options=OPTIONS)
    assert report.coverage.status == "PARTIAL"
    assert any("experts" in one for one in report.coverage.missing)


def test_biases_alone_on_request(tmp_path: Path) -> None:
    case = made(tmp_path, tiny_models.qwen2_tied, lora(target_modules=["q_proj"], bias="all"))
    done = run("anisotropy", case.base, case.adapter, "--include", "bias$", "--json")
    assert len(done.report["vectors"]) == 6


def test_float8_factors_are_refused(tmp_path: Path) -> None:
    case = made(tmp_path, *CASES["lora"])
    path = case.adapter / "adapter_model.safetensors"
    save_file({k: v.to(torch.float8_e4m3fn) for k, v in load_file(path).items()}, path)
    done = run("anisotropy", case.base, case.adapter)
    assert done.code == 1 and "float8_e4m3fn" in done.err and len(done.err.splitlines()) == 1


def test_a_link_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    case = made(tmp_path, *CASES["lora"])
    path = case.adapter / "adapter_model.safetensors"
    path.rename(tmp_path / "elsewhere.safetensors")
    path.symlink_to(tmp_path / "elsewhere.safetensors")
    done = run("anisotropy", case.base, case.adapter)
    assert done.code == 1 and "is a link to" in done.err
