"""One elementwise pass over a pair of stored matrices: norms, rounding noise, what stayed the same.

For the 16-bit formats everything that depends on one side alone comes from a histogram of its
65 536 codes, which is exact and costs one pass; so does the expectation of the changed fraction
under an isotropic update (docs/methods.md#unchanged-entries).
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from geoscope.linalg.grids import Grid
from geoscope.linalg.storage import (
    FORMATS,
    FloatFormat,
    bf16_bounds,
    effective_format,
    normal_cdf,
    round_to,
    rounding_cell,
    rounding_energy,
    squared_spacing,
)
from geoscope.profile import stage
from geoscope.records import Quantisation

__all__ = [
    "Side",
    "Unchanged",
    "changed_mask",
    "expected_unchanged",
    "expected_unchanged_shares",
    "matched_spread",
    "nonfinite_counts",
    "nonfinite_entries",
    "side",
    "unchanged",
    "unchanged_cell",
    "unchanged_probability",
    "unchanged_shares",
]

# |ΔW| ≤ 1e-5 counts as unchanged in 2505.11711.
ABSOLUTE_TOLERANCE = 1e-5
# |a − b| ≤ η·max(|a|, |b|) counts as unchanged in 2511.08567 and 2606.07082.
RELATIVE_TOLERANCE = 1e-3

_BF16 = FORMATS[torch.bfloat16]
_EXPONENT_BITS = {torch.bfloat16: 0x7F80, torch.float16: 0x7C00}
# All bits of a 16-bit number but that of its sign.
_MAGNITUDE = 0x7FFF
# Below this many entries their codes are sorted, not counted.
_FEW = 1 << 16
# Entries of one step: stays in the cache of one core.
_BLOCK = 1 << 15
# The same on other devices, where each step costs a wait: few steps, and room for them.
_BLOCK_ELSEWHERE = 1 << 24
# Of a wider base a regular sample of this size serves the expectation of the changed fraction;
# its standard error is below 5e-4.
_SAMPLE = 1 << 20
# Nothing added: a weight stays where rounding alone leaves it.
_LEAST_SPREAD = 1e-300
# Halvings that bring a spread from eighteen decades down to rounding.
_BISECTIONS = 60


@dataclass(frozen=True)
class Side:
    """One stored matrix: Frobenius norm, rounding noise, format, and its values.

    `noise` is √(Σulp²/12), the Frobenius norm of the rounding error that storing it made; on a
    grid that of the grid, too. `levels`: values, their signs apart for 16-bit formats: nothing that
    is asked of them knows the sign. `stored`: the same in the format that stores them.
    `quantisation`: where it was read from codes.
    """

    norm: float
    noise: float
    fmt: FloatFormat
    levels: Tensor
    counts: Tensor
    grid: Grid | None = None
    stored: Tensor | None = None
    quantisation: Quantisation | None = None

    @property
    def is_quantised(self) -> bool:
        """Whether it went through a grid coarser than the dtype in work."""
        return self.quantisation is not None or self.grid is not None


@stage("entries")
def side(weight: Tensor) -> Side:
    """Norm, rounding noise and the values of one finite stored matrix (any shape and dtype).

    `levels` and `counts` list its distinct magnitudes for 16-bit formats, a regular sample of its
    entries (with equal counts) for wider ones.
    """
    fmt = effective_format(weight)
    if weight.dtype in (torch.bfloat16, torch.float16):
        stored, counts = _histogram(weight)
        levels = stored.double()
        norm = torch.dot(counts, levels.square()).sqrt()
        spacings = _of_codes(squared_spacing, fmt, stored)[:, 0]
        noise = (torch.dot(counts, spacings.contiguous()) / 12).sqrt()
        return Side(float(norm), float(noise), fmt, levels, counts, stored=stored)
    flat = weight.reshape(-1)
    squares = noise_squares = 0.0
    for block in _split(flat):
        values = block.to(torch.float64, copy=True)
        squares += float(values.square().sum())
        noise_squares += float(rounding_energy(values, fmt))
    sample = _regular_sample(flat)
    return Side(
        squares**0.5,
        noise_squares**0.5,
        fmt,
        sample,
        torch.full_like(sample, flat.numel() / sample.numel()),
    )


def _histogram(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Distinct magnitudes of a 16-bit tensor, as it stores them, and how often each is there.

    Of a bf16 or fp16 number all bits but the first are its magnitude.
    """
    codes = weight.contiguous().view(torch.int16).reshape(-1)
    if codes.device.type == "cpu" and len(codes) < _FEW:
        found, often = np.unique(codes.numpy() & _MAGNITUDE, return_counts=True)
        present, counts = torch.from_numpy(found), torch.from_numpy(often)
    else:
        every = _magnitude_counts(codes)
        present = every.nonzero().squeeze(-1)
        present, counts = present.to(torch.int16), every[present]
    return present.view(weight.dtype), counts.double()


