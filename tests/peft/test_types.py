"""Is the update of every type of adapter what PEFT adds to the base, and is nothing left out?

The oracle is PEFT: the base in fp64, the adapter merged into it, the difference. The files are
those of `save_pretrained`; every parameter of the adapter has random values.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import save_torch_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor

from geoscope.errors import CheckpointError, CheckpointNotFound, OptionError, UnsupportedFormat
from geoscope.peft.adapter import Adapter, read_adapter
from geoscope.sources.series import open_series
from tests.helpers.peft_adapters import infos, merged, peft, quietly

LORA: dict[str, Any] = {"r": 2, "lora_alpha": 6, "task_type": "CAUSAL_LM"}
CAUSAL: dict[str, Any] = {"task_type": "CAUSAL_LM"}
LINEAR = ["q_proj", "v_proj", "down_proj"]
GPT2 = ["c_attn", "mlp.c_proj"]


def lora(**settings: Any) -> Any:
    return lambda: peft.LoraConfig(**{**LORA, "target_modules": LINEAR, **settings})


def adalora(**settings: Any) -> Any:
    made = {"init_r": 4, "target_r": 2, "lora_alpha": 6, "total_step": 10, **CAUSAL}
    return lambda: peft.AdaLoraConfig(**{**made, "target_modules": LINEAR, **settings})


def vera(**settings: Any) -> Any:
    made = {"r": 3, "projection_prng_key": 7, "target_modules": LINEAR, **CAUSAL}
    return lambda: peft.VeraConfig(**{**made, **settings})


def ia3(**settings: Any) -> Any:
    made = {"target_modules": LINEAR, "feedforward_modules": ["down_proj"], **CAUSAL}
    return lambda: peft.IA3Config(**{**made, **settings})


def of(config: str, **settings: Any) -> Any:
    """A configuration of PEFT by its name, on the linear layers of a block."""
    return lambda: getattr(peft, config)(**{"target_modules": LINEAR, **CAUSAL, **settings})


FIFO = {"target_modules": GPT2, "fan_in_fan_out": True}
STACKS = {"target_modules": ["q_proj"]}
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]

CASES: dict[str, tuple[str, Any]] = {
    "lora": ("llama", lora()),
    "patterns, rslora": (
        "llama",
        lora(
            use_rslora=True,
            rank_pattern={"v_proj": 3, r"layers\.1\.self_attn\.q_proj": 1},
            alpha_pattern={"down_proj": 5},
        ),
    ),
    "conv1d": ("gpt2", lora(**FIFO)),
    "dora": ("llama", lora(use_dora=True)),
    "dora, conv1d": ("gpt2", lora(use_dora=True, **FIFO)),
    "embedding": ("llama", lora(target_modules=["embed_tokens", "q_proj"])),
    "embedding, dora": ("llama", lora(target_modules=["embed_tokens"], use_dora=True)),
    "embedding, conv1d": (
        "gpt2",
        lora(target_modules=["wte", "c_attn"], fan_in_fan_out=True),
    ),
    "tied embedding": ("tied", lora(target_modules=["embed_tokens"])),
    "lora_bias": ("biased", lora(target_modules=["q_proj"], lora_bias=True, use_rslora=True)),
    "modules_to_save": ("llama", lora(modules_to_save=["lm_head", "norm"])),
    "modules_to_save, conv1d": (
        "gpt2",
        lora(target_modules=["c_attn"], fan_in_fan_out=True, modules_to_save=["mlp.c_proj"]),
    ),
    "modules_to_save, tied": ("tied", lora(modules_to_save=["embed_tokens"])),
    "bias": ("gpt2", lora(bias="all", **FIFO)),
    "tokens": ("llama", lora(trainable_token_indices=[5, 3])),
    "tokens, tied": ("tied", lora(trainable_token_indices={"embed_tokens": [1, 3, 27]})),
    "tokens of two": (
        "llama",
        lora(trainable_token_indices={"embed_tokens": [1, 3], "lm_head": [2]}),
    ),
    "experts": ("qwen3_moe", lora(target_parameters=EXPERTS, **STACKS)),
    "experts, one": ("mixtral", lora(target_parameters=EXPERTS[1:], **STACKS)),
    "experts, turned": ("gpt_oss", lora(target_parameters=EXPERTS, **STACKS)),
    "router": ("qwen3_moe", lora(target_parameters=["mlp.gate.weight"], **STACKS)),
    "adalora": ("llama", adalora()),
    "adalora, alpha 0": ("llama", adalora(lora_alpha=0)),
    "adalora, conv1d": ("gpt2", adalora(**FIFO)),
    "vera": ("llama", vera()),
    "vera, drawn": ("llama", vera(save_projection=False)),
    "vera, conv1d": ("gpt2", vera(**FIFO)),
    "ia3": ("llama", ia3()),
    "miss": ("llama", of("MissConfig", r=4)),
    "miss, a rest": ("llama", of("MissConfig", r=5)),
    "miss, mini": ("llama", of("MissConfig", r=4, init_weights="mini", mini_r=4)),
    "miss, bat": ("llama", of("MissConfig", r=4, init_weights="bat")),
    "loha": ("llama", of("LoHaConfig", r=2, alpha=6)),
    "loha, patterns": (
        "llama",
        of("LoHaConfig", r=2, alpha=6, rank_pattern={"v_proj": 1}, alpha_pattern={"q_proj": 3}),
    ),
    "loha, full rank": ("llama", of("LoHaConfig", r=4, alpha=6)),  # rank 16 of 12
    "lokr": ("llama", of("LoKrConfig", r=2, alpha=6)),
    "lokr, whole": ("llama", of("LoKrConfig", r=9, alpha=6)),
    "lokr, both": (
        "llama",
        of("LoKrConfig", r=1, alpha=6, decompose_both=True, decompose_factor=4),
    ),
    "tinylora": ("llama", of("TinyLoraConfig", r=2, u=3)),
    "tinylora, groups": ("llama", of("TinyLoraConfig", r=2, u=3, weight_tying=0.6)),
    "tinylora, one": ("llama", of("TinyLoraConfig", r=2, u=3, weight_tying=1.0)),
    "tinylora, conv1d": ("gpt2", of("TinyLoraConfig", r=2, u=3, **FIFO)),
    "tinylora, embedding": (
        "llama",
        of("TinyLoraConfig", r=2, u=3, target_modules=["embed_tokens", "k_proj"]),
    ),
    "oft": ("llama", of("OFTConfig", oft_block_size=4, r=0)),
    "oft, exact": ("llama", of("OFTConfig", oft_block_size=4, r=0, use_cayley_neumann=False)),
    "oft, 3 terms": ("llama", of("OFTConfig", oft_block_size=4, r=0, num_cayley_neumann_terms=3)),
    "oft, 7 terms": ("llama", of("OFTConfig", oft_block_size=4, r=0, num_cayley_neumann_terms=7)),
    "oft, constrained": ("llama", of("OFTConfig", oft_block_size=4, r=0, coft=True, eps=0.1)),
    "oft, shared": ("llama", of("OFTConfig", oft_block_size=4, r=0, block_share=True)),
    "oft, embedding": (
        "llama",
        of("OFTConfig", oft_block_size=4, r=0, target_modules=["embed_tokens"]),
    ),
    "boft": ("llama", of("BOFTConfig", boft_block_size=4)),
    "by PEFT: C3A": ("llama", of("C3AConfig", block_size=4)),
    "by PEFT: DEFT": ("llama", of("DeftConfig", r=2)),
    "by PEFT: DeLoRA": ("llama", of("DeloraConfig", r=2)),
    "by PEFT: FourierFT": ("llama", of("FourierFTConfig", n_frequency=5)),
    "by PEFT: GraLoRA": ("llama", of("GraloraConfig", r=2, gralora_k=2)),
    "by PEFT: HiRA": ("llama", of("HiraConfig", r=2)),
    "by PEFT: HRA": ("llama", of("HRAConfig", r=2)),
    "by PEFT: HRA, chosen": (
        "biased",
        of("HRAConfig", r=2, target_modules=r".*\.[01]\..*[qv]_proj", exclude_modules=["v_proj"]),
    ),
    "by PEFT: OSF": ("llama", of("OSFConfig")),
    "by PEFT: PEANuT": ("llama", of("PeanutConfig", r=2)),
    "by PEFT: SHiRA": ("llama", of("ShiraConfig", r=2)),
    "by PEFT: SuperTuning": ("llama", of("SupertuningConfig", sparsity=0.5)),
    "by PEFT: WaveFT": ("llama", of("WaveFTConfig", n_frequency=5)),
    "ia3, bias": ("biased", ia3()),
    "ia3, conv1d": (
        "gpt2",
        ia3(target_modules=GPT2, feedforward_modules=["mlp.c_proj"], fan_in_fan_out=True),
    ),
}


# What no product of two factors does.
OF_THE_BASE = ("dora", "ia3", "bat", "oft", "by PEFT")


def error(found: Tensor, expected: Tensor) -> float:
    """Largest deviation against the largest entry."""
    assert found.dtype == torch.float64
    assert found.shape == expected.shape
    return float((found - expected).abs().max() / expected.abs().max())


def edit(folder: Path, **fields: Any) -> None:
    """Sets fields of adapter_config.json."""
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**config, **fields}), encoding="utf-8")


def changes(adapter: Adapter, base: dict[str, Tensor]) -> dict[str, Tensor]:
    """Every tensor of the base that the adapter changes → what becomes of it."""
    names = [
        *((name, name if one.is_stack else f"{name}.weight")
          for name, one in adapter.modules.items()),
        *((name, name) for name in (*adapter.replaced, *adapter.rows, *adapter.vectors)),
    ]  # fmt: skip
    found: dict[str, Tensor] = {}
    for name, tensor in names:
        if tensor in base:  # IA3 names biases that a layer may lack
            found[tensor] = adapter.updated(name, base[tensor])
            assert torch.equal(found[tensor], adapter.updated(tensor, base[tensor]))
    return found


@pytest.mark.parametrize("case", CASES)
def test_the_tuned_model_is_that_of_peft(tmp_path: Path, case: str) -> None:
    made = merged(tmp_path, *CASES[case])
    adapter = read_adapter(tmp_path).with_base(infos(made.base))
    found = changes(adapter, made.base)
    heads = {"lm_head.weight"} if "tied" in case or CASES[case][0] == "gpt2" else set()
    for name, weight in made.tuned.items():
        if name in found:
            # PEFT takes the bound of constrained OFT in fp32
            assert error(found[name], weight) < (1e-8 if "constrained" in case else 1e-9), name
        elif name not in heads:
            assert torch.equal(made.base[name], weight), name
    assert [name for name in found if torch.equal(made.base[name], made.tuned[name])] == []


@pytest.mark.parametrize("case", CASES)
def test_the_update_of_factors_is_the_difference(tmp_path: Path, case: str) -> None:
    made = merged(tmp_path, *CASES[case])
    adapter = read_adapter(tmp_path).with_base(infos(made.base))
    for name, one in adapter.modules.items():
        tensor = name if one.is_stack else f"{name}.weight"
        base, tuned = made.base[tensor], made.tuned[tensor]
        assert one.shape == base.shape[-2:]
        assert (one.kind == "base") == any(kind in case for kind in OF_THE_BASE)
        if one.kind == "factors":
            B, A = adapter.factors(name)
            update = one.scaling * (B.double() @ A.double()).reshape(base.shape)
            assert error(update, tuned - base) < 1e-9


@pytest.mark.parametrize(
    ("case", "field", "value"),
    [
        ("miss, bat", "init_weights", True),
        ("loha", "alpha", 7),
        ("lokr", "rank_pattern", {"v_proj": 3}),
        ("oft", "use_cayley_neumann", False),
        ("oft, constrained", "coft", False),
        ("lora", "lora_alpha", 7),
        ("patterns, rslora", "use_rslora", False),
        ("adalora", "init_r", 5),
        ("adalora", "lora_alpha", 7),
        ("vera, drawn", "projection_prng_key", 8),
        ("tokens", "trainable_token_indices", [3, 5]),
    ],
)
def test_another_config_is_another_update(
    tmp_path: Path, case: str, field: str, value: Any
) -> None:
    """The negative control: what the numbers above depend on."""
    made = merged(tmp_path, *CASES[case])
    edit(tmp_path, **{field: value})
    refused = {
        ("adalora", "init_r"): "the config rank 5",
        ("miss, bat", "init_weights"): "they are of different saves",
    }
    if (case, field) in refused:
        with pytest.raises(CheckpointError, match=refused[case, field]):
            read_adapter(tmp_path)
        return
    adapter = read_adapter(tmp_path).with_base(infos(made.base))
    worst = max(error(new, made.tuned[name]) for name, new in changes(adapter, made.base).items())
    assert worst > 1e-3


def test_what_adalora_has_pruned_is_not_there(tmp_path: Path) -> None:
    """Masks of different counts, one of them none at all, as the allocator leaves them."""

    def prune(adapted: Any) -> None:
        masks = {}
        for number, (name, module) in enumerate(adapted.base_model.model.named_modules()):
            if not hasattr(module, "lora_E"):
                continue
            kept = [False] * 4 if not masks else [(number >> k) % 2 == 0 for k in range(4)]
            masks[f"{name}.lora_E"] = kept
            with torch.no_grad():
                module.lora_E["default"][~torch.tensor(kept)] = 0
        adapted.peft_config["default"].rank_pattern = masks

    made = merged(tmp_path, "llama", adalora(), before_saving=prune)
    adapter = read_adapter(tmp_path)
    assert {one.rank for one in adapter.modules.values()} >= {0, 2}
    for name, one in adapter.modules.items():
        base, tuned = made.base[f"{name}.weight"], made.tuned[f"{name}.weight"]
        assert torch.allclose(adapter.updated(name, base), tuned, rtol=0, atol=1e-12)
        B, A = adapter.factors(name)
        update = one.scaling * (B[0] @ A[0])
        assert torch.allclose(update, tuned - base, rtol=0, atol=1e-12)
        assert bool(update.any()) is (one.rank > 0)


@pytest.mark.parametrize("save_projection", [True, False])
def test_vera_on_a_base_in_bf16(tmp_path: Path, save_projection: bool) -> None:
    """PEFT rounds the projections to the dtype of the base: so do we where they are drawn again."""
    config = vera(save_projection=save_projection)
    made = merged(tmp_path, "llama", config, dtype=torch.bfloat16)
    adapter = read_adapter(tmp_path)

    def worst(dtype: str) -> float:
        known = adapter.with_base(infos(made.base, dtype))
        found = changes(known, made.base)
        return max(error(new, made.tuned[name]) for name, new in found.items())

    assert worst("bfloat16") < 1e-9
    assert (worst("float32") < 1e-9) is save_projection


def test_vera_tells_nothing_without_the_base(tmp_path: Path) -> None:
    made = merged(tmp_path, "llama", vera(save_projection=False))
    adapter = read_adapter(tmp_path)
    name, one = next(iter(adapter.modules.items()))
    assert (one.kind, one.shape[1]) == ("base", 0)
    with pytest.raises(UnsupportedFormat, match=r"does not store the sizes .* `base`$"):
        adapter.factors(name)
    base = infos(made.base)
    del base["model.layers.1.mlp.down_proj"]
    with pytest.raises(
        CheckpointError, match=r"lacks 1 modules: model\.layers\.1\.mlp\.down_proj;"
    ):
        adapter.with_base(base)


def test_what_is_merged_by_peft_needs_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    merged(tmp_path, *CASES["by PEFT: HRA"])
    (note,) = read_adapter(tmp_path).notes
    assert note == "HRA is merged by PEFT itself, so that its update is dense"
    monkeypatch.setitem(sys.modules, "peft.mapping", None)
    with pytest.raises(UnsupportedFormat, match=r"pip install 'geoscope\[peft\]'"):
        read_adapter(tmp_path)


def test_what_peft_does_not_load_is_refused(tmp_path: Path) -> None:
    """A module that lacks one of its tensors: PEFT leaves the rest at random."""
    made = merged(tmp_path, *CASES["by PEFT: HiRA"])
    file = tmp_path / "adapter_model.safetensors"
    stored = load_file(file)
    del stored["base_model.model.model.layers.0.self_attn.q_proj.hira_B"]
    save_file(stored, file)
    with pytest.raises(CheckpointError, match=r"PEFT does not load its tensors, first .*hira_B"):
        changes(read_adapter(tmp_path), made.base)


NEW = ["miss", "miss, bat", "loha", "lokr", "tinylora", "oft", "boft"]


@pytest.mark.parametrize("case", ["lora", "ia3", "vera", "experts", *NEW])
def test_another_model_is_no_base(tmp_path: Path, case: str) -> None:
    merged(tmp_path, *CASES[case])
    adapter = read_adapter(tmp_path)
    for name, one in adapter.modules.items():
        m, n = one.shape
        wrong = torch.zeros(m + 1, n + 1)
        with pytest.raises(CheckpointError, match=r"the base weight is .*; give the model that"):
            adapter.updated(name, wrong)


@pytest.mark.parametrize(
    ("case", "name", "shape"),
    [
        ("tokens", "model.embed_tokens.weight", (5, 12)),
        ("tokens", "model.embed_tokens.weight", (28, 11)),
        ("lora_bias", "model.layers.0.self_attn.q_proj.bias", (15,)),
        ("ia3, bias", "model.layers.0.self_attn.q_proj.bias", (17,)),
    ],
)
def test_rows_and_vectors_of_another_model(
    tmp_path: Path, case: str, name: str, shape: tuple[int, ...]
) -> None:
    merged(tmp_path, *CASES[case])
    adapter = read_adapter(tmp_path)
    with pytest.raises(CheckpointError, match=r"base tensor is .*; give the model that"):
        adapter.updated(name, torch.zeros(shape))
    with pytest.raises(KeyError):
        adapter.updated("model.norm.weight", torch.zeros(12))


RAW = ["lora", "dora", "embedding", "lora_bias", "modules_to_save", "tokens", "vera", "ia3"]
RAW += [*NEW, "lokr, both", "tinylora, groups", "oft, embedding"]
RAW += ["conv1d", "dora, conv1d", "modules_to_save, conv1d", "experts", "experts, turned"]


@pytest.mark.parametrize("case", [*RAW, "adalora"])
def test_a_raw_state_dict_is_the_same_adapter(tmp_path: Path, case: str) -> None:
    """With the adapter's name in its keys, the whole base beside it, and the marks of wrappers."""
    made = merged(tmp_path, *CASES[case])
    saved = read_adapter(tmp_path).with_base(infos(made.base))
    (tmp_path / "adapter_model.safetensors").unlink()
    state = {f"_fsdp_wrapped_module.{k}": v for k, v in made.model.state_dict().items()}
    torch.save(state, tmp_path / "adapter_model.bin")
    raw = read_adapter(tmp_path).with_base(infos(made.base))
    assert list(raw.modules) == list(saved.modules)
    assert raw.rows.keys() == saved.rows.keys()
    assert raw.vectors.keys() == saved.vectors.keys()
    assert raw.replaced.keys() >= saved.replaced.keys()
    found = changes(raw, made.base)
    assert found.keys() <= made.tuned.keys()
    for name, weight in found.items():
        assert error(weight, made.tuned[name]) < 1e-9, name


