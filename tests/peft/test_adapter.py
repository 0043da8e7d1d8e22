"""Is an adapter read as PEFT reads it, and is every folder that is not one refused in one line?"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from geoscope.errors import CheckpointError, CheckpointNotFound, UnsupportedFormat
from geoscope.formats.hashes import file_sha256, tensor_sha256
from geoscope.formats.safetensors_file import SafetensorsFile
from geoscope.peft.adapter import read_adapter
from geoscope.peft.folder import adapter_folder, record_beside
from geoscope.peft.lora import is_targeted, stacked, unstacked

Q, V = "model.layers.0.self_attn.q_proj", "model.layers.10.self_attn.v_proj"
CONFIG = {
    "peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"],
    "base_model_name_or_path": "org/base",
}  # fmt: skip


def factors(
    *modules: str, rank: int = 4, prefix: str = "base_model.model.", adapter: str = ""
) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    tensors: dict[str, Tensor] = {}
    for module in modules:
        A, B = (torch.randn(shape, generator=generator) for shape in ((rank, 6), (5, rank)))
        tensors[f"{prefix}{module}.lora_A{adapter}.weight"] = A
        tensors[f"{prefix}{module}.lora_B{adapter}.weight"] = B
    return tensors


# As JSON has them.
SPELT: dict[Any, str] = {None: "null", True: "true"}


def folder(path: Path, tensors: dict[str, Tensor] | None = None, **config: Any) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    (path / "adapter_config.json").write_text(json.dumps({**CONFIG, **config}), encoding="utf-8")
    stored = factors(V, Q) if tensors is None else tensors
    save_file(stored, path / "adapter_model.safetensors", metadata={"format": "pt"})
    return path


def refused(path: Path, kind: type[CheckpointError], text: str) -> None:
    with pytest.raises(kind, match=text) as caught:
        read_adapter(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


def test_modules_in_natural_order_with_their_factors(tmp_path: Path) -> None:
    adapter = read_adapter(folder(tmp_path))
    assert list(adapter.modules) == [Q, V]  # layer 0 before layer 10
    one = adapter.modules[Q]
    assert (one.shape, one.rank, one.alpha, one.scaling, one.experts) == ((5, 6), 4, 8.0, 2.0, 1)
    B, A = adapter.factors(Q)
    assert B.shape == (1, 5, 4)
    assert A.shape == (1, 4, 6)
    stored = factors(V, Q)
    assert torch.equal(B[0], stored[f"base_model.model.{Q}.lora_B.weight"])
    assert torch.equal(A[0], stored[f"base_model.model.{Q}.lora_A.weight"])
    assert adapter.base == "org/base"
    assert adapter.others == ()


@pytest.mark.parametrize(
    ("prefix", "adapter"),
    [("base_model.model.", ".default"), ("", ""), ("base_model.model.", ".x")],
)
def test_raw_state_dicts_name_the_adapter(tmp_path: Path, prefix: str, adapter: str) -> None:
    tensors = factors(Q, V, prefix=prefix, adapter=adapter)
    assert list(read_adapter(folder(tmp_path, tensors)).modules) == [Q, V]


def test_a_pickle_is_read_without_running_it(tmp_path: Path) -> None:
    path = folder(tmp_path)
    (path / "adapter_model.safetensors").unlink()
    torch.save(factors(Q), path / "adapter_model.bin")
    adapter = read_adapter(path)
    assert torch.equal(adapter.factors(Q)[0][0], factors(Q)[f"base_model.model.{Q}.lora_B.weight"])


class _Exploit:
    """Pickled, it is a call that creates a file when it is loaded."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.target,)


def test_a_hostile_pickle_runs_nothing(tmp_path: Path) -> None:
    path, target = folder(tmp_path / "adapter"), tmp_path / "touched"
    (path / "adapter_model.safetensors").unlink()
    hostile = path / "adapter_model.bin"
    torch.save({**factors(Q), "x": _Exploit(target)}, hostile)
    refused(path, UnsupportedFormat, "would run code stored in it; convert it to safetensors")
    assert not target.exists()
    torch.load(hostile, weights_only=False)  # and it would have
    assert target.exists()