def _magnitude_counts(codes: Tensor) -> Tensor:
    counts = torch.zeros(_MAGNITUDE + 1, dtype=torch.int64, device=codes.device)
    room = torch.empty(0, dtype=torch.int16, device=codes.device)
    for block in _split(codes, 32):
        if len(room) < len(block):  # fresh pages would cost more than the counting
            room = torch.empty_like(block)
        magnitudes = torch.bitwise_and(block, _MAGNITUDE, out=room[: len(block)])
        counts += torch.bincount(magnitudes, minlength=len(counts))
    return counts


def _of_codes(function: Callable[..., Any], fmt: FloatFormat, stored: Tensor) -> Tensor:
    """function(levels, fmt) of 16-bit numbers (p,), from a table of all codes: (p, results)."""
    table = _code_table(function, fmt, stored.dtype, stored.device)
    return table[stored.view(torch.int16).int() & 0xFFFF]


@lru_cache(maxsize=8)
def _code_table(
    function: Callable[..., Any], fmt: FloatFormat, dtype: torch.dtype, device: torch.device
) -> Tensor:
    codes = torch.arange(65536, device=device).to(torch.int16).view(dtype)
    found = function(codes.double(), fmt)
    return torch.stack(found if isinstance(found, tuple) else (found,), -1)


def _count(
    left: Tensor, relation: Callable[[Any, Any], Any], right: Tensor | float
) -> NDArray[np.int64]:
    """Number of entries in each row for which the relation holds; fp32, fp64 or integers.

    numpy compares and counts several times as fast as torch on the CPU.
    """
    if left.device.type != "cpu":
        return torch.count_nonzero(relation(left, right), -1).cpu().numpy()
    other = right.numpy() if isinstance(right, Tensor) else right
    held = relation(left.numpy(), other)
    return np.array([np.count_nonzero(row) for row in held], dtype=np.int64)


@dataclass(frozen=True)
class Unchanged:
    """Shares of entries that did not move: by the relative rule, the absolute rule, and exactly."""

    relative: float
    absolute: float
    exact: float


def nonfinite_entries(weight: Tensor) -> int:
    """Number of NaN and Inf entries."""
    return nonfinite_counts(weight[None])[0]


@stage("entries")
def nonfinite_counts(weights: Tensor) -> list[int]:
    """`nonfinite_entries` of each matrix of a stack (b, …)."""
    exponent = _EXPONENT_BITS.get(weights.dtype)
    counts = np.zeros(len(weights), dtype=np.int64)
    if exponent is None:
        for part in _rows(weights):
            counts += part.shape[1] - _count(part.double().abs(), operator.lt, math.inf)
        return counts.tolist()
    # All exponent bits set: on integers this is ten times as fast as isfinite on 16-bit floats.
    for part in _rows(weights.contiguous().view(torch.int16)):
        counts += _count(part & exponent, operator.eq, exponent)
    return counts.tolist()


