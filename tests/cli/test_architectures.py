"""What a user sees of fused, stacked, quantised, renamed and resized models."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.helpers.matrices import gaussian, save_model, updated
from tests.helpers.running import Done, Weights, run, weights, write_pair

with warnings.catch_warnings():  # of packages that transformers imports
    warnings.simplefilter("ignore")
    transformers = pytest.importorskip("transformers")

Models = dict[str, Path]
Q0 = "model.layers.0.self_attn.q_proj.weight"
EMBED = "model.embed_tokens.weight"


def one_line(done: Done) -> bool:
    return done.err.startswith("geoscope: ") and done.err.count("\n") == 1


# --- experts --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> Models:
    """A base and a tuned Qwen3-MoE: as transformers saves them, and as they are live."""
    root = tmp_path_factory.mktemp("experts")
    config = transformers.Qwen3MoeConfig(
        hidden_size=32, intermediate_size=48, moe_intermediate_size=24, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, num_experts=3,
        num_experts_per_tok=2, vocab_size=48,
    )  # fmt: skip
    found: Models = {}
    generator = torch.Generator().manual_seed(0)
    model = transformers.Qwen3MoeForCausalLM(config)
    for side, scale in (("base", 0.3), ("tuned", 0.01)):
        with torch.no_grad():
            for parameter in model.parameters():
                drawn = torch.randn(parameter.shape, generator=generator) * scale
                parameter.copy_(drawn if side == "base" else parameter + drawn)
        model.save_pretrained(root / side)
        found[side] = root / side
        found[f"{side} live"] = root / f"{side}.bin"
        torch.save(model.state_dict(), found[f"{side} live"])
    return found


def numbers(done: Done) -> dict[str, Any]:
    report = done.report
    return {key: report[key] for key in ("layers", "vectors", "summary")}


def test_stacked_and_per_expert_layouts_give_one_report(experts: Models) -> None:
    reports = [
        run("compare", experts[base], experts[tuned], "--json", "--no-resume")
        for base, tuned in (
            ("base", "tuned"), ("base live", "tuned live"), ("base", "tuned live"),
        )
    ]  # fmt: skip
    assert [done.code for done in reports] == [0, 0, 0]
    first = numbers(reports[0])
    assert len([one for one in first["layers"] if ".experts." in one["name"]]) == 9
    assert first["summary"]["modules"].keys() >= {
        f"experts.{one}_proj" for one in ("gate", "up", "down")
    }
    assert all(numbers(done) == first for done in reports[1:])
    assert reports[0].report["coverage"]["status"] == "COMPLETE"


def test_the_tensors_of_the_file_are_counted_and_the_parts_shown(experts: Models) -> None:
    done = run("inspect", experts["base live"])
    lines = done.out.splitlines()
    assert "14 tensors" in lines[1]
    assert "     3 × experts.gate_proj      24×32          float32" in lines


# --- FP8 ------------------------------------------------------------------------------------------


def fp8(tensors: Weights, block: int = 16) -> Weights:
    """Every matrix of a block in FP8, as in the files of DeepSeek."""
    found: Weights = {}
    for name, W in tensors.items():
        if ".layers." not in name or W.dim() < 2:
            found[name] = W.bfloat16()
            continue
        q = torch.zeros(W.shape, dtype=torch.float8_e4m3fn)
        s = torch.zeros(-(-len(W) // block), -(-W.shape[1] // block))
        for i in range(len(s)):
            for j in range(s.shape[1]):
                rows, columns = (slice(k * block, (k + 1) * block) for k in (i, j))
                s[i, j] = W[rows, columns].abs().max() / 448
                q[rows, columns] = (W[rows, columns] / s[i, j]).to(q.dtype)
        found |= {name: q, f"{name}_scale_inv": s}
    return found


def write_fp8(folder: Path, tensors: Weights) -> Path:
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors")
    quantization = {"quant_method": "fp8", "weight_block_size": [16, 16]}
    (folder / "config.json").write_text(
        json.dumps({"model_type": "llama", "quantization_config": quantization})
    )
    return folder


@pytest.fixture(scope="module")
def quantised(tmp_path_factory: pytest.TempPathFactory) -> Models:
    """One model in bf16, in FP8, that FP8 trained on in fp32, and a tuned one in FP8."""
    root = tmp_path_factory.mktemp("fp8")
    numbers = fp8(weights())
    read: Weights = {}
    for name, q in numbers.items():
        if not name.endswith("_scale_inv"):
            scale = numbers.get(f"{name}_scale_inv")
            read[name] = q.float() if scale is None else q.float() * expanded(scale, q)
    trained = {
        name: updated(W.double(), gaussian(*W.shape, seed=7), 1e-3).float()
        if ".layers." in name and W.dim() == 2
        else W
        for name, W in read.items()
    }
    return {
        "bf16": save_model(root / "bf16", {name: W.bfloat16() for name, W in weights().items()}),
        "fp8": write_fp8(root / "fp8", numbers),
        "trained on": save_model(root / "trained", trained),
        "tuned fp8": write_fp8(root / "tuned", fp8(weights(100, rho=0.2))),
    }


def expanded(scale: Tensor, like: Tensor) -> Tensor:
    wide = scale.repeat_interleave(16, 0).repeat_interleave(16, 1)
    return wide[: like.shape[0], : like.shape[1]]


ERROR = "is block-scaled FP8: its quantisation error, about 0.027 of the weights, is"


def notes(done: Done) -> set[str]:
    return {note for layer in done.report["layers"] for note in layer.get("notes", ())}


def test_the_error_of_quantising_is_told_and_is_the_floor(quantised: Models) -> None:
    """The same weights in bf16 and FP8: what is between them is rounding and nothing else."""
    for base, tuned, role in (("fp8", "bf16", "base"), ("bf16", "fp8", "tuned")):
        done = run("anisotropy", quantised[base], quantised[tuned], "--json", "--no-resume")
        assert done.code == 0
        assert notes(done) == {f"{role} {ERROR} in the update; ν counts it"}
        for layer in done.report["layers"]:
            assert layer["values"]["precision_ratio"] == pytest.approx(1, abs=0.2)
            assert layer["status"]["update.stable_rank"] == "BELOW_RESOLUTION"
            assert layer["nulls"].get("update_sparsity_exact") is None


def test_training_that_started_from_fp8_has_its_own_floor(quantised: Models) -> None:
    done = run("anisotropy", quantised["fp8"], quantised["trained on"], "--json", "--no-resume")
    left_out = f"base {ERROR} larger than the update, which started from FP8; ν leaves it out"
    assert notes(done) == {left_out}
    for layer in done.report["layers"]:
        assert layer["values"]["relative_update"] == pytest.approx(1e-3, rel=1e-3)
        assert layer["values"]["precision_ratio"] < 1e-3
        assert layer["values"]["update.stable_rank"] is not None


def test_two_fp8_models_have_the_rounding_of_both(quantised: Models) -> None:
    done = run(
        "compare", quantised["fp8"], quantised["tuned fp8"], "--json", "--no-resume", "--masks"
    )
    assert {note.split()[0] for note in notes(done)} == {"base", "tuned"}
    for layer in done.report["layers"]:
        # Both sides lose 2.7 % of themselves, and the update has 20 %.
        assert layer["values"]["precision_ratio"] == pytest.approx(0.027 * 2**0.5 / 0.2, rel=0.2)
        assert layer["status"]["mask_overlap_low"] == "NOT_APPLICABLE"
    scales = {one["name"] for one in done.report["coverage"]["skipped"]}
    assert f"{Q0}_scale_inv" not in scales  # read with its weight
    shown = run("compare", quantised["fp8"], quantised["tuned fp8"], "--no-resume", "--masks", "-v")
    assert "Which weights a grid rounds away is not known" in " ".join(shown.out.split())


def test_two_tuned_models_of_which_one_is_fp8_have_no_null_of_their_masks(
    quantised: Models,
) -> None:
    """The rounding cells of FP8 blocks are not known; those of bf16 are."""
    asked = ("--json", "--no-resume", "--layers", "0")
    for second, known in (("tuned fp8", False), ("trained on", True)):
        done = run(
            "alignment", quantised["bf16"], quantised["trained on"], quantised[second], *asked
        )
        assert done.code == 0
        for one in done.report["overlaps"]:
            assert one["values"]["mask_jaccard"] is not None
            assert ("mask_jaccard" in one["nulls"]) == known


def test_an_fp8_model_beside_itself_is_unchanged(quantised: Models) -> None:
    done = run("compare", quantised["fp8"], quantised["fp8"], "--json", "--no-resume")
    assert {layer["values"]["relative_update"] for layer in done.report["layers"]} == {0}


def test_results_of_fp8_and_of_the_same_numbers_in_fp32_are_kept_apart(
    quantised: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The numbers read are equal; the rounding behind them is not."""
    from geoscope.sources.open import open_checkpoint

    monkeypatch.setenv("GEOSCOPE_CACHE", str(tmp_path / "cache"))
    model = open_checkpoint(str(quantised["tuned fp8"]))
    names = [name for name in model.tensors if not name.endswith("_scale_inv")]
    plain = save_model(tmp_path / "wide", {name: model.read(name).clone() for name in names})
    ratios = [
        run("anisotropy", quantised["bf16"], tuned, "--json").layer(Q0)["values"]["precision_ratio"]
        for tuned in (quantised["tuned fp8"], plain)
    ]
    assert ratios[0] > 0.1 > 1e-3 > ratios[1]


