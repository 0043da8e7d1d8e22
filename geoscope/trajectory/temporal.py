"""Statistics of a path in weight space from the inner products of its increments.

See docs/methods.md#drift. Each takes `Increments` and returns a number, or one per step, and None
where it is 0/0. Rows are the T checkpoints; the base, Δ = 0, is not a data point. Fits use
t_i − t_0, the steps since the base.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from geoscope.linalg.small import gram_eigen, orthonormal_columns
from geoscope.trajectory.increments import Increments

__all__ = [
    "cos_to_final",
    "curvature",
    "drift_fraction",
    "increment_cosine",
    "line",
    "linear_r2",
    "linear_r2_origin",
    "nonlinearity",
    "participation_ratio",
    "rank1_coefficient_r2",
    "rank1_coefficients",
    "rates_gram",
    "residual_share",
    "step_cosines",
    "step_curvatures",
    "straightness",
    "subspace_drift",
    "temporal_pc1",
    "temporal_pc1_centred",
    "update_cosines",
]

Numbers = tuple[float | None, ...]
Columns = Callable[[Tensor], Tensor]

# A variance below this part of the energy is the rounding of fp64.
_ROUNDING = 1e-13


def line(t: Tensor) -> Tensor:
    """X = [1, t], (T, 2)."""
    return torch.stack([torch.ones_like(t), t], 1)


# --- from H -------------------------------------------------------------------------------------


def rates_gram(H: Tensor, gaps: Tensor) -> Tensor:
    """H̃_ij = H_ij/(Δt_i·Δt_j), (T, T)."""
    return H / (gaps[:, None] * gaps)


def drift_fraction(H: Tensor, gaps: Tensor) -> float | None:
    """φ = mean_{i≠j}H̃_ij / mean_i H̃_ii; φ/(1 − φ) = drift²/noise² per interval. 0 walk, 1 line."""
    rates = rates_gram(H, gaps)
    T, energy = len(H), float(rates.trace())
    if energy <= 0:
        return None
    return float((rates - rates.diagonal().diag()).sum()) / ((T - 1) * energy)


def step_cosines(H: Tensor) -> Numbers:
    """Cosines of successive increments H_{i,i+1}/√(H_ii·H_{i+1,i+1}), T − 1 of them."""
    return _neighbours(H)


def increment_cosine(H: Tensor) -> float | None:
    """Mean cosine of successive increments; the turning angle is its arccos. 0 walk, 1 line."""
    return _mean(step_cosines(H))


def straightness(inc: Increments) -> float | None:
    """√G_TT/Σ√H_ii: distance over path length. About 1/√T for a walk, 1 for a line."""
    length = float(inc.H.diagonal().sqrt().sum())
    return math.sqrt(max(0.0, float(inc.H.sum()))) / length if length > 0 else None


def step_curvatures(inc: Increments) -> Numbers:
    """‖δ_{i+1}/Δt_{i+1} − δ_i/Δt_i‖/mean speed, T − 1 of them. √2 walk, 0 line."""
    rates = rates_gram(inc.H, inc.gaps)
    speeds = rates.diagonal()
    mean = float(speeds.sqrt().mean())
    if mean == 0:
        return (None,) * (len(inc) - 1)
    turns = speeds[1:] + speeds[:-1] - 2 * rates.diagonal(1)
    return tuple((turns.clamp_min(0).sqrt() / mean).tolist())


def curvature(inc: Increments) -> float | None:
    """Mean of `step_curvatures`."""
    return _mean(step_curvatures(inc))


# --- from G -------------------------------------------------------------------------------------


def temporal_pc1(inc: Increments) -> float | None:
    """λ1(G)/Σλ, uncentred: RELEX's explained variance [2605.21468]. 8/π² for a long walk."""
    return _leading_share(inc.G, float(inc.G.trace()))


def temporal_pc1_centred(inc: Increments) -> float | None:
    """λ1(CGC)/Σλ, C = I − 11ᵀ/T, as a PCA has it. 6/π² for a long walk, 1 for a line."""
    return _leading_share(_residual(inc.G, torch.ones(len(inc), 1)), float(inc.G.trace()))


def participation_ratio(inc: Increments) -> float | None:
    """(Σλ)²/Σλ² of G. About 1.5 for a walk, 1 for a line."""
    energy = float(inc.G.square().sum())
    return float(inc.G.trace()) ** 2 / energy if energy > 0 else None


def rank1_coefficients(inc: Increments) -> Tensor:
    """c_i = √λ1·U_i1, sign such that c_T > 0: RELEX's coefficients. (T,)."""
    values, vectors = gram_eigen(inc.G)
    c = values[0].sqrt() * vectors[:, 0]
    return -c if float(c[-1]) < 0 else c


