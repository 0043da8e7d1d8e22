"""Which weights of a model are FP8 numbers, and what scales have they?

    q: F8_E4M3 (…, R, C), under NAME; its scale in fp32, bf16 or E8M0 (bytes, too), under

    NAME_scale_inv      DeepSeek-V3, Qwen, transformers
    NAME_scale          compressed-tensors, modelopt, fbgemm
    MODULE.scale        DeepSeek-V4, of MODULE.weight

    a number for each block    (…, ⌈R/b0⌉, ⌈C/b1⌉)
    a tensor                   (), (1,), (…, 1, 1)
    a channel                  (…, R, 1), (R,); of stacks that are stored (in, out) (…, 1, C)
    32 in a row, MXFP8         (…, R, C/32) in E8M0

The scale may lie in another shard than its weight. The spacing of q = ±2^e·1.xyz is 2^(e−3), that
of the numbers below 2^−6 is 2^−9.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from geoscope.foreign import COUNT
from geoscope.formats.quantised import Files, Quantised, ScaleLayout
from geoscope.records import Quantisation, TensorInfo

if TYPE_CHECKING:
    import torch

__all__ = [
    "DEFAULT_BLOCK",
    "FP8",
    "MX_BLOCK",
    "Fp8Weight",
    "block_size",
    "fp8_weights",
    "power_scales",
    "scale_of",
    "spacings",
]

FP8 = "float8_e4m3fn"
MX_BLOCK = 32
_POWERS = frozenset({"float8_e8m0fnu", "uint8"})
_SCALE_DTYPES = frozenset({"float32", "bfloat16", "float16"}) | _POWERS
DEFAULT_BLOCK = (128, 128)
_LARGEST_BLOCK = 1 << 16
_ERROR = 0.0266  # of three fraction bits (docs/numerics.md)


@dataclass(frozen=True)
class Fp8Weight(Quantised):
    """A weight of FP8 numbers."""

    def numbers(self, files: Files, begin: int, end: int) -> torch.Tensor:
        return self._codes(files, begin, end).float()

    def spacings(self, files: Files, begin: int, end: int) -> torch.Tensor:
        return spacings(self._codes(files, begin, end))

    def scales(self, files: Files) -> torch.Tensor:
        return power_scales(files.open(self.scale.source).read(self.scale.name, None))

    def _codes(self, files: Files, begin: int, end: int) -> torch.Tensor:
        return files.open(self.codes.source).read_part(self.codes.name, begin, end)


def power_scales(stored: torch.Tensor) -> torch.Tensor:
    """Scales in fp32; bytes are E8M0, 2^(byte − 127)."""
    import torch

    is_byte = stored.dtype == torch.uint8
    return (stored.view(torch.float8_e8m0fnu) if is_byte else stored).float()


def block_size(quantization: Mapping[str, Any]) -> tuple[int, int] | None:
    """`weight_block_size` of a quantization_config, 128 × 128 without one; None for no blocks."""
    size = quantization.get("weight_block_size", DEFAULT_BLOCK)
    if not isinstance(size, (list, tuple)) or len(size) != 2:
        return None
    if not all(COUNT.holds(side) and 0 < side <= _LARGEST_BLOCK for side in size):
        return None
    return size[0], size[1]


def scale_of(name: str, tensors: Mapping[str, TensorInfo]) -> TensorInfo | None:
    """The tensor that has the name of a weight's scale."""
    spellings = [f"{name}_scale_inv", f"{name}_scale"]
    if name.endswith(".weight"):
        spellings.append(f"{name.removesuffix('.weight')}.scale")
    return next((tensors[one] for one in spellings if one in tensors), None)


def fp8_weights(
    tensors: Mapping[str, TensorInfo], block: tuple[int, int]
) -> tuple[dict[str, Quantised], str | None]:
    """Name of an FP8 weight → how it is read; and the first one whose scale is absent or odd."""
    weights: dict[str, Quantised] = {}
    odd: str | None = None
    for name, info in tensors.items():
        if info.dtype != FP8 or name.endswith("_scale"):
            continue
        scale = scale_of(name, tensors)
        layout = None if scale is None else _layout(info.shape, scale, block)
        if scale is None or layout is None:
            odd = odd or name
            continue
        called, shape = layout
        weights[name] = Fp8Weight(info, info, scale, shape, Quantisation(called, _ERROR, 3))
    return weights, odd


def _layout(
    shape: tuple[int, ...], scale: TensorInfo, block: tuple[int, int]
) -> tuple[str, ScaleLayout] | None:
    """What the scales are called and where they lie; None where their shape does not tell."""
    if len(shape) < 2 or scale.dtype not in _SCALE_DTYPES:
        return None
    *lead, rows, columns = shape
    for called, sides in _blocks(rows, columns, scale, block):
        high, wide = -(-rows // sides[0]), -(-columns // sides[1])
        spelled = [(*lead, high, wide)]
        spelled += [(*lead, high)] if wide == 1 else []
        spelled += [tuple(lead), (*lead, 1)] if high == wide == 1 else []
        if scale.shape in spelled and math.prod(scale.shape) == math.prod((*lead, high, wide)):
            return called, ScaleLayout(rows, columns, sides)
    return None


def _blocks(
    rows: int, columns: int, scale: TensorInfo, block: tuple[int, int]
) -> Iterator[tuple[str, tuple[int, int]]]:
    """The blocks that there are; a byte is a power of two, and those of MXFP8 alone."""
    if scale.dtype in _POWERS and columns % MX_BLOCK == 0:
        yield "MXFP8", (1, MX_BLOCK)
    if scale.dtype != "uint8":
        yield "block-scaled FP8", block
        yield "FP8 with a scale for the tensor", (rows, columns)
        yield "FP8 with a scale for each channel", (1, columns)
        yield "FP8 with a scale for each channel", (rows, 1)


def spacings(codes: torch.Tensor) -> torch.Tensor:
    """Distance from each FP8 number to the next, fp32, shape of `codes`."""
    import torch

    every = torch.arange(256)
    exponent = (every >> 3 & 0xF).clamp_min(1) - 7
    table = torch.ldexp(torch.ones(256), exponent - 3)
    return table[codes.view(torch.uint8).long()]
