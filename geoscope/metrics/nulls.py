"""What would noise of the same shape and size give? The null beside every number.

Two generic nulls: *iid*, the singular values of a Gaussian matrix, and the *isotropic update*, a
Gaussian ΔW of the same norm stored in the same dtype. Sampled nulls depend on the seed and the
shape alone, so equal shapes share one and order changes nothing.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from scipy.integrate import quad
from scipy.optimize import brentq
from torch import Tensor

from geoscope.linalg import blas
from geoscope.linalg.iid import iid_draws, iid_tridiagonals
from geoscope.metrics.size import relative_update
from geoscope.profile import stage

__all__ = [
    "angle_rms",
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
    "one",
    "outside_span",
    "spectral_share",
    "zero",
]


@stage("nulls")
def iid_spectra(m: int, n: int, seed: int) -> Tensor:
    """Singular values of max(4, ⌈4096/q⌉) Gaussian m×n matrices: (draws, q), descending.

    Exact in distribution; see `geoscope.linalg.iid`.
    """
    return _iid_spectra(min(m, n), max(m, n), seed)


@lru_cache(maxsize=64)
def _iid_spectra(q: int, M: int, seed: int) -> Tensor:
    spectra = torch.empty(iid_draws(q), q, dtype=torch.float64)
    for draw, (main, side) in enumerate(iid_tridiagonals(q, M, seed)):
        values = blas.eigenvalues(torch.from_numpy(main), torch.from_numpy(side))
        spectra[draw] = values.clamp_min(0).sqrt()
    return spectra


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


@stage("nulls")
def angle_rms(
    base_S: Tensor, spread: Tensor, *, k: int, side: str, shape: tuple[int, int]
) -> Tensor:
    """RMS principal angle that isotropic noise turns the leading k directions by, in radians.

    √(E‖sin Θ‖_F²/k) to first order, with entry variance ω² = spread²/(mn):
    E‖sin Θ_left‖_F² = Σ_{i≤k<j≤m} min(½, ω²(σ_i²+σ_j²)/(σ_i²−σ_j²)²) with σ_j = 0 for j > q, right
    with j ≤ n. base_S: (..., q), spread: ‖ΔW‖_F or the rounding noise, (...,) → (...,).
    [METHODS §2.3; Wedin 1972 for the pairs]
    """
    m, n = shape
    variance = (spread.square() / (m * n))[..., None]
    energy = base_S.square()
    kept, dropped = energy[..., :k, None], energy[..., None, k:]
    pairs = variance[..., None] * (kept + dropped) / (kept - dropped).square()
    # An exactly degenerate pair (0/0 when both vanish, or x/0) turns as far as it can: the cap.
    total = pairs.nan_to_num(nan=0.5, posinf=0.5).clamp_max(0.5).sum((-2, -1))
    outside = (m if side == "left" else n) - base_S.shape[-1]
    if outside > 0:
        alone = (variance / energy[..., :k]).nan_to_num(nan=0.5, posinf=0.5)
        total = total + outside * alone.clamp_max(0.5).sum(-1)
    return (total / k).sqrt()


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


def nss(update_norm: Tensor, base_norm: Tensor, *, shape: tuple[int, int]) -> Tensor:
    """ρ/√M, to first order."""
    return relative_update(update_norm, base_norm) / max(shape) ** 0.5


def spectral_share(*, shape: tuple[int, int]) -> Tensor:
    """1/√M, to first order."""
    return _constant(max(shape) ** -0.5)