def test_no_data_is_read_before_it_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Opening needs the header alone; factors are read module by module."""
    asked: list[str] = []
    read = SafetensorsFile.read

    def told(self: SafetensorsFile, name: str, buffer: Tensor | None) -> Tensor:
        asked.append(name)
        return read(self, name, buffer)

    monkeypatch.setattr(SafetensorsFile, "read", told)
    adapter = read_adapter(folder(tmp_path))
    assert asked == []
    adapter.factors(Q)
    assert sorted(asked) == [f"base_model.model.{Q}.lora_{side}.weight" for side in "AB"]


@pytest.mark.parametrize(
    ("start", "told"),
    [
        *((one, True) for one in ("pissa", "pissa_niter_16", "olora", "OLoRA", "corda", "loftq")),
        *((one, True) for one in ("lora_ga", "milora")),
        *((one, False) for one in (True, False, "gaussian", "eva", "orthogonal", "mica", None)),
    ],
)
def test_a_start_that_is_not_zero_is_told(tmp_path: Path, start: Any, told: bool) -> None:
    adapter = read_adapter(folder(tmp_path, init_lora_weights=start))
    assert adapter.initial == (f"init_lora_weights is {start!r}" if told else None)


@pytest.mark.parametrize(
    ("layout", "told"), [("residual", True), ("anchor", True), ("mirror", False), (None, False)]
)
def test_a_start_that_is_recorded_is_told(tmp_path: Path, layout: str | None, told: bool) -> None:
    """Beside the adapter, and beside the rewritten base of one that was trained from it."""
    record(tmp_path, layout=layout)
    adapter = read_adapter(folder(tmp_path / "adapter"))
    assert adapter.initial == (f"its layout is {layout}" if told else None)
    base = model(tmp_path / "residual")
    trained = read_adapter(folder(tmp_path / "trained", base_model_name_or_path=str(base)))
    assert bool(trained.initial) is (layout == "residual")


def test_the_base_and_its_revision(tmp_path: Path) -> None:
    adapter = read_adapter(folder(tmp_path, revision="c0ffee"))
    assert (adapter.base, adapter.revision) == ("org/base", "c0ffee")
    assert read_adapter(folder(tmp_path, base_model_name_or_path="")).base is None


@pytest.mark.parametrize(
    ("config", "rank", "scaling"),
    [
        ({}, 4, 2.0),
        ({"use_rslora": True}, 4, 4.0),
        ({"rank_pattern": {"q_proj": 2}}, 2, 4.0),
        ({"alpha_pattern": {"q_proj": 2}}, 4, 0.5),
        ({"rank_pattern": {"q_proj": 2}, "alpha_pattern": {r"layers\.0\..*": 1}}, 2, 0.5),
        ({"rank_pattern": {"q_proj": 2}, "use_rslora": True}, 2, 8 / math.sqrt(2)),
        ({"rank_pattern": {"q_pro": 2, "proj": 3}}, 4, 2.0),  # a whole part of the path, or none
        ({"rank_pattern": {".*q_proj": 2, "q_proj": 3}}, 2, 4.0),  # the first that matches
        ({"lora_alpha": 0.5}, 4, 0.125),
    ],
)
def test_rank_and_scaling_are_those_of_peft(
    tmp_path: Path, config: dict[str, Any], rank: int, scaling: float
) -> None:
    one = read_adapter(folder(tmp_path, factors(Q, rank=rank), **config)).modules[Q]
    assert (one.rank, one.scaling) == (rank, scaling)


def test_stacked_experts_come_apart_as_peft_multiplies_them(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(1)
    experts, r, up, down = 3, 4, (10, 6), (6, 5)
    path = "base_model.model.model.layers.0.mlp.experts"
    tensors: dict[str, Tensor] = {}
    for inner, (m, n), rank in ((".base_layer", up, 2 * r), ("", down, r)):
        A = torch.randn(experts * rank, n, generator=generator)
        B = torch.randn(m, rank * experts, generator=generator)
        tensors |= {f"{path}{inner}.lora_A.weight": A, f"{path}{inner}.lora_B.weight": B}
    config: dict[str, Any] = {
        "target_parameters": ["down_proj", "gate_up_proj"], "target_modules": ["q_proj"],
        "rank_pattern": {r".*\.gate_up_proj": 2 * r}, "alpha_pattern": {r".*\.gate_up_proj": 16},
    }  # fmt: skip
    adapter = read_adapter(folder(tmp_path, tensors, **config))
    for leaf, inner, shape, rank in (
        ("gate_up_proj", ".base_layer", up, 2 * r),
        ("down_proj", "", down, r),
    ):
        one = adapter.modules[f"model.layers.0.mlp.experts.{leaf}"]
        assert (one.shape, one.rank, one.experts, one.scaling) == (shape, rank, experts, 2.0)
        B, A = adapter.factors(one.name)
        for e in range(experts):
            stored_A = tensors[f"{path}{inner}.lora_A.weight"][e * rank : (e + 1) * rank]
            stored_B = tensors[f"{path}{inner}.lora_B.weight"][:, e::experts]
            torch.testing.assert_close(B[e] @ A[e], stored_B @ stored_A)
        again = unstacked(
            *stacked(one, *(adapter.read(info.name) for info in reversed(one.stored)))
        )
        assert torch.equal(again[0], tensors[f"{path}{inner}.lora_B.weight"])
        assert torch.equal(again[1], tensors[f"{path}{inner}.lora_A.weight"])


@pytest.mark.parametrize(
    ("config", "module", "named"),
    [
        ({"target_modules": ["q_proj"]}, Q, True),
        ({"target_modules": ["proj"]}, Q, False),
        ({"target_modules": [Q]}, Q, True),
        ({"target_modules": ["0.self_attn.q_proj"]}, "model.layers.10.self_attn.q_proj", False),
        ({"target_modules": r".*\.q_proj"}, Q, True),
        ({"target_modules": "q_proj"}, Q, False),
        ({"target_modules": ["q_proj"], "exclude_modules": ["self_attn.q_proj"]}, Q, False),
        ({"target_modules": ["q_proj"], "layers_to_transform": [1, 2]}, Q, False),
        ({"target_modules": ["q_proj"], "layers_to_transform": 0}, Q, True),
        ({}, Q, False),
    ],
)
def test_targets_are_matched_by_the_rule_of_peft(
    config: dict[str, Any], module: str, named: bool
) -> None:
    assert is_targeted(config, module) is named


# --- refusals -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "way_out"),
    [
        ("ROAD", "Merge it"),
        ("VBLORA", "Merge it"),
        ("XLORA", "mixes its adapters"),
        ("P_TUNING", "changes no weight"),
        ("new", "Merge it"),
        (None, "Merge it"),
    ],
)
def test_other_types_are_refused_by_name(tmp_path: Path, kind: str | None, way_out: str) -> None:
    text = rf"peft_type is {SPELT.get(kind, repr(kind))}; geoscope reads LORA, ADALORA, .*{way_out}"
    refused(folder(tmp_path, peft_type=kind), UnsupportedFormat, text)


@pytest.mark.parametrize(
    ("config", "called"),
    [
        ({"layer_replication": [[0, 2]]}, "layer replication"),
        ({"alora_invocation_tokens": [1]}, "activated LoRA"),
        ({"use_qalora": True}, "QALoRA"),
    ],
)
def test_extras_that_change_the_update_are_refused(
    tmp_path: Path, config: dict[str, Any], called: str
) -> None:
    refused(folder(tmp_path, **config), UnsupportedFormat, called)


@pytest.mark.parametrize(
    ("config", "text"),
    [
        ({"use_dora": True}, "has no lora_magnitude_vector and use_dora is true"),
        ({"lora_bias": True}, "lora_bias is true .* no lora_B.bias is stored"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices are in .* no new rows"),
    ],
)
def test_extras_of_the_config_without_their_tensors(
    tmp_path: Path, config: dict[str, Any], text: str
) -> None:
    refused(folder(tmp_path, **config), CheckpointError, text)


@pytest.mark.parametrize(
    "name",
    [
        "lora_unet_down.lora_down.weight",
        "a.b.lora_up.weight",
        "unet.mid_block.attn1.processor.to_q_lora.up.weight",
        "unet.mid_block.attn1.to_q.lora.down.weight",
        "text_encoder.k_proj.lora_linear_layer.up.weight",
    ],
)
def test_keys_of_kohya_and_diffusers_are_refused_by_name(tmp_path: Path, name: str) -> None:
    tensors = {**factors(Q), name: torch.zeros(5)}
    text = rf"a kohya or diffusers LoRA \(tensor {re.escape(name)}\)"
    refused(folder(tmp_path, tensors), UnsupportedFormat, text)


def test_what_is_no_adapter_folder(tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", CheckpointNotFound, "no such folder")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", CheckpointNotFound, "holds no adapter_config.json; give the folder")
    folder(tmp_path / "run" / "checkpoint-1")
    refused(tmp_path / "run", CheckpointNotFound, r"give .*run/checkpoint-1$")
    path = folder(tmp_path / "config")
    (path / "adapter_model.safetensors").unlink()
    refused(path, CheckpointNotFound, "without factors; copy adapter_model.safetensors or")
    (path / "adapter_model-00001-of-00002.safetensors").write_bytes(b"")
    refused(path, UnsupportedFormat, r"in 1 shards .* without adapter_model\.safetensors\.index")
    (path / "adapter_config.json").write_text("[1]", encoding="utf-8")
    refused(path, CheckpointError, "the JSON is not an object")


def test_factors_of_another_type_or_of_kernels(tmp_path: Path) -> None:
    whole = factors(Q)
    refused(folder(tmp_path, whole, peft_type="IA3"), CheckpointError, "no ia3_l among its 2")
    two = {**whole, f"base_model.model.{V}.ia3_l": torch.ones(5, 1)}
    refused(folder(tmp_path, two), CheckpointError, r"ia3_l belongs to no module of the type")
    kernels = {name: one[..., None, None] for name, one in whole.items()}
    refused(folder(tmp_path, kernels), UnsupportedFormat, "2 factors are of convolutions")
    magnitude = {**whole, f"base_model.model.{Q}.lora_magnitude_vector": torch.ones(5)}
    refused(
        folder(tmp_path, magnitude), CheckpointError, "has a lora_magnitude_vector and use_dora"
    )
    short = {**whole, f"base_model.model.{Q}.lora_magnitude_vector": torch.ones(4)}
    refused(folder(tmp_path, short, use_dora=True), CheckpointError, r"is \(4,\), needs \(5,\)")


def test_factors_over_a_quantised_base_are_read_alone(tmp_path: Path) -> None:
    """A raw state dict of QLoRA: the packed weights and their scales are nobody's replacement."""
    packed = f"base_model.model.{Q}.base_layer.weight"
    beside = {
        packed: torch.zeros(15, 1, dtype=torch.uint8),
        f"{packed}.absmax": torch.ones(2),
        f"{packed}.quant_map": torch.ones(16),
        f"base_model.model.{V}.base_layer.SCB": torch.ones(5),
    }
    adapter = read_adapter(folder(tmp_path, {**factors(Q, adapter=".default"), **beside}))
    assert adapter.replaced == {}
    B, A = adapter.factors(Q)
    W = torch.ones(5, 6)
    assert torch.equal(adapter.updated(Q, W), W.double() + 2 * B[0].double() @ A[0].double())


