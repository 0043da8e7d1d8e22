"""How large was an isotropic update before it was stored? Its measured size holds rounding already.

ΔW = round(W0 + s·G) − W0 is what two files show of an update of entry sd s. Where s is of the size
of a spacing, ‖ΔW‖ is not s√(mn): small updates round away, others up to a whole spacing. A null
that takes the measured size for s rounds twice. So s is the solution of E‖ΔW(s)‖² = ‖ΔW‖², with
the expectation over the rounding cells of this very base (docs/methods-notes.md).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache, lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import brentq
from torch import Tensor

from geoscope.linalg.changes import Side
from geoscope.linalg.storage import FORMATS, FloatFormat, normal_cdf, round_to, squared_spacing
from geoscope.profile import stage

__all__ = ["expected_energy", "isotropic_spread"]

# ν below which rounding adds its own energy and nothing else, to 1e-6 of the whole.
_FINE = 1e-3
# Of spacings this much smaller than s the sum over cells is an integral, to 1e-5 (Euler-Maclaurin).
_SPACINGS = 4
# Standard deviations beyond which nothing lands.
_REACH = 6.5
# The same to the rounding of fp64.
_CERTAIN = 9.0
# Values that stand for those of a wide base: quantiles of its sizes.
_LEVELS = 1 << 12
_PRECISION = 1e-5
_STEPS = 200
# Numbers above and below a value that it can reach: spacings are half as long below 2^e.
_ABOVE = math.ceil(_REACH * _SPACINGS) + 1
_BELOW = 2 * _ABOVE
# Fraction bits of formats of which all numbers are kept, and of those with tables of a binade:
# what a value can reach lies in its binade and the two next to it.
_SHORT, _LEAST_BITS = 10, 7
# In units of the spacing: s from which on some value leaves its cell, to the rounding of fp64.
_NOTHING_LEAVES = 2.0**-6
# Points of the tables an octave, and log2 of the s where the second ends: there rounding adds 5e-6.
_ROUGH_STEPS, _FINE_STEPS, _FINE_TO = 48, 16, 7


@stage("nulls")
def isotropic_spread(base: Side, tuned: Side, rms: float) -> float:
    """Entry sd s of the isotropic update whose stored difference has the measured size.

    rms: ‖ΔW‖_F/√(mn) as measured. Solves `expected_energy` = rms². Where the base is off the grid
    of `tuned` its phase in a cell is uniform, and E = s² + Σulp²/(12mn) whatever s is. 0 where
    rounding alone is as large.
    """
    noise = tuned.noise / float(base.counts.sum()) ** 0.5
    wide = FORMATS[torch.float32].fraction_bits
    if rms == 0 or noise < _FINE * rms or tuned.fmt.fraction_bits < wide <= base.fmt.fraction_bits:
        return math.sqrt(max(rms**2 - noise**2, 0.0))
    energy = _Energy(*_sizes(base), tuned.fmt)

    @cache
    def excess(log_spread: float) -> float:
        return math.log(max(energy.at(math.exp(log_spread)), 1e-300) / rms**2)

    # E ~ s², or steeper where most updates round away: a step beyond Newton's brackets the root.
    ends = [math.log(rms)]
    while excess(ends[-1]) * excess(ends[0]) > 0 and len(ends) < _STEPS:
        ends.append(ends[-1] - 0.6 * max(-5.0, min(excess(ends[-1]), 5.0)))
    if len(ends) == 1 or excess(ends[-1]) * excess(ends[0]) > 0:
        return rms  # right already, or so few entries moved that no isotropic update explains them
    found = brentq(excess, ends[-2], ends[-1], xtol=_PRECISION)
    return math.exp(found)  # pyright: ignore[reportArgumentType]


def _sizes(base: Side) -> tuple[Tensor, Tensor]:
    """|w| of the base and the share of each; rounding is the same on both sides of zero."""
    sizes, shares = base.levels.abs(), base.counts / base.counts.sum()
    if len(sizes) <= 1 << 16:
        sizes, place = torch.unique(sizes, return_inverse=True)
        shares = torch.zeros_like(sizes).index_add_(0, place, shares)
    else:
        sizes = sizes.sort().values
    stride = 2 * (len(sizes) // (2 * _LEVELS)) + 1  # odd: no power of two is its multiple
    padded = torch.nn.functional.pad(shares, (0, -len(shares) % stride))
    parts = padded.view(-1, stride).sum(-1)
    middles = torch.arange(len(parts), device=sizes.device) * stride + stride // 2
    return sizes[middles.clamp_max(len(sizes) - 1)].cpu(), parts.cpu()


def expected_energy(sizes: Tensor, shares: Tensor, fmt: FloatFormat, spread: float) -> float:
    """E[(round(w + s·g) − w)²] over g ~ N(0, 1) and the values w of the base; s > 0.

    sizes: |w|, (p,), fp64, ascending, on the CPU; shares: (p,), of sum 1.
    """
    return _Energy(sizes, shares, fmt).at(spread)


class _Energy:
    """`expected_energy` as a function of s: what does not depend on s is made once."""

    def __init__(self, sizes: Tensor, shares: Tensor, fmt: FloatFormat) -> None:
        regular = _is_regular(sizes, fmt)
        self._binades = _Binades.of(sizes[regular], shares[regular], fmt)
        self._sizes, self._shares, self._fmt = sizes[~regular], shares[~regular], fmt
        self._reached = squared_spacing(self._sizes, fmt) * _SPACINGS**2
        self._first, self._edges = len(self._sizes) + 1, None

    def at(self, spread: float) -> float:
        energy = self._binades.energy(spread)
        return energy + self._one_by_one(spread) if len(self._sizes) else energy

    def _one_by_one(self, spread: float) -> float:
        """What the values that lie in no regular binade add."""
        # Spacings grow with the values: the coarse ones are the last.
        first = int(torch.searchsorted(self._reached, spread**2, right=True))
        if (
            self._edges is None or first < self._first
        ):  # some more are made at once: the next spread may be smaller
            self._first = int(torch.searchsorted(self._reached, spread**2 / 4))
            self._edges = _Edges.of(self._sizes[self._first :], self._fmt)
        fine = _fine_energy(self._sizes[:first], self._fmt, spread)
        rough = self._edges.energy(first - self._first, spread)
        return float(torch.dot(self._shares[:first], fine) + torch.dot(self._shares[first:], rough))


def _is_regular(sizes: Tensor, fmt: FloatFormat) -> Tensor:
    """Numbers of the format in a binade that looks like every other one to what rounds there."""
    if not _LEAST_BITS <= fmt.fraction_bits <= _SHORT:
        return torch.zeros(len(sizes), dtype=torch.bool)
    return (sizes >= 2.0 ** (fmt.min_exponent + 1)) & (round_to(sizes, fmt) == sizes)


# --- tables of a binade -------------------------------------------------------------------------


@dataclass(frozen=True)
class _Table:
    """A function of numbers of a binade and of s, both in units of their spacing.

    values: (rows, columns), a row for some numbers, a column for each of `steps` values of s an
    octave, from 2^start on.
    """

    values: NDArray[np.float64]
    start: float
    steps: int

    def at(self, spreads: NDArray[np.float64]) -> NDArray[np.float64]:
        """(spreads, rows): a cubic in log s through four points; its ends beyond the table."""
        last = self.values.shape[1] - 3
        at = np.clip((np.log2(spreads) - self.start) * self.steps, 1, last + 1)
        point = np.minimum(at.astype(int), last)
        t = (at - point)[:, None]
        weights = (
            -t * (t - 1) * (t - 2) / 6,
            (t + 1) * (t - 1) * (t - 2) / 2,
            -(t + 1) * t * (t - 2) / 2,
            (t + 1) * t * (t - 1) / 6,
        )
        columns = (self.values[:, point + shift - 1].T for shift in range(4))
        found = np.zeros((len(spreads), len(self.values)))
        for weight, column in zip(weights, columns, strict=True):
            found += weight * column
        return found


@dataclass(frozen=True)
class _Binades:
    """The energy of numbers of a short format, by tables of one binade.

    All numbers of [2^e, 2^(e+1)) lie alike among their neighbours, in units of their spacing.
    spacings: (binades,). rough, fine: shares of the rows of the two tables, (binades, rows).
    """

    fmt: FloatFormat
    spacings: NDArray[np.float64]
    rough: NDArray[np.float64]
    fine: NDArray[np.float64]

    @classmethod
    def of(cls, sizes: Tensor, shares: Tensor, fmt: FloatFormat) -> _Binades:
        fractions, exponents = np.frexp(sizes.numpy())
        binades, which = np.unique(exponents, return_inverse=True)
        places = np.rint((2 * fractions - 1) / fmt.eps).astype(int)
        found = []
        for firsts in (_rough_places(fmt), _fine_places(fmt)):
            rows = np.searchsorted(firsts, places, side="right") - 1
            sums = np.bincount(
                which * len(firsts) + rows, shares.numpy(), len(binades) * len(firsts)
            )
            found.append(sums.reshape(len(binades), len(firsts)))
        return cls(fmt, np.ldexp(fmt.eps, binades - 1), *found)

    def energy(self, spread: float) -> float:
        """E[(round(w + s·g) − w)²], to 1e-5."""
        units = spread / self.spacings
        energy = 0.0
        if (some := (units < _SPACINGS) & (units > _NOTHING_LEAVES)).any():
            table = np.exp(_rough_table(self.fmt).at(units[some]))
            energy += float(np.sum(table * self.rough[some] * self.spacings[some, None] ** 2))
        if (some := units >= _SPACINGS).any():
            table = units[some, None] ** 2 + _fine_table(self.fmt).at(units[some])
            energy += float(np.sum(table * self.fine[some] * self.spacings[some, None] ** 2))
        return energy


def _rough_places(fmt: FloatFormat) -> NDArray[np.int64]:
    """First place of each row of `_rough_table`: near both ends of a binade a row for each, one for
    all between, as they cannot reach an end."""
    count, near = 2**fmt.fraction_bits, _ABOVE + 1
    return np.concatenate([np.arange(near + 1), np.arange(count - near, count)])


def _fine_places(fmt: FloatFormat) -> NDArray[np.int64]:
    """First place of each row of `_fine_table`: 128 rows."""
    return np.arange(2**_LEAST_BITS) << (fmt.fraction_bits - _LEAST_BITS)


def _unit(fmt: FloatFormat) -> FloatFormat:
    """The format scaled so that a binade with the spacing 1 has regular ones below it."""
    return FloatFormat("unit", fmt.fraction_bits, -fmt.fraction_bits - 9)


def _spreads(start: float, stop: float, steps: int) -> list[float]:
    """From 2^start to beyond 2^stop."""
    return (2.0 ** (start + np.arange(math.ceil((stop - start) * steps) + 3) / steps)).tolist()


@lru_cache(maxsize=4)
def _rough_table(fmt: FloatFormat) -> _Table:
    """ln E[(round(w + s·g) − w)²] for s up to _SPACINGS."""
    start, steps = math.log2(_NOTHING_LEAVES) - 1 / _ROUGH_STEPS, _ROUGH_STEPS
    edges = _Edges.of(torch.from_numpy(1 / fmt.eps + _rough_places(fmt)), _unit(fmt))
    spreads = _spreads(start, math.log2(_SPACINGS), steps)
    found = torch.stack([edges.energy(0, spread) for spread in spreads], -1)
    return _Table(found.clamp_min(1e-300).log().numpy(), start, steps)


@lru_cache(maxsize=4)
def _fine_table(fmt: FloatFormat) -> _Table:
    """E[(round(w + s·g) − w)²] − s² for s from _SPACINGS on; far up it is nothing beside s²."""
    start, steps = math.log2(_SPACINGS) - 1 / _FINE_STEPS, _FINE_STEPS
    middle = (2.0 ** (fmt.fraction_bits - _LEAST_BITS) - 1) / 2
    sizes = torch.from_numpy(1 / fmt.eps + _fine_places(fmt) + middle)
    spreads = _spreads(start, _FINE_TO, steps)
    found = [_fine_energy(sizes, _unit(fmt), spread) - spread**2 for spread in spreads]
    return _Table(torch.stack(found, -1).numpy(), start, steps)


# --- value by value -----------------------------------------------------------------------------


def _fine_energy(sizes: Tensor, fmt: FloatFormat, spread: float) -> Tensor:
    """s² + ∫ulp(x)²/12·dH, H(x) = Φ(z) + z·φ(z), z = (x − w)/s: spacings far below s.

    The sum over cells up to fourth order in ulp/s, binade by binade; ulp² jumps at powers of two.
    """
    # Landing numbers are below 2·_SPACINGS·s/eps; those below s/16 are spaced too finely to matter.
    first = max(fmt.min_exponent + 1, math.frexp(spread)[1] - 4)
    last = max(first, math.frexp(2 * _SPACINGS * spread / fmt.eps)[1])
    powers = 2.0 ** torch.arange(first, last + 1, dtype=torch.float64)
    jumps = powers.square() * (0.75 * fmt.eps**2 / 12)
    least = float(powers[0] * fmt.eps / 2) ** 2 / 12
    energy = torch.full_like(sizes, spread**2 + least)
    # `_mass` is 0 beyond: only these values and powers meet.
    far = _CERTAIN * spread
    low, wide = int(torch.searchsorted(sizes, far)), powers < far
    energy[:low] += _mass((-powers[wide] - sizes[:low, None]) / spread) @ jumps[wide]
    wide = powers < far + (sizes[-1] if len(sizes) else 0)
    return energy + _mass((sizes[:, None] - powers[wide]) / spread) @ jumps[wide]


def _mass(z: Tensor) -> Tensor:
    z = z.clamp(-_CERTAIN, _CERTAIN)  # numbers that underflow take ten times as long
    return normal_cdf(z) + z * torch.exp(-z.square() / 2) / math.sqrt(2 * math.pi)


@dataclass(frozen=True)
class _Edges:
    """The edges of the cells that w + s·g can cross, each with the step of h = (· − w)² across it.

    start: h(round(w)), (p,). edges: distance to w with the sign of the side, and rise: (p, edges).
    """

    start: Tensor
    edges: Tensor
    rise: Tensor

    @classmethod
    def of(cls, sizes: Tensor, fmt: FloatFormat) -> _Edges:
        places = _place(round_to(sizes, fmt), fmt)
        away = _neighbours(places, fmt) - sizes[:, None]
        edges, rise = (away[:, 1:] + away[:, :-1]) / 2, away.square().diff()
        edges[:, _BELOW:].neg_()
        rise[:, :_BELOW].neg_()
        return cls(away[:, _BELOW].square(), edges, rise)

    def energy(self, first: int, spread: float) -> Tensor:
        """E h(round(X)) = h(round(w)) + Σ_edges (step of h across the edge)·P(X beyond it), of the
        values from the number `first` on."""
        beyond = normal_cdf(self.edges[first:] / spread)
        return self.start[first:] + beyond.mul_(self.rise[first:]).sum(-1)


def _neighbours(places: Tensor, fmt: FloatFormat) -> Tensor:
    """The numbers around each place of the format, (p, _BELOW + 1 + _ABOVE)."""
    if fmt.fraction_bits > _SHORT:
        return _value(places[:, None] + torch.arange(-_BELOW, _ABOVE + 1), fmt)
    return _numbers(fmt).unfold(0, _BELOW + 1 + _ABOVE, 1)[places]


@lru_cache(maxsize=8)
def _numbers(fmt: FloatFormat) -> Tensor:
    """All numbers of a short format up to 2^128 and some beyond, from the place −_BELOW on."""
    most = (129 - fmt.min_exponent) * 2**fmt.fraction_bits + _ABOVE
    return _value(torch.arange(-_BELOW, most + 1), fmt)


def _place(values: Tensor, fmt: FloatFormat) -> Tensor:
    """Which number of the format each value ≥ 0 is, counted from 0."""
    exponent = (torch.frexp(values).exponent - 1).clamp_min(fmt.min_exponent)
    exponent[values == 0] = fmt.min_exponent
    fraction = torch.ldexp(values, fmt.fraction_bits - exponent).long()
    return (exponent - fmt.min_exponent) * 2**fmt.fraction_bits + fraction


def _value(places: Tensor, fmt: FloatFormat) -> Tensor:
    """The number at a place; below 0 the mirror image."""
    binade = (places.abs() >> fmt.fraction_bits) - 1
    exponent = binade.clamp_min(0)
    fraction = places.abs() - exponent * 2**fmt.fraction_bits
    size = torch.ldexp(fraction.double(), exponent + fmt.min_exponent - fmt.fraction_bits)
    return torch.where(places < 0, -size, size)