def test_shards_with_an_index_are_one_adapter(tmp_path: Path) -> None:
    made = merged(tmp_path, *CASES["lora"])
    whole = tmp_path / "adapter_model.safetensors"
    saved = load_file(whole)
    whole.unlink()
    pattern = "adapter_model{suffix}.safetensors"
    save_torch_state_dict(saved, tmp_path, filename_pattern=pattern, max_shard_size=1000)
    shards = sorted(tmp_path.glob("adapter_model-*-of-*.safetensors"))
    assert len(shards) > 2
    adapter = read_adapter(tmp_path)
    for name, weight in changes(adapter, made.base).items():
        assert error(weight, made.tuned[name]) < 1e-9
    shards[0].unlink()
    with pytest.raises(CheckpointNotFound, match=r"index\.json: names .*; copy all shards"):
        read_adapter(tmp_path)


def test_an_alpha_can_be_given_where_the_config_has_none(tmp_path: Path) -> None:
    made = merged(tmp_path / "lora", *CASES["lora"])
    edit(tmp_path / "lora", lora_alpha=0)
    with pytest.raises(CheckpointError, match=r"lora_alpha of .* is 0"):
        read_adapter(tmp_path / "lora")
    for alpha, is_right in ((6, True), (7, False)):
        found = changes(read_adapter(tmp_path / "lora", alpha=alpha), made.base)
        worst = max(error(one, made.tuned[name]) for name, one in found.items())
        assert (worst < 1e-9) is is_right
    for alpha in (0, -1, float("nan")):
        with pytest.raises(OptionError, match="must be a number above 0"):
            read_adapter(tmp_path / "lora", alpha=alpha)
    merged(tmp_path / "ia3", *CASES["ia3"])
    with pytest.raises(OptionError, match="IA3 has no lora_alpha"):
        read_adapter(tmp_path / "ia3", alpha=6)