def test_whole_tensors_that_replace_one_twice(tmp_path: Path) -> None:
    head = "base_model.model.lm_head"
    names = (f"{head}.weight", f"{head}.modules_to_save.default.weight")
    both = {**factors(Q), **{name: torch.zeros(3, 2) for name in names}}
    refused(folder(tmp_path, both), CheckpointError, r"both replace lm_head\.weight; save one")


@pytest.mark.parametrize("indices", [[1], [1, 2, 3], {"lm_head": [1, 2]}, [0.5, 1], "1,2"])
def test_rows_that_the_config_does_not_count(tmp_path: Path, indices: Any) -> None:
    rows = "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"
    tensors = {**factors(Q), rows: torch.zeros(2, 6)}
    path = folder(tmp_path, tensors, trainable_token_indices=indices)
    refused(path, CheckpointError, r"trainable_tokens_delta is \(2, 6\), and trainable_token_ind")


def test_damaged_factors(tmp_path: Path) -> None:
    whole = factors(Q, V)
    half = {name: one for name, one in whole.items() if f"{V}.lora_B" not in name}
    refused(folder(tmp_path, half), CheckpointError, rf"first {re.escape(V)} without lora_B")
    flat = {name: one.reshape(-1) for name, one in whole.items()}
    refused(folder(tmp_path, flat), CheckpointError, "ZeRO-3 or FSDP save whose shards were not")
    refused(folder(tmp_path, {"x": torch.zeros(2)}), CheckpointError, "no lora_A or lora_B among")
    refused(folder(tmp_path, r=8), CheckpointError, r"lora_A \(4, 6\) .* the config rank 8")
    two = {**factors(Q, adapter=".a"), **factors(V, adapter=".b")}
    refused(folder(tmp_path, two), CheckpointError, r"holds 2 adapters \(a, b\)")
    twice = {**factors(Q), **factors(Q, adapter=".default")}
    refused(folder(tmp_path, twice), CheckpointError, "occurs twice")


