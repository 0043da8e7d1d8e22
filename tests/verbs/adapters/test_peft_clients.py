"""Do PEFT and transformers take the files as they are, and compute the model that they came from?

Warnings are errors, every key is used, and the logits are those of the original. The factors are
drawn, not initialised: any factors must survive the way through the files.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from geoscope.adapters.factors import LoraFactors
from geoscope.adapters.layouts import anchor, mirror, residual
from geoscope.adapters.peft_config import adapter_config, config_bytes, target_modules
from geoscope.adapters.peft_names import (
    expert_findings,
    lora_keys,
    module_paths,
    parameter_keys,
    stack_experts,
)
from geoscope.formats.safetensors_writer import FilePlan, TensorPlan
from geoscope.models.checkpoint import Checkpoint
from geoscope.models.scope import MATRIX, Scope
from geoscope.names import Selection
from geoscope.outputs.model_folder import plan_model, write_model
from geoscope.outputs.output_folder import OutputFolder, travelling_files
from geoscope.sources.open import open_checkpoint
from tests.helpers import tiny_models

with warnings.catch_warnings():  # of packages that peft imports
    warnings.simplefilter("ignore")
    peft = pytest.importorskip("peft")
    import transformers

# Of these packages about each other; none is about the files. The second: PEFT 0.21 turns targets
# of single experts into parameters, notes their rank in `rank_pattern`, and then misses them among
# the modules.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
    pytest.mark.filterwarnings(
        r"ignore:The following (rank|alpha)_pattern keys did not .*gate_up_proj:RuntimeWarning"
    ),
]

FAMILIES: dict[str, Callable[..., Path]] = {
    "llama": tiny_models.llama,
    "qwen2 tied": tiny_models.qwen2_tied,
    "gpt2": tiny_models.gpt2,
    "phi3 fused": tiny_models.phi3,
    "qwen3 moe": tiny_models.qwen3_moe,
    "mixtral": tiny_models.mixtral,
}
every_family = pytest.mark.parametrize("family", FAMILIES)
RANK, ALPHA = 2, 4.0


def draw(shape: tuple[int, ...], seed: int) -> LoraFactors:
    """Factors whose product is as large as a weight of the tiny models."""
    (m, n), generator = shape, torch.Generator().manual_seed(seed)
    B = torch.randn(m, RANK, generator=generator) * 0.3
    A = torch.randn(RANK, n, generator=generator) * 0.3
    return LoraFactors(B, A, ALPHA / RANK, {}, {}, {}, {}, ())


@dataclass
class Written:
    """What went into a folder."""

    checkpoint: Checkpoint
    factors: dict[str, LoraFactors] = field(default_factory=dict)
    keys: set[str] = field(default_factory=set)


ROUTER = r"(mlp|block_sparse_moe)\.gate\.weight"


def adapted_names(checkpoint: Checkpoint, leave_out: str) -> list[str]:
    scope = Scope.of(Selection(exclude=(leave_out,)), checkpoint.tensors.values())
    return [name for name, info in checkpoint.tensors.items() if scope.place(info) == MATRIX]


def write(folder: Path, out: Path, layout: str, exclude: str = ROUTER) -> Written:
    """The steps of the command, on drawn factors."""
    checkpoint = open_checkpoint(str(folder))
    chosen = adapted_names(checkpoint, exclude)
    paths = module_paths(list(checkpoint.tensors), checkpoint.config).paths
    written = Written(checkpoint)
    for seed, name in enumerate(chosen):
        written.factors[name] = draw(checkpoint.tensors[name].shape, seed)
    assert expert_findings([paths[name] for name in chosen], list(paths.values())) == ()
    settings: dict[str, Any] = {
        "targets": target_modules([paths[name] for name in chosen], list(paths.values())),
        "fan_in_fan_out": any(checkpoint.tensors[name].transposed for name in chosen),
        "alpha": ALPHA,
    }
    match layout:
        case "residual":
            write_residual(out / "residual", checkpoint, written.factors)
            config = adapter_config(base=str(out / "residual"), rank=RANK, **settings)
            adapters = {"adapter": {n: (f.A, f.B) for n, f in written.factors.items()}}
        case "mirror":
            config = adapter_config(base=str(folder), rank=2 * RANK, **settings)
            adapters = {"": {n: mirror(f) for n, f in written.factors.items()}}
        case _:
            config = adapter_config(base=str(folder), rank=RANK, **settings)
            both = {n: anchor(f) for n, f in written.factors.items()}
            adapters = {
                part: {n: pairs[i] for n, pairs in both.items()}
                for i, part in enumerate(("adapter", "anchor"))
            }
    for part, pairs in adapters.items():
        tensors = {
            key: tensor
            for name, (A, B) in pairs.items()
            for key, tensor in zip(lora_keys(paths[name]), (A, B), strict=True)
        }
        write_adapter(out / part, config, tensors)
        written.keys |= set(tensors)
    return written


def write_residual(out: Path, checkpoint: Checkpoint, factors: dict[str, LoraFactors]) -> None:
    plan = plan_model(checkpoint, dict.fromkeys(factors, "float32"), {"layout": "residual"})
    small, _ = travelling_files(Path(checkpoint.ref.resolved))
    sizes = plan.sizes | {name: path.stat().st_size for name, path in small.items()}

    def replacement(name: str) -> Tensor | None:
        if name not in factors:
            return None
        made = residual(
            checkpoint.read(name),
            factors[name],
            dtype=torch.float32,
            transposed=checkpoint.tensors[name].transposed,
        )
        assert made.error < 1e-7
        return made.weight

    with OutputFolder(out, sizes, inputs=(Path(checkpoint.ref.resolved),)) as folder:
        for name, path in small.items():
            folder.copy(name, path)
        write_model(folder, "", checkpoint, plan, replacement)


def write_adapter(out: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    plan = FilePlan({key: TensorPlan.of(one) for key, one in tensors.items()}, {"initial": "true"})
    text = config_bytes(config)
    name = "adapter_model.safetensors"
    with OutputFolder(out, {name: plan.nbytes, "adapter_config.json": len(text)}) as folder:
        folder.write("adapter_config.json", text)
        with folder.tensors(name, plan) as writer:
            for key in plan.order:
                writer.write(key, tensors[key])


def load(base: Any, adapter: Path) -> Any:
    """As a user loads it; any warning is an error, and so is a key that is not used."""
    model = peft.PeftModel.from_pretrained(base, adapter, is_trainable=True).eval()
    result = model.load_adapter(adapter, "again")
    assert result.unexpected_keys == []
    assert [key for key in result.missing_keys if "lora_" in key and "again" in key] == []
    model.delete_adapter("again")
    return model


@every_family
def test_residual_and_adapter_are_the_original(tmp_path: Path, family: str) -> None:
    folder = FAMILIES[family](tmp_path / "model")
    original = tiny_models.logits(tiny_models.live(folder))
    write(folder, tmp_path / "out", "residual")
    model = load(tiny_models.live(tmp_path / "out/residual"), tmp_path / "out/adapter")
    tiny_models.assert_same_logits(tiny_models.logits(model), original)
    with model.disable_adapter():  # W_res is another model: the adapter does something
        assert (tiny_models.logits(model) - original).abs().max() > 0.01


@every_family
def test_a_mirror_is_the_original_to_the_bit_in_bf16(tmp_path: Path, family: str) -> None:
    folder = FAMILIES[family](tmp_path / "model", dtype=torch.bfloat16)
    original = tiny_models.logits(tiny_models.live(folder, torch.bfloat16))
    write(folder, tmp_path / "out", "mirror")
    model = load(tiny_models.live(folder, torch.bfloat16), tmp_path / "out")
    assert torch.equal(tiny_models.logits(model), original)
    with model.disable_adapter():
        assert torch.equal(tiny_models.logits(model), original)


@every_family
def test_a_mirror_is_the_original_in_fp32(tmp_path: Path, family: str) -> None:
    folder = FAMILIES[family](tmp_path / "model")
    original = tiny_models.logits(tiny_models.live(folder))
    write(folder, tmp_path / "out", "mirror")
    model = load(tiny_models.live(folder), tmp_path / "out")
    tiny_models.assert_same_logits(tiny_models.logits(model), original)
    with model.disable_adapter():
        assert torch.equal(tiny_models.logits(model), original)


@every_family
def test_both_adapters_of_an_anchor_are_the_original(tmp_path: Path, family: str) -> None:
    folder = FAMILIES[family](tmp_path / "model")
    original = tiny_models.logits(tiny_models.live(folder))
    write(folder, tmp_path / "out", "anchor")
    model = load(tiny_models.live(folder), tmp_path / "out/adapter")
    assert (tiny_models.logits(model) - original).abs().max() > 0.01  # one alone is not
    model.load_adapter(tmp_path / "out/anchor", "anchor")
    model.base_model.set_adapter(["default", "anchor"])
    tiny_models.assert_same_logits(tiny_models.logits(model), original)


def test_untouched_tensors_are_byte_identical_and_shards_keep_their_names(tmp_path: Path) -> None:
    folder = tiny_models.llama(tmp_path / "model", dtype=torch.bfloat16)
    written = write(folder, tmp_path / "out", "residual")
    shards = {path.name for path in folder.glob("*.safetensors")}
    assert len(shards) > 2
    assert {path.name for path in (tmp_path / "out/residual").glob("*.safetensors")} == shards
    after = open_checkpoint(str(tmp_path / "out/residual"))
    for name, info in written.checkpoint.tensors.items():
        assert after.tensors[name].source == info.source
        if name not in written.factors:
            assert after.tensors[name].dtype == info.dtype
            assert torch.equal(after.read(name), written.checkpoint.read(name))
        else:
            assert after.tensors[name].dtype == "float32"
    for name in ("config.json", "generation_config.json"):
        assert (tmp_path / "out/residual" / name).read_bytes() == (folder / name).read_bytes()


def test_a_part_of_the_layers_is_adapted_alone(tmp_path: Path) -> None:
    folder = tiny_models.llama(tmp_path / "model")
    written = write(folder, tmp_path / "out", "residual", r"layers\.1|mlp|o_proj")
    assert len(written.factors) == 3
    model = load(tiny_models.live(tmp_path / "out/residual"), tmp_path / "out/adapter")
    live = {name for name, _ in model.named_parameters() if "lora_" in name}
    assert live == {key.replace(".weight", ".default.weight") for key in written.keys}


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_bare_backbone_is_loaded_under_its_live_names(tmp_path: Path, family: str) -> None:
    """Hub copies of GPT-2 hold `h.0.…`; the live model calls it `transformer.h.0.…`."""
    full = tiny_models.live(FAMILIES[family](tmp_path / "full"))
    getattr(full, full.base_model_prefix).save_pretrained(tmp_path / "bare")
    names = open_checkpoint(str(tmp_path / "bare")).tensors
    assert any(name.startswith(("layers.0.", "h.0.")) for name in names)
    torch.manual_seed(0)  # llama: a head is drawn by transformers
    base = tiny_models.live(tmp_path / "bare")
    original = tiny_models.logits(base)
    write(tmp_path / "bare", tmp_path / "out", "mirror")
    model = load(base, tmp_path / "out")
    tiny_models.assert_same_logits(tiny_models.logits(model), original)


# --- stacked experts ------------------------------------------------------------------------------


def test_target_parameters_reproduce_a_mixture_of_experts(tmp_path: Path) -> None:
    """The other style (`target_parameters`): one adapter for each stacked parameter."""
    folder = tiny_models.qwen3_moe(tmp_path / "model")
    checkpoint = open_checkpoint(str(folder))
    original = tiny_models.logits(tiny_models.live(folder))
    tensors: dict[str, Tensor] = {}
    new: dict[str, Tensor] = {}
    seed = 0
    for layer in range(2):
        container = f"model.layers.{layer}.mlp.experts"
        keys = parameter_keys(container, ["gate_up_proj", "down_proj"])
        for parameter, leaves in (("gate_up_proj", ("gate", "up")), ("down_proj", ("down",))):
            made = []
            for expert in range(4):
                names = [f"{container}.{expert}.{leaf}_proj.weight" for leaf in leaves]
                W = torch.cat([checkpoint.read(name) for name in names])
                seed += 1
                made.append(draw(W.shape, seed))
                rest = residual(W, made[-1], dtype=torch.float32).weight
                new |= dict(zip(names, rest.chunk(len(names)), strict=True))
            stacked = stack_experts([one.A for one in made], [one.B for one in made])
            tensors |= dict(zip(keys[parameter], stacked, strict=True))
    plan = plan_model(checkpoint, dict.fromkeys(new, "float32"), {})
    small, _ = travelling_files(folder)
    sizes = plan.sizes | {name: path.stat().st_size for name, path in small.items()}
    with OutputFolder(tmp_path / "out/residual", sizes) as out:
        for name, path in small.items():
            out.copy(name, path)
        write_model(out, "", checkpoint, plan, new.get)
    config = adapter_config(
        base="x",
        rank=RANK,
        alpha=ALPHA,
        targets=[],
        parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    )
    write_adapter(tmp_path / "out/adapter", config, tensors)
    model = load(tiny_models.live(tmp_path / "out/residual"), tmp_path / "out/adapter")
    tiny_models.assert_same_logits(tiny_models.logits(model), original)


def load_part_of_moe(
    folder: Path, out: Path, exclude: str
) -> tuple[tuple[str, ...], Callable[[], Any]]:
    """What `expert_findings` says to a choice of modules, and how to load it nevertheless."""
    checkpoint = open_checkpoint(str(folder))
    chosen = adapted_names(checkpoint, exclude)
    paths = module_paths(list(checkpoint.tensors), checkpoint.config).paths
    adapted = [paths[name] for name in chosen]
    tensors: dict[str, Tensor] = {}
    for seed, name in enumerate(chosen):
        A, B = mirror(draw(checkpoint.tensors[name].shape, seed))
        tensors |= dict(zip(lora_keys(paths[name]), (A, B), strict=True))
    targets = target_modules(adapted, list(paths.values()))
    config = adapter_config(base=str(folder), rank=2 * RANK, alpha=ALPHA, targets=targets)
    write_adapter(out, config, tensors)
    found = expert_findings(adapted, list(paths.values()))
    return found, lambda: load(tiny_models.live(folder), out)


@pytest.mark.parametrize(
    ("exclude", "config", "raised"),
    [
        pytest.param(rf"{ROUTER}|experts\.0\.", {}, RuntimeError, id="an expert is left out"),
        pytest.param(rf"{ROUTER}|up_proj", {}, ValueError, id="gate without up"),
        pytest.param(rf"{ROUTER}|down_proj", {}, UserWarning, id="gate and up without down"),
        pytest.param(ROUTER, {"mlp_only_layers": [0]}, AssertionError, id="a dense block beside"),
    ],
)
def test_what_is_refused_for_experts_really_fails(
    tmp_path: Path, exclude: str, config: dict[str, Any], raised: type[Exception]
) -> None:
    """Negative control of `expert_findings`: PEFT raises, warns of
    missing keys, or leaves keys without a word."""
    folder = tiny_models.qwen3_moe(tmp_path / "model", **config)
    found, attempt = load_part_of_moe(folder, tmp_path / "out", exclude)
    assert found
    with pytest.raises(raised):
        attempt()


@pytest.mark.parametrize("exclude", [rf"{ROUTER}|gate_proj|up_proj", rf"{ROUTER}|experts", "no"])
def test_parts_that_are_not_refused_load(tmp_path: Path, exclude: str) -> None:
    folder = tiny_models.qwen3_moe(tmp_path / "model")
    found, attempt = load_part_of_moe(folder, tmp_path / "out", exclude)
    assert found == ()
    original = tiny_models.logits(tiny_models.live(folder))
    tiny_models.assert_same_logits(tiny_models.logits(attempt()), original)


# --- live names -----------------------------------------------------------------------------------

TEXT: dict[str, Any] = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 48, "head_dim": 4,
}  # fmt: skip
VISION: dict[str, Any] = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "image_size": 16, "patch_size": 8,
}  # fmt: skip


def llava() -> Any:
    vision = transformers.CLIPVisionConfig(**VISION)
    text = transformers.LlamaConfig(**TEXT)
    config = transformers.LlavaConfig(vision_config=vision, text_config=text, image_token_index=47)
    return transformers.LlavaForConditionalGeneration(config)


def gemma3() -> Any:
    vision = transformers.SiglipVisionConfig(**VISION)
    text = transformers.Gemma3TextConfig(**TEXT)
    config = transformers.Gemma3Config(
        text_config=text, vision_config=vision, mm_tokens_per_image=4
    )
    return transformers.Gemma3ForConditionalGeneration(config)


def qwen2_5_vl() -> Any:
    text = {**TEXT, "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 0]}}
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2,
              "out_hidden_size": 16, "fullatt_block_indexes": [0]}  # fmt: skip
    config = transformers.Qwen2_5_VLConfig(text_config=text, vision_config=vision)
    return transformers.Qwen2_5_VLForConditionalGeneration(config)


@pytest.mark.parametrize("make", [llava, gemma3, qwen2_5_vl])
def test_multimodal_files_lead_to_live_modules(tmp_path: Path, make: Callable[[], Any]) -> None:
    """Whatever names transformers gives the file, every linear module is found, and no other."""
    model = make()
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    checkpoint = open_checkpoint(str(tmp_path))
    made = module_paths(list(checkpoint.tensors), config)
    assert made.notes == ()
    live = dict(model.named_modules())
    weights = {path for name, path in made.paths.items() if name.endswith(".weight")}
    assert weights <= set(live)
    linear = {name for name, one in live.items() if isinstance(one, torch.nn.Linear)}
    assert linear - weights <= ({"lm_head"} if checkpoint.tied else set())


def test_the_table_of_backbones_is_that_of_transformers() -> None:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    from geoscope.adapters import peft_names

    table = peft_names._BACKBONES  # pyright: ignore[reportPrivateUsage]
    for family in table:
        if family in ("gpt-sw3", "openai-gpt", "reformer", "xlstm"):
            continue  # another class name, or a module of its own
        kind = getattr(transformers, str(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[family]))
        assert kind.base_model_prefix == (table[family] or family), family
