"""What would noise of the same shape and size give? The null beside every number.

Two generic nulls: *iid*, the singular values of a Gaussian matrix, and the *isotropic update*, a
Gaussian ΔW of the same norm: W0 + ω·G is sampled in linalg/perturbed.py, and what rounding to the
stored dtype leaves unchanged is in linalg/isotropic.py and linalg/changes.py. The draws of
sampled nulls depend on the seed and the shape alone, so that order changes nothing.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from scipy.integrate import quad
from scipy.optimize import brentq
from torch import Tensor

from geoscope.linalg.iid import iid_spectra
from geoscope.metrics import collapse

__all__ = [
    "base_share",
    "captured_area",
    "condition_number",
    "energy_left",
    "energy_right",
    "energy_two_sided",
    "full_rank",
    "iid_spectra",
    "marchenko_pastur_median",
    "nss",
    "null_sampled",
    "one",
    "outside_span",
    "rank_ratio",
    "spectral_lift",
    "spectral_share",
    "zero",
]


@lru_cache(maxsize=64)
def marchenko_pastur_median(beta: float) -> float:
    """Median μ of the Marchenko-Pastur law of x = σ²/M with entries of unit variance, β = q/M."""
    low, high = (1 - math.sqrt(beta)) ** 2, (1 + math.sqrt(beta)) ** 2

    def density(x: float) -> float:
        return math.sqrt(max((high - x) * (x - low), 0.0)) / (2 * math.pi * beta * x)

    def below(x: float) -> float:
        # x = low + t² takes the square-root edge away (and 1/√x at β = 1)
        width = math.sqrt(x - low)
        return quad(lambda t: 2 * t * density(low + t * t), 0, width, epsabs=1e-12)[0] - 0.5

    return float(brentq(below, low + 1e-9, high, xtol=1e-13))  # pyright: ignore[reportArgumentType]


def _constant(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def energy_right(*, k: int, shape: tuple[int, int]) -> Tensor:
    """k/n."""
    return _constant(k / shape[1])


def energy_left(*, k: int, shape: tuple[int, int]) -> Tensor:
    """k/m."""
    return _constant(k / shape[0])


def energy_two_sided(*, k: int, shape: tuple[int, int]) -> Tensor:
    """k²/(mn)."""
    return _constant(k * k / (shape[0] * shape[1]))


def base_share(*, shape: tuple[int, int]) -> Tensor:
    """1/(mn): an isotropic update has as much energy along W0 as along any other matrix."""
    return torch.tensor(1 / (shape[0] * shape[1]), dtype=torch.float64)


def outside_span(*, shape: tuple[int, int]) -> Tensor:
    """1 − q/M."""
    return _constant(1 - min(shape) / max(shape))


def captured_area(*, axis: int, shape: tuple[int, int]) -> Tensor:
    """(q + 1)/(2·m) or (q + 1)/(2·n); axis 0 is m."""
    return _constant((min(shape) + 1) / (2 * shape[axis]))


def one() -> Tensor:
    """1, the null of every ratio to a null."""
    return _constant(1.0)


def full_rank(*, shape: tuple[int, int]) -> Tensor:
    """q: noise fills every direction."""
    return _constant(float(min(shape)))


def zero() -> Tensor:
    """0."""
    return _constant(0.0)


def condition_number(*, shape: tuple[int, int]) -> Tensor:
    """(1 + √β)/(1 − √β) from the edges of the Marchenko-Pastur law; NaN at β = 1."""
    root = (min(shape) / max(shape)) ** 0.5
    return _constant((1 + root) / (1 - root) if root < 1 else float("nan"))


def null_sampled(base_S: Tensor, number: Tensor) -> Tensor:
    """What was sampled from the base's spectrum, as it is."""
    return number


def nss(base_S: Tensor, sampled_S: Tensor) -> Tensor:
    """Mean of NSS over sampled spectra (b, draws, q) of the tuned matrix; near 0 it is ρ/√M."""
    return collapse.nss(base_S[:, None], sampled_S).mean(-1)


def spectral_share(base_S: Tensor, sampled_S: Tensor, update_norm: Tensor) -> Tensor:
    """The same over ρ; near ρ = 0 it is 1/√M."""
    return collapse.spectral_share(base_S[:, None], sampled_S, update_norm[:, None]).mean(-1)


def spectral_lift(
    base_S: Tensor, sampled_S: Tensor, update_norm: Tensor, *, shape: tuple[int, int]
) -> Tensor:
    """The same times √M: 1 near ρ = 0, more where noise lifts the tail of the spectrum."""
    return spectral_share(base_S, sampled_S, update_norm) * max(shape) ** 0.5


def rank_ratio(base_S: Tensor, sampled_S: Tensor) -> Tensor:
    """Mean effective rank of sampled spectra (b, draws, q) over that of the base."""
    return collapse.rank_ratio(base_S[:, None], sampled_S).mean(-1)