@pytest.mark.parametrize("command", ["init-adapter", "extrapolate"])
def test_what_writes_models_refuses_fp8_by_name(
    quantised: Models, tmp_path: Path, command: str
) -> None:
    model = quantised["fp8"]
    if command == "init-adapter":
        done = run(command, model, "--out", tmp_path / "out")
    else:
        other = quantised["tuned fp8"]
        done = run(command, other, "--base", model, "--steps", "1", "--to-step", "2", "--out",
                   tmp_path / "out")  # fmt: skip
        model = other
    assert done.code == 1 and one_line(done)
    assert f"`{model}`: weights are block-scaled FP8 (tensor model.layers.0." in done.err
    assert f"{command} needs fp32, fp16 or bf16. Use a bf16 conversion." in done.err
    assert not (tmp_path / "out").exists()


def test_other_precisions_of_a_pair_are_told_with_their_floor(tmp_path: Path) -> None:
    base, _ = write_pair(tmp_path)
    for dtype, said in (
        (torch.float16, "base holds float32, tuned float16: ν counts the rounding of tuned, "
                        "about 0.00021 of the weights"),
        (torch.float64, "base holds float32, tuned float64: ν counts the rounding of tuned, "
                        "about 4.7e-17 of the weights; a base rounded after training began adds "
                        "about 2.5e-08"),
    ):  # fmt: skip
        tuned = {name: W.to(dtype) for name, W in weights(100).items()}
        folder = save_model(tmp_path / str(dtype), tuned)
        done = run("anisotropy", base, folder, "--json", "--no-resume")
        assert notes(done) == {said}
        share = float(said.split("about ")[1].split()[0])
        # The update has 2 % of the weights.
        assert 0.02 * done.layer(Q0)["values"]["precision_ratio"] == pytest.approx(share, rel=0.1)


