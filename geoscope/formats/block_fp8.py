"""What is W where a file holds it as FP8 numbers and a scale for each block?

    W = q · s        q: F8_E4M3 (…, R, C), under NAME
                     s: fp32, bf16 or E8M0 (…, ⌈R/b0⌉, ⌈C/b1⌉), under NAME_scale_inv

in fp32, each entry multiplied once. The scale may lie in another shard than its weight. Storing W
so rounds each entry to the spacing of its FP8 number times the scale of its block: the spacing of
q = ±2^e·1.xyz is 2^(e−3), that of the numbers below 2^−6 is 2^−9.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from geoscope.foreign import COUNT
from geoscope.records import TensorInfo

if TYPE_CHECKING:
    import torch

__all__ = [
    "DEFAULT_BLOCK",
    "FP8",
    "SCALE",
    "BlockScale",
    "block_scales",
    "block_size",
    "scaled",
    "spacings",
]

FP8 = "float8_e4m3fn"
SCALE = "_scale_inv"
_SCALE_DTYPES = frozenset({"float32", "bfloat16", "float8_e8m0fnu"})
DEFAULT_BLOCK = (128, 128)
_LARGEST_BLOCK = 1 << 16


@dataclass(frozen=True)
class BlockScale:
    """The scale of one weight. stored: its header. rows, columns: sides of each stored matrix of
    the weight. block: sides of a block.
    """

    stored: TensorInfo
    rows: int
    columns: int
    block: tuple[int, int]


def block_size(quantization: Mapping[str, Any]) -> tuple[int, int] | None:
    """`weight_block_size` of a quantization_config, 128 × 128 without one; None for no blocks."""
    size = quantization.get("weight_block_size", DEFAULT_BLOCK)
    if not isinstance(size, (list, tuple)) or len(size) != 2:
        return None
    if not all(COUNT.holds(side) and 0 < side <= _LARGEST_BLOCK for side in size):
        return None
    return size[0], size[1]


def block_scales(
    tensors: Mapping[str, TensorInfo], block: tuple[int, int]
) -> tuple[dict[str, BlockScale], str | None]:
    """Name of an FP8 weight → its scale; and the first FP8 tensor whose scale is absent or odd."""
    found: dict[str, BlockScale] = {}
    for name, info in tensors.items():
        if info.dtype != FP8:
            continue
        scale = tensors.get(name + SCALE)
        if scale is None or len(info.shape) < 2 or scale.dtype not in _SCALE_DTYPES:
            return found, name
        *lead, rows, columns = info.shape
        if scale.shape != (*lead, -(-rows // block[0]), -(-columns // block[1])):
            return found, name
        found[name] = BlockScale(scale, rows, columns, block)
    return found, None


def scaled(
    values: torch.Tensor, begin: int, scale: torch.Tensor, layout: BlockScale
) -> torch.Tensor:
    """fp32 entries begin … of a stored tensor, in its order, times the scales of their blocks.

    values: 1-D, changed in place. scale: as stored.
    """
    rows, columns = layout.rows, layout.columns
    height, width = layout.block
    table = scale.float().reshape(-1, -(-columns // width))
    high = -(-rows // height)  # rows of the table for each matrix
    done = 0
    while done < len(values):
        row, column = divmod(begin + done, columns)
        matrix, row = divmod(row, rows)
        factors = table[matrix * high + row // height].repeat_interleave(width)[:columns]
        left = len(values) - done
        count = 0
        if column == 0:  # whole rows, to the end of their blocks
            count = min(height - row % height, rows - row, left // columns)
        if count:
            values[done : done + count * columns].view(count, columns).mul_(factors)
            done += count * columns
        else:
            length = min(columns - column, left)
            values[done : done + length].mul_(factors[column : column + length])
            done += length
    return values


def spacings(codes: torch.Tensor) -> torch.Tensor:
    """Distance from each FP8 number to the next, fp32, shape of `codes`."""
    import torch

    every = torch.arange(256)
    exponent = (every >> 3 & 0xF).clamp_min(1) - 7
    table = torch.ldexp(torch.ones(256), exponent - 3)
    return table[codes.view(torch.uint8).long()]