@stage("entries")
def unchanged(base: Tensor, tuned: Tensor) -> Unchanged:
    """The shares of docs/methods.md#unchanged-entries. base, tuned: equal shape, storage dtypes."""
    return unchanged_shares(base[None], tuned[None])[0]


@stage("entries")
def unchanged_shares(base: Tensor, tuned: Tensor) -> list[Unchanged]:
    """`unchanged` of each pair of a stack (b, …)."""
    counts = np.zeros((3, len(base)), dtype=np.int64)
    through = _both_bf16(base, tuned)
    for before, after in _blocks(base, tuned):
        counts += _unchanged_counts(before, after, through=through)
    return [Unchanged(*row) for row in (counts / base[0].numel()).T.tolist()]


def _unchanged_counts(before: Tensor, after: Tensor, *, through: bool) -> NDArray[np.int64]:
    """Entries that stayed by each rule, of each row of (b, entries); (3, b)."""
    before32, after32 = _through_bf16(before), _through_bf16(after)
    distance = (before32 - after32).abs_()
    absolute = _count(distance, operator.le, ABSOLUTE_TOLERANCE)
    if through:
        # Neighbouring bf16 numbers are at least 2^-8 of themselves apart: within 1e-3 is equal.
        exact = _count(distance, operator.eq, 0.0)
        return np.stack([exact, absolute, exact])
    exact = _count(before.double(), operator.eq, after.double())
    scale = torch.maximum(before32.abs_(), after32.abs_())
    relative = _count(distance, operator.le, RELATIVE_TOLERANCE * scale)
    return np.stack([relative, absolute, exact])


@stage("entries")
def changed_mask(base: Tensor, tuned: Tensor) -> Tensor:
    """Entries that moved by the relative rule, bool, shape of `base`."""
    if _both_bf16(base, tuned):
        return base != tuned
    parts = []
    for before, after in _blocks(base[None], tuned[None]):
        before32, after32 = _through_bf16(before), _through_bf16(after)
        distance = (before32 - after32).abs_()
        parts.append(distance > RELATIVE_TOLERANCE * torch.maximum(before32.abs_(), after32.abs_()))
    return torch.cat(parts, 1).reshape(base.shape)


def _both_bf16(base: Tensor, tuned: Tensor) -> bool:
    return base.dtype == tuned.dtype == torch.bfloat16


def _blocks(base: Tensor, tuned: Tensor) -> zip[tuple[Tensor, Tensor]]:
    return zip(_rows(base), _rows(tuned), strict=True)


