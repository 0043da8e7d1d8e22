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

import torch
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
# Fraction bits of formats of which all numbers are kept.
_SHORT = 10


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
        self._sizes, self._shares, self._fmt = sizes, shares, fmt
        self._reached = squared_spacing(sizes, fmt) * _SPACINGS**2
        self._first, self._edges = len(sizes) + 1, None

    def at(self, spread: float) -> float:
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
