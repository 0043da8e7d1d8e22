"""Is a trained adapter, converted, the same model on the original base? Asked of PEFT itself."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from geoscope.adapters.peft_config import adapter_config
from geoscope.errors import (
    CheckpointError,
    NumericsError,
    OptionError,
    PairingError,
    UnsupportedFormat,
)
from geoscope.formats.hashes import file_sha256
from geoscope.verbs.adapters.convert import (
    Conversion,
    ModuleEnergy,
    conversion_of,
    discarded_share,
)
from geoscope.verbs.adapters.converted import write_conversion
from geoscope.verbs.adapters.verify import verify_adapter
from tests.helpers import tiny_models
from tests.helpers.tiny_models import live, logits
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
    relative,
    residual_folder,
    saved,
    train,
)

pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{DEPRECATION}:FutureWarning"),
    pytest.mark.filterwarnings(f"ignore:{PATTERNS}:RuntimeWarning"),
]

SAME = 1e-5  # relative difference of logits, fp32 throughout


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path, Tensor]:
    """The original model, the folder of an initialisation, a trained adapter, what it says."""
    folder = tmp_path_factory.mktemp("residual")
    base = tiny_models.llama(folder / "original")
    model = initialised(adapted(base))
    out = residual_folder(model, base, folder / "out")
    trained = saved(train(model), folder / "checkpoint-3")
    return base, out, trained, logits(model)


def written(conversion: Conversion, folder: Path) -> tuple[ModuleEnergy, ...]:
    """The conversion as files; checks that they are what the plan promised."""
    tensors: dict[str, Tensor] = {}
    energies = conversion.write(tensors.__setitem__)
    assert tuple(tensors) == conversion.plan.order
    for name, plan in conversion.plan.tensors.items():
        assert tuple(tensors[name].shape) == plan.shape
        assert str(tensors[name].dtype) == f"torch.{plan.dtype}"
        assert tensors[name].is_contiguous()
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    text = json.dumps(dict(conversion.config))
    (folder / "adapter_config.json").write_text(text, encoding="utf-8")
    return energies


def loaded(base: Path, adapter: Path) -> Any:
    """PEFT's model; any warning, such as one about missing keys, is an error."""
    model = live(base)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", DEPRECATION, FutureWarning)
        warnings.filterwarnings("ignore", PATTERNS, RuntimeWarning)
        return peft.PeftModel.from_pretrained(model, str(adapter)).eval()


def test_the_converted_adapter_on_the_original_base_is_the_trained_model(
    run: tuple[Path, Path, Path, Tensor], tmp_path: Path
) -> None:
    base, out, trained, said = run
    conversion = conversion_of(str(out), str(trained))
    assert written(conversion, tmp_path / "lora") == ()
    assert conversion.config["r"] == 8
    assert conversion.config["lora_alpha"] == 16
    assert conversion.config["base_model_name_or_path"] == str(base)
    model = loaded(base, tmp_path / "lora")
    assert relative(logits(model), said) < SAME
    with model.disable_adapter():
        assert relative(logits(model), said) > 1e-3  # so that the test can fail
        assert torch.equal(logits(model), logits(live(base)))


def test_out_and_the_adapter_inside_are_the_same_initial(
    run: tuple[Path, Path, Path, Tensor],
) -> None:
    _, out, trained, _ = run
    one, two = (conversion_of(str(path), str(trained)) for path in (out, out / "adapter"))
    assert one.config == two.config


