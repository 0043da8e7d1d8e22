"""Is every format that geoscope does not read refused by name, in one line with a way out?

One fixture for each row of the table of refused formats, each with the exact line.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from geoscope.errors import UnsupportedFormat
from geoscope.sources.open import open_checkpoint
from tests.helpers.files import llama, write_config, write_model

READS = "geoscope reads fp32, fp16, bf16, FP8 with its scales, MXFP4 and bitsandbytes 4-bit."
ODD = "is not a scale by block, row or tensor"
SOURCE = "Use the checkpoint it was quantised from."
BITSANDBYTES = "Merge the adapter into the bf16 base; for QLoRA that is the unquantised base."
BF16 = "Use a bf16 conversion."
WHOLE = "geoscope compares whole weights."
TOGETHER = (
    "geoscope reads them together, from their folder. Give the folder that holds them all, on this "
    "disk."
)
BESIDE = (
    "geoscope reads adapters by their folder. Give the folder that holds adapter_config.json; "
    "where a model is wanted, base+adapter."
)
MERGE = "Merge it into its base and give the merged weights."
BLOCK = "model.layers.0.mlp.up_proj"


def line(reference: Path) -> str:
    with pytest.raises(UnsupportedFormat) as caught:
        open_checkpoint(str(reference))
    return str(caught.value)


@pytest.mark.parametrize(
    ("quantization", "called", "hint"),
    [
        ({"quant_method": "gptq", "bits": 4}, "GPTQ", SOURCE),
        ({"quant_method": "awq"}, "AWQ", SOURCE),
        (
            {"quant_method": "bitsandbytes", "load_in_4bit": True},
            "bitsandbytes 4-bit",
            BITSANDBYTES,
        ),
        (
            {"quant_method": "bitsandbytes", "load_in_8bit": True},
            "bitsandbytes 8-bit",
            BITSANDBYTES,
        ),
        (
            {"quant_method": "compressed-tensors"},
            "compressed-tensors",
            "Use the source checkpoint.",
        ),
        ({"quant_method": "mxfp4"}, "MXFP4", BF16),
        ({"quant_method": "mxfp8"}, "MXFP8", BF16),
        ({"quant_method": "nvfp4"}, "NVFP4", BF16),
        ({"quant_method": "fp8", "weight_block_size": None}, "FP8", BF16),
        ({"quant_method": "fp8", "weight_block_size": [128]}, "FP8", BF16),
        ({"quant_method": "fp8", "weight_block_size": [128, 0]}, "FP8", BF16),
        ({"quant_method": "fbgemm_fp8"}, "FP8", BF16),
        *(
            ({"quant_method": name}, name, SOURCE)
            for name in (
                "hqq",
                "aqlm",
                "vptq",
                "quanto",
                "eetq",
                "higgs",
                "torchao",
                "bitnet",
                "spqr",
                "quark",
                "auto-round",
                "not invented yet",
            )
        ),
    ],
)
@pytest.mark.parametrize("nested", [False, True])
def test_the_method_in_the_config_is_named(
    tmp_path: Path, quantization: dict[str, Any], called: str, hint: str, nested: bool
) -> None:
    part = {"quantization_config": quantization}
    codes = {f"{BLOCK}.codes": torch.zeros(4, 4, dtype=torch.uint8)}
    write_model(tmp_path, {**llama(), **codes}, {"text_config": part} if nested else part)
    method = quantization["quant_method"]
    assert line(tmp_path) == (
        f"`{tmp_path}`: weights are {called} (quant_method {method!r} in config.json, tensor "
        f"{BLOCK}.codes is uint8). {READS} {hint}"
    )


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize(
    ("quantization", "called"),
    [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes 4-bit"),
        ({"load_in_8bit": True}, "bitsandbytes 8-bit"),
        ({"quant_method": "gptq", "bits": 4}, "GPTQ"),
        ({"quant_method": "awq"}, "AWQ"),
        ({"quant_method": "mxfp4"}, "MXFP4"),
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "FP8"),
        ({"quant_method": "fp8"}, "FP8"),
        ({"quant_method": "hqq"}, "hqq"),
    ],
)
def test_plain_tensors_are_believed_over_a_stale_config(
    tmp_path: Path, quantization: dict[str, Any], called: str, nested: bool
) -> None:
    part = {"quantization_config": quantization}
    buffers = {
        "model.layers.0.attn.bias": torch.ones(1, 1, 4, 4, dtype=torch.uint8),
        "model.position_ids": torch.arange(4)[None],
    }
    write_model(tmp_path, {**llama(), **buffers}, {"text_config": part} if nested else part)
    found = open_checkpoint(str(tmp_path))
    (note,) = [one for one in found.notes if "config.json" in one]
    assert note == (
        f"config.json claims {called}, and no tensor is packed: they are read as stored; take "
        "quantization_config out of it before a loader believes it"
    )
    for name, weight in llama().items():
        assert torch.equal(found.read(name), weight)


def test_a_config_without_a_method_is_still_quantised(tmp_path: Path) -> None:
    codes = {f"{BLOCK}.codes": torch.zeros(4, 4, dtype=torch.int8)}
    config = {"quantization_config": {"load_in_8bit": True}}
    write_model(tmp_path, {**llama(), **codes}, config)
    assert "weights are bitsandbytes 8-bit (quant_method 'bitsandbytes'" in line(tmp_path)


@pytest.mark.parametrize("quantization", [None, {}])
def test_an_empty_quantisation_is_none(tmp_path: Path, quantization: object) -> None:
    write_model(tmp_path, llama(), {"quantization_config": quantization})
    assert open_checkpoint(str(tmp_path)).tensors


U8 = torch.zeros(4, 4, dtype=torch.uint8)
I32 = torch.zeros(4, 4, dtype=torch.int32)
F8 = torch.zeros(4, 4, dtype=torch.float8_e4m3fn)
F32 = torch.zeros(4, 4)


@pytest.mark.parametrize(
    ("tensors", "called", "evidence", "hint"),
    [
        (
            {".qweight": I32, ".qzeros": I32, ".g_idx": I32},
            "GPTQ",
            f"tensor {BLOCK}.qweight",
            SOURCE,
        ),
        ({".qweight": I32, ".qzeros": I32}, "AWQ", f"tensor {BLOCK}.qweight", SOURCE),
        (
            {".weight": U8, ".weight.absmax": F32, ".weight.quant_state.bitsandbytes__nf4": U8},
            "bitsandbytes 4-bit",
            f"tensor {BLOCK}.weight.absmax",
            BITSANDBYTES,
        ),
        ({".weight": U8, ".SCB": F32}, "bitsandbytes 8-bit", f"tensor {BLOCK}.SCB", BITSANDBYTES),
        (
            {".weight_packed": I32, ".weight_scale": F32},
            "compressed-tensors",
            f"tensor {BLOCK}.weight_packed",
            "Use the source checkpoint.",
        ),
        ({"_blocks": U8, "_scales": U8}, "MXFP4", f"tensor {BLOCK}_blocks", BF16),
        (
            {".weight": U8, ".weight_scale": F8, ".weight_scale_2": F32},
            "NVFP4",
            f"tensor {BLOCK}.weight_scale_2",
            BF16,
        ),
        (
            {".weight_packed": U8, ".weight_scale": F8, ".weight_global_scale": F32},
            "NVFP4",
            f"tensor {BLOCK}.weight_packed",
            BF16,
        ),
        (
            {".weight": U8.to(torch.int8), ".weight_scale": F32[:, :1]},
            "8-bit integers",
            f"tensor {BLOCK}.weight_scale",
            SOURCE,
        ),
        ({".weight": F8, ".weight_scale": F32}, "FP8", f"tensor {BLOCK}.weight_scale", BF16),
        (
            {".weight": F8, ".weight_scale_inv": F32},
            "FP8",
            f"tensor {BLOCK}.weight_scale_inv: float32, 4 × 4, {ODD}",
            BF16,
        ),
        (
            {".weight": F8},
            "FP8",
            f"tensor {BLOCK}.weight is float8_e4m3fn without {BLOCK}.weight_scale_inv",
            BF16,
        ),
        (
            {".weight": F8.to(torch.float8_e5m2), ".weight_scale_inv": F32[:1, :1]},
            "FP8",
            f"tensor {BLOCK}.weight is float8_e5m2",
            BF16,
        ),
    ],
)
def test_the_tensors_are_evidence_when_the_config_is_silent(
    tmp_path: Path, tensors: dict[str, torch.Tensor], called: str, evidence: str, hint: str
) -> None:
    write_model(tmp_path, {f"{BLOCK}{end}": tensor.clone() for end, tensor in tensors.items()})
    assert line(tmp_path) == f"`{tmp_path}`: weights are {called} ({evidence}). {READS} {hint}"


@pytest.mark.parametrize(
    ("name", "called"),
    [
        ("model-Q4_K_M.gguf", "GGUF"),
        ("flax_model.msgpack", "Flax"),
        ("tf_model.h5", "TensorFlow"),
        ("model.onnx", "ONNX"),
    ],
)
def test_other_frameworks_are_known_by_their_suffix(tmp_path: Path, name: str, called: str) -> None:
    write_config(tmp_path)
    (tmp_path / name).write_bytes(b"GGUF")
    rest = f"weights are {called} ({name}). {READS} Convert it to safetensors."
    assert line(tmp_path) == f"`{tmp_path}`: {rest}"
    assert line(tmp_path / name) == f"`{tmp_path / name}`: {rest}"


def test_readable_weights_beside_another_format_are_read(tmp_path: Path) -> None:
    write_model(tmp_path, llama())
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    assert open_checkpoint(str(tmp_path)).tensors


DEEPSPEED = (
    "Run `python {above}/zero_to_fp32.py {above} OUT --safe_serialization --tag 'global step'` "
    "(DeepSpeed writes the script there) and give OUT."
)
PARALLEL = (
    "Export it with the trainer: `zero_to_fp32.py` does not join the parts of tensor parallelism."
)
MEGATRON = (
    "Export it with the framework's own converter, for verl `python -m verl.model_merger merge "
    "--backend megatron --local_dir … --target_dir OUT`, and give OUT."
)


@pytest.mark.parametrize(
    ("names", "called", "evidence", "rest"),
    [
        (
            [
                "expp_rank_0_mp_rank_00_optim_states.pt",
                "mp_rank_00_model_states.pt",
                "zero_pp_rank_0_mp_rank_00_optim_states.pt",
            ],
            "DeepSpeed ZeRO-1 or ZeRO-2 shards of 1 rank",
            "expp_rank_0_mp_rank_00_optim_states.pt and 2 more",
            f"{READS} {DEEPSPEED}",
        ),
        (
            [
                f"{prefix}zero_pp_rank_{rank}_mp_rank_00_{what}_states.pt"
                for rank in range(4)
                for prefix, what in (("", "model"), ("bf16_", "optim"))
            ]
            + ["layer_0_expert_0_mp_rank_00_model_states.pt"],
            "DeepSpeed ZeRO-3 shards of 4 ranks",
            "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt and 8 more",
            f"{READS} {DEEPSPEED}",
        ),
        (
            ["mp_rank_00_model_states.pt", "mp_rank_01_model_states.pt"],
            "DeepSpeed ZeRO shards",
            "mp_rank_00_model_states.pt and 1 more",
            f"{READS} {PARALLEL}",
        ),
        (
            ["common.pt", "metadata.json", "model_optim_rng.pt"],
            "a Megatron checkpoint",
            "common.pt and 1 more",
            f"{READS} {MEGATRON}",
        ),
    ],
)
def test_a_framework_folder_is_known_by_its_files(
    tmp_path: Path, names: list[str], called: str, evidence: str, rest: str
) -> None:
    folder = tmp_path / "global step"
    folder.mkdir()
    for name in names:
        (folder / name).touch()
    expected = f"`{{ref}}`: weights are {called} ({evidence}). {rest}"
    expected = expected.replace("{ref}", str(folder)).replace("{above}", str(tmp_path))
    assert line(folder) == expected


def test_framework_shards_in_a_folder_below_are_named_with_it(tmp_path: Path) -> None:
    (tmp_path / "actor" / "dist_ckpt").mkdir(parents=True)
    (tmp_path / "actor" / "dist_ckpt" / "common.pt").touch()
    assert f"`{tmp_path}/actor/dist_ckpt`: weights are a Megatron checkpoint" in line(tmp_path)


@pytest.mark.parametrize(
    ("name", "called"),
    [
        ("model_world_size_4_rank_3.pt", "verl FSDP shards"),
        ("__0_0.distcp", "a DCP checkpoint"),
        (".metadata", "a DCP checkpoint"),
    ],
)
def test_one_shard_of_a_framework_is_no_model(tmp_path: Path, name: str, called: str) -> None:
    path = tmp_path / name
    path.touch()
    assert line(path) == f"`{path}`: weights are {called} ({name}). {TOGETHER}"


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_an_adapter_folder_is_refused_with_the_way_to_merge_it(tmp_path: Path, suffix: str) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / f"adapter_model.{suffix}").touch()
    evidence = f"adapter_config.json, adapter_model.{suffix}"
    assert line(tmp_path) == (f"`{tmp_path}`: weights are a PEFT adapter ({evidence}). {BESIDE}")
    path = tmp_path / f"adapter_model.{suffix}"
    assert line(path) == (
        f"`{path}`: weights are a PEFT adapter (adapter_model.{suffix}). {BESIDE}"
    )


@pytest.mark.parametrize(
    ("name", "called", "rest"),
    [
        ("base_model.model.model.layers.0.q_proj.lora_A.weight", "a PEFT adapter", BESIDE),
        ("base_model.model.model.embed_tokens.lora_embedding_A", "a PEFT adapter", BESIDE),
        (
            "lora_unet_down_blocks_0.lora_down.weight",
            "a kohya or diffusers LoRA",
            f"{WHOLE} {MERGE}",
        ),
    ],
)
def test_factors_under_another_file_name_are_known_by_their_tensors(
    tmp_path: Path, name: str, called: str, rest: str
) -> None:
    save_file({name: F32}, tmp_path / "renamed.safetensors")
    assert f"weights are {called} (tensor {name}). {rest}" in line(tmp_path)
