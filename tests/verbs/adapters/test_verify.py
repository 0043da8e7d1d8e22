"""Does every check pass on a sound folder, and fail with its own line on a damaged one?"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from geoscope.errors import CheckpointNotFound, OptionError
from geoscope.verbs.adapters.converted import convert_adapter
from geoscope.verbs.adapters.verify import Check, Verification, verify_adapter
from tests.helpers import tiny_models
from tests.helpers.tiny_models import transformers
from tests.helpers.trained import (
    DEPRECATION,
    PATTERNS,
    adapted,
    edit,
    expert_folder,
    initialised,
    mirrored,
    peft,
    record,
    residual_folder,
    saved,
)

pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{DEPRECATION}:FutureWarning"),
    pytest.mark.filterwarnings(f"ignore:{PATTERNS}:RuntimeWarning"),
]

FACTORS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The original model and OUT of the residual layout, in fp32."""
    folder = tmp_path_factory.mktemp("verify")
    base = tiny_models.llama(folder / "original")
    model = initialised(adapted(base))
    return base, residual_folder(model, base, folder / "out")


@pytest.fixture
def out(sound: tuple[Path, Path], tmp_path: Path) -> Path:
    """A copy to damage. Its config still names the residual of the sound one."""
    return Path(shutil.copytree(sound[1], tmp_path / "out"))


def failed(verification: Verification) -> dict[str, Check]:
    assert verification.ok == all(check.ok for check in verification.checks)
    for check in verification.checks:
        assert "\n" not in check.text
    return {check.id: check for check in verification.checks if not check.ok}


def change(file: Path, edit: Callable[[dict[str, Tensor]], Any]) -> None:
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def key(module: str, side: str) -> str:
    return f"base_model.model.{module}.lora_{side}.weight"


def test_a_sound_residual_passes_every_check(sound: tuple[Path, Path]) -> None:
    seen: list[tuple[int, int]] = []
    found = verify_adapter(str(sound[1]), on_module=lambda done, of: seen.append((done, of)))
    assert failed(found) == {}
    assert [check.id for check in found.checks] == [
        "layout", "spelling", "keys", "shapes", "config", "vllm", "weights", "untouched", "sha256",
    ]  # fmt: skip
    weights = {check.id: check for check in found.checks}["weights"]
    assert weights.worst is not None
    assert 0 < weights.worst < 1e-7
    assert seen[-1] == (14, 14)
    assert found.layout == "residual"
    assert found.base == str(sound[0])


def test_out_and_the_adapter_inside_are_one_folder(sound: tuple[Path, Path]) -> None:
    one, two = (verify_adapter(str(path)) for path in (sound[1], sound[1] / "adapter"))
    assert one.checks == two.checks


def test_a_missing_module_is_named(out: Path) -> None:
    module = "model.layers.1.self_attn.v_proj"

    def drop(tensors: dict[str, Tensor]) -> None:
        for side in "AB":
            del tensors[key(module, side)]

    change(out / "adapter" / FACTORS, drop)
    check = failed(verify_adapter(str(out)))["keys"]
    assert f"1 modules of the base are targeted and have no factors: {module}" in check.text
    assert check.name == module


def test_a_module_that_the_base_lacks_is_named(out: Path) -> None:
    def rename(tensors: dict[str, Tensor]) -> None:
        for side in "AB":
            was = tensors.pop(key("model.layers.1.mlp.up_proj", side))
            tensors[key("model.layers.7.mlp.up_proj", side)] = was

    change(out / "adapter" / FACTORS, rename)
    check = failed(verify_adapter(str(out)))["keys"]
    assert "1 modules of the adapter are not in the base: model.layers.7.mlp.up_proj" in check.text
    assert "no factors: model.layers.1.mlp.up_proj" in check.text


def test_factors_that_no_target_names_are_told(out: Path) -> None:
    edit(out / "adapter", target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "up_proj"])
    check = failed(verify_adapter(str(out)))["keys"]
    assert "4 modules have factors that target_modules does not name" in check.text
    assert check.name == "model.layers.0.mlp.down_proj"


def test_a_swapped_shape_is_told_with_both(out: Path) -> None:
    module = "model.layers.0.mlp.down_proj"

    def swap(tensors: dict[str, Tensor]) -> None:
        A, B = tensors[key(module, "A")], tensors[key(module, "B")]
        tensors[key(module, "A")] = B.T.contiguous()
        tensors[key(module, "B")] = A.T.contiguous()

    change(out / "adapter" / FACTORS, swap)
    found = failed(verify_adapter(str(out)))
    assert "B·A (24, 16), weight (16, 24)" in found["shapes"].text
    assert found["shapes"].name == module
    assert "untouched" not in found  # the weight is an adapted one all the same