@pytest.mark.parametrize("rslora", [False, True])
def test_patterns_and_rslora_keep_their_scaling(tmp_path: Path, rslora: bool) -> None:
    base = tiny_models.llama(tmp_path / "original")
    model = initialised(
        adapted(base, use_rslora=rslora, rank_pattern={"q_proj": 2, r"layers\.1\.mlp\.up_proj": 3},
                alpha_pattern={"v_proj": 6})
    )  # fmt: skip
    initial = saved(model, tmp_path / "initial")
    trained = saved(train(model), tmp_path / "trained")
    written(conversion_of(str(initial), str(trained), base=str(base)), tmp_path / "lora")
    assert relative(logits(loaded(base, tmp_path / "lora")), logits(model)) < SAME


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("rank", [1, 5, 7])
def test_compression_loses_what_it_says(
    run: tuple[Path, Path, Path, Tensor], tmp_path: Path, rank: int, rslora: bool
) -> None:
    base, out, trained, _ = run
    if rslora:
        shutil.copytree(out, tmp_path / "out")
        shutil.copytree(trained, tmp_path / "trained")
        out, trained = tmp_path / "out", tmp_path / "trained"
        for one in (out / "adapter", trained):
            edit(one, use_rslora=True, lora_alpha=4)
    energies = written(conversion_of(str(out), str(trained), rank=rank), tmp_path / "lora")
    start, end = (
        load_file(one / "adapter_model.safetensors") for one in (out / "adapter", trained)
    )
    model = loaded(base, tmp_path / "lora")
    assert len(energies) == 14
    for one in energies:
        key = f"base_model.model.{one.name}"
        update = 2 * sum(
            sign * (side[f"{key}.lora_B.weight"].double() @ side[f"{key}.lora_A.weight"].double())
            for sign, side in ((1, end), (-1, start))
        )
        S = torch.linalg.svdvals(torch.as_tensor(update))
        assert one.energy == pytest.approx(float(S.square().sum()), rel=1e-10)
        tail = float(S[rank:].square().sum())
        assert one.discarded == pytest.approx(tail, rel=1e-6, abs=1e-12 * one.energy)
        made = model.base_model.model.get_submodule(one.name).get_delta_weight("default")
        missed = float((made.double() - update).norm())
        assert missed == pytest.approx(tail**0.5, rel=1e-4, abs=1e-6 * one.energy**0.5)
    total = sum(one.discarded for one in energies) / sum(one.energy for one in energies)
    assert discarded_share(energies) == pytest.approx(total)


def test_a_rank_above_that_of_a_small_matrix_is_filled_with_zeros(tmp_path: Path) -> None:
    base = tiny_models.llama(tmp_path / "original", num_key_value_heads=1)  # k_proj: 4 × 16
    model = initialised(adapted(base))
    initial, trained = saved(model, tmp_path / "a"), saved(train(model), tmp_path / "b")
    conversion = conversion_of(str(initial), str(trained), rank=7, base=str(base))
    written(conversion, tmp_path / "lora")
    assert relative(logits(loaded(base, tmp_path / "lora")), logits(model)) < 1e-2
    tensors = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    assert {one.shape[0] for name, one in tensors.items() if "lora_A" in name} == {7}


# --- PEFT's own initialisations -----------------------------------------------------------------


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_what_peft_initialised_converts_as_peft_does(tmp_path: Path, init: str) -> None:
    base = tiny_models.llama(tmp_path / "original")
    model = adapted(base, init_lora_weights=init)
    model.peft_config["default"].init_lora_weights = True
    initial = saved(model, tmp_path / f"{init}_init")
    model.peft_config["default"].init_lora_weights = init
    trained = saved(train(model), tmp_path / "trained")
    shutil.copytree(initial, tmp_path / "copy" / "start")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(
            tmp_path / "theirs",
            path_initial_model_for_weight_conversion=str(tmp_path / "copy/start"),
        )
    conversion = conversion_of(str(initial), str(trained))
    written(conversion, tmp_path / "ours")
    assert conversion.config["base_model_name_or_path"] == str(base)  # told by init_lora_weights
    ours, theirs = (
        load_file(tmp_path / one / "adapter_model.safetensors") for one in ("ours", "theirs")
    )
    assert set(ours) == set(theirs)
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=2e-7, atol=0)
    config = json.loads((tmp_path / "theirs" / "adapter_config.json").read_text())
    assert {key: config[key] for key in ("r", "lora_alpha")} == {
        key: conversion.config[key] for key in ("r", "lora_alpha")
    }
    assert relative(logits(loaded(base, tmp_path / "ours")), logits(model)) < SAME


def test_pissa_beside_its_residual_base_needs_the_original_by_name(tmp_path: Path) -> None:
    base = tiny_models.llama(tmp_path / "original")
    model = adapted(base, init_lora_weights="pissa")
    model.peft_config["default"].init_lora_weights = True
    initial = saved(model, tmp_path / "residual" / "pissa_init")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        residual = model.unload()
        residual.save_pretrained(tmp_path / "residual")
    again = peft.PeftModel.from_pretrained(live(tmp_path / "residual"), str(initial),
                                           is_trainable=True)  # fmt: skip
    trained = saved(train(again), tmp_path / "trained")
    with pytest.raises(OptionError, match=r"does not tell the original model .* `base`"):
        conversion_of(str(initial), str(trained))
    written(conversion_of(str(initial), str(trained), base=str(base)), tmp_path / "ours")
    assert relative(logits(loaded(base, tmp_path / "ours")), logits(again)) < SAME


# --- other layouts and families -----------------------------------------------------------------


