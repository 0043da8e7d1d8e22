"""Partial least squares with one component, of a curve on many features.

See docs/methods.md#metric-curves.

AlphaRL [paper 2510.00553] fits y = αz + b, z = F·w, w ∝ Fᵀ(y − ȳ), on standardised features F
(T, d). All of it is in K = F·Fᵀ: with s = K(y − ȳ) the fit is ȳ + s·⟨s, y − ȳ⟩/⟨s, s⟩. So K (T, T)
is all that is kept, sums of K are features side by side, and a thousand permutations of y cost a
matrix product. The sign of a feature changes nothing.

Beside the in-sample R², which d ≫ T makes void, stands a forecast: fitted and standardised on the
first o checkpoints only, o = max(5, ⌈T/2⌉) … T − 1, it predicts all later ones.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from geoscope.errors import NumericsError

__all__ = ["LEAST_POINTS", "PlsForecast", "PlsKernels", "pls_forecast", "pls_kernels", "pls_r2"]

# Checkpoints that the first forecast is fitted on, and those that any forecast needs.
_LEAST_FITTED = 5
LEAST_POINTS = _LEAST_FITTED + 1
# A feature that varies by less than this part of its size does not vary.
_CONSTANT = 1e-12


def _first_origin(T: int) -> int:
    """max(5, ⌈T/2⌉)."""
    return max(_LEAST_FITTED, -(-T // 2))


@dataclass(frozen=True)
class PlsKernels:
    """F·Fᵀ of standardised features; fp64.

    whole: (T, T), standardised over all checkpoints. past: (O, T, T), over the first o of them, one
    for each origin o = T − O … T − 1.
    """

    whole: Tensor
    past: Tensor

    def __add__(self, other: PlsKernels) -> PlsKernels:
        """Of both sets of features side by side."""
        return PlsKernels(self.whole + other.whole, self.past + other.past)


@dataclass(frozen=True)
class PlsForecast:
    """Squared errors of curves (P,), summed over `pairs` of an origin and a later checkpoint.

    held: of persistence, the last value seen.
    """

    error: Tensor
    held: Tensor
    pairs: int

    @property
    def rmse(self) -> Tensor:
        """In units of y, (P,)."""
        return (self.error / self.pairs).sqrt()

    @property
    def skill(self) -> Tensor:
        """1 − error/held, (P,); NaN where persistence makes no error."""
        return torch.where(self.held > 0, 1 - self.error / self.held, torch.nan)


def pls_kernels(features: Tensor) -> PlsKernels:
    """Of features (T, d), one row a checkpoint in order of steps, such as sign-aligned u1(t)."""
    F = features.to(torch.float64)
    T = len(F)
    past = [_kernel(F, origin) for origin in range(_first_origin(T), T)]
    return PlsKernels(_kernel(F, T), torch.stack(past) if past else F.new_zeros(0, T, T))


def _kernel(F: Tensor, fitted: int) -> Tensor:
    """Features standardised on the first rows; one that is constant there counts for nothing."""
    seen = F[:fitted]
    spread = seen.std(0, correction=0)
    varies = spread > _CONSTANT * seen.abs().amax(0)
    Z = torch.where(varies, (F - seen.mean(0)) / spread, 0.0)
    return Z @ Z.T


def pls_r2(kernels: PlsKernels, Y: Tensor) -> Tensor:
    """In-sample R² of curves Y (P, T), (P,); NaN where a curve or all features are constant.

    Above .9 for any smooth curve when d ≫ T, even on noise: show it with `pls_forecast` only.
    """
    centred = _centred(Y)
    s = centred @ kernels.whole
    return _dot(s, centred).square() / (_dot(s, s) * _dot(centred, centred))


def pls_forecast(kernels: PlsKernels, Y: Tensor) -> PlsForecast:
    """Leave-future-out errors of curves Y (P, T). Raises NumericsError for T < 6."""
    T = Y.shape[1]
    if T < LEAST_POINTS:
        raise NumericsError(f"{T} checkpoints; a forecast held out needs {LEAST_POINTS} or more")
    error, held = Y.new_zeros(len(Y)), Y.new_zeros(len(Y))
    first = _first_origin(T)
    for origin, K in zip(range(first, T), kernels.past, strict=True):
        seen, later = Y[:, :origin], Y[:, origin:]
        centred = _centred(seen)
        s = centred @ K[:origin]
        fitted = s[:, :origin]
        alpha = (_dot(fitted, centred) / _dot(fitted, fitted)).nan_to_num(0.0, 0.0, 0.0)
        predicted = seen.mean(1, keepdim=True) + alpha[:, None] * s[:, origin:]
        error += (predicted - later).square().sum(1)
        held += (seen[:, -1:] - later).square().sum(1)
    return PlsForecast(error, held, sum(T - origin for origin in range(first, T)))


def _centred(Y: Tensor) -> Tensor:
    return Y - Y.mean(1, keepdim=True)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(1)