def test_an_alpha_of_0_is_an_old_mergers_for_lora_alone(tmp_path: Path) -> None:
    """AdaLoRA takes its own rank for it."""
    for case in ("lora", "adalora, alpha 0"):
        merged(tmp_path / case, *CASES[case])
    edit(tmp_path / "lora", lora_alpha=0)
    with pytest.raises(CheckpointError, match="lora_alpha is 0: written by an old merger"):
        open_series([str(tmp_path / "lora")], steps=[1])
    series = open_series([str(tmp_path / "adalora, alpha 0")], steps=[1])
    adapter = series.points[0].adapter
    assert adapter is not None
    assert {module.scaling for module in adapter.modules.values()} == {4 / (4 + 1e-5)}


def test_a_place_of_tinylora_is_told_by_its_draw(tmp_path: Path) -> None:
    """In the order of the live model, not in that of the names; another seed tells nothing."""
    made = merged(tmp_path, *CASES["tinylora, groups"])
    edit(tmp_path, projection_seed=43)
    adapter = read_adapter(tmp_path)
    with pytest.raises(CheckpointError, match="does not match projection_seed 43"):
        changes(adapter, made.base)
    merged(tmp_path, "llama", of("TinyLoraConfig", r=2, u=3, save_projection=False))
    with pytest.raises(UnsupportedFormat, match="6 modules have no tinylora_P"):
        read_adapter(tmp_path)