@pytest.mark.parametrize("alpha", [0, None, "8", True, -1])
def test_an_alpha_that_is_none_is_asked_for(tmp_path: Path, alpha: Any) -> None:
    refused(
        folder(tmp_path, lora_alpha=alpha),
        CheckpointError,
        rf"lora_alpha of {re.escape(Q)} is {SPELT.get(alpha, repr(alpha))}",
    )


# --- what lies beside it ------------------------------------------------------------------------


def record(path: Path, **content: Any) -> None:
    path.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"schema": "geoscope.adapter/1", **content})
    (path / "geoscope.json").write_text(text, encoding="utf-8")


def model(path: Path) -> Path:
    path.mkdir(parents=True)
    (path / "config.json").write_text("{}", encoding="utf-8")
    save_file({"a.weight": torch.zeros(2, 2)}, path / "model.safetensors")
    return path


@pytest.mark.parametrize("inside", ["", "adapter"])
def test_the_output_folder_and_its_adapter_name_the_same(tmp_path: Path, inside: str) -> None:
    out = tmp_path / "out"
    folder(out / "adapter")
    residual = model(out / "residual")
    record(out, layout="residual", base={"reference": "org/base", "commit": "c0ffee"})
    found = adapter_folder(out / inside)
    assert (found.adapter, found.residual, found.anchor) == (out / "adapter", residual, None)
    assert (found.layout, found.original) == ("residual", "org/base@c0ffee")
    assert record_beside(str(residual)) == found.record
    assert record_beside("org/base") == record_beside(None) == {}


