"""How large was an isotropic update before it was stored? Its measured size holds rounding already.

ΔW = round(W0 + s·G) − W0 is what two files show of an update of entry sd s. Where s is of the size
of a spacing, ‖ΔW‖ is not s√(mn): small updates round away, others up to a whole spacing. A null
that takes the measured size for s rounds twice. So s is the solution of E‖ΔW(s)‖² = ‖ΔW‖², with
the expectation over the rounding cells of this very base (docs/methods-notes.md).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from geoscope.linalg.changes import Side
from geoscope.linalg.rounded import Energies
from geoscope.linalg.storage import FORMATS, FloatFormat
from geoscope.profile import stage

__all__ = ["isotropic_spread", "isotropic_spreads"]

# ν below which rounding adds its own energy and nothing else, to 1e-6 of the whole.
_FINE = 1e-3
# Of log s, and most steps of a search.
_PRECISION, _STEPS = 1e-5, 200


@stage("nulls")
def isotropic_spread(base: Side, tuned: Side, rms: float) -> float:
    """Entry sd s of the isotropic update whose stored difference has the measured size.

    rms: ‖ΔW‖_F/√(mn) as measured. Solves `expected_energy` = rms². Where the base is off the grid
    of `tuned` its phase in a cell is uniform, and E = s² + Σulp²/(12mn) whatever s is. 0 where
    rounding alone is as large.
    """
    return isotropic_spreads([(base, tuned)], [rms])[0]


@stage("nulls")
def isotropic_spreads(pairs: Sequence[tuple[Side, Side]], rms: Sequence[float]) -> list[float]:
    """`isotropic_spread` of each pair of a stack; what is found of one depends on no other."""
    found, by_format = [0.0] * len(pairs), dict[FloatFormat, list[int]]()
    wide = FORMATS[torch.float32].fraction_bits
    for i, ((base, tuned), size) in enumerate(zip(pairs, rms, strict=True)):
        noise = tuned.noise / float(base.counts.sum()) ** 0.5
        is_off = tuned.fmt.fraction_bits < wide <= base.fmt.fraction_bits
        if size == 0 or noise < _FINE * size or is_off:
            found[i] = math.sqrt(max(size**2 - noise**2, 0.0))
        else:
            by_format.setdefault(tuned.fmt, []).append(i)
    for fmt, which in by_format.items():
        bases = [pairs[i][0] for i in which]
        shares = [base.counts / base.counts.sum() for base in bases]
        energies = Energies([base.levels for base in bases], shares, fmt)
        spreads = _solved(energies, np.array([rms[i] for i in which]))
        for i, spread in zip(which, spreads.tolist(), strict=True):
            found[i] = spread
    return found


def _solved(energies: Energies, rms: NDArray[np.float64]) -> NDArray[np.float64]:
    """s with E(s) = rms²; rms itself where it is right already, or where so few entries moved that
    no isotropic update explains them."""
    target = 2 * np.log(rms)

    def excess(log_spreads: NDArray[np.float64], which: NDArray[np.bool_]) -> NDArray[np.float64]:
        energy = energies.at(np.exp(np.where(which, log_spreads, 0.0)), which)
        return np.where(which, np.log(np.maximum(energy, 1e-300)) - target, 0.0)

    every = np.ones(len(rms), dtype=bool)
    start = np.log(rms)
    left, at_left = start, excess(start, every)
    right, at_right = left, at_left
    # E ~ s², or steeper where most updates round away: a step beyond Newton's brackets the root.
    searching = at_left != 0
    for _ in range(_STEPS):
        if not searching.any():
            break
        left = np.where(searching, right, left)
        at_left = np.where(searching, at_right, at_left)
        right = np.where(searching, right - 0.6 * np.clip(at_right, -5.0, 5.0), right)
        at_right = np.where(searching, excess(right, searching), at_right)
        searching &= at_right * at_left > 0
    bracketed = ~searching & (at_left * at_right <= 0) & (left != right)
    root = _root(excess, (left, right), (at_left, at_right), bracketed)
    return np.where(bracketed, np.exp(root), rms)


_Ends = tuple[NDArray[np.float64], NDArray[np.float64]]


def _root(
    function: Callable[[NDArray[np.float64], NDArray[np.bool_]], NDArray[np.float64]],
    ends: _Ends,
    values: _Ends,
    active: NDArray[np.bool_],
) -> NDArray[np.float64]:
    """Where a function of each element is 0 between two ends, to _PRECISION: Chandrupatla's method,
    inverse quadratic interpolation where it is safe and bisection elsewhere.

    function(x, which): its values at some elements. [Chandrupatla 1997]
    """
    (a, b), (fa, fb) = ends, values
    c, fc = a, fa
    part = np.full(len(a), 0.5)
    active = active.copy()
    best = np.where(np.abs(fa) < np.abs(fb), a, b)
    for _ in range(_STEPS):
        if not active.any():
            break
        x = a + part * (b - a)
        fx = function(x, active)
        same = np.sign(fx) == np.sign(fa)
        c, fc = np.where(same, a, b), np.where(same, fa, fb)
        b, fb = np.where(same, b, a), np.where(same, fb, fa)
        a, fa = x, fx
        best = np.where(active, np.where(np.abs(fa) < np.abs(fb), a, b), best)
        with np.errstate(all="ignore"):
            least = _PRECISION / np.abs(b - a)
            active &= (least <= 1) & (fa != 0) & (fb != 0)
            xi, phi = (a - b) / (c - b), (fa - fb) / (fc - fb)
            quadratic = fa / (fb - fa) * fc / (fb - fc)
            quadratic += (c - a) / (b - a) * fa / (fc - fa) * fb / (fc - fb)
            safe = (phi**2 < xi) & ((1 - phi) ** 2 < 1 - xi) & np.isfinite(quadratic)
            part = np.clip(np.where(safe, quadratic, 0.5), least / 2, 1 - least / 2)
            part = np.where(active, part, 0.5)
    return best