def test_mirror_is_a_plain_lora_already_and_compresses_as_stored(tmp_path: Path) -> None:
    base = tiny_models.llama(tmp_path / "original")
    model = mirrored(adapted(base, r=6, lora_alpha=6))
    out = saved(model, tmp_path / "out")
    record(out, base, layout="mirror")
    trained = saved(train(model, lr=0.1), tmp_path / "trained")  # far from any symmetry
    with pytest.raises(OptionError, match=r"mirror layout, it is a plain LoRA .* `rank`"):
        conversion_of(str(out), str(trained))
    energies = written(conversion_of(str(out), str(trained), rank=5), tmp_path / "lora")
    made, was = (
        loaded(base, one).base_model.model.get_submodule(name).get_delta_weight("default").double()
        for name in ["model.layers.0.mlp.down_proj"]
        for one in (tmp_path / "lora", trained)
    )
    S = torch.linalg.svdvals(was)
    assert float((made - was).norm()) == pytest.approx(float(S[5:].norm()), rel=1e-4)
    assert 0 < discarded_share(energies) < 0.5
    with pytest.raises(OptionError, match=r"`rank` 6: .* 1 … 5; rank 6 is exact"):
        conversion_of(str(out), str(trained), rank=6)


def test_anchor_converts_to_its_difference(tmp_path: Path) -> None:
    base = tiny_models.llama(tmp_path / "original")
    model = initialised(adapted(base))
    out = tmp_path / "out"
    adapter = saved(model, out / "adapter")
    shutil.copytree(adapter, out / "anchor")
    record(out, base, layout="anchor")
    trained = saved(train(model), tmp_path / "trained")
    conversion = conversion_of(str(out), str(trained))
    written(conversion, tmp_path / "lora")
    assert relative(logits(loaded(base, tmp_path / "lora")), logits(model)) < SAME


def test_conv1d_keeps_the_shape_of_its_factors(tmp_path: Path) -> None:
    base = tiny_models.gpt2(tmp_path / "original")
    model = adapted(base, leaves=("c_attn", "c_proj", "c_fc"), fan_in_fan_out=True)
    initial = saved(initialised(model), tmp_path / "initial")
    trained = saved(train(model), tmp_path / "trained")
    conversion = conversion_of(str(initial), str(trained), base=str(base))
    assert conversion.config["fan_in_fan_out"] is True
    written(conversion, tmp_path / "lora")
    assert relative(logits(loaded(base, tmp_path / "lora")), logits(model)) < SAME


@pytest.mark.parametrize("rank", [None, 7, 8])
def test_experts_that_peft_stacks_while_it_trains(tmp_path: Path, rank: int | None) -> None:
    base = tiny_models.qwen3_moe(tmp_path / "original")
    out = expert_folder(base, tmp_path / "out")
    model = live(out / "residual")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", DEPRECATION, FutureWarning)
        warnings.filterwarnings("ignore", PATTERNS, RuntimeWarning)
        model = peft.PeftModel.from_pretrained(model, str(out / "adapter"), is_trainable=True)
    assert relative(logits(model.eval()), logits(live(base))) < SAME
    trained = saved(train(model), tmp_path / "trained")
    conversion = conversion_of(str(out), str(trained), rank=rank)
    assert set(conversion.config["target_parameters"]) == {"gate_up_proj", "down_proj"}
    energies = written(conversion, tmp_path / "lora")
    missed = relative(logits(loaded(base, tmp_path / "lora")), logits(model))
    assert missed < (1e-2 if rank == 7 else SAME)
    checks = verify_adapter(str(tmp_path / "lora")).checks
    assert all(check.ok for check in checks)
    warned = {check.id for check in checks if check.is_warning}
    if rank is None:
        assert energies == ()
        assert warned == {"vllm"}  # gate_up_proj has twice the rank of the others
    else:
        assert (1e-12 < discarded_share(energies) < 0.05) == (rank == 7)
        assert warned == set()  # one rank for all


# --- what does not belong together --------------------------------------------------------------


