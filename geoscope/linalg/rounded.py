"""The expected square of an update of normal entries once it is stored: E[(round(w + s·g) − w)²].

Over the values w of a base, for each s that a search asks for. Numbers of a short format lie alike
in every binade, so tables of one binade do for nearly all of them (docs/methods-notes.md).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from geoscope.linalg.storage import FloatFormat, normal_cdf, round_to, squared_spacing

__all__ = ["Energies", "expected_energy"]

# Of spacings this much smaller than s the sum over cells is an integral, to 1e-5 (Euler-Maclaurin).
_SPACINGS = 4
# Standard deviations beyond which nothing lands.
_REACH = 6.5
# The same to the rounding of fp64.
_CERTAIN = 9.0
# Values that stand for those of a wide base: quantiles of its sizes.
_LEVELS = 1 << 12
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


def expected_energy(sizes: Tensor, shares: Tensor, fmt: FloatFormat, spread: float) -> float:
    """E[(round(w + s·g) − w)²] over g ~ N(0, 1) and the values w of the base; s > 0.

    sizes: w or |w|, (p,), fp64; shares: (p,), of sum 1.
    """
    every = np.ones(1, dtype=bool)
    return float(Energies([sizes], [shares], fmt).at(np.array([spread]), every)[0])


class Energies:
    """`expected_energy` of a stack of bases as a function of s: what does not depend on s is made
    once."""

    def __init__(
        self, levels: Sequence[Tensor], shares: Sequence[Tensor], fmt: FloatFormat
    ) -> None:
        binades, self._others, self._zeros = [], {}, np.zeros(len(levels))
        for i, (level, share) in enumerate(zip(levels, shares, strict=True)):
            sizes, share = level.abs().cpu(), share.cpu()
            exponents, places, regular = _regular(sizes.numpy(), fmt)
            binades.append(_Binades.of(exponents, places, share.numpy()[regular], fmt))
            others = torch.from_numpy(~regular)
            self._zeros[i] = float(share[sizes == 0].sum())
            others &= sizes != 0
            if others.any():
                self._others[i] = _OneByOne(sizes[others], share[others], fmt)
        self._fmt, one = fmt, torch.ones(1, dtype=torch.float64)
        self._zero = _OneByOne(0 * one, one, fmt)
        self._binades = _Binades.together(binades, fmt)
        self._owner = np.repeat(np.arange(len(levels)), [len(one.spacings) for one in binades])

    def at(self, spreads: NDArray[np.float64], which: NDArray[np.bool_]) -> NDArray[np.float64]:
        """The energies (b,) at s (b,) of some; those of the others are 0."""
        some = which[self._owner]
        owner = self._owner[some]
        parts = self._binades.energies(spreads[owner], some)
        energy = np.bincount(owner, parts, len(spreads)) + self._zeros * self._of_zero(spreads)
        for i, others in self._others.items():
            if which[i]:
                energy[i] += others.energy(float(spreads[i]))
        return np.where(which, energy, 0.0)

    def _of_zero(self, spreads: NDArray[np.float64]) -> NDArray[np.float64]:
        """What is added to a zero is rounded to 2^-bits of itself: that counts among the least
        numbers alone."""
        energies = spreads**2
        for i in (spreads < 2.0**self._fmt.min_exponent).nonzero()[0]:
            energies[i] = self._zero.energy(float(spreads[i]))
        return energies


def _regular(
    sizes: NDArray[np.float64], fmt: FloatFormat
) -> tuple[NDArray[np.int32], NDArray[np.int64], NDArray[np.bool_]]:
    """Exponents and places of the numbers of the format that lie in a binade that looks like every
    other one to what rounds there, and which these are."""
    fractions, exponents = np.frexp(sizes)
    places = (2 * fractions - 1) / fmt.eps
    regular = (places == np.rint(places)) & (sizes >= 2.0 ** (fmt.min_exponent + 2))
    regular &= _LEAST_BITS <= fmt.fraction_bits <= _SHORT
    return exponents[regular], places[regular].astype(int), regular


# --- tables of a binade -------------------------------------------------------------------------


@dataclass(frozen=True)
class _Table:
    """A function of numbers of a binade and of s, both in units of their spacing.

    values: (columns, rows), a row for some numbers, a column for each of `steps` values of s an
    octave, from 2^start on.
    """

    values: NDArray[np.float64]
    start: float
    steps: int

    def at(self, spreads: NDArray[np.float64]) -> NDArray[np.float64]:
        """(spreads, rows): a cubic in log s through four points; its ends beyond the table."""
        last = len(self.values) - 3
        at = np.clip((np.log2(spreads) - self.start) * self.steps, 1, last + 1)
        point = np.minimum(at.astype(int), last)
        weights = ((at - point)[:, None] ** _POWERS) @ _CUBIC
        return (weights[:, None] @ self.values[point[:, None] + _AROUND])[:, 0]


# The cubic through the values at −1, 0, 1 and 2: powers of t times this weigh the four.
_AROUND, _POWERS = np.arange(-1, 3), np.arange(4)
_CUBIC = np.linalg.inv(_AROUND[:, None].astype(float) ** _POWERS)


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
    def together(cls, parts: Sequence[_Binades], fmt: FloatFormat) -> _Binades:
        """Those of several bases, one after the other."""
        parts = [one for one in parts if len(one.spacings)] or parts[:1]
        names = ("spacings", "rough", "fine")
        return cls(fmt, *(np.concatenate([getattr(one, name) for one in parts]) for name in names))

    @classmethod
    def of(
        cls,
        exponents: NDArray[np.int32],
        places: NDArray[np.int64],
        shares: NDArray[np.float64],
        fmt: FloatFormat,
    ) -> _Binades:
        """Of the numbers 2^(exponent − 1)·(1 + place·eps)."""
        if not len(places):
            return cls(fmt, np.zeros(0), *(np.zeros((0, 0)) for _ in range(2)))
        least = int(exponents.min())
        which = exponents - least
        binades = int(which.max()) + 1
        found = []
        for firsts in (_rough_places(fmt), _fine_places(fmt)):
            rows = np.searchsorted(firsts, places, side="right") - 1
            sums = np.bincount(which * len(firsts) + rows, shares, binades * len(firsts))
            found.append(sums.reshape(binades, len(firsts)))
        return cls(fmt, np.ldexp(fmt.eps, np.arange(binades) + least - 1), *found)

    def energies(
        self, spreads: NDArray[np.float64], some: NDArray[np.bool_]
    ) -> NDArray[np.float64]:
        """Of some of the binades the sum of E[(round(w + s·g) − w)²], to 1e-5, at an s for each."""
        spacings = self.spacings[some]
        units = spreads / spacings
        sums = np.zeros(len(units))
        rough = (units < _SPACINGS) & (units > _NOTHING_LEAVES)
        if rough.any():
            table = np.exp(_rough_table(self.fmt).at(units[rough]))
            sums[rough] = (table * self.rough[some][rough]).sum(-1)
        fine = units >= _SPACINGS
        if fine.any():
            table = units[fine, None] ** 2 + _fine_table(self.fmt).at(units[fine])
            sums[fine] = (table * self.fine[some][fine]).sum(-1)
        return sums * spacings**2


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
    return _Table(found.clamp_min(1e-300).log().numpy().T.copy(), start, steps)


@lru_cache(maxsize=4)
def _fine_table(fmt: FloatFormat) -> _Table:
    """E[(round(w + s·g) − w)²] − s² for s from _SPACINGS on; far up it is nothing beside s²."""
    start, steps = math.log2(_SPACINGS) - 1 / _FINE_STEPS, _FINE_STEPS
    middle = (2.0 ** (fmt.fraction_bits - _LEAST_BITS) - 1) / 2
    sizes = torch.from_numpy(1 / fmt.eps + _fine_places(fmt) + middle)
    spreads = _spreads(start, _FINE_TO, steps)
    found = [_fine_energy(sizes, _unit(fmt), spread) - spread**2 for spread in spreads]
    return _Table(torch.stack(found).numpy(), start, steps)


# --- value by value -----------------------------------------------------------------------------


class _OneByOne:
    """The energy of values that lie in no regular binade."""

    def __init__(self, sizes: Tensor, shares: Tensor, fmt: FloatFormat) -> None:
        self._sizes, self._shares = _condensed(sizes, shares)
        self._fmt = fmt
        self._reached = squared_spacing(self._sizes, fmt) * _SPACINGS**2
        self._first, self._edges = len(self._sizes) + 1, None

    def energy(self, spread: float) -> float:
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


def _condensed(sizes: Tensor, shares: Tensor) -> tuple[Tensor, Tensor]:
    """Distinct sizes, ascending, and the share of each; of very many some that stand for all."""
    if len(sizes) <= 1 << 16:
        sizes, place = torch.unique(sizes, return_inverse=True)
        shares = torch.zeros_like(sizes).index_add_(0, place, shares)
    else:
        sizes, order = sizes.sort()
        shares = shares[order]
    stride = 2 * (len(sizes) // (2 * _LEVELS)) + 1  # odd: no power of two is its multiple
    padded = torch.nn.functional.pad(shares, (0, -len(shares) % stride))
    parts = padded.view(-1, stride).sum(-1)
    middles = torch.arange(len(parts)) * stride + stride // 2
    return sizes[middles.clamp_max(len(sizes) - 1)], parts


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
