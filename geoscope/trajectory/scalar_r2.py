"""RLVR-Linearity: how well a straight line in t fits each single entry [paper 2601.04537].

R² = (S1²/S_tt)/(S2 − S0²/T) with S0 = Σx_i, S1 = Σ(t_i − t̄)x_i, S2 = Σx_i², in one pass over the
checkpoints. x is Δ less its first value: R² does not change, an entry that never moves has S2 = 0
exactly, and nothing cancels. Results are counts in fine bins, so that blocks, tensors and models
add up without holding every R².
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from geoscope.errors import NumericsError
from geoscope.trajectory.increments import Increments

__all__ = ["LINEAR_ABOVE", "ScalarR2", "ScalarR2Counts", "scalar_r2_walk"]

# An entry above this R² is called linear in the paper.
LINEAR_ABOVE = 0.7
# The published filter: an entry must span more than this, and take at least so many values.
_RANGE, _DISTINCT = 1e-4, 4
_BINS = 10_000  # LINEAR_ABOVE is an edge


@dataclass(frozen=True)
class ScalarR2Counts:
    """Entries by R²: counts (10000,) of bins of 1e-4. entries: all of them, kept or not."""

    counts: Tensor
    entries: int

    def __add__(self, other: ScalarR2Counts) -> ScalarR2Counts:
        """Of both tensors together."""
        return ScalarR2Counts(self.counts + other.counts, self.entries + other.entries)

    @property
    def kept(self) -> int:
        """Entries that have an R² and passed the filter."""
        return int(self.counts.sum())

    @property
    def kept_fraction(self) -> float | None:
        return self.kept / self.entries if self.entries else None

    @property
    def median(self) -> float | None:
        """To 1e-4; None if nothing is kept."""
        if not self.kept:
            return None
        below = self.counts.cumsum(0)
        at = int(torch.searchsorted(below, (self.kept + 1) // 2))
        inside = (self.kept / 2 - int(below[at] - self.counts[at])) / int(self.counts[at])
        return (at + min(1.0, max(0.0, inside))) / _BINS

    @property
    def share_linear(self) -> float | None:
        """Share of the kept entries with R² > .7; None if nothing is kept."""
        if not self.kept:
            return None
        return int(self.counts[round(LINEAR_ABOVE * _BINS) :].sum()) / self.kept


class ScalarR2:
    """Accumulators per entry of one block, in fp64 on the block's device.

    times: t_1 … t_T, the checkpoints that will be added (the base is not a data point).
    published_filter: keep only entries with range > 1e-4 and at least 4 distinct values, as the
    paper does. That selects movers: slow pure noise that survives it shows medians near .9.
    """

    def __init__(self, times: Sequence[float], *, published_filter: bool = False) -> None:
        if len(set(times)) < 3 or len(set(times)) != len(times):
            raise NumericsError(
                f"R² of a line needs 3 or more distinct steps; {len(set(times))} were given in "
                f"{len(times)}"
            )
        self._times = tuple(map(float, times))
        self._mean = sum(self._times) / len(self._times)
        self._added: set[float] = set()
        self._sums: Tensor | None = None  # (3, entries)
        self._first = torch.empty(0)
        self._seen = _Seen() if published_filter else None

    def add(self, t: float, block: Tensor) -> None:
        """Takes Δ(t) of the block's entries, any shape and float dtype, the same at every t.

        The order of the steps does not matter; each must come once.
        """
        if t not in self._times or t in self._added:
            twice = "was added already" if t in self._added else "is not among the steps"
            raise NumericsError(f"step {t:g} {twice}; each of the given steps is added once")
        self._added.add(t)
        values = block.reshape(-1).to(torch.float64)
        if self._sums is None:
            self._first = values.clone()
            self._sums = values.new_zeros(3, len(values))
        x = values - self._first
        S0, S1, S2 = self._sums
        S0 += x
        S1.add_(x, alpha=t - self._mean)
        S2.addcmul_(x, x)
        if self._seen is not None:
            self._seen.add(x)

    def r2(self) -> tuple[Tensor, Tensor]:
        """R² of each entry in [0, 1] and whether it is kept, (entries,) each."""
        if self._sums is None or len(self._added) < len(self._times):
            raise NumericsError(
                f"{len(self._added)} of {len(self._times)} steps were added; all are needed"
            )
        S0, S1, S2 = self._sums
        around_line = sum((t - self._mean) ** 2 for t in self._times)
        spread = S2 - S0.square() / len(self._times)
        kept = S2 > 0
        if self._seen is not None:
            kept &= self._seen.passes()
        return (S1.square() / (around_line * spread)).nan_to_num_(0.0).clamp_(0, 1), kept

    def counts(self) -> ScalarR2Counts:
        """The block's entries by R²."""
        r2, kept = self.r2()
        bins = (r2[kept] * _BINS).long().clamp_(max=_BINS - 1)
        return ScalarR2Counts(torch.bincount(bins, minlength=_BINS).cpu(), len(r2))


class _Seen:
    """Range of each entry, and its distinct values up to three: the fourth decides."""

    def __init__(self) -> None:
        self._low = self._high = torch.empty(0)
        self._values: list[Tensor] = []  # each (entries,), NaN where there is none yet
        self._enough = torch.empty(0, dtype=torch.bool)

    def add(self, x: Tensor) -> None:
        if not self._values:
            self._low, self._high = x.clone(), x.clone()
            self._values = [x.clone()]
            self._values += [torch.full_like(x, torch.nan) for _ in range(_DISTINCT - 2)]
            self._enough = torch.zeros_like(x, dtype=torch.bool)
            return
        self._low, self._high = torch.minimum(self._low, x), torch.maximum(self._high, x)
        new = torch.ones_like(self._enough)
        for value in self._values:
            empty = value.isnan()
            new &= value != x
            value[new & empty] = x[new & empty]
            new &= ~empty
        self._enough |= new

    def passes(self) -> Tensor:
        return self._enough & (self._high - self._low > _RANGE)


def scalar_r2_walk(inc: Increments, *, entries: int = 1 << 16, seed: int = 0) -> ScalarR2Counts:
    """The null: entries of Gaussian walks with the step norms of `inc`, stored without rounding.

    About .44 and .26 above .7 for a long walk of equal steps; good to .003 with 65536 entries.
    The filter has no part in it, for what passes depends on rounding.
    """
    generator = torch.Generator().manual_seed(seed)
    deviations = inc.H.diagonal().sqrt()
    state = torch.zeros(entries, dtype=torch.float64)
    found = ScalarR2(inc.steps[1:])
    for t, deviation in zip(inc.steps[1:], deviations.tolist(), strict=True):
        state = state + deviation * torch.randn(entries, generator=generator, dtype=torch.float64)
        found.add(t, state)
    return found.counts()