@pytest.mark.parametrize(
    ("reference", "commit", "original"),
    [
        ("org/base", None, "org/base"),
        ("org/base@v1", "c0ffee", "org/base@v1"),
        ("hf://org/base/sub", "c0ffee", "hf://org/base@c0ffee/sub"),
        (None, None, None),
    ],
)
def test_the_original_is_pinned(
    tmp_path: Path, reference: str | None, commit: str | None, original: str | None
) -> None:
    record(folder(tmp_path), layout="mirror", base={"reference": reference, "commit": commit})
    assert adapter_folder(tmp_path).original == original


def test_a_base_folder_that_has_moved_is_no_hub_id(tmp_path: Path) -> None:
    """Neither by its whole path nor by a path that looks like org/name."""
    for base in (
        {"reference": str(tmp_path / "gone"), "commit": None},
        {"reference": "models/gone", "commit": None, "sha256": {"model.safetensors": "0"}},
    ):
        record(folder(tmp_path), layout="mirror", base=base)
        with pytest.raises(CheckpointNotFound, match=r"gone: the base .* not there; .* `base`$"):
            _ = adapter_folder(tmp_path).original


def test_a_model_around_the_adapter_is_a_residual_only_where_peft_puts_it(tmp_path: Path) -> None:
    around = model(tmp_path / "model")
    assert adapter_folder(folder(around / "pissa_init")).residual == around
    assert adapter_folder(folder(around / "lora")).layout is None


def test_a_record_of_another_schema_is_refused(tmp_path: Path) -> None:
    record(folder(tmp_path), schema="geoscope.report/1")
    with pytest.raises(CheckpointError, match=r"schema is 'geoscope\.report/1', needs"):
        adapter_folder(tmp_path)


def test_hashes_are_those_of_the_bytes(tmp_path: Path) -> None:
    tensor = torch.arange(6, dtype=torch.bfloat16).reshape(2, 3)
    assert tensor_sha256(tensor) == tensor_sha256(tensor.T.contiguous().T)
    assert tensor_sha256(tensor) != tensor_sha256(tensor.T)
    raw = tensor.view(torch.uint8).numpy().tobytes()
    (tmp_path / "raw").write_bytes(raw)
    assert tensor_sha256(tensor) == file_sha256(tmp_path / "raw")
    with pytest.raises(CheckpointError, match="cannot be read"):
        file_sha256(tmp_path / "nowhere")
