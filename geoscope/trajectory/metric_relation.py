"""How a series of weights goes with a metric curve y(t) (docs/methods.md#metric-curves).

    metric_correlation                corr(c_t, y), c that of the first temporal component
    metric_increment_correlation      corr of their rates Δc/Δt and Δy/Δt between neighbours
    metric_norm_spearman              Spearman of ‖Δ‖ and y
    metric_sigma1_spearman            Spearman of σ1 and y
    pls_r2, pls_skill, pls_rmse       AlphaRL's fit of y on u1(t), in sample and held out

With each but the RMSE, `…_p` and `…_shift_p`: the chance that y shuffled, or y shifted around, goes
as well with the same weights, by the same code. Two series that both rise go together by chance:
the shuffles forget that, the shifts less so. Correlations are compared by size, the others one
sided. Held-out skill is against persistence, the last value of y seen.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from scipy.stats import rankdata
from torch import Tensor

from geoscope.errors import NumericsError
from geoscope.records import Numbers, Status
from geoscope.trajectory.pls import LEAST_POINTS, PlsKernels, pls_forecast, pls_r2

__all__ = ["METRIC_RELATIONS", "PERMUTATIONS", "metric_relation"]

PERMUTATIONS = 999
_TESTED = (
    "metric_correlation",
    "metric_increment_correlation",
    "metric_norm_spearman",
    "metric_sigma1_spearman",
    "pls_r2",
    "pls_skill",
)
METRIC_RELATIONS = (
    "metric_points",
    *(f"{name}{end}" for name in _TESTED for end in ("", "_p", "_shift_p")),
    "pls_rmse",
)
# Points of a correlation; with two it is ±1.
_LEAST = 3
# Shuffles that give the same number but for rounding count as at least as large.
_EQUAL = 1e-9
# A series that varies by less than this part of its size does not vary.
_CONSTANT = 1e-12


def metric_relation(
    steps: Sequence[float],
    y: Sequence[float],
    *,
    coefficient: Tensor,
    norm: Tensor,
    sigma1: Tensor | None = None,
    features: PlsKernels | None = None,
    permutations: int = PERMUTATIONS,
    seed: int = 0,
) -> Numbers:
    """All of them, at the checkpoints where the metric has a value.

    steps, y, coefficient, norm, sigma1: (T,), in order of steps. features: of sign-aligned u1 at
    the same checkpoints. Without sigma1 or features their numbers are NOT_APPLICABLE, and so is all
    with fewer than 3 points (4 for increments, 6 for the fit, which never stands in-sample alone)
    or for a curve that does not move. The null of `pls_r2` is its median over the shuffles of y;
    that of a correlation is 0. Raises NumericsError where lengths differ.
    """
    T = len(steps)
    given = [one for one in (coefficient, norm, sigma1) if one is not None]
    sizes = [len(y), *map(len, given), *([] if features is None else [len(features.whole)])]
    if any(size != T for size in sizes):
        raise NumericsError(
            f"{T} steps and {', '.join(map(str, sizes))} values; one of each is needed at each step"
        )
    values: dict[str, float | None] = dict.fromkeys(METRIC_RELATIONS)
    values["metric_points"] = T
    nulls: dict[str, float] = {}
    curve = torch.tensor(y, dtype=torch.float64)
    if T >= _LEAST and bool((curve != curve[0]).any()):
        Y = _curves(curve, permutations, seed)
        for name, found in _correlations(steps, Y, coefficient, norm, sigma1).items():
            _put(values, name, found, permutations, by_size=True)
        if features is not None and T >= LEAST_POINTS:
            ahead = pls_forecast(features, Y)
            fit = pls_r2(features, Y)
            # A fit that cannot be held out is not shown in sample.
            if bool(fit[0].isfinite() & ahead.skill[0].isfinite()):
                _put(values, "pls_r2", fit, permutations, by_size=False)
                _put(values, "pls_skill", ahead.skill, permutations, by_size=False)
                values["pls_rmse"] = float(ahead.rmse[0])
                if permutations:
                    nulls["pls_r2"] = float(fit[1 : 1 + permutations].nanmedian())
    status = {key: Status.NOT_APPLICABLE for key, value in values.items() if value is None}
    return Numbers(values=values, nulls=nulls, status=status)


def _curves(y: Tensor, permutations: int, seed: int) -> Tensor:
    """y, its shuffles, its T − 1 shifts around: (1 + permutations + T − 1, T)."""
    generator = torch.Generator().manual_seed(seed)
    T = len(y)
    orders = torch.rand(permutations, T, generator=generator, dtype=torch.float64).argsort(1)
    shifts = (torch.arange(T) + torch.arange(1, T)[:, None]) % T
    return y[torch.cat([torch.arange(T)[None], orders, shifts])]


def _correlations(
    steps: Sequence[float], Y: Tensor, coefficient: Tensor, norm: Tensor, sigma1: Tensor | None
) -> dict[str, Tensor]:
    """name → its number for every curve, (P,)."""
    gaps = torch.tensor(steps, dtype=torch.float64).diff()
    ranks = _ranks(Y)
    found = {
        "metric_correlation": _correlation(coefficient, Y),
        "metric_norm_spearman": _correlation(_ranks(norm[None])[0], ranks),
    }
    if len(steps) > _LEAST:
        found["metric_increment_correlation"] = _correlation(
            coefficient.diff() / gaps, Y.diff(dim=1) / gaps
        )
    if sigma1 is not None:
        found["metric_sigma1_spearman"] = _correlation(_ranks(sigma1[None])[0], ranks)
    return found


def _correlation(x: Tensor, Y: Tensor) -> Tensor:
    """Pearson's, of x (T,) with each row of Y (P, T); NaN where one does not vary."""
    x, Y = _centred(x[None])[0], _centred(Y)
    lengths = x.norm() * Y.norm(dim=1)
    return torch.where(lengths > 0, (Y @ x / lengths).clamp(-1, 1), torch.nan)


def _centred(Y: Tensor) -> Tensor:
    """Each row (P, T) less its mean, in fp64; 0 where only rounding would be left."""
    Y = Y.to(torch.float64)
    centred = Y - Y.mean(1, keepdim=True)
    varies = centred.norm(dim=1) > _CONSTANT * Y.norm(dim=1)
    return torch.where(varies[:, None], centred, 0.0)


def _ranks(Y: Tensor) -> Tensor:
    """Of each row (P, T), from 1; equal values share the mean of their ranks."""
    return torch.from_numpy(rankdata(Y.numpy(), axis=1))


def _put(
    values: dict[str, float | None], name: str, found: Tensor, permutations: int, *, by_size: bool
) -> None:
    """The number and p = (1 + #{≥})/(1 + #) of the shuffles and of the shifts."""
    if not bool(found[0].isfinite()):
        return
    values[name] = float(found[0])
    size = found.abs() if by_size else found
    # a shuffle without a number counts as at least as large
    as_large = ~(size < size[0] - _EQUAL)
    shuffled, shifted = as_large[1 : 1 + permutations], as_large[1 + permutations :]
    for end, group in (("_p", shuffled), ("_shift_p", shifted)):
        if len(group):
            values[name + end] = (1 + int(group.sum())) / (1 + len(group))