# --- names ----------------------------------------------------------------------------------------


def test_a_rule_for_names_brings_two_spellings_together(models: Models, tmp_path: Path) -> None:
    spelled = {name.replace("model.", "policy.net."): W for name, W in weights(100).items()}
    tuned = save_model(tmp_path / "tuned", spelled)
    refused = run("compare", models["base"], tuned)
    assert refused.code == 1 and "--map-name '^model\\.=policy.net.'" in refused.err
    done = run("compare", models["base"], tuned, "--map-name", r"^policy\.net\.=model.", "--json")
    assert done.code == 0 and done.report["coverage"]["status"] == "COMPLETE"
    (rename,) = [one for one in done.report["coverage"]["renamed"] if one["base"] == Q0]
    assert rename["rule"].endswith(r"--map-name ^policy\.net\.=model.")
    assert numbers(done)["layers"] == numbers(
        run("compare", models["base"], models["tuned"], "--json")
    )["layers"]  # fmt: skip


def test_a_rule_that_changes_nothing_is_told(models: Models) -> None:
    done = run("compare", models["base"], models["tuned"], "--map-name", "^nowhere=else")
    assert done.code == 0
    assert "note: --map-name ^nowhere=else: changes no name\n" in done.err


@pytest.mark.parametrize("command", ["compare", "inspect", "trajectory"])
@pytest.mark.parametrize("rule", ["no sign", "(=x", r"a=\1", r"a=\q"])
def test_a_bad_rule_is_a_usage_error(models: Models, command: str, rule: str) -> None:
    done = run(command, models["base"], models["tuned"], "--map-name", rule)
    assert done.code == 2 and one_line(done)
    assert f"--map-name {rule!r}" in done.err