def _rows(weights: Tensor) -> tuple[Tensor, ...]:
    """A stack as blocks (b, entries) of one step."""
    flat = weights.flatten(1)
    step = _BLOCK if flat.device.type == "cpu" else _BLOCK_ELSEWHERE
    return flat.split(max(1, step // len(flat)), dim=1)


def _split(flat: Tensor, steps: int = 1) -> tuple[Tensor, ...]:
    """Blocks of one step, or of several."""
    return flat.split(_BLOCK * steps if flat.device.type == "cpu" else _BLOCK_ELSEWHERE)


def _through_bf16(block: Tensor) -> Tensor:
    """A new tensor in fp32 of the numbers that bf16 shows."""
    if block.dtype == torch.float64:  # torch would round it to fp32 first
        return round_to(block, _BF16).to(torch.float32)
    return block.to(torch.bfloat16).to(torch.float32)


@stage("nulls")
def expected_unchanged(base: Side, tuned_format: FloatFormat, spread: float) -> Unchanged:
    """What `unchanged` gives on average for an isotropic update of entry sd `spread`.

    ΔW_ij ~ N(0, spread²) added to this very base and rounded to the tuned format: the probability
    that it stays in the rounding cell, averaged over the entries of the base.
    """
    return expected_unchanged_shares([base], [tuned_format], [spread])[0]


@stage("nulls")
def expected_unchanged_shares(
    bases: Sequence[Side], formats: Sequence[FloatFormat], spreads: Sequence[float]
) -> list[Unchanged]:
    """`expected_unchanged` of each of several bases."""
    if not bases:
        return []
    counts = [len(base.levels) for base in bases]
    levels = torch.cat([base.levels for base in bases])
    sizes = [max(spread, _LEAST_SPREAD) for spread in spreads]
    spread = levels.new_tensor(sizes).repeat_interleave(torch.tensor(counts, device=levels.device))
    bounds = [_bounds(base, fmt) for base, fmt in zip(bases, formats, strict=True)]

    def stays(rule: int) -> list[float]:
        low, high = (torch.cat([one[rule][end] for one in bounds]) for end in range(2))
        parts = _between(levels, low, high, spread).split(counts)
        return [
            float(torch.dot(base.counts, part)) / float(base.counts.sum())
            for base, part in zip(bases, parts, strict=True)
        ]

    exact = stays(2)
    # Where both are stored in bf16 the relative rule is the exact one.
    same = all(torch.equal(one[0][end], one[2][end]) for one in bounds for end in range(2))
    rows = zip(exact if same else stays(0), stays(1), exact, strict=True)
    return [Unchanged(*row) for row in rows]


_Bounds = tuple[Tensor, Tensor]


def _bounds(base: Side, tuned_format: FloatFormat) -> tuple[_Bounds, _Bounds, _Bounds]:
    """Between what each level stays unchanged by the relative, the absolute and the exact rule."""
    if base.stored is None:
        columns = _stacked_bounds(base.levels, tuned_format)
    else:
        columns = _of_codes(_stacked_bounds, tuned_format, base.stored).T.contiguous()
    return (columns[0], columns[1]), (columns[2], columns[3]), (columns[4], columns[5])


def _stacked_bounds(levels: Tensor, tuned_format: FloatFormat) -> tuple[Tensor, ...]:
    """The bounds of `_bounds`, one after the other."""
    low, high = rounding_cell(levels, tuned_format)
    # What the tuned format does not hold cannot stay: an empty cell.
    high = torch.where(round_to(levels, tuned_format) == levels, high, low)
    shown = round_to(levels, _BF16)
    return (
        *unchanged_cell(levels, tuned_format),
        *bf16_bounds(shown, ABSOLUTE_TOLERANCE, tuned_format),
        low,
        high,
    )


def unchanged_cell(weight: Tensor, tuned_format: FloatFormat) -> tuple[Tensor, Tensor]:
    """Bounds of the numbers that show the same bf16 number as each entry once they are stored."""
    return bf16_bounds(round_to(weight, _BF16), 0.0, tuned_format)


def unchanged_probability(weight: Tensor, cell: tuple[Tensor, Tensor], spread: float) -> Tensor:
    """P(an entry stays in its cell when N(0, spread²) is added); fp64, shape of `weight`."""
    return _between(weight, *cell, spread)


def matched_spread(base: Side, density: float, tuned_format: FloatFormat) -> float:
    """Entry sd of the isotropic update of which the share `density` shows after rounding.

    By bisection on the expectation over the base's values, to rounding.
    """
    weights, share = base.levels, base.counts / base.counts.sum()
    cell = unchanged_cell(weights, tuned_format)
    scale = float(torch.dot(share, weights.square()).sqrt())
    low, high = scale * 1e-12, scale * 1e6
    for _ in range(_BISECTIONS):
        middle = (low * high) ** 0.5
        if 1 - float(torch.dot(share, unchanged_probability(weights, cell, middle))) < density:
            low = middle
        else:
            high = middle
    return (low * high) ** 0.5


def _regular_sample(weight: Tensor) -> Tensor:
    """Every so many-th entry, a million at most, in fp64."""
    flat = weight.reshape(-1)
    return flat[:: -(-flat.numel() // _SAMPLE)].double()


def _between(centre: Tensor, low: Tensor, high: Tensor, spread: Tensor | float) -> Tensor:
    return normal_cdf((high - centre) / spread) - normal_cdf((low - centre) / spread)
