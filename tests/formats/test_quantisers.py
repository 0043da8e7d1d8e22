"""Are the weights of bitsandbytes, transformers and compressed-tensors read as these libraries
read them themselves, entry by entry, and is what they rounded away known?

Each library writes the tensors and is the oracle of what they hold; it is skipped where missing.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from geoscope.errors import UnsupportedFormat
from geoscope.models.checkpoint import Checkpoint
from geoscope.models.split import split
from tests.helpers.files import assert_equal_bits, model_of

UP = "model.layers.0.mlp.up_proj.weight"
BLOCK = "model.layers.0.mlp.up_proj"


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.02


def assert_reads(checkpoint: Checkpoint, expected: Tensor, name: str = UP) -> None:
    """The whole, into a buffer, and parts that begin and end anywhere."""
    assert_equal_bits(checkpoint.read(name), expected)
    info = checkpoint.tensors[name]
    assert info.memory_bytes == 4 * expected.numel()
    buffer = torch.empty(info.memory_bytes, dtype=torch.uint8)
    assert_equal_bits(checkpoint.read(name, buffer=buffer), expected)
    flat = expected.reshape(-1)
    for begin, end in ((0, 1), (1, 2), (3, 70), (63, 65), (64, 128), (5, len(flat)), (7, 7)):
        assert_equal_bits(checkpoint.read_part(name, begin, end), flat[begin:end])


def size(checkpoint: Checkpoint, name: str) -> float:
    known = checkpoint.rounding(name)
    assert known is not None
    return known.size


def share_known(checkpoint: Checkpoint, exact: Tensor, name: str = UP) -> float:
    """What is said to be rounded away, over the error that was made."""
    known = checkpoint.rounding(name)
    assert known is not None
    error = float((checkpoint.read(name).double() - exact.double()).norm())
    assert error / float(exact.norm()) == pytest.approx(known.error, rel=0.15)
    return known.size / error


# --- bitsandbytes -------------------------------------------------------------------------------


def bnb_tensors(W: Tensor, **choices: Any) -> tuple[dict[str, Tensor], Tensor]:
    """The tensors that bitsandbytes saves of a weight, and what it reads of them in fp32."""
    functional = pytest.importorskip("bitsandbytes.functional")
    codes, state = functional.quantize_4bit(W, **choices)
    saved = {f"{UP}.{leaf}": tensor for leaf, tensor in state.as_dict(packed=True).items()}
    state.dtype = torch.float32
    return {UP: codes, **saved}, functional.dequantize_4bit(codes, state)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [True, False], ids=["nested", "plain"])
@pytest.mark.parametrize("shape", [(48, 128), (7, 33)], ids=["whole blocks", "a cut block"])
def test_every_entry_is_that_of_bitsandbytes(
    tmp_path: Path, kind: str, nested: bool, shape: tuple[int, int]
) -> None:
    W = drawn(*shape).bfloat16()
    tensors, expected = bnb_tensors(W, quant_type=kind, compress_statistics=nested)
    checkpoint = model_of(tmp_path, {**tensors, "model.norm.weight": torch.ones(3)})
    assert_reads(checkpoint, expected)
    assert sorted(checkpoint.tensors) == [UP, "model.norm.weight"]
    assert checkpoint.ref.storage_dtype == f"mixed: float32 1, {kind} 1"
    assert {name for names in checkpoint._by_file([UP]).values() for name in names} == {*tensors}


@pytest.mark.parametrize(("kind", "width"), [("nf4", 64), ("nf4", 128), ("fp4", 64)])
def test_what_bitsandbytes_rounds_away_is_known(tmp_path: Path, kind: str, width: int) -> None:
    W = drawn(256, 256)
    tensors, _ = bnb_tensors(W, quant_type=kind, blocksize=width)
    # The largest of a block is exact, and what rounds to the outer numbers is not uniform.
    assert share_known(model_of(tmp_path, tensors), W) == pytest.approx(1, abs=0.1)


def test_blocks_run_on_over_the_ends_of_rows(tmp_path: Path) -> None:
    """As they were quantised; bitsandbytes 0.50.2 itself reads them wrong on a CPU."""
    W = drawn(48, 96)
    tensors, _ = bnb_tensors(W, quant_type="nf4")
    read = model_of(tmp_path, tensors).read(UP)
    assert float((read - W).norm() / W.norm()) == pytest.approx(0.092, rel=0.05)


def test_states_that_do_not_fit_are_refused_by_name(tmp_path: Path) -> None:
    tensors, _ = bnb_tensors(drawn(8, 64), quant_type="nf4")
    tensors[f"{UP}.absmax"] = tensors[f"{UP}.absmax"][:3].clone()
    with pytest.raises(UnsupportedFormat, match=r"bitsandbytes 4-bit .tensor .*absmax"):
        model_of(tmp_path, tensors)


# --- MXFP4 ----------------------------------------------------------------------------------------


def mx(W: Tensor) -> tuple[Tensor, Tensor]:
    """Bytes (…, R, C/2) and exponents (…, R, C/32) of the OCP format, in plain steps."""
    runs = W.reshape(*W.shape[:-1], -1, 32)
    power = torch.floor(torch.log2(runs.abs().amax(-1, keepdim=True))) - 2
    numbers = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    sizes = (runs / 2**power).abs().clamp_max(6)
    codes = (sizes[..., None] - numbers).abs().argmin(-1) + 8 * (runs < 0)
    codes = codes.reshape(*W.shape[:-1], -1, 2).to(torch.uint8)
    return codes[..., 0] | codes[..., 1] << 4, (power[..., 0] + 127).to(torch.uint8)


def gpt_oss() -> dict[str, Tensor]:
    """Experts of gpt-oss as its files hold them: three, hidden 64, inside 32."""
    tensors: dict[str, Tensor] = {}
    for leaf, shape in (("gate_up_proj", (3, 64, 64)), ("down_proj", (3, 64, 32))):
        codes, scales = mx(drawn(*shape))
        stem = f"model.layers.0.mlp.experts.{leaf}"
        tensors[f"{stem}_blocks"] = codes.reshape(*scales.shape, 16)
        tensors[f"{stem}_scales"] = scales
    return tensors


@pytest.mark.parametrize("leaf", ["gate_up_proj", "down_proj"])
def test_experts_of_gpt_oss_are_those_of_transformers(tmp_path: Path, leaf: str) -> None:
    mxfp4 = pytest.importorskip("transformers.integrations.mxfp4")
    tensors = gpt_oss()
    checkpoint = model_of(tmp_path, tensors, model_type="gpt_oss")
    stem = f"model.layers.0.mlp.experts.{leaf}"
    expected = mxfp4.convert_moe_packed_tensors(
        tensors[f"{stem}_blocks"], tensors[f"{stem}_scales"], dtype=torch.float32
    )
    assert_reads(checkpoint, expected, stem)


def test_parts_of_experts_in_mxfp4_are_those_of_the_bf16_model(tmp_path: Path) -> None:
    """Under one name, gate and up alternating, as the live model of gpt-oss has them."""
    packed = model_of(tmp_path / "packed", gpt_oss(), model_type="gpt_oss")
    wide = {name: packed.read(name).contiguous() for name in packed.tensors}
    plain = split(model_of(tmp_path / "plain", wide, model_type="gpt_oss"))
    parts = split(packed)
    assert set(parts.tensors) == set(plain.tensors) and len(parts.tensors) == 9
    for name in parts.tensors:
        assert_equal_bits(parts.read(name), plain.read(name))
        assert_equal_bits(parts.read_part(name, 3, 75), plain.read_part(name, 3, 75))
    total = sum(size(parts, name) ** 2 for name in parts.tensors)
    whole = sum(size(packed, name) ** 2 for name in packed.tensors)
    assert total == pytest.approx(whole, rel=1e-6)


def test_packed_weights_of_compressed_tensors_in_mxfp4(tmp_path: Path) -> None:
    module = pytest.importorskip("compressed_tensors.compressors.mxfp4.base")
    scheme = scheme_of(num_bits=4, type="float", strategy="group", group_size=32)
    W = drawn(24, 96)
    codes, powers = mx(W)
    state = {"weight_packed": codes, "weight_scale": powers}
    expected = module.MXFP4PackedCompressor.decompress(state, scheme)["weight"]
    checkpoint = model_of(tmp_path, {f"{BLOCK}.{leaf}": part for leaf, part in state.items()})
    assert_reads(checkpoint, expected.float())
    assert share_known(checkpoint, W) == pytest.approx(1, abs=0.15)


# --- FP8 ------------------------------------------------------------------------------------------


def scheme_of(**weights: Any) -> Any:
    quantization = pytest.importorskip("compressed_tensors.quantization")
    return quantization.QuantizationScheme(
        targets=["Linear"], weights=quantization.QuantizationArgs(**weights)
    )


@pytest.mark.parametrize(
    ("strategy", "scale"),
    [("tensor", (1,)), ("channel", (24, 1)), ("block", (2, 3))],
)
def test_fp8_of_compressed_tensors(tmp_path: Path, strategy: str, scale: tuple[int, ...]) -> None:
    module = pytest.importorskip("compressed_tensors.compressors.naive_quantized.base")
    blocks = {"block_structure": [16, 32]} if strategy == "block" else {}
    scheme = scheme_of(num_bits=8, type="float", strategy=strategy, **blocks)
    W = drawn(24, 96)
    scales = torch.full(scale, float(W.abs().max()) / 448) * (1 + torch.rand(scale))
    state = {"weight": W, "weight_scale": scales}
    packed = module.FloatQuantizationCompressor.compress(state, scheme)
    assert packed["weight"].dtype == torch.float8_e4m3fn
    expected = module.FloatQuantizationCompressor.decompress(packed, scheme)["weight"]
    tensors = {f"{BLOCK}.{leaf}": part for leaf, part in packed.items()}
    config = {
        "quant_method": "compressed-tensors",
        "weight_block_size": [16, 32],
    }
    checkpoint = model_of(tmp_path, tensors, quantization_config=dict(config))
    assert_reads(checkpoint, expected)
    assert share_known(checkpoint, W) == pytest.approx(1, abs=0.15)


SPELLINGS = {
    "DeepSeek-V4": (".scale", torch.float8_e8m0fnu, (2, 3)),
    "modelopt": (".weight_scale", torch.float32, ()),
    "transformers without blocks": (".weight_scale_inv", torch.float32, ()),
    "fbgemm": (".weight_scale", torch.float32, (32, 1)),
    "MXFP8": (".weight_scale_inv", torch.uint8, (32, 3)),
}


@pytest.mark.parametrize("case", SPELLINGS.values(), ids=[*SPELLINGS])
def test_fp8_under_other_names_is_that_of_transformers(
    tmp_path: Path, case: tuple[str, torch.dtype, tuple[int, ...]]
) -> None:
    module = pytest.importorskip("transformers.integrations.finegrained_fp8")
    ending, dtype, shape = case
    q = drawn(32, 96, seed=1).mul(50).to(torch.float8_e4m3fn)
    powers = torch.randint(120, 124, shape, dtype=torch.uint8)
    scale = powers.view(torch.float8_e8m0fnu) if dtype == torch.float8_e8m0fnu else powers
    scale = torch.rand(shape) if dtype == torch.float32 else scale
    oracle = module.Fp8Dequantize(None)._dequantize_one
    expected = oracle(q, scale, output_dtype=torch.float32)
    sizes = {"quant_method": "fp8", "weight_block_size": [16, 32]}
    checkpoint = model_of(tmp_path, {UP: q, f"{BLOCK}{ending}": scale}, quantization_config=sizes)
    assert_reads(checkpoint, expected)


def test_experts_of_deepseek_v4_in_mxfp4(tmp_path: Path) -> None:
    module = pytest.importorskip("transformers.integrations.finegrained_fp8")
    codes, powers = mx(drawn(24, 96))
    scale = powers.view(torch.float8_e8m0fnu)
    oracle = module.Fp8Dequantize(None)._dequantize_one
    expected = oracle(codes.view(torch.int8), scale, output_dtype=torch.float32)
    tensors = {UP: codes.view(torch.int8), f"{BLOCK}.scale": scale}
    config = {"quant_method": "fp8", "expert_dtype": "fp4"}
    assert_reads(model_of(tmp_path, tensors, quantization_config=config), expected)