def test_another_run_is_refused_by_what_differs(
    run: tuple[Path, Path, Path, Tensor], tmp_path: Path
) -> None:
    _, out, trained, _ = run
    other = Path(shutil.copytree(trained, tmp_path / "other"))
    edit(other, lora_alpha=4)
    with pytest.raises(PairingError, match=r"down_proj: scaling 1\.0 in .*other, 2\.0 in .*out"):
        conversion_of(str(out), str(other))
    key = "base_model.model.model.layers.0.mlp.up_proj.lora_{}.weight"
    tensors = load_file(trained / "adapter_model.safetensors")
    wide = {**tensors, key.format("A"): torch.zeros(4, 17)}
    edit(other, lora_alpha=8)
    save_file(wide, other / "adapter_model.safetensors")
    with pytest.raises(PairingError, match=r"up_proj: shape \(24, 17\) in .*, \(24, 16\) in"):
        conversion_of(str(out), str(other))
    fewer = {name: one for name, one in tensors.items() if "layers.0.mlp.up_proj" not in name}
    save_file(fewer, other / "adapter_model.safetensors")
    with pytest.raises(
        PairingError, match=r"1 modules of .*out/adapter are not in .*other: model\.layers\.0"
    ):
        conversion_of(str(out), str(other))
    with pytest.raises(PairingError, match=r"1 modules of .*checkpoint-3 are not in .*other"):
        conversion_of(str(other), str(trained))


def test_an_adapter_of_the_original_is_refused_for_a_residual(
    run: tuple[Path, Path, Path, Tensor], tmp_path: Path
) -> None:
    """Its initial product was never taken out of that base, so it must not be taken out here."""
    base, out, trained, _ = run
    other = Path(shutil.copytree(trained, tmp_path / "other"))
    for name in (str(base), f"{base}/"):
        edit(other, base_model_name_or_path=name)
        with pytest.raises(PairingError, match=r"its base is the original model .*, but"):
            conversion_of(str(out), str(other))
        with pytest.raises(PairingError, match="its base is the original model"):
            conversion_of(str(out), str(other), base=str(base))


@pytest.mark.parametrize(
    ("settings", "called"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"trainable_token_indices": [1, 2]}, "trainable tokens"),
        ({"leaves": ("embed_tokens", "q_proj")}, "an adapted embedding, model.embed_tokens"),
    ],
)
def test_more_than_plain_lora_is_refused_by_name(
    tmp_path: Path, settings: dict[str, Any], called: str
) -> None:
    base = tiny_models.llama(tmp_path / "original")
    trained = saved(adapted(base, **settings), tmp_path / "trained")
    with pytest.raises(
        UnsupportedFormat, match=rf"convert-adapter reads plain LoRA only.*{called}"
    ):
        conversion_of(str(trained), str(trained), base=str(base))
    assert verify_adapter(str(trained), base=str(base)).ok


def test_an_adapter_that_was_not_trained_is_told(run: tuple[Path, Path, Path, Tensor]) -> None:
    _, out, trained, _ = run
    (note,) = conversion_of(str(out), str(out / "adapter")).notes
    assert "nothing was trained, and the update is zero" in note
    assert conversion_of(str(out), str(trained)).notes == ()


def test_a_conversion_knows_itself(run: tuple[Path, Path, Path, Tensor], tmp_path: Path) -> None:
    base, out, trained, said = run
    folder = tmp_path / "plain"
    write_conversion(conversion_of(str(out), str(trained)), folder, command=["geoscope", "…"])
    known = json.loads((folder / "geoscope.json").read_text(encoding="utf-8"))
    assert (known["method"], known["layout"], known["rank"]) == ("converted", None, 8)
    assert known["base"]["reference"] == str(base)
    assert known["base"]["sha256"]
    assert known["from"] == {"initial": str(out / "adapter"), "trained": str(trained)}
    assert relative(logits(loaded(base, folder)), said) < SAME
    found = {check.id: check for check in verify_adapter(str(folder)).checks}
    assert all(check.ok for check in found.values())
    assert found["layout"].text.startswith("converted, plain LoRA")
    assert found["sha256"].text.startswith(f"{28 + len(list(base.glob('*.safetensors')))} hashes")
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert "the trained update exactly" in card
    assert "--max-lora-rank 8" in card
    tensors = load_file(folder / "adapter_model.safetensors")
    next(iter(tensors.values()))[0, 0] += 1
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    assert not verify_adapter(str(folder)).ok
    with pytest.raises(OptionError, match="converted adapter, it is a plain LoRA"):
        conversion_of(str(folder), str(folder))


def test_the_adapters_that_are_read_are_never_written_to(
    run: tuple[Path, Path, Path, Tensor],
) -> None:
    _, out, trained, _ = run
    for read in (out / "adapter", trained):
        before = {path.name: file_sha256(path) for path in read.iterdir()}
        with pytest.raises(CheckpointError, match="never written to"):
            write_conversion(conversion_of(str(out), str(trained)), read, force=True)
        assert {path.name: file_sha256(path) for path in read.iterdir()} == before