def rank1_coefficient_r2(inc: Increments) -> float | None:
    """R² of c on [1, t] [RELEX, 2605.21468]. About .96 for a walk."""
    c = rank1_coefficients(inc)
    return _r2(c[:, None] * c, line(inc.elapsed))


def linear_r2(inc: Increments) -> float | None:
    """1 − tr(RG)/tr(CG), R the residual projector of X = [1, t]. About .60 for a walk."""
    return _r2(inc.G, line(inc.elapsed))


def linear_r2_origin(inc: Increments) -> float | None:
    """1 − tr(RG)/tr(G), R that of X = [t]. About .80 for a walk."""
    total = float(inc.G.trace())
    return 1 - float(_residual(inc.G, inc.elapsed[:, None]).trace()) / total if total > 0 else None


def nonlinearity(inc: Increments, columns: Columns) -> float | None:
    """1 − (1 − R²)/(1 − R²_line): how much of what the line misses `columns` of t explain.

    Negative where they fit worse than the line. None for a path that is a line.
    """
    line, other = linear_r2(inc), _r2(inc.G, columns(inc.elapsed))
    if line is None or other is None or 1 - line < _ROUNDING:
        return None
    return 1 - (1 - other) / (1 - line)


def cos_to_final(inc: Increments) -> Numbers:
    """G_iT/√(G_ii·G_TT), T of them. √(i/T) for a walk."""
    G = inc.G
    return tuple(
        _cosine(*one) for one in zip(G[:, -1], G.diagonal(), G[-1, -1:].expand(len(G)), strict=True)
    )


def update_cosines(inc: Increments) -> Numbers:
    """Cosines of successive updates Δ_i, Δ_{i+1}, T − 1 of them. √(i/(i+1)) for a walk."""
    return _neighbours(inc.G)


def subspace_drift(inc: Increments) -> float | None:
    """|⟨v_early, v_all⟩| = |u_aᵀG_ab·u_b|/(σ_aσ_b): of the first ⌊T/2⌋ updates and of all."""
    G, half = inc.G, len(inc) // 2
    early, whole = _leading(G[:half, :half]), _leading(G)
    if early is None or whole is None:
        return None
    return min(1.0, abs(float(early @ G[:half] @ whole)))


def residual_share(inc: Increments) -> Numbers:
    """1 − c_i²/G_ii outside the first ⌊T/2⌋ updates' rank-1 span, T of them."""
    G, half = inc.G, len(inc) // 2
    early = _leading(G[:half, :half]) if half else None
    if early is None:
        return (None,) * len(inc)
    captured = (early @ G[:half]).square()
    return tuple(
        max(0.0, 1 - one / energy) if energy > 0 else None
        for one, energy in zip(captured.tolist(), G.diagonal().tolist(), strict=True)
    )


# --- shared -------------------------------------------------------------------------------------


def _leading(G: Tensor) -> Tensor | None:
    """u/σ, (T,), such that Σ_i (u_i/σ)·Δ_i is the leading unit vector; None for G = 0."""
    values, vectors = gram_eigen(G)
    return vectors[:, 0] / values[0].sqrt() if float(values[0]) > 0 else None


def _leading_share(G: Tensor, energy: float) -> float | None:
    """λ1/Σλ; None where Σλ is nothing beside `energy`."""
    total = float(G.trace())
    if total <= _ROUNDING * energy:
        return None
    return float(gram_eigen(G)[0][0]) / total


def _residual(G: Tensor, X: Tensor) -> Tensor:
    """R·G·R with R = I − X(XᵀX)⁻¹Xᵀ."""
    Q = orthonormal_columns(X)
    part = G - Q @ (Q.T @ G)
    return part - (part @ Q) @ Q.T


def _r2(G: Tensor, X: Tensor) -> float | None:
    """1 − tr(RG)/tr(CG); None where all rows are equal."""
    around_mean = float(_residual(G, torch.ones(len(G), 1)).trace())
    if around_mean <= _ROUNDING * float(G.trace()):
        return None
    return 1 - float(_residual(G, X).trace()) / around_mean


def _neighbours(G: Tensor) -> Numbers:
    energies = G.diagonal()
    rows = zip(G.diagonal(1), energies[:-1], energies[1:], strict=True)
    return tuple(_cosine(*row) for row in rows)


def _cosine(product: Tensor, one: Tensor, two: Tensor) -> float | None:
    if float(one) <= 0 or float(two) <= 0:
        return None
    return float(product) / (math.sqrt(float(one)) * math.sqrt(float(two)))


def _mean(numbers: Numbers) -> float | None:
    defined = [number for number in numbers if number is not None]
    return math.fsum(defined) / len(defined) if defined else None
