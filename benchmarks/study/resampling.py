"""AUC with intervals from whole runs, and logistic regression left out by groups; numpy alone."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "Estimate",
    "auc",
    "auc_of_resamples",
    "difference",
    "estimate",
    "largest_by_chance",
    "left_out",
    "mean_estimate",
    "ranks",
    "resamples",
]

Floats = NDArray[np.float64]
DRAWS = 2000
LEAST = 5


@dataclass(frozen=True)
class Estimate:
    """A number and its 95 % interval; None where it is undefined. count: of the runs it is of."""

    value: float | None
    low: float | None
    high: float | None
    count: int

    @property
    def above(self) -> float:
        """The lower end, −inf where undefined."""
        return -np.inf if self.low is None else self.low

    @property
    def below(self) -> float:
        """The upper end, +inf where undefined."""
        return np.inf if self.high is None else self.high


def ranks(values: Floats) -> Floats:
    """Average ranks of the defined values, standardised; undefined ones are 0."""
    known, scores = np.isfinite(values), np.zeros(len(values))
    average = _plain_ranks(values[known])
    if len(average) and average.std() > 0:
        scores[known] = (average - average.mean()) / average.std()
    return scores


def resamples(groups: Iterable[object], draws: int = DRAWS, seed: int = 0) -> Floats:
    """(draws, n): how often each run is in each resample, where groups are drawn whole."""
    return _resamples(tuple(map(str, groups)), draws, seed)


@lru_cache(maxsize=64)
def _resamples(groups: tuple[str, ...], draws: int, seed: int) -> Floats:
    """The same array for the same groups, so that differences are of the same resamples."""
    names, members = np.unique(groups, return_inverse=True)
    generator, count = np.random.default_rng(seed), len(names)
    drawn = (generator.integers(0, count, count) for _ in range(draws))
    return np.array([np.bincount(row, minlength=count) for row in drawn], dtype=float)[:, members]


def _order(scores: Floats, failed: NDArray[np.bool_]) -> Floats:
    """1, ½ or 0 for each pair of a failed run and another: whether the failed one is larger."""
    ours, theirs = scores[failed][:, None], scores[~failed][None, :]
    return (ours > theirs) + 0.5 * (ours == theirs)


def auc(scores: Floats, failed: NDArray[np.bool_]) -> float | None:
    """The probability that a failed run has the larger score, ties half; None without both."""
    order = _order(scores, failed)
    return float(order.mean()) if order.size else None


def auc_of_resamples(scores: Floats, failed: NDArray[np.bool_], counts: Floats) -> Floats:
    """AUC in each resample; NaN where it lacks failed or other runs."""
    ours, theirs = counts[:, failed], counts[:, ~failed]
    wins = np.einsum("dp,pn,dn->d", ours, _order(scores, failed), theirs, optimize=True)
    pairs = ours.sum(axis=1) * theirs.sum(axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(pairs > 0, wins / pairs, np.nan)


def _interval(value: float | None, draws: Floats, count: int) -> Estimate:
    known = draws[np.isfinite(draws)]
    if value is None or not len(known):
        return Estimate(None, None, None, count)
    low, high = np.percentile(known, [2.5, 97.5])
    return Estimate(value, float(low), float(high), count)


def estimate(values: Floats, failed: NDArray[np.bool_], counts: Floats) -> Estimate:
    """AUC of a statistic on the runs where it is defined; none of fewer than five of a side."""
    known = np.isfinite(values)
    scores, outcomes = values[known], failed[known]
    if min(outcomes.sum(), (~outcomes).sum()) < LEAST:
        return Estimate(None, None, None, int(known.sum()))
    draws = auc_of_resamples(scores, outcomes, counts[:, known])
    return _interval(auc(scores, outcomes), draws, int(known.sum()))


def mean_estimate(values: Floats, counts: Floats) -> Estimate:
    """Mean of the defined values, resampled."""
    known = np.isfinite(values)
    weights = counts[:, known]
    with np.errstate(divide="ignore", invalid="ignore"):
        draws = weights @ values[known] / weights.sum(axis=1)
    mean = float(values[known].mean()) if known.any() else None
    return _interval(mean, draws, int(known.sum()))


def difference(ours: Floats, theirs: Floats, failed: NDArray[np.bool_], counts: Floats) -> Estimate:
    """AUC of ours less AUC of theirs, both of the same runs, in the same resamples."""
    values = [auc(scores, failed) for scores in (ours, theirs)]
    if values[0] is None or values[1] is None:
        return Estimate(None, None, None, len(failed))
    draws = auc_of_resamples(ours, failed, counts) - auc_of_resamples(theirs, failed, counts)
    return _interval(values[0] - values[1], draws, len(failed))


def _fit(inputs: Floats, failed: NDArray[np.bool_]) -> Floats:
    """Logistic regression by Newton, ridge ½·|w|² on slopes; intercept first."""
    X = np.column_stack([np.ones(len(inputs)), inputs])
    ridge = np.diag([1e-9] + [1.0] * inputs.shape[1])
    w = np.zeros(X.shape[1])
    for _ in range(50):
        p = 1 / (1 + np.exp(-X @ w))
        gradient = X.T @ (p - failed) + ridge @ w
        step = np.linalg.solve((X * (p * (1 - p))[:, None]).T @ X + ridge, gradient)
        w -= step
        if np.abs(step).max() < 1e-9:
            break
    return w


def left_out(inputs: Floats, failed: NDArray[np.bool_], groups: NDArray[np.str_]) -> Floats:
    """Log-odds of each run, predicted by a fit on the other groups; inputs (n, features)."""
    scores = np.zeros(len(failed))
    for group in np.unique(groups):
        away = groups == group
        w = _fit(inputs[~away], failed[~away])
        scores[away] = w[0] + inputs[away] @ w[1:]
    return scores


def largest_by_chance(
    table: Sequence[Floats], failed: NDArray[np.bool_], blocks: NDArray[np.str_], draws: int = 1000
) -> float:
    """95 % point of the largest |AUC − ½| when outcomes are permuted within blocks."""
    generator, permuted = np.random.default_rng(0), np.empty((draws, len(failed)))
    for row in permuted:
        row[:] = failed
        for block in np.unique(blocks):
            inside = np.flatnonzero(blocks == block)
            row[inside] = generator.permutation(row[inside])
    largest = np.zeros(draws)
    for values in table:
        known = np.isfinite(values)
        scores = _plain_ranks(values[known])
        ours = permuted[:, known]
        count = ours.sum(axis=1)
        with np.errstate(divide="ignore", invalid="ignore"):
            area = (ours @ scores - count * (count + 1) / 2) / (count * (known.sum() - count))
        largest = np.fmax(largest, np.abs(area - 0.5))
    return float(np.percentile(largest, 95))


def _plain_ranks(values: Floats) -> Floats:
    """Average ranks from 1."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse]
