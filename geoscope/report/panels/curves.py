"""Curves of many matrices as one: a common grid, a middle and a spread."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from geoscope.records import LayerRecord

__all__ = ["Middle", "Points", "middle_of", "points"]

Points = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True)
class Middle:
    """Mean and median over curves, and the band that holds the middle 80 % of them."""

    x: np.ndarray
    mean: np.ndarray
    median: np.ndarray
    low: np.ndarray
    high: np.ndarray


def points(layer: LayerRecord, key: str) -> Points | None:
    """x and y of a curve where both are positive (the axes are logarithmic), or None."""
    curve = layer.curves.get(key)
    if curve is None:
        return None
    x, y = np.array(curve.x, dtype=float), np.array(curve.y, dtype=float)
    shown = (x > 0) & (y > 0)
    return (x[shown], y[shown]) if shown.any() else None


def middle_of(curves: Sequence[Points], ends: Sequence[float] = ()) -> Middle | None:
    """The middle of curves on the union of their grids, where all of them are defined.

    Between points a curve is straight over log x. With `ends`, one for each curve, a curve that
    reaches its end stays there: the energy in all q directions is that in any more.
    """
    if not curves:
        return None
    grid = np.unique(np.concatenate([x for x, _ in curves]))
    reach = ends or [np.inf] * len(curves)
    table = np.array(
        [
            np.interp(np.log(grid), np.log(x), y, np.nan, y[-1] if x[-1] >= end else np.nan)
            for (x, y), end in zip(curves, reach, strict=True)
        ]
    )
    defined = np.isfinite(table).all(axis=0)
    if not defined.any():
        return None
    table = table[:, defined]
    low, median, high = np.quantile(table, (0.1, 0.5, 0.9), axis=0)
    return Middle(grid[defined], table.mean(axis=0), median, low, high)