@pytest.mark.parametrize("name", ["model.norm.weight", "lm_head.weight"])
def test_a_changed_untouched_tensor_is_named(out: Path, name: str) -> None:
    index = json.loads((out / "residual" / "model.safetensors.index.json").read_text())

    def nudge(tensors: dict[str, Tensor]) -> None:
        tensors[name].view(-1)[3] *= 1 + 2.0**-23

    change(out / "residual" / index["weight_map"][name], nudge)
    found = failed(verify_adapter(str(out)))
    assert list(found) == ["untouched"]
    assert found["untouched"].text.startswith(f"1 tensors changed in the residual: {name}")


def test_a_recast_untouched_tensor_is_a_change(out: Path) -> None:
    index = json.loads((out / "residual" / "model.safetensors.index.json").read_text())
    name = "model.norm.weight"
    change(
        out / "residual" / index["weight_map"][name],
        lambda tensors: tensors.__setitem__(name, tensors[name].double()),
    )
    assert list(failed(verify_adapter(str(out)))) == ["untouched"]


def test_a_bf16_residual_fails_unless_lossy_is_allowed(
    sound: tuple[Path, Path], tmp_path: Path
) -> None:
    base = sound[0]
    out = residual_folder(initialised(adapted(base)), base, tmp_path / "o", dtype=torch.bfloat16)
    check = failed(verify_adapter(str(out)))["weights"]
    assert check.worst is not None
    assert 5e-4 < check.worst < 5e-3
    assert "bfloat16 is too coarse for a residual" in check.text
    assert (
        "`residual_dtype` float32, choose `layout` mirror, or accept it with `allow" in check.text
    )
    assert failed(verify_adapter(str(out), allow_lossy=True)) == {}


def test_doubled_alpha_fails_the_weights(out: Path) -> None:
    edit(out / "adapter", lora_alpha=16)
    found = failed(verify_adapter(str(out)))
    assert list(found) == ["weights"]
    assert found["weights"].worst is not None
    assert found["weights"].worst > 0.01
    assert "lora_alpha was changed" in found["weights"].text


def test_nan_is_no_small_error(out: Path) -> None:
    module = "model.layers.0.mlp.up_proj"
    change(out / "adapter" / FACTORS, lambda tensors: tensors[key(module, "A")].fill_(torch.nan))
    found = failed(verify_adapter(str(out)))
    assert set(found) == {"weights", "sha256"}
    assert found["weights"].name == f"{module}.weight"
    assert found["weights"].worst is None
    assert "weights" in failed(verify_adapter(str(out), allow_lossy=True))


def test_the_word_pissa_would_initialise_again(out: Path) -> None:
    edit(out / "adapter", init_lora_weights="pissa", lora_dropout=0.05)
    check = failed(verify_adapter(str(out)))["config"]
    assert "init_lora_weights is 'pissa': PEFT would initialise again" in check.text
    assert "lora_dropout is 0.05" in check.text


def test_rank_patterns_are_not_for_vllm(out: Path) -> None:
    edit(out / "adapter", rank_pattern={"q_proj": 4}, alpha_pattern={"q_proj": 8})
    assert "rank_pattern is not empty" in failed(verify_adapter(str(out)))["vllm"].text


def test_vllm_is_promised_by_starts_alone(out: Path, sound: tuple[Path, Path]) -> None:
    """Elsewhere what vLLM would not serve is a warning."""
    edit(out / "adapter", rank_pattern={"q_proj": 4}, alpha_pattern={"q_proj": 8})
    (out / "geoscope.json").unlink()
    found = verify_adapter(str(out), base=str(sound[0]))
    assert failed(found) == {}
    (warned,) = [check for check in found.checks if check.is_warning]
    assert "rank_pattern is not empty" in warned.text


def test_a_base_that_has_moved_is_asked_for(out: Path, sound: tuple[Path, Path]) -> None:
    record(out, out.parent / "gone", layout="residual")
    with pytest.raises(CheckpointNotFound, match=r"gone: .* is not there; give it with `base`"):
        verify_adapter(str(out))
    assert failed(verify_adapter(str(out), base=str(sound[0]))) == {}