@pytest.mark.parametrize(
    ("settings", "is_drawn"),
    [({}, False), ({"init_weights": False}, True), ({"init_weights": "mini", "mini_r": 4}, False)],
)
def test_a_start_that_was_drawn_is_told(
    tmp_path: Path, settings: dict[str, Any], is_drawn: bool
) -> None:
    merged(tmp_path, "llama", of("MissConfig", r=4, **settings))
    notes = read_adapter(tmp_path).notes
    told = "init_weights is false: all parameters were drawn at random"
    assert any(note.startswith(told) for note in notes) is is_drawn


@pytest.mark.parametrize("case", ["miss", "miss, mini"])
def test_miss_tells_nothing_without_the_base(tmp_path: Path, case: str) -> None:
    merged(tmp_path, *CASES[case])
    adapter = read_adapter(tmp_path)
    name, one = next(iter(adapter.modules.items()))
    assert one.kind == "base"
    with pytest.raises(UnsupportedFormat, match=r"MiSS does not store the sizes .* `base`$"):
        adapter.factors(name)


def test_a_butterfly_is_that_of_peft(tmp_path: Path) -> None:
    """Two and three levels, which PEFT itself makes with its CUDA extension alone: its own
    permutations and Cayley transforms, in dense matrices."""
    made = merged(tmp_path, "llama", of("BOFTConfig", boft_block_size=4, target_modules=["o_proj"]))
    file = tmp_path / "adapter_model.safetensors"
    layer = made.model.base_model.model.model.layers[0].self_attn.o_proj
    generator = torch.Generator().manual_seed(3)
    for levels in (2, 3):
        stored = load_file(file)
        wide = {
            key: torch.randn(levels, 4, 4, 4, generator=generator, dtype=torch.float64)
            for key in stored
            if key.endswith("boft_R")
        }
        save_file({**stored, **wide}, tmp_path / "adapter_model.safetensors")
        adapter = read_adapter(tmp_path)
        name = "model.layers.0.self_attn.o_proj"
        R = wide[f"base_model.model.{name}.boft_R"]
        whole = torch.eye(16, dtype=torch.float64)
        for level, data in enumerate(R):
            order = layer.block_butterfly_perm(16, 4 // 2**level, 2, levels - 1)
            P = layer.perm2mat(order).double()
            whole = P @ torch.block_diag(*layer.cayley_batch(data)) @ P.T @ whole
        W = made.base[f"{name}.weight"]
        expected = (whole @ W.T).T * stored[f"base_model.model.{name}.boft_s"]
        assert error(adapter.updated(name, W), expected) < 1e-12


# --- types that are not read --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "hint"),
    [
        (lambda: peft.VBLoRAConfig(target_modules=LINEAR), "Merge it"),
        (lambda: peft.RoadConfig(target_modules=LINEAR), "Merge it"),
        (lambda: peft.LNTuningConfig(target_modules=["norm"]), "Merge it"),
        (lambda: peft.PromptTuningConfig(num_virtual_tokens=2, **CAUSAL), "changes no weight"),
        (lambda: peft.PrefixTuningConfig(num_virtual_tokens=2, **CAUSAL), "changes no weight"),
    ],
)
def test_other_types_are_refused_by_name(tmp_path: Path, make: Any, hint: str) -> None:
    config = quietly(make)
    quietly(lambda: config.save_pretrained(tmp_path))
    kind = config.peft_type.value
    with pytest.raises(UnsupportedFormat) as caught:
        read_adapter(tmp_path)
    text = str(caught.value)
    assert f"peft_type is '{kind}'; geoscope reads LORA, ADALORA, " in text
    assert hint in text
    assert "\n" not in text
