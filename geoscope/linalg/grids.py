"""Do the values of a matrix lie on a grid that is coarser than its dtype?

A model that was quantised and written back as fp32, fp16 or bf16 has lost more than its dtype says.
Its values tell: within a row, a column or a group of neighbours they are few, and
a + s·k with whole k (integers), or shares of the largest one that every group has (FP8, FP4, NF4).

*Ties.* Honest values tie no more often than they miss one another by one spacing: a pair of
neighbouring cells of a smooth density is met twice as often as the same cell twice. Segments of 16
neighbours with 16 ties or more, and at least twice as many as near misses, ask for a closer look;
all others are done with.

*Steps.* For the steps s = range/L, L = 3 … C, the phases v/s mod 1 of the n distinct values that
are at least four times finer than s give a resultant of length R. Of honest values n·R² exceeds x
with probability e^-x, so max n·R² − ln C − 2 is negative on average, and its sum over G groups
exceeds 40 with a probability below .65^G·e^-20. A grid has R near 1, and misses its points by no
more than storage rounding.

*Codebooks.* Of G groups, each divided by its largest magnitude, the values fall in at most 256
levels no wider than storage rounding, with 16 values or more a level.

Fewer than five values a group are a format of their own (binary and ternary weights), where nothing
was rounded. All thresholds are ours.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from geoscope.linalg.storage import FORMATS, FloatFormat, squared_spacing
from geoscope.profile import stage

__all__ = ["Grid", "grid_of", "grids_of"]

_ENOUGH_ENTRIES = 1024
_SEGMENT, _SEGMENTS = 16, 256
_SHORTEST = 2 * _SEGMENT  # side along which values are compared
_TIES, _TIES_A_MISS = 16, 2
_SIZES = (256, 128, 64, 32, 16)
_FEWEST_LEVELS, _MOST_LEVELS = 5, 256
# Steps a range that are tried: few first, since each that is tried could be met by chance.
_STEPS = (16, 256)
_EVIDENCE = 40.0
_FIRST_GROUPS = 4  # a layout that these refute is done with
_GROUPS, _ENTRIES = 32, 1 << 12  # whose steps are sought, eight groups at least
_MORE_GROUPS, _MORE_ENTRIES = 1024, 1 << 16  # over which energies are averaged
_A_LEVEL = 16  # values of a codebook's level
_NEGLIGIBLE = 2.0**-9  # of the largest value of a group; short formats are uneven below
_BLOCK = 128


@dataclass(frozen=True)
class Grid:
    """name: what was seen, as in "int8 grid by row". energy: E‖rounding error‖², the sum of
    step²/12 over the entries; of a codebook the second moment of each value's cell.
    """

    name: str
    energy: float

    def noise_with(self, storage: float) -> float:
        """Frobenius norm of both errors: of the grid, and of storing its values."""
        return math.hypot(self.energy**0.5, storage)


@stage("entries")
def grids_of(weights: Tensor) -> tuple[Grid | None, ...]:
    """`grid_of` each of a stack (b, m, n): ties are counted in all at once."""
    if weights.ndim != 3 or not len(weights) or weights[0].numel() < _ENOUGH_ENTRIES:
        return (None,) * len(weights)
    bits = _fraction_bits(weights)
    sides = [("row", weights), ("column", weights.mT)]
    ties = {side: _ties(W, bits) for side, W in sides if W.shape[-1] >= _SHORTEST}
    return tuple(
        _searched(weight, bits[i], [side for side in ties if ties[side][i]])
        for i, weight in enumerate(weights)
    )


def grid_of(weight: Tensor) -> Grid | None:
    """The grid of a finite stored matrix (m, n), from a regular sample of it; None without one.

    Fewer than 1024 entries are not looked at.
    """
    return grids_of(weight[None])[0]


def _searched(weight: Tensor, bits: int, sides: list[str]) -> Grid | None:
    """The grid along one of the sides whose values tie."""
    stored = FORMATS[weight.dtype]
    fmt = FloatFormat(stored.name, bits, stored.min_exponent)
    # Sums of a few powers of two look even in places.
    for search in (_codebook, _uniform) if sides and _is_short(weight) else (_uniform, _codebook):
        for side in sides:
            grid = search(weight if side == "row" else weight.T, side, fmt)
            if grid is not None:
                return grid
    return None


def _fraction_bits(weights: Tensor) -> list[int]:
    """The dtype's, or what a sample of each matrix has; honest numbers have bf16's or more."""
    least, stored = (FORMATS[dtype].fraction_bits for dtype in (torch.bfloat16, weights.dtype))
    found = torch.full((len(weights),), stored)
    if stored <= least:
        return found.tolist()
    fraction = torch.frexp(_groups(weights, _SEGMENT, _SEGMENTS))[0]
    for bits in range(stored - 1, least - 1, -1):
        scaled = fraction * 2.0 ** (bits + 1)
        found[(scaled == scaled.round()).flatten(1).all(1)] = bits
    return found.tolist()


def _groups(W: Tensor, size: int, count: int) -> Tensor:
    """(…, ≤ count, size) fp64 on the CPU: groups of neighbours in the order of the rows, spread
    evenly."""
    rows, columns = W.shape[-2:]
    total = rows * columns // size
    starts = torch.linspace(0, total - 1, min(count, total), dtype=torch.float64).round().long()
    flat = (starts[:, None] * size + torch.arange(size)).to(W.device)
    return W[..., flat // columns, flat % columns].double().cpu()


def _spacing(values: Tensor, fmt: FloatFormat) -> Tensor:
    return squared_spacing(values, fmt).sqrt_()


def _ties(W: Tensor, bits: list[int]) -> list[bool]:
    """Whether the values of each matrix (b, m, n), of so many fraction bits, tie along its rows."""
    stored = FORMATS[W.dtype]
    values = _groups(W, _SEGMENT, _SEGMENTS).sort(-1).values
    gap, after = values.diff(dim=-1), values[..., 1:]
    largest = values.abs().amax((-2, -1), keepdim=True)
    inside = (after != 0) & (after.abs() < largest)  # neither pruned nor clamped
    # A bit less doubles the spacing.
    wider = torch.tensor([2.0 ** (stored.fraction_bits - count) for count in bits])
    near = gap < 1.5 * _spacing(after, stored) * wider[:, None, None]
    ties, misses = ((gap == 0) & inside).sum((-2, -1)), ((gap > 0) & near).sum((-2, -1))
    return (ties >= (_TIES_A_MISS * misses).clamp_min(_TIES)).tolist()


def _layouts(W: Tensor, side: str) -> Iterator[tuple[str, int]]:
    """Names and sizes of groups, the largest first; a group of a row may go on in the next."""
    yield f"by {side}", W.shape[1]
    for size in _SIZES:
        if size < W.shape[1] and W.numel() % size == 0:
            yield f"in groups of {size}" + (" along columns" if side == "column" else ""), size


def _few(W: Tensor, size: int) -> Tensor:
    return _groups(W, size, max(8, min(_GROUPS, _ENTRIES // size)))


def _many(W: Tensor, size: int) -> Tensor:
    return _groups(W, size, max(16, min(_MORE_GROUPS, _MORE_ENTRIES // size)))


# Integers


@dataclass(frozen=True)
class _Steps:
    """Of G groups: step, value at k = 0, range over step, evidence; (G,) each, and whether the
    values are on the grid."""

    step: Tensor
    offset: Tensor
    levels: Tensor
    evidence: Tensor
    fits: Tensor

    @property
    def accepted(self) -> bool:
        fits = self.fits & (self.evidence > 0)
        return float(self.evidence.sum()) >= _EVIDENCE and float(fits.double().mean()) >= 0.8


def _uniform(W: Tensor, side: str, fmt: FloatFormat) -> Grid | None:
    for where, size in _layouts(W, side):
        groups = _few(W, size)
        for most in _STEPS:
            first = _steps(groups[:: -(-len(groups) // _FIRST_GROUPS)], fmt, most)
            if first is None or float(first.evidence.sum()) <= 0:
                continue
            found = _steps(groups, fmt, most)
            if found is not None and found.accepted and _is_even(groups, found):
                return _uniform_grid(W, where, groups, found, fmt)
    return None


def _is_even(groups: Tensor, found: _Steps) -> bool:
    """Whether neighbouring steps are met at all in the outer half of the range: the spacing of
    FP4, FP8 and other codebooks grows there. Pairs of one step, against pairs of equal values.
    """
    k = ((groups - found.offset[:, None]) / found.step[:, None]).round()
    k = (k - k.amin(-1, keepdim=True)).long().clamp(0, 2 * _MOST_LEVELS)
    outer = groups.abs() > (groups.amax(-1) - groups.amin(-1))[:, None] / 4
    counts = groups.new_zeros(len(k), 2 * _MOST_LEVELS + 2).scatter_add_(1, k, outer.double())
    equal = float((counts * (counts - 1)).sum()) / 2
    beside = float((counts[:, 1:] * counts[:, :-1]).sum())
    return equal < _A_LEVEL or beside >= 0.1 * equal


def _uniform_grid(W: Tensor, where: str, groups: Tensor, found: _Steps, fmt: FloatFormat) -> Grid:
    """The energy of all groups by how step and size go together in those whose step is known."""
    step = found.step[found.fits]
    many, levels = _many(W, groups.shape[1]), float(found.levels.quantile(0.9))
    if float((step - step.median()).abs().quantile(0.9)) < fmt.eps * float(step.median()):
        where, levels = "by tensor", float((many.max() - many.min()) / step.median()) + 1
    bits = math.ceil(math.log2(min(levels, _MOST_LEVELS)) - 1e-3)
    energies = []
    for size_of in (_unity, _range, _magnitude):
        ratio = step / size_of(groups)[found.fits].clamp_min(1e-300)
        middle = float(ratio.median())
        spread = float((ratio - middle).abs().median()) / middle
        energies.append((spread, middle**2 * float(size_of(many).square().mean())))
    energy = min(energies)[1] / 12
    return Grid(f"int{bits} grid {where}", W.numel() * _rounded_share(many, step.median()) * energy)


def _unity(groups: Tensor) -> Tensor:
    return torch.ones_like(groups[:, 0])


def _range(groups: Tensor) -> Tensor:
    return groups.amax(-1) - groups.amin(-1)


def _magnitude(groups: Tensor) -> Tensor:
    return groups.abs().amax(-1)


def _rounded_share(groups: Tensor, step: Tensor) -> float:
    """The share of entries that were rounded: zeros beyond what the values beside 0 make likely
    were pruned."""
    zeros = float((groups == 0).double().mean())
    beside = float(((groups.abs() < 1.5 * step) & (groups != 0)).double().mean()) / 2
    return 1 - zeros + min(zeros, 2 * beside)


def _steps(groups: Tensor, fmt: FloatFormat, most: int) -> _Steps | None:
    """The step of each group (G, n), at most `most` of them in its range; None for groups of too
    few or too many distinct values."""
    values, real = _distinct(groups)
    count = real.sum(-1)
    if values.shape[-1] > _MOST_LEVELS + 1 or float(count.double().median()) < _FEWEST_LEVELS:
        return None
    low, high = values.amin(-1), values.amax(-1)
    tried = torch.arange(3, most + 1, dtype=torch.float64)
    steps = ((high - low)[:, None] / tried).clamp_min(1e-300)
    spacing = _spacing(values, fmt)
    power = _power(values - low[:, None], steps, real[..., None] & _finer(spacing, steps))
    best = power.amax(-1)
    chosen = _coarsest(power, tried)
    step = steps.gather(1, chosen[:, None])
    fine = real & (spacing <= step / 4)
    offset, step = _refined(values, fine, low[:, None], step)
    off = (values - offset - step * ((values - offset) / step).round()).abs()
    near = (off <= 0.75 * spacing + 0.01 * step) & fine
    fits = (near.sum(-1) >= 0.95 * fine.sum(-1)) & (count >= _FEWEST_LEVELS)
    levels = ((high - low) / step[:, 0]).round() + 1
    evidence = best - math.log(len(tried)) - 2
    return _Steps(step[:, 0], offset[:, 0], levels, evidence, fits)


def _coarsest(power: Tensor, tried: Tensor) -> Tensor:
    """Number of the best of the steps, or of a coarser one that does as well: whole parts of a
    step fit wherever it does."""
    best, at = power.max(-1, keepdim=True)
    as_good = (power >= 0.8 * best) & (tried < 0.7 * tried[at])
    first = as_good.double().argmax(-1)
    return torch.where(as_good.any(-1), first, at[:, 0])


def _distinct(groups: Tensor) -> tuple[Tensor, Tensor]:
    """(G, D) distinct values of each group, and which are none but a repeated last one."""
    values = groups.sort(-1).values
    fresh = torch.ones_like(values, dtype=torch.bool)
    fresh[:, 1:] = values.diff(dim=-1) > 0
    most = int(fresh.sum(-1).max())
    order = (~fresh).to(torch.uint8).sort(dim=-1, stable=True).indices[:, :most]
    real = fresh.gather(1, order)
    return torch.where(real, values.gather(1, order), values[:, -1:]), real


def _finer(spacing: Tensor, steps: Tensor) -> Tensor:
    return spacing[..., None] <= steps[:, None, :] / 4


def _power(values: Tensor, steps: Tensor, counted: Tensor) -> Tensor:
    """n·R² of the counted (G, D, C) of values (G, D) at each of the steps (G, C)."""
    turns = values[..., None] / steps[:, None, :]
    angle = (turns - turns.round()).float() * (2 * math.pi)
    squares = sum((part(angle) * counted).sum(1).square() for part in (torch.cos, torch.sin))
    assert isinstance(squares, Tensor)
    return squares.double() / counted.sum(1).clamp_min(1)


def _refined(
    values: Tensor, counted: Tensor, offset: Tensor, step: Tensor
) -> tuple[Tensor, Tensor]:
    """Least squares of the counted values on their whole numbers, over and over. All (G, …)."""
    total = counted.sum(-1, keepdim=True).clamp_min(1)
    for _ in range(3):
        k = ((values - offset) / step).round()
        mean_k, mean = ((one * counted).sum(-1, keepdim=True) / total for one in (k, values))
        centred = (k - mean_k) * counted
        scatter = centred.square().sum(-1, keepdim=True)
        slope = (centred * (values - mean)).sum(-1, keepdim=True) / scatter.clamp_min(1)
        step = torch.where((scatter > 0) & (slope > 0), slope, step)
        offset = mean - step * mean_k
    return offset, step


# Codebooks


@dataclass(frozen=True)
class _Codebook:
    """Sorted signed levels (L,) that all groups share once each is divided by its scale."""

    levels: Tensor
    tolerance: float

    @property
    def name(self) -> str:
        """Even levels as integers, FP8 and FP4 by their fraction bits, others by their count."""
        gaps = self.levels.diff()
        if len(self.levels) > 3 and float(gaps.max()) < 1.01 * float(gaps.min()):
            return f"int{math.ceil(math.log2(len(self.levels)))} grid"
        magnitude = self.levels[self.levels != 0].abs()
        for bits, name in ((1, "fp4"), (2, "fp8 e5m2"), (3, "fp8 e4m3")):
            for first in range(1 << bits, 2 << bits):
                fraction, _ = torch.frexp(magnitude / magnitude.max() * first)
                scaled = fraction * (2 << bits)
                misses = (scaled - scaled.round()).abs() > scaled * self.tolerance
                if float(misses.double().mean()) < 0.05:
                    return f"{name} grid"
        return f"codebook of {len(self.levels)} values"

    def moments(self, ratios: Tensor) -> Tensor:
        """Second moment of the cell of each ratio, (G, n); of ±1 there is one in each group that
        is exact, for its scale was taken from it."""
        nearest = torch.bucketize(ratios, self.levels[:-1] + self.levels.diff() / 2)
        half = self.levels.diff() / 2
        above, below = torch.cat([half, half[-1:]]), torch.cat([half[:1], half])
        moments = ((above**3 + below**3) / (above + below) / 3)[nearest]
        largest = ratios.abs().argmax(-1, keepdim=True)
        exact = ratios.abs().gather(1, largest) == 1
        return moments.scatter(1, largest, moments.gather(1, largest) * ~exact)


def _codebook(W: Tensor, side: str, fmt: FloatFormat) -> Grid | None:
    """Of the layouts that have a codebook the one with the fewest levels, the coarsest first."""
    if _has_repeats(W) or not _is_varied(W):
        return None
    best: tuple[int, Grid] | None = None
    for where, groups in _codebook_groups(W, side):
        for scale in _scales(groups, short=_is_short(W)):
            ratios = groups / scale.where(scale != 0, 1.0)
            ratios = torch.where(ratios.abs() < _NEGLIGIBLE, 0.0, ratios)
            codebook = _shared_levels(ratios, 2 * fmt.eps)
            if codebook is None or (best is not None and len(codebook.levels) > 0.8 * best[0]):
                continue
            energy = float((codebook.moments(ratios) * scale.square()).mean())
            best = len(codebook.levels), Grid(f"{codebook.name} {where}", W.numel() * energy)
    return None if best is None else best[1]


def _scales(groups: Tensor, *, short: bool) -> Iterator[Tensor]:
    """What the values of a group may be shares of, (G, 1): its largest magnitude, or that value
    with its sign; of short numbers the power of two below."""
    extreme = groups.gather(1, groups.abs().argmax(-1, keepdim=True))
    if short:
        _, exponent = torch.frexp(extreme)
        yield torch.ldexp(torch.ones_like(extreme), exponent - 1)
    else:
        yield extreme.abs()
        yield extreme


def _is_varied(W: Tensor) -> bool:
    """Whether neighbours take five values or more, other than 0; else it is a format of its own."""
    values = _groups(W, _SEGMENT, _SEGMENTS).sort(-1).values
    fresh = (values.diff(dim=-1) > 0) & (values[:, 1:] != 0)
    return float((fresh.sum(-1) + 1).double().median()) >= _FEWEST_LEVELS


def _has_repeats(W: Tensor) -> bool:
    """Whether columns repeat one another, or rows but for signs and order: values tie without a
    grid."""
    rows = torch.linspace(0, W.shape[0] - 1, min(64, W.shape[0])).round().long().to(W.device)
    seen = W[rows].double().abs().cpu()
    return any(_repeat(one) for one in (seen[:16].T, seen.sort(-1).values))


def _repeat(rows: Tensor) -> bool:
    rows = rows[rows.amax(-1) > 0]
    return len(rows.unique(dim=0)) < 0.9 * len(rows)


def _is_short(W: Tensor) -> bool:
    """Whether the values have three fraction bits or less: FP8 or FP4 times a power of two."""
    fraction, _ = torch.frexp(_groups(W, _SEGMENT, _SEGMENTS))
    return torch.equal(fraction * 16, (fraction * 16).round())


def _codebook_groups(W: Tensor, side: str) -> Iterator[tuple[str, Tensor]]:
    """Names of layouts and the groups (G, n) of each, the coarsest first."""
    layouts = list(_layouts(W, side))
    if side == "row":
        yield "by tensor", _many(W, _SEGMENT).reshape(1, -1)
        yield layouts.pop(0)[0], _many(W, W.shape[1])
        if min(W.shape) >= _BLOCK:
            yield f"in blocks of {_BLOCK}×{_BLOCK}", _blocks(W)
    for where, size in layouts:
        yield where, _many(W, size)


def _blocks(W: Tensor) -> Tensor:
    """(8, 128²): whole square blocks, spread evenly."""
    high, wide = (size // _BLOCK for size in W.shape)
    chosen = torch.linspace(0, high * wide - 1, min(8, high * wide)).round().long().tolist()
    corners = [(i // wide * _BLOCK, i % wide * _BLOCK) for i in chosen]
    parts = [W[i : i + _BLOCK, j : j + _BLOCK].reshape(-1) for i, j in corners]
    return torch.stack(parts).double().cpu()


def _shared_levels(ratios: Tensor, tolerance: float) -> _Codebook | None:
    """The levels in which all ratios fall; None where these are too many, too few or too wide."""
    values = ratios[ratios != 0].sort().values
    if len(values) < 2 * _A_LEVEL:
        return None
    size = torch.maximum(values[1:].abs(), values[:-1].abs())
    level = torch.nn.functional.pad((values.diff() > tolerance * size).cumsum(0), (1, 0))
    count = torch.bincount(level)
    levels = torch.bincount(level, values) / count
    if not _FEWEST_LEVELS <= len(levels) <= min(_MOST_LEVELS, len(values) // _A_LEVEL):
        return None
    wide = (values - levels[level]).abs() > tolerance * levels[level].abs()
    if float(wide.double().mean()) > 0.005:
        return None
    if bool((ratios == 0).any()):
        levels = torch.cat([levels, levels.new_zeros(1)]).sort().values
    return _Codebook(levels, tolerance)