def test_a_relative_base_is_told_from_the_adapter(
    sound: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As every other command resolves it, whatever the working folder."""
    shutil.copytree(sound[0], tmp_path / "models" / "original")
    plain = Path(shutil.copytree(sound[1] / "adapter", tmp_path / "run" / "lora"))
    edit(plain, base_model_name_or_path="../../models/original")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    found = verify_adapter("../run/lora")
    assert found.base == str(tmp_path / "models" / "original")
    assert "shapes" not in failed(found)


def test_hashes_tell_a_trained_factor_and_another_base(out: Path, tmp_path: Path) -> None:
    name = key("model.layers.0.self_attn.q_proj", "B")
    change(out / "adapter" / FACTORS, lambda tensors: tensors[name].mul_(1 + 1e-6))
    assert name in failed(verify_adapter(str(out)))["sha256"].text
    other = tiny_models.llama(tmp_path / "other", seed=9)
    found = failed(verify_adapter(str(out), base=str(other)))
    assert "of the base" in found["sha256"].text
    assert {"weights", "untouched"} <= set(found)


def test_a_residual_without_its_folder_says_so(out: Path) -> None:
    shutil.rmtree(out / "residual")
    found = failed(verify_adapter(str(out), with_peft=True))
    assert "residual/ is missing" in found["layout"].text


def test_the_original_has_to_be_known(out: Path, sound: tuple[Path, Path]) -> None:
    (out / "geoscope.json").unlink()
    with pytest.raises(OptionError, match=r"tells the original model.*`base`"):
        verify_adapter(str(out))
    assert failed(verify_adapter(str(out), base=str(sound[0]))) == {}
    with pytest.raises(CheckpointNotFound, match=r"nowhere"):
        verify_adapter(str(out), base="./nowhere")


# --- mirror, anchor, plain ----------------------------------------------------------------------


@pytest.mark.parametrize("recorded", [True, False])
def test_a_mirror_is_zero_until_it_is_trained(tmp_path: Path, recorded: bool) -> None:
    base = tiny_models.llama(tmp_path / "original", dtype=torch.bfloat16)
    out = saved(mirrored(adapted(base, r=8, lora_alpha=8)), tmp_path / "out")
    if recorded:
        record(out, base, layout="mirror")
    found = verify_adapter(str(out))
    assert failed(found) == {}
    assert found.layout == "mirror"
    name = key("model.layers.0.mlp.gate_proj", "B")
    change(out / FACTORS, lambda tensors: tensors[name][:, 7].add_(1e-6))
    check = failed(verify_adapter(str(out)))["product"]
    assert check.name == "model.layers.0.mlp.gate_proj.weight"
    assert "1e-12 needed" in check.text


def anchored(base: Path, out: Path) -> Path:
    """OUT of the anchor layout: adapter/ and anchor/, which is the same with B negated."""
    adapter = saved(initialised(adapted(base)), out / "adapter")
    shutil.copytree(adapter, out / "anchor")
    change(out / "anchor" / FACTORS, negate)
    record(out, base, layout="anchor")
    return out


def negate(tensors: dict[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        if "lora_B" in name:
            tensor.neg_()


def test_an_anchor_is_the_opposite(tmp_path: Path) -> None:
    out = anchored(tiny_models.llama(tmp_path / "original"), tmp_path / "out")
    assert failed(verify_adapter(str(out))) == {}
    change(out / "anchor" / FACTORS, negate)
    check = failed(verify_adapter(str(out)))["anchor"]
    assert "14 modules of anchor/ are not the opposite" in check.text


def test_a_converted_adapter_is_a_sound_plain_lora(tmp_path: Path) -> None:
    base = tiny_models.llama(tmp_path / "original")
    initial = saved(initialised(adapted(base)), tmp_path / "initial")
    conversion = convert_adapter(str(initial), str(initial), base=str(base))
    lora = tmp_path / "lora"
    lora.mkdir()
    save_file(dict(conversion.tensors), lora / FACTORS, metadata={"format": "pt"})
    (lora / "adapter_config.json").write_text(json.dumps(dict(conversion.config)))
    found = verify_adapter(str(lora))
    assert failed(found) == {}
    assert (found.layout, found.base) == (None, str(base))


# --- other families -----------------------------------------------------------------------------


def test_conv1d_is_compared_in_its_own_orientation(tmp_path: Path) -> None:
    base = tiny_models.gpt2(tmp_path / "original")
    model = adapted(base, leaves=("c_attn", "c_fc"), fan_in_fan_out=True)
    out = residual_folder(initialised(model), base, tmp_path / "out")
    found = verify_adapter(str(out))
    assert failed(found) == {}
    worst = next(check.worst for check in found.checks if check.id == "weights")
    assert worst is not None
    assert worst < 1e-7


def test_tied_embeddings_are_no_loss(tmp_path: Path) -> None:
    base = tiny_models.qwen2_tied(tmp_path / "original")
    out = residual_folder(initialised(adapted(base)), base, tmp_path / "out")
    assert failed(verify_adapter(str(out))) == {}


def test_experts_one_by_one_and_as_a_stack(tmp_path: Path) -> None:
    base = tiny_models.qwen3_moe(tmp_path / "original")
    out = expert_folder(base, tmp_path / "out")
    found = verify_adapter(str(out), with_peft=True)
    assert failed(found) == {}
    live = peft.PeftModel.from_pretrained(tiny_models.live(out / "residual"), str(out / "adapter"))
    stacked = saved(live, tmp_path / "stacked" / "adapter")
    shutil.copytree(out / "residual", tmp_path / "stacked" / "residual")
    record(tmp_path / "stacked", base, layout="residual")
    again = verify_adapter(str(stacked.parent))
    assert set(failed(again)) == {"vllm"}  # PEFT writes patterns
    one, two = (
        next(check.worst for check in which.checks if check.id == "weights")
        for which in (found, again)
    )
    assert one is not None
    assert one < 1e-7
    assert two == pytest.approx(one, rel=0.5)


# --- with PEFT ----------------------------------------------------------------------------------


def differences(verification: Verification) -> dict[str, float]:
    return {check.id: check.worst for check in verification.checks if check.worst is not None}


def test_peft_agrees_on_a_residual(
    sound: tuple[Path, Path], capfd: pytest.CaptureFixture[str]
) -> None:
    bars = transformers.utils.logging
    bars.enable_progress_bar()
    capfd.readouterr()
    found = verify_adapter(str(sound[1]), with_peft=True)
    assert failed(found) == {}
    assert capfd.readouterr() == ("", "")  # no bars of theirs,
    assert bars.is_progress_bar_enabled()  # which are as they were
    said = differences(found)
    assert said["peft-enabled"] < 2e-6
    assert said["peft-merged"] < 2e-6
    assert said["peft-disabled"] > 1e-2


def test_peft_agrees_on_a_mirror(tmp_path: Path) -> None:
    base = tiny_models.qwen2_tied(tmp_path / "original")
    out = saved(mirrored(adapted(base, r=8, lora_alpha=8)), tmp_path / "out")
    record(out, base, layout="mirror")
    found = verify_adapter(str(out), with_peft=True)
    assert failed(found) == {}
    assert differences(found)["peft-disabled"] == 0


def test_peft_agrees_on_an_anchor(tmp_path: Path) -> None:
    base = tiny_models.llama(tmp_path / "original")
    out = anchored(base, tmp_path / "out")
    found = verify_adapter(str(out), with_peft=True)
    assert failed(found) == {}
    assert differences(found)["peft-enabled"] < 2e-6


def test_peft_finds_doubled_alpha(out: Path) -> None:
    edit(out / "adapter", lora_alpha=16)
    assert set(failed(verify_adapter(str(out), with_peft=True))) == {
        "peft-enabled",
        "peft-merged",
        "weights",
    }


def test_peft_tells_missing_keys(out: Path) -> None:
    name = "model.layers.0.mlp.up_proj"

    def drop(tensors: dict[str, Tensor]) -> None:
        for side in "AB":
            del tensors[key(name, side)]

    change(out / "adapter" / FACTORS, drop)
    found = failed(verify_adapter(str(out), with_peft=True))
    assert "missing adapter keys" in found["peft-loads"].text
    assert {"keys", "weights", "peft-enabled"} & set(found) == {"keys", "peft-enabled"}


def test_without_peft_the_extra_is_named(
    sound: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(
        OptionError, match=r"peft is not installed; run `pip install 'geoscope\[peft"
    ):
        verify_adapter(str(sound[1]), with_peft=True)


def test_peft_unused_keys_are_a_failure(out: Path) -> None:
    edit(out / "adapter", target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "up_proj"])
    found = failed(verify_adapter(str(out), with_peft=True))
    assert "peft-enabled" in found