# --- resized vocabularies -------------------------------------------------------------------------


@pytest.fixture
def resized(tmp_path: Path) -> tuple[Path, Path]:
    def grow(tuned: Weights) -> None:
        W = updated(weights()[EMBED].double(), gaussian(50, 24, seed=5), 0.02).float()
        tuned[EMBED] = torch.cat([W, torch.full((3, 24), 9.0)])

    return write_pair(tmp_path, grow)


def test_a_resized_vocabulary_is_missing_with_the_way_to_compare_it(
    resized: tuple[Path, Path],
) -> None:
    done = run("compare", *resized, "--include", "q_proj|embed")
    assert done.code == 0 and "PARTIAL 1 of 3 matrices not compared" in done.out
    said = f"note: {EMBED}: 50 rows in base, 53 in tuned; --allow-vocab-resize compares the rows"
    assert said in done.err
    alone = run("compare", *resized, "--include", "embed")
    assert alone.code == 1 and "--allow-vocab-resize compares the rows that both have" in alone.err


@pytest.mark.parametrize("swapped", [False, True])
def test_the_rows_that_both_have_are_compared_on_request(
    resized: tuple[Path, Path], tmp_path: Path, swapped: bool
) -> None:
    base, tuned = reversed(resized) if swapped else resized
    asked = ("--include", "embed", "--json", "--no-resume")
    done = run("anisotropy", base, tuned, *asked, "--allow-vocab-resize")
    assert done.code == 0 and done.report["coverage"]["status"] == "COMPLETE"
    rows = "53 rows in base, 50 in tuned" if swapped else "50 rows in base, 53 in tuned"
    assert f"note: {EMBED}: {rows}; the first 50 are compared" in done.err
    cut = {}
    for side, folder in (("base", base), ("tuned", tuned)):
        tensors = load_file(folder / "model.safetensors")
        cut[side] = save_model(tmp_path / f"cut {side}", {**tensors, EMBED: tensors[EMBED][:50]})
    expected = run("anisotropy", cut["base"], cut["tuned"], *asked)
    assert done.report["layers"] == expected.report["layers"]
    assert done.layer(EMBED)["shape"] == [50, 24]


def test_a_resized_tied_embedding_is_counted_once(tmp_path: Path) -> None:
    """The head is stored on both sides, and is the embedding."""
    sides = []
    for side, rows in (("base", 50), ("tuned", 53)):
        E = gaussian(53, 24, seed=97)[:rows]
        E = (E if side == "base" else updated(E, gaussian(rows, 24, seed=5), 0.02)).float()
        tensors = {**weights(), EMBED: E, "lm_head.weight": E.clone()}
        config = {"model_type": "llama", "tie_word_embeddings": True}
        sides.append(save_model(tmp_path / side, tensors, config=config))
    done = run("anisotropy", *sides, "--include", "embed|lm_head", "--json", "--allow-vocab-resize")
    assert [layer["name"] for layer in done.report["layers"]] == [EMBED]
    reasons = {one["name"]: one["reason"] for one in done.report["coverage"]["skipped"]}
    assert reasons["lm_head.weight"] == f"tied to {EMBED}: counted once"
    assert done.report["coverage"]["status"] == "COMPLETE" and "lm_head" not in done.err


def test_a_reshaped_matrix_is_no_resized_vocabulary(tmp_path: Path) -> None:
    def cut(tuned: Weights) -> None:
        tuned[Q0] = tuned[Q0][:20]

    done = run("compare", *write_pair(tmp_path, cut), "--allow-vocab-resize", "--strict")
    assert done.code == 1 and "1 matrices not compared" in done.err
