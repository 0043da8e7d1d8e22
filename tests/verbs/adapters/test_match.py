"""Do adapters find the tensors of their base: other names, parts, packings, two of one base?"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import geoscope
from geoscope.errors import CheckpointError, OptionError
from geoscope.peft.adapter import read_adapter
from geoscope.verbs.adapters.verify import verify_adapter
from tests.helpers import tiny_models
from tests.helpers.merged import Made, lora, made, tuned_weights
from tests.helpers.running import run

EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
PREFIX = "base_model.model."
FACTORS = "adapter_model.safetensors"


def put(folder: Path, tensors: Mapping[str, Tensor], **config: Any) -> Path:
    """An adapter in a folder."""
    folder.mkdir(parents=True)
    whole = {"peft_type": "LORA", "r": 3, "lora_alpha": 5, "target_modules": ["q_proj"], **config}
    save_file(
        {name: one.contiguous() for name, one in tensors.items()},
        folder / FACTORS,
        metadata={"format": "pt"},
    )
    (folder / "adapter_config.json").write_text(json.dumps(whole), encoding="utf-8")
    return folder


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))


def factors(paths: Mapping[str, tuple[int, int]], *, seed: int = 0) -> dict[str, Tensor]:
    """Factors of rank 3 of some modules (out, in)."""
    generator = torch.Generator().manual_seed(seed)
    found: dict[str, Tensor] = {}
    for path, (m, n) in paths.items():
        found[f"{PREFIX}{path}.lora_A.weight"] = torch.randn(3, n, generator=generator)
        found[f"{PREFIX}{path}.lora_B.weight"] = torch.randn(m, 3, generator=generator)
    return found


def product(tensors: Mapping[str, Tensor], path: str) -> Tensor:
    A, B = (tensors[f"{PREFIX}{path}.lora_{side}.weight"].double() for side in "AB")
    return 5 / 3 * B @ A


def assert_same(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert found
    for name, weight in found.items():
        gap = (weight - expected[name]).abs().max()
        assert gap <= 1e-9 * expected[name].abs().max(), name


# --- stacked experts as PEFT up to 0.18 packed them -----------------------------------------------


def old_packing(adapter: Path, out: Path, experts: int = 4, **config: Any) -> Path:
    """The same update, with A over the first side of each parameter (E, d1, d2) and B over d2."""
    tensors = load_file(adapter / FACTORS)
    for key in [one for one in tensors if ".experts." in one and "lora_A" in one]:
        A, B = tensors[key], tensors[key.replace("lora_A", "lora_B")]
        rank = len(A) // experts
        stack = B.reshape(len(B), rank, experts)
        tensors[key] = stack.permute(2, 1, 0).reshape(experts * rank, len(B))
        turned = A.reshape(experts, rank, -1).permute(2, 1, 0)
        tensors[key.replace("lora_A", "lora_B")] = turned.reshape(A.shape[1], rank * experts)
    return put(out, tensors, **{**config_of(adapter), **config})


def moe(root: Path, parameters: list[str], **sides: Any) -> Made:
    def family(folder: Path) -> Path:
        return tiny_models.qwen3_moe(folder, **sides)

    return made(root, family, lora(target_parameters=parameters, target_modules=["q_proj"]))


@pytest.mark.parametrize("width", [8, 12])  # gate_up is square, and is not
def test_experts_of_the_old_packing_are_turned_and_said(tmp_path: Path, width: int) -> None:
    case = moe(tmp_path, EXPERTS, moe_intermediate_size=width)
    old = old_packing(case.adapter, tmp_path / "old")
    expected = tuned_weights(case.base, case.merged)
    assert_same(tuned_weights(case.base, case.adapter), expected)
    assert_same(tuned_weights(case.base, old), expected)
    done = run("collapse", case.base, old, "--json")
    notes = done.report["provenance"]["parameters"]["notes"]
    assert any("transposed update" in one for one in notes)
    found = {one.id: one for one in verify_adapter(str(old), base=str(case.base)).checks}
    assert not found["packing"].ok  # the config names a PEFT that reads it otherwise
    sound = verify_adapter(str(case.adapter), base=str(case.base))
    assert sound.ok
    assert "packing" not in {one.id for one in sound.checks}


def llama4(folder: Path, **sides: Any) -> Path:
    """Experts stored (in, out), in a class that does not call itself transposed."""
    settings = {
        "hidden_size": 16, "intermediate_size_mlp": 16, "num_hidden_layers": 1, "head_dim": 8,
        "num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": 4,
        "interleave_moe_layer_step": 1, "vocab_size": 32, "tie_word_embeddings": False,
        "pad_token_id": 0, **sides,
    }  # fmt: skip
    torch.manual_seed(0)
    model = tiny_models.transformers.Llama4ForCausalLM(
        tiny_models.transformers.Llama4TextConfig(**settings)
    )
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    model.double().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("width", [8, 12])  # gate_up is square, and is not
def test_experts_of_llama_4_are_packed_the_other_way_round(tmp_path: Path, width: int) -> None:
    """PEFT from 0.19 on packs the transpose, which is sound; up to 0.18 it packed the update."""
    names = ["feed_forward.experts.gate_up_proj", "feed_forward.experts.down_proj"]
    config = lora(target_parameters=names, target_modules=["q_proj"])
    case = made(tmp_path, partial(llama4, intermediate_size=width), config)
    old = old_packing(case.adapter, tmp_path / "old")
    expected = tuned_weights(case.base, case.merged)
    for adapter, is_sound in ((case.adapter, True), (old, False)):
        assert_same(tuned_weights(case.base, adapter), expected)
        modules = read_adapter(adapter).modules.values()
        assert {one.is_turned for one in modules if one.is_stack} == {is_sound}
        checks = {one.id: one for one in verify_adapter(str(adapter), base=str(case.base)).checks}
        assert ("packing" not in checks) is is_sound
        assert checks["shapes"].ok


def test_a_square_stack_alone_goes_by_the_version_or_not_at_all(tmp_path: Path) -> None:
    case = moe(tmp_path, EXPERTS[:1], moe_intermediate_size=8)
    expected = tuned_weights(case.base, case.merged)
    old = old_packing(case.adapter, tmp_path / "old", peft_version="0.18.1")
    assert_same(tuned_weights(case.base, old), expected)
    check = next(
        one for one in verify_adapter(str(old), base=str(case.base)).checks if one.id == "packing"
    )
    assert check.ok
    assert check.is_warning
    assert_same(tuned_weights(case.base, case.adapter), expected)
    for version in (None, "0.19.0.dev0"):
        silent = old_packing(case.adapter, tmp_path / f"silent{version}", peft_version=version)
        with pytest.raises(CheckpointError, match="peft_version"):
            geoscope.compare(case.base, silent)
        with pytest.raises(CheckpointError, match="peft_version"):
            verify_adapter(str(silent), base=str(case.base))


def test_a_converted_adapter_is_packed_as_the_trained_one(tmp_path: Path) -> None:
    case = moe(tmp_path, EXPERTS, moe_intermediate_size=12)
    old, start = (
        old_packing(folder, tmp_path / name)
        for name, folder in (("old", case.adapter), ("old0", case.start))
    )
    done = run("convert-adapter", start, old, "-o", tmp_path / "out", "--base", case.base)
    assert done.code == 0, done.err
    module = read_adapter(tmp_path / "out").modules["model.layers.0.mlp.experts.gate_up_proj"]
    assert module.is_turned
    difference = tuned_weights(case.base, tmp_path / "out")
    expected = tuned_weights(case.base, case.adapter, initial_adapter=str(case.start))
    for name, weight in difference.items():
        torch.testing.assert_close(weight, expected[name], rtol=1e-5, atol=1e-6)


# --- names ----------------------------------------------------------------------------------------


def renamed(base: Path, out: Path, old: str, new: str) -> Path:
    """The base in one file, with another begin of its names."""
    tensors: dict[str, Tensor] = {}
    for file in base.glob("*.safetensors"):
        tensors |= load_file(file)
    out.mkdir()
    save_file(
        {new + n[len(old) :] if n.startswith(old) else n: t for n, t in tensors.items()},
        out / "model.safetensors",
    )
    shutil.copy(base / "config.json", out)
    return out


def test_an_adapter_of_the_text_model_pairs_with_the_wrapper(tmp_path: Path) -> None:
    case = made(tmp_path, tiny_models.llama, lora())
    wrapper = renamed(case.base, tmp_path / "vlm", "model.", "model.language_model.")
    report = geoscope.compare(wrapper, case.adapter, kind="collapse")
    assert report.coverage.status == "COMPLETE"
    assert len(report.coverage.renamed) == len(report.layers) == 6
    expected = tuned_weights(case.base, case.merged)
    found = tuned_weights(wrapper, case.adapter)
    assert_same({n.replace(".language_model", ""): w for n, w in found.items()}, expected)
    verified = verify_adapter(str(case.adapter), base=str(wrapper))
    assert any("other names in the base" in one for one in verified.notes)


def test_map_name_reaches_adapters_on_either_side(tmp_path: Path) -> None:
    case = made(tmp_path, tiny_models.llama, lora())
    policy = renamed(case.base, tmp_path / "policy", "model.", "actor.net.")
    done = run("collapse", policy, case.adapter)
    assert done.code == 1
    assert "--map-name" in done.err
    for rule in (r"^actor\.net\.=model.", r"^model\.=actor.net."):
        found = tuned_weights(policy, case.adapter, map_name=(rule,))
        expected = tuned_weights(case.base, case.merged)
        assert_same({n.replace("actor.net.", "model."): w for n, w in found.items()}, expected)


def test_split_factors_over_a_fused_base_and_fused_ones_over_split(tmp_path: Path) -> None:
    phi, llama = tiny_models.phi3(tmp_path / "phi"), tiny_models.llama(tmp_path / "llama")
    block = "model.layers.0.self_attn"
    parts = {"q_proj": (16, 16), "k_proj": (8, 16), "v_proj": (8, 16)}
    tensors = factors({f"{block}.{leaf}": shape for leaf, shape in parts.items()})
    split = put(tmp_path / "split", tensors, target_modules=list(parts))
    fused = load_fused(phi)[f"{block}.qkv_proj.weight"].double()
    expected, top = {}, 0
    for leaf, (rows, _) in parts.items():
        weight = fused[top : top + rows]
        expected[f"{block}.{leaf}.weight"] = weight + product(tensors, f"{block}.{leaf}")
        top += rows
    assert_same(tuned_weights(phi, split), expected)

    tensors = factors({f"{block}.qkv_proj": (32, 16)})
    together = put(tmp_path / "fused", tensors, target_modules=["qkv_proj"])
    update, base = product(tensors, f"{block}.qkv_proj"), load_fused(llama)
    rows = dict(zip(parts, update.split([16, 8, 8]), strict=True))
    names = {leaf: f"{block}.{leaf}.weight" for leaf in parts}
    expected = {names[leaf]: base[names[leaf]].double() + rows[leaf] for leaf in parts}
    assert_same(tuned_weights(llama, together), expected)
    notes = geoscope.compare(llama, together).provenance.parameters["notes"]
    assert any("qkv_proj of the adapter is compared as" in one for one in notes)


def load_fused(folder: Path) -> dict[str, Tensor]:
    return {n: t for file in folder.glob("*.safetensors") for n, t in load_file(file).items()}


# --- two adapters of one base ------------------------------------------------------------------


@pytest.mark.parametrize("order", [("sft", "rl"), ("rl", "sft")])
def test_a_module_that_one_of_two_adapters_has_not_is_zero(
    tmp_path: Path, order: tuple[str, str]
) -> None:
    base = tiny_models.llama(tmp_path / "base")
    shapes = {"q_proj": (16, 16), "o_proj": (16, 16)}
    modules = {"sft": ["q_proj"], "rl": ["q_proj", "o_proj"]}
    block = "model.layers.0.self_attn"
    made_factors: dict[str, dict[str, Tensor]] = {}
    for seed, (name, leaves) in enumerate(modules.items()):
        made_factors[name] = factors({f"{block}.{x}": shapes[x] for x in leaves}, seed=seed)
        put(
            tmp_path / name,
            made_factors[name],
            target_modules=leaves,
            base_model_name_or_path=str(base),
        )
    first, second = order
    report = geoscope.compare(tmp_path / first, tmp_path / second, kind="anisotropy")
    assert report.coverage.status == "COMPLETE"
    assert len(report.layers) == 2
    for layer in report.layers:
        path = layer.name.removesuffix(".weight")
        updates = [
            product(made_factors[one], path) if path.endswith(tuple(modules[one])) else 0.0
            for one in (second, first)
        ]
        expected = float(torch.as_tensor(updates[0] - updates[1]).norm())
        assert layer.values["update.frobenius_norm"] == pytest.approx(expected, rel=1e-9)
    notes = report.provenance.parameters["notes"]
    assert sum("alone" in one for one in notes) == 1


def test_two_adapters_of_which_one_replaces_whole_tensors_are_told_the_way(tmp_path: Path) -> None:
    base = tiny_models.llama(tmp_path / "base")
    tensors = factors({"model.layers.0.self_attn.q_proj": (16, 16)})
    named = {"base_model_name_or_path": str(base)}
    one = put(tmp_path / "one", tensors, **named)
    saved = {f"{PREFIX}model.layers.0.self_attn.o_proj.weight": torch.randn(16, 16)}
    two = put(tmp_path / "two", tensors | saved, modules_to_save=["o_proj"], **named)
    with pytest.raises(OptionError, match=r"BASE\+ADAPTER twice"):
        geoscope.compare(one, two)


# --- scope and options -------------------------------------------------------------------------


def test_an_output_head_out_of_scope_is_listed_and_not_missing(tmp_path: Path) -> None:
    base = tiny_models.llama(tmp_path / "base")
    tensors = factors({"model.layers.0.self_attn.q_proj": (16, 16)})
    head = {f"{PREFIX}score.weight": torch.randn(2, 16)}
    adapter = put(tmp_path / "rm", tensors | head, modules_to_save=["score"])
    assert run("compare", base, adapter, "--strict").code == 0
    coverage = geoscope.compare(base, adapter).coverage
    assert coverage.missing == ()
    assert "score.weight" in {one.name for one in coverage.skipped}
    reached = geoscope.Options(include=("score", "q_proj"))
    assert geoscope.compare(base, adapter, options=reached).coverage.missing == ("score.weight",)


def test_rows_that_both_have_of_an_embedding_that_the_adapter_brings(tmp_path: Path) -> None:
    base = tiny_models.llama(tmp_path / "base")
    grown = torch.randn(tiny_models.VOCABULARY + 6, 16, generator=torch.Generator().manual_seed(1))
    tensors = factors({"model.layers.0.self_attn.q_proj": (16, 16)})
    adapter = put(tmp_path / "ad", tensors | {f"{PREFIX}model.embed_tokens.weight": grown})
    text = run("compare", base, adapter, "--details").out
    assert "1 of another shape" in text
    assert "model.embed_tokens.weight" in text
    asked = {"include": ("embed",), "allow_vocab_resize": True}
    found = tuned_weights(base, adapter, **asked)
    expected = {"model.embed_tokens.weight": grown[: tiny_models.VOCABULARY].double()}
    assert_same(found, expected)
