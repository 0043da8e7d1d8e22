"""Is block-scaled FP8 read as q · s, entry by entry, and is what it rounded away known?

The oracle quantises and multiplies back in plain loops over blocks, and takes the spacing of FP8
numbers from the sorted list of all that there are.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from geoscope.errors import UnsupportedFormat
from geoscope.formats.disk import Room
from geoscope.formats.fp8 import spacings
from geoscope.models.checkpoint import Checkpoint
from geoscope.models.pairing import pair
from geoscope.models.split import split
from geoscope.names import Selection
from geoscope.sources.open import open_checkpoint
from tests.helpers.files import assert_equal_bits, write_config, write_model, write_sharded

UP = "model.layers.0.mlp.up_proj.weight"
DOWN = "model.layers.0.mlp.down_proj.weight"
E8M0 = torch.float8_e8m0fnu


def quantised(W: Tensor, block: tuple[int, int], scale: torch.dtype) -> tuple[Tensor, Tensor]:
    """q and s of a matrix (m, n), each block by the largest entry in it."""
    height, width = block
    q = torch.zeros(W.shape, dtype=torch.float8_e4m3fn)
    s = torch.zeros(-(-len(W) // height), -(-W.shape[1] // width))
    for i in range(s.shape[0]):
        for j in range(s.shape[1]):
            rows, columns = slice(i * height, (i + 1) * height), slice(j * width, (j + 1) * width)
            factor = W[rows, columns].abs().max() / 448
            if scale == E8M0:
                factor = 2.0 ** torch.ceil(torch.log2(factor))
            s[i, j] = factor
            q[rows, columns] = (W[rows, columns] / factor).to(torch.float8_e4m3fn)
    return q, s.to(scale)


def multiplied(q: Tensor, s: Tensor, block: tuple[int, int]) -> Tensor:
    """W entry by entry."""
    factors, numbers = s.float(), q.float()
    rows = [
        torch.stack(
            [numbers[i, j] * factors[i // block[0], j // block[1]] for j in range(len(row))]
        )
        for i, row in enumerate(numbers)
    ]
    return torch.stack(rows)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    W = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.02
    W[0, 0] = 1.0  # an outlier: the blocks have different scales
    return W


def config_of(block: tuple[int, int] | None) -> dict[str, Any]:
    quantization: dict[str, Any] = {"quant_method": "fp8"}
    if block is not None:
        quantization["weight_block_size"] = list(block)
    return {"model_type": "llama", "quantization_config": quantization}


CASES = {
    "whole blocks, fp32": ((8, 12), (4, 4), torch.float32),
    "cut blocks, fp32": ((9, 14), (4, 5), torch.float32),
    "cut blocks, E8M0": ((9, 14), (4, 5), E8M0),
    "one block, bf16": ((5, 7), (128, 128), torch.bfloat16),
}


@pytest.fixture(params=CASES.values(), ids=[*CASES])
def case(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Checkpoint, Tensor]:
    shape, block, scale = request.param
    q, s = quantised(drawn(*shape), block, scale)
    tensors = {UP: q, f"{UP}_scale_inv": s, "model.norm.weight": torch.ones(3)}
    folder = write_model(tmp_path, tensors, config_of(block))
    return open_checkpoint(str(folder)), multiplied(q, s, block)


def test_every_entry_is_its_number_times_the_scale_of_its_block(
    case: tuple[Checkpoint, Tensor],
) -> None:
    checkpoint, expected = case
    assert_equal_bits(checkpoint.read(UP), expected)
    info = checkpoint.tensors[UP]
    assert (info.dtype, info.nbytes) == ("float8_e4m3fn", expected.numel())
    buffer = torch.empty(info.memory_bytes, dtype=torch.uint8)
    assert_equal_bits(checkpoint.read(UP, buffer=buffer), expected)
    flat = expected.reshape(-1)
    for begin in range(0, len(flat), 3):
        for end in (begin + 1, begin + 2, len(flat)):
            if end <= len(flat):
                assert_equal_bits(checkpoint.read_part(UP, begin, end), flat[begin:end])


def test_the_storage_dtype_is_fp8_and_the_scale_no_tensor_of_its_own(
    case: tuple[Checkpoint, Tensor],
) -> None:
    checkpoint, _ = case
    assert checkpoint.ref.storage_dtype == "mixed: float32 1, float8_e4m3fn 1"
    pairing = pair(checkpoint, checkpoint, Selection())
    assert [one.name for one in pairing.matrices] == [UP]
    assert pairing.skipped == () and f"{UP}_scale_inv" not in checkpoint.tensors


def test_blocks_are_128_by_128_where_the_config_is_silent(tmp_path: Path) -> None:
    q, s = quantised(drawn(130, 129), (128, 128), torch.float32)
    write_model(tmp_path, {UP: q, f"{UP}_scale_inv": s}, config_of(None))
    assert tuple(s.shape) == (2, 2)
    found = open_checkpoint(str(tmp_path)).read(UP)
    for i, j in ((0, 0), (127, 127), (128, 127), (127, 128), (129, 128)):
        assert found[i, j] == q[i, j].float() * s[i // 128, j // 128]


def test_the_scale_may_lie_in_another_shard(tmp_path: Path) -> None:
    q, s = quantised(drawn(9, 14), (4, 5), torch.float32)
    placed = write_sharded(tmp_path, {UP: q, f"{UP}_scale_inv": s}, count=2)
    assert placed[UP] != placed[f"{UP}_scale_inv"]
    write_config(tmp_path, config_of((4, 5)))
    checkpoint = open_checkpoint(str(tmp_path))
    assert_equal_bits(checkpoint.read(UP), multiplied(q, s, (4, 5)))
    asked: list[dict[str, list[str]]] = []

    class Recorded:
        def room(self, wanted: Mapping[str, Collection[str]]) -> Room:
            return {}

        def fetch(self, wanted: Mapping[str, Collection[str]]) -> None:
            asked.append({file: sorted(names) for file, names in wanted.items()})

    replace(checkpoint, source=Recorded()).fetch([UP])  # type: ignore[arg-type]
    assert asked == [{file: [name] for name, file in placed.items()}]


def size(checkpoint: Checkpoint, name: str) -> float:
    known = checkpoint.rounding(name)
    assert known is not None
    return known.size


def spacing(number: float, every: Tensor) -> float:
    """Distance from |q| to the next larger FP8 number, by the list of all."""
    larger = every[every > abs(number)]
    return float(larger[0] - abs(number)) if len(larger) else 32.0  # beyond 448


def test_what_was_rounded_away_is_the_spacing_times_the_scale(
    case: tuple[Checkpoint, Tensor], tmp_path: Path
) -> None:
    checkpoint, _ = case
    stored = checkpoint.source.open("model.safetensors")
    q, s = (stored.read(name, None).float() for name in (UP, f"{UP}_scale_inv"))
    block = checkpoint.quantised[UP].layout.block
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    every = codes[codes.isfinite()].abs().unique()
    squares = sum(
        (spacing(float(q[i, j]), every) * float(s[i // block[0], j // block[1]])) ** 2
        for i in range(q.shape[0])
        for j in range(q.shape[1])
    )
    assert size(checkpoint, UP) == pytest.approx((squares / 12) ** 0.5, rel=1e-6)
    assert checkpoint.rounding("model.norm.weight") is None


def test_it_is_about_the_error_that_quantising_makes(tmp_path: Path) -> None:
    W = drawn(200, 150)
    q, s = quantised(W, (32, 32), torch.float32)
    write_model(tmp_path, {UP: q, f"{UP}_scale_inv": s}, config_of((32, 32)))
    checkpoint = open_checkpoint(str(tmp_path))
    error = float((checkpoint.read(UP).double() - W.double()).norm())
    # With 3 bits the spacing above a power of two is often taken for that below: 6 % too much.
    assert size(checkpoint, UP) == pytest.approx(error, rel=0.1)
    # The share that the note about FP8 tells, but for the outlier.
    share = checkpoint.quantised[UP].kind.error
    assert error / float(W[1:].norm()) == pytest.approx(share, rel=0.1)


def test_one_expert_of_an_fp8_stack(tmp_path: Path) -> None:
    block = (4, 4)
    pairs = [quantised(drawn(12, 10, seed=seed), block, torch.float32) for seed in range(3)]
    downs = [quantised(drawn(10, 6, seed=seed), block, torch.float32) for seed in range(3)]
    prefix = "model.layers.0.mlp.experts"
    tensors = {}
    for leaf, members in (("gate_up_proj", pairs), ("down_proj", downs)):
        tensors[f"{prefix}.{leaf}"] = torch.stack([q.view(torch.uint8) for q, _ in members]).view(
            torch.float8_e4m3fn
        )
        tensors[f"{prefix}.{leaf}_scale_inv"] = torch.stack([s for _, s in members])
    write_model(tmp_path, tensors, config_of(block))
    model = split(open_checkpoint(str(tmp_path)))
    whole = multiplied(*pairs[2], block)
    for module, rows in (("gate_proj", slice(0, 6)), ("up_proj", slice(6, 12))):
        name = f"{prefix}.2.{module}.weight"
        assert_equal_bits(model.read(name), whole[rows])
        assert_equal_bits(model.read_part(name, 3, 17), whole[rows].reshape(-1)[3:17])
    parts = [size(model, f"{prefix}.2.{module}.weight") for module in ("gate_proj", "up_proj")]
    alone = tmp_path / "alone"
    write_model(alone, {UP: pairs[2][0], f"{UP}_scale_inv": pairs[2][1]}, config_of(block))
    together = size(open_checkpoint(str(alone)), UP)
    assert sum(part**2 for part in parts) == pytest.approx(together**2, rel=1e-6)


READS = (
    "geoscope reads fp32, fp16, bf16, FP8 with its scales, MXFP4 and bitsandbytes 4-bit. "
    "Use a bf16 conversion."
)
ODD = "is not a scale by block, row or tensor"


@pytest.mark.parametrize(
    ("scale", "evidence"),
    [
        (None, f"tensor {UP} is float8_e4m3fn without {UP}_scale_inv"),
        (torch.ones(2, 1), f"tensor {UP}_scale_inv: float32, 2 × 1, {ODD}"),
        (torch.ones(200), f"tensor {UP}_scale_inv: float32, 200, {ODD}"),
        (torch.ones(2, 2, dtype=torch.int32), f"tensor {UP}_scale_inv: int32, 2 × 2, {ODD}"),
        (torch.ones((), dtype=torch.uint8), f"tensor {UP}_scale_inv: uint8, one number, {ODD}"),
    ],
)
def test_fp8_without_a_scale_that_fits_is_refused(
    tmp_path: Path, scale: Tensor | None, evidence: str
) -> None:
    tensors = {UP: torch.zeros(130, 200, dtype=torch.float8_e4m3fn)}
    if scale is not None:
        tensors[f"{UP}_scale_inv"] = scale
    write_model(tmp_path, tensors, config_of(None))
    with pytest.raises(UnsupportedFormat) as caught:
        open_checkpoint(str(tmp_path))
    assert str(caught.value) == f"`{tmp_path}`: weights are FP8 ({evidence}). {READS}"


def test_blocks_in_the_text_part_of_the_config_are_found(tmp_path: Path) -> None:
    q, s = quantised(drawn(9, 14), (4, 5), torch.float32)
    write_model(tmp_path, {UP: q, f"{UP}_scale_inv": s}, {"text_config": config_of((4, 5))})
    assert_equal_bits(open_checkpoint(str(tmp_path)).read(UP), multiplied(q, s, (4, 5)))


def test_a_pickle_of_fp8_reads_as_the_safetensors_file(tmp_path: Path) -> None:
    q, s = quantised(drawn(9, 14), (4, 5), torch.float32)
    torch.save({UP: q, f"{UP}_scale_inv": s}, tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text(json.dumps(config_of((4, 5))))
    found = open_checkpoint(str(tmp_path))
    assert_equal_bits(found.read(UP), multiplied(q, s, (4, 5)))
    assert_equal_bits(found.read_part(UP, 5, 30), multiplied(q, s, (4, 5)).reshape(-1)[5:30])


def test_damaged_numbers_stay_what_they_are(tmp_path: Path) -> None:
    """NaN of FP8 is NaN of W: the report names the matrix, and nothing hides it."""
    q, s = quantised(drawn(9, 14), (4, 5), torch.float32)
    q.view(torch.uint8)[3, 3] = 0x7F
    save_file({UP: q, f"{UP}_scale_inv": s}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config_of((4, 5))))
    found = open_checkpoint(str(tmp_path)).read(UP)
    assert found.isnan().nonzero().tolist() == [[3, 3]]


def test_the_spacing_of_every_number_is_that_of_the_list() -> None:
    """The least numbers, which have no leading bit of their own, among them."""
    numbers = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    finite = numbers.float().isfinite()
    every = numbers.float()[finite].abs().unique()
    expected = [spacing(float(one), every) for one in numbers.float()[finite]]
    assert spacings(numbers)[finite].tolist() == expected
    assert min(expected) == 2.0**-9