@pytest.mark.parametrize("recorded", [True, False])
def test_a_compressed_update_of_zero_is_no_mirror(
    run: tuple[Path, Path, Path, Tensor], tmp_path: Path, recorded: bool
) -> None:
    base, out, _, _ = run
    folder = tmp_path / "plain"
    write_conversion(conversion_of(str(out), str(out / "adapter"), rank=2), folder)
    if not recorded:
        (folder / "geoscope.json").unlink()
    found = verify_adapter(str(folder), base=str(base))
    assert (found.layout, found.ok) == (None, True)


def test_a_converted_adapter_is_not_converted_again(
    run: tuple[Path, Path, Path, Tensor], tmp_path: Path
) -> None:
    _, out, trained, _ = run
    written(conversion_of(str(out), str(trained)), tmp_path / "lora")
    with pytest.raises(PairingError, match=r"rank 8 in .*lora, 4 in"):
        conversion_of(str(out), str(tmp_path / "lora"))


@pytest.mark.parametrize("rank", [0, -1, 8, 100])
def test_a_rank_that_does_not_compress_is_refused(
    run: tuple[Path, Path, Path, Tensor], rank: int
) -> None:
    _, out, trained, _ = run
    with pytest.raises(OptionError, match=rf"`rank` {rank}: takes 1 … 7; rank 8 is exact"):
        conversion_of(str(out), str(trained), rank=rank)


@pytest.mark.parametrize("rank", [None, 3])
def test_a_diverged_run_is_told_with_its_module(
    run: tuple[Path, Path, Path, Tensor], tmp_path: Path, rank: int | None
) -> None:
    _, out, trained, _ = run
    other = Path(shutil.copytree(trained, tmp_path / "other"))
    tensors = load_file(other / "adapter_model.safetensors")
    tensors["base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"][0, 0] = torch.nan
    save_file(tensors, other / "adapter_model.safetensors")
    with pytest.raises(NumericsError, match=r"^model\.layers\.1\.mlp\.up_proj: .*NaN"):
        conversion_of(str(out), str(other), rank=rank).write(lambda name, tensor: None)


def test_tensors_of_modules_to_save_travel_and_strangers_do_not(
    run: tuple[Path, Path, Path, Tensor], tmp_path: Path
) -> None:
    _, out, trained, _ = run
    other = Path(shutil.copytree(trained, tmp_path / "other"))
    tensors = load_file(other / "adapter_model.safetensors")
    head = "base_model.model.lm_head.weight"
    tensors[head] = torch.randn(48, 16).to(torch.bfloat16)
    save_file(tensors, other / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match=r"1 tensors are neither factors .*lm_head"):
        conversion_of(str(out), str(other))
    edit(other, modules_to_save=["lm_head"])
    conversion = conversion_of(str(out), str(other))
    assert conversion.plan.order[-1] == head
    written(conversion, tmp_path / "lora")
    made = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    assert torch.equal(made[head], tensors[head])
    assert any("modules_to_save are copied" in note for note in conversion.notes)


def test_a_hub_reference_keeps_its_commit(
    run: tuple[Path, Path, Path, Tensor], tmp_path: Path
) -> None:
    base, out, trained, _ = run
    copy = Path(shutil.copytree(out, tmp_path / "out"))
    record(copy, base, layout="residual", base={"reference": "org/name", "commit": "c0ffee"})
    config = conversion_of(str(copy), str(trained)).config
    assert (config["base_model_name_or_path"], config["revision"]) == ("org/name", "c0ffee")
    config = conversion_of(str(copy), str(trained), base="org/other@v2").config
    assert (config["base_model_name_or_path"], config["revision"]) == ("org/other", "v2")


def test_the_config_has_no_keys_beyond_those_of_old_peft(
    run: tuple[Path, Path, Path, Tensor],
) -> None:
    _, out, trained, _ = run
    config = conversion_of(str(out), str(trained)).config
    least = adapter_config(base="x", rank=1, alpha=1, targets=["q_proj"])
    assert list(config) == sorted(least)
    assert config["init_lora_weights"] is True
    assert config["task_type"] == "CAUSAL_LM"


def test_inputs_stay_as_they_are(run: tuple[Path, Path, Path, Tensor], tmp_path: Path) -> None:
    _, out, trained, _ = run
    files = [path for top in (out, trained) for path in sorted(top.rglob("*")) if path.is_file()]
    before = [file_sha256(path) for path in files]
    written(conversion_of(str(out), str(trained), rank=3), tmp_path / "lora")
    assert [file_sha256(path) for path in files] == before
