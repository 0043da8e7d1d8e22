"""What storing weights in a floating dtype does to them: spacing, rounding noise, rounding cells.

A bf16 file holds each weight rounded to 8 significant bits. An update smaller than half a spacing
is lost, and a larger one is rounded; so every number about an update has a floor that follows from
the file alone (docs/methods.md#floors).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = [
    "FORMATS",
    "FloatFormat",
    "bf16_bounds",
    "effective_format",
    "normal_cdf",
    "round_to",
    "rounding_cell",
    "rounding_energy",
    "squared_spacing",
]


@dataclass(frozen=True)
class FloatFormat:
    """A binary floating format: explicit fraction bits and the exponent of its least normal."""

    name: str
    fraction_bits: int
    min_exponent: int

    @property
    def eps(self) -> float:
        """Distance from 1 to the next number, 2^-fraction_bits."""
        return 2.0**-self.fraction_bits


FORMATS = {
    torch.bfloat16: FloatFormat("bfloat16", 7, -126),
    torch.float16: FloatFormat("float16", 10, -14),
    torch.float32: FloatFormat("float32", 23, -126),
    torch.float64: FloatFormat("float64", 52, -1022),
}

# Standard deviations up to which Φ is a normal number of fp64.
_LEAST_NORMAL = 37.0
# Below this many entries a wider tensor may hold bf16 numbers by chance (docs/methods.md#floors).
_ENOUGH_ENTRIES = 1024


def effective_format(weight: Tensor) -> FloatFormat:
    """The format whose rounding the entries really went through.

    An fp32 or fp16 tensor of 1024 entries or more that are all bf16 numbers counts as bf16: it is
    a bf16 checkpoint saved wide, and its floor is that of bf16.
    """
    stored = FORMATS[weight.dtype]
    if weight.dtype not in (torch.float32, torch.float16) or weight.numel() < _ENOUGH_ENTRIES:
        return stored
    flat = weight.reshape(-1)
    # Most wide tensors fail on the first few entries: look there before the whole is cast.
    for part in (flat[:_ENOUGH_ENTRIES], flat):
        if not torch.equal(part.to(torch.bfloat16).to(part.dtype), part):
            return stored
    return FORMATS[torch.bfloat16]


def squared_spacing(weight: Tensor, fmt: FloatFormat) -> Tensor:
    """ulp(w)² of each entry, ulp(w) = 2^(max(⌊log2|w|⌋, e_min) − f); fp64, shape of `weight`.

    Zeros have the spacing of the least numbers, 2^(e_min − f).
    """
    _, exponent = torch.frexp(weight.to(torch.float64))  # |w| = x·2^e with x in [½, 1)
    exponent = torch.where(weight == 0, fmt.min_exponent, exponent - 1)
    exponent = exponent.clamp_min(fmt.min_exponent) - fmt.fraction_bits
    return torch.ldexp(torch.ones_like(exponent, dtype=torch.float64), 2 * exponent)


# The exponent of an fp64 number.
_EXPONENT = 0x7FF0_0000_0000_0000


def rounding_energy(values: Tensor, fmt: FloatFormat) -> Tensor:
    """Σulp²/12 along the last side of contiguous fp64 values (…, n), which are overwritten.

    Without its fraction a number is 2^⌊log2|w|⌋, and ulp is 2^-f of that, or of the least normal.
    """
    powers = values.view(torch.int64).bitwise_and_(_EXPONENT).view(torch.float64)
    powers.clamp_min_(2.0**fmt.min_exponent)
    return torch.linalg.vecdot(powers, powers) * (4.0**-fmt.fraction_bits / 12)


def rounding_cell(weight: Tensor, fmt: FloatFormat) -> tuple[Tensor, Tensor]:
    """Bounds (low, high) of the numbers that round to the same `fmt` number as each entry does.

    fp64, shape of `weight`. Ties are of measure zero and not told apart. Towards zero the spacing
    below a power of two is half of that above, so the cell of ±2^e is lopsided.
    """
    nearest = round_to(weight, fmt)
    magnitude = nearest.abs()
    above = squared_spacing(nearest, fmt).sqrt_() / 2
    mantissa, exponent = torch.frexp(magnitude)
    at_power = (mantissa == 0.5) & (exponent - 1 > fmt.min_exponent)
    below = torch.where(at_power, above / 2, above)
    outer, inner = magnitude + above, magnitude - below
    negative = nearest < 0
    low = torch.where(negative, -outer, inner)
    high = torch.where(negative, -inner, outer)
    return low, high


def round_to(values: Tensor, fmt: FloatFormat) -> Tensor:
    """fp64 values rounded to the nearest number of `fmt` (still held in fp64)."""
    if fmt.fraction_bits >= 52:
        return values.to(torch.float64)
    spacing = squared_spacing(values, fmt).sqrt_()
    return torch.round(values.to(torch.float64) / spacing) * spacing


def bf16_bounds(values: Tensor, reach: float, fmt: FloatFormat) -> tuple[Tensor, Tensor]:
    """Bounds of the numbers that, stored as `fmt`, read within `reach` of `values` through bf16.

    `values` are bf16 numbers in fp64. Returns (low, high): x stored as `fmt` and then rounded to
    bf16 lies in [v − reach, v + reach] iff low < x < high.
    """
    low = -_upper_bound(-(values - reach), fmt)
    return low, _upper_bound(values + reach, fmt)


def _upper_bound(limit: Tensor, fmt: FloatFormat) -> Tensor:
    """The number below which x, stored as `fmt` and rounded to bf16, is ≤ limit."""
    bf16 = FORMATS[torch.bfloat16]
    top = _last_at_most(limit, bf16)
    edge = rounding_cell(top, bf16)[1]
    if not bf16.fraction_bits < fmt.fraction_bits < FORMATS[torch.float32].fraction_bits:
        return edge  # of bf16 itself; a wider format moves it by 2^-16 of a spacing at most
    last = _last_at_most(edge, fmt)
    # On the edge itself stands a tie, which may go to the other side.
    last = torch.where(round_to(last, bf16) > top, _last_below(last, fmt), last)
    return rounding_cell(last, fmt)[1]


def _last_at_most(limit: Tensor, fmt: FloatFormat) -> Tensor:
    """The largest number of `fmt` that is ≤ limit."""
    nearest = round_to(limit, fmt)
    return torch.where(nearest > limit, _last_below(nearest, fmt), nearest)


def _last_below(value: Tensor, fmt: FloatFormat) -> Tensor:
    """The number of `fmt` before `value`, which is one."""
    spacing = squared_spacing(value, fmt).sqrt_()
    mantissa, exponent = torch.frexp(value)
    # One step down from a positive power of two is half as long.
    at_power = (mantissa == 0.5) & (exponent - 1 > fmt.min_exponent)
    return value - torch.where(at_power, spacing / 2, spacing)


def normal_cdf(x: Tensor) -> Tensor:
    """Φ(x), the standard normal distribution function, in [5e-300, 1].

    What underflows would take five times as long.
    """
    return torch.special.erfc(x.clamp(-_LEAST_NORMAL, _LEAST_NORMAL) / -math.sqrt(2.0)) / 2
