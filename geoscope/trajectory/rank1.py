"""Statistics of the leading pair of every update, σ1·u·vᵀ over the steps.

See docs/methods.md#leading-pairs. Two things are called rank-1 trajectory. This is the spatial one:
each Δ_i has its own pair (NExt, AlphaRL). The signs of singular vectors are arbitrary; everything
here is a product of a u with a u and a v with a v, so that no number depends on them. Only figures
need aligned signs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from geoscope.errors import NumericsError
from geoscope.linalg.operand import Operand
from geoscope.linalg.product import Product
from geoscope.linalg.small import gram_eigen
from geoscope.profile import stage
from geoscope.records import Collected, Numbers, Status
from geoscope.trajectory import storage_noise
from geoscope.trajectory.increments import Increments, increment_gram
from geoscope.trajectory.statistics import Statistics, statistics

__all__ = [
    "ILL_DEFINED_ABOVE",
    "WEAK_BELOW",
    "Rank1Path",
    "Rank1Statistics",
    "Rank1Totals",
    "align_signs",
    "fixed_direction_energy",
    "pair_cosine",
    "rank1_gram",
    "rank1_increments",
    "rank1_statistics",
    "rank1_totals",
    "sigma1_exponent",
]

Series = tuple[float | None, ...]

# σ2/σ1 above which the direction is ill-defined, and |cos| below which an alignment is a guess.
ILL_DEFINED_ABOVE, WEAK_BELOW = 0.9, 0.2
# Alternating maximisation stops on this relative gain.
_GAIN, _ROUNDS = 1e-13, 1000


@dataclass(frozen=True)
class Rank1Path:
    """Leading pair of every Δ_i (or δ_i); fp64, signs arbitrary.

    sigma, second, norm: (T,), σ1, σ2 and ‖·‖_F. u: (T, m), v: (T, n), unit rows.
    """

    sigma: Tensor
    second: Tensor
    norm: Tensor
    u: Tensor
    v: Tensor

    def __post_init__(self) -> None:
        T = len(self.sigma)
        sizes = [len(one) for one in (self.second, self.norm, self.u, self.v)]
        if sizes != [T] * 4:
            raise NumericsError(
                f"a path of {T} values and {', '.join(map(str, sizes))} σ2, norms, u and v; "
                "one of each per step is needed"
            )

    def __len__(self) -> int:
        """T."""
        return len(self.sigma)

    @property
    def shape(self) -> tuple[int, int]:
        return self.u.shape[1], self.v.shape[1]

    @property
    def null_fraction(self) -> float:
        """σ1/‖·‖_F of an isotropic matrix of this shape, 1/√m + 1/√n."""
        m, n = self.shape
        return min(1.0, 1 / math.sqrt(m) + 1 / math.sqrt(n))


@dataclass(frozen=True, kw_only=True)
class Rank1Statistics(Numbers):
    """Of one tensor.

    series: id → one number per step, or per pair of
    neighbours. linearity: docs/methods.md#drift on K.
    ill_defined: places of the steps with gap21 > .9.
    """

    series: Mapping[str, Series]
    linearity: Statistics
    ill_defined: tuple[int, ...]


@dataclass(frozen=True)
class Rank1Totals:
    """Over tensors. Per step and over all steps; None where nothing moved.

    rank1_share: Σσ1²/Σ‖Δ‖², a share of energy. norm_fraction: Σσ1/Σ‖Δ‖ [AlphaRL, 2510.00553], a
    ratio of sums of norms: 19 % of it is about 4 % of the energy. With each its isotropic null.
    """

    rank1_share: Series
    norm_fraction: Series
    null_share: Series
    null_fraction: Series
    final_share: float | None
    final_fraction: float | None


def rank1_totals(paths: Sequence[Rank1Path]) -> Rank1Totals:
    """The tensors' shares together, step by step; paths of one length."""
    sigma, norm = (
        torch.stack(one) for one in zip(*((p.sigma, p.norm) for p in paths), strict=True)
    )
    null = torch.tensor([[p.null_fraction] for p in paths], dtype=torch.float64)
    energy, length = norm.square().sum(0), norm.sum(0)
    share = _divide(sigma.square().sum(0), energy)
    fraction = _divide(sigma.sum(0), length)
    return Rank1Totals(
        rank1_share=share,
        norm_fraction=fraction,
        null_share=_divide((null * norm).square().sum(0), energy),
        null_fraction=_divide((null * norm).sum(0), length),
        final_share=share[-1],
        final_fraction=fraction[-1],
    )


# --- K and what follows from it -----------------------------------------------------------------


def rank1_gram(path: Rank1Path) -> Tensor:
    """K_ij = σ_iσ_j(u_iᵀu_j)(v_iᵀv_j), the Gram matrix of Z_i = σ_i·u_i·v_iᵀ; sign-free. (T, T)."""
    weighted = path.sigma[:, None] * path.sigma
    return weighted * (path.u @ path.u.T) * (path.v @ path.v.T)


def rank1_increments(path: Rank1Path, steps: Sequence[float]) -> Increments:
    """The rank-1 parts as a series of their own: docs/methods.md#drift applies, and sums add up.

    steps: T + 1, the base first, where Z = 0. base_energy is 0 and no rounding is known.
    """
    H = increment_gram(rank1_gram(path))
    return Increments(tuple(map(float, steps)), H, (0.0,) * len(steps), 0.0)


def sigma1_exponent(sigma: Tensor, elapsed: Tensor) -> float | None:
    """Slope of ln σ1 on ln t: 1 drift, ½ diffusion. Steps with σ1 = 0 are left out; T ≥ 2."""
    moved = sigma > 0
    if int(moved.sum()) < 2:
        return None
    x, y = elapsed[moved].log(), sigma[moved].log()
    x = x - x.mean()
    return float(x @ (y - y.mean())) / float(x @ x)


# --- directions ---------------------------------------------------------------------------------


def pair_cosine(u: Tensor, v: Tensor, u2: Tensor, v2: Tensor) -> Tensor:
    """⟨u, u2⟩·⟨v, v2⟩ row by row: the cosine of the rank-1 matrices u·vᵀ and u2·v2ᵀ."""
    return (u * u2).sum(-1) * (v * v2).sum(-1)


def align_signs(path: Rank1Path) -> tuple[Rank1Path, tuple[bool, ...], tuple[int, ...]]:
    """From last to first: u_i and v_i turn together if u_i·u_{i+1} + v_i·v_{i+1} < 0.

    Returns the path, which steps turned, and the places of those whose |u_i·u_{i+1}| or
    |v_i·v_{i+1}| is below .2: there the sign is a guess.
    """
    u, v = path.u.clone(), path.v.clone()
    flips, weak = [False] * len(path), []
    for i in range(len(path) - 2, -1, -1):
        left, right = float(u[i] @ u[i + 1]), float(v[i] @ v[i + 1])
        if left + right < 0:
            u[i], v[i], flips[i] = -u[i], -v[i], True
        if min(abs(left), abs(right)) < WEAK_BELOW:
            weak.append(i)
    aligned = Rank1Path(path.sigma, path.second, path.norm, u, v)
    return aligned, tuple(flips), tuple(reversed(weak))


@stage("fixed direction")
def fixed_direction_energy(
    path: Rank1Path, updates: Sequence[Operand | Product] | None = None
) -> float | None:
    """max_{u,v} Σ(uᵀΔ_iv)²/Σσ1(i)², by alternating maximisation; 1: directions never move.

    updates: Δ_1 … Δ_T, each a stack of one. Without them Z_i = σ_i·u_i·v_iᵀ stands for Δ_i: what
    the rank-1 parts alone hold in one fixed pair of directions. The search starts from the pairs
    of the first, last and largest step and of the leading combination of Z; the best is taken.
    """
    energy = float(path.sigma.square().sum())
    if energy == 0:
        return None
    _, vectors = gram_eigen(rank1_gram(path))
    places = {0, len(path) - 1, int(path.sigma.argmax()), int(vectors[:, 0].abs().argmax())}
    best = max(_alternate(path, updates, path.v[i]) for i in sorted(places))
    return min(1.0, best / energy)


def _alternate(path: Rank1Path, updates: Sequence[Operand | Product] | None, v: Tensor) -> float:
    """The value reached from v."""
    value = before = 0.0
    for _ in range(_ROUNDS):
        u, _ = _combined(_images(path, updates, v, left=False))
        v, value = _combined(_images(path, updates, u, left=True))
        if value <= before * (1 + _GAIN):
            break
        before = value
    return value


def _images(
    path: Rank1Path, updates: Sequence[Operand | Product] | None, x: Tensor, *, left: bool
) -> Tensor:
    """Δ_i·x, (T, m), or with `left` Δ_iᵀ·x, (T, n)."""
    if updates is not None:
        rows = x[None, None]
        return torch.stack(
            [(update.left(rows) if left else update.right(rows))[0, 0] for update in updates]
        )
    known, other = (path.u, path.v) if left else (path.v, path.u)
    return (path.sigma * (known @ x))[:, None] * other


def _combined(rows: Tensor) -> tuple[Tensor, float]:
    """The unit x with the largest Σ_i (row_i·x)², and that sum."""
    values, vectors = gram_eigen(rows @ rows.T)
    x = vectors[:, 0] @ rows
    length = float(torch.linalg.vector_norm(x))
    return (x / length if length > 0 else rows.new_zeros(rows.shape[1])), float(values[0])


# --- all of them --------------------------------------------------------------------------------


@stage("rank-1 statistics")
def rank1_statistics(
    path: Rank1Path,
    inc: Increments,
    *,
    local: Rank1Path | None = None,
    updates: Sequence[Operand | Product] | None = None,
    base_exact: bool = True,
) -> Rank1Statistics:
    """Everything of docs/methods.md#leading-pairs for one tensor.

    path: of the updates Δ_i. inc: the tensor's increments, for steps, step norms and rounding.
    local: the pairs of δ_i, for `local_global_cosine`. updates: as for `fixed_direction_energy`.
    """
    if len(path) != len(inc):
        raise NumericsError(
            f"a path of {len(path)} steps and increments of {len(inc)} do not belong together"
        )
    series = _series(path, local)
    linearity = statistics(rank1_increments(path, inc.steps))
    last = len(path) - 1
    found: dict[str, float | None] = {
        "rank1_share": series["rank1_share"][last],
        "norm_fraction": series["norm_fraction"][last],
        "gap21": series["gap21"][last],
        "direction_cosine": _mean(series["direction_cosine"]),
        "direction_cosine_first_last": series["direction_cosine_last"][0] if last else None,
        "sigma1_exponent": sigma1_exponent(path.sigma, inc.elapsed),
        "fixed_direction_energy": fixed_direction_energy(path, updates) if last else None,
        "rank1_linearity": linearity.values["linear_r2"],
        "rank1_drift_fraction": linearity.values["drift_fraction"],
    }
    if local is not None:
        found["local_global_cosine"] = _mean(series["local_global_cosine"])
    state = storage_noise.noise_state(inc, base_exact=base_exact)
    numbers = Collected()
    for key, value in found.items():
        numbers.put(key, value, _status(value, path, state))
    return Rank1Statistics(
        values=numbers.values,
        nulls=_nulls(path, inc, linearity),
        status=numbers.status,
        raw=numbers.raw,
        series=series,
        linearity=linearity,
        ill_defined=tuple(
            i
            for i, gap in enumerate(series["gap21"])
            if gap is not None and gap > ILL_DEFINED_ABOVE
        ),
    )


def _status(value: float | None, path: Rank1Path, state: Status) -> Status:
    if float(path.norm.max()) == 0:
        return Status.ZERO_UPDATE
    return Status.NOT_APPLICABLE if value is None else state


def _nulls(path: Rank1Path, inc: Increments, linearity: Statistics) -> dict[str, float]:
    """Isotropic: share and fraction. Walk with the same step norms: exponent and linearity."""
    walked = inc.H.diagonal().cumsum(0).sqrt()
    nulls: dict[str, float | None] = {
        "rank1_share": path.null_fraction**2,
        "norm_fraction": path.null_fraction,
        "sigma1_exponent": sigma1_exponent(walked, inc.elapsed),
        "rank1_linearity": linearity.nulls.get("linear_r2"),
        "rank1_drift_fraction": linearity.nulls.get("drift_fraction"),
    }
    return {key: value for key, value in nulls.items() if value is not None}


def _series(path: Rank1Path, local: Rank1Path | None) -> dict[str, Series]:
    """Per step (T); direction_cosine, left_cosine, right_cosine per pair of neighbours (T − 1)."""
    u, v = path.u, path.v
    moved = path.sigma > 0
    neighbours = moved[:-1] & moved[1:]
    share = _divide(path.sigma.square(), path.norm.square())
    edge = _noise_edge(path)
    series = {
        "sigma1": tuple(path.sigma.tolist()),
        "rank1_share": share,
        "norm_fraction": _divide(path.sigma, path.norm),
        "gap21": _divide(path.second, path.sigma),
        "direction_cosine": _where(neighbours, pair_cosine(u[:-1], v[:-1], u[1:], v[1:])),
        "direction_cosine_first": _where(moved & moved[0], pair_cosine(u, v, u[:1], v[:1])),
        "direction_cosine_last": _where(moved & moved[-1], pair_cosine(u, v, u[-1:], v[-1:])),
        "left_cosine": _where(neighbours, (u[:-1] * u[1:]).sum(-1).abs()),
        "right_cosine": _where(neighbours, (v[:-1] * v[1:]).sum(-1).abs()),
        "noise_edge": tuple(edge.tolist()),
        # of the two leading values that are known
        "above_edge": tuple(
            float((one > limit) + (two > limit))
            for one, two, limit in zip(
                path.sigma.tolist(), path.second.tolist(), edge.tolist(), strict=True
            )
        ),
    }
    if local is not None:
        both = moved & (local.sigma > 0)
        series["local_global_cosine"] = _where(both, pair_cosine(local.u, local.v, u, v))
    return series


def _noise_edge(path: Rank1Path) -> Tensor:
    """ŝ(√m + √n), ŝ² = (‖Δ‖² − σ1² − σ2²)/mn, (T,): where iid noise of that size would end."""
    m, n = path.shape
    left = path.norm.square() - path.sigma.square() - path.second.square()
    return (left.clamp_min(0) / (m * n)).sqrt() * (math.sqrt(m) + math.sqrt(n))


def _where(defined: Tensor, numbers: Tensor) -> Series:
    pairs = zip(defined.tolist(), numbers.tolist(), strict=True)
    return tuple(value if one else None for one, value in pairs)


def _divide(numbers: Tensor, by: Tensor) -> Series:
    pairs = zip(numbers.tolist(), by.tolist(), strict=True)
    return tuple(one / two if two > 0 else None for one, two in pairs)


def _mean(numbers: Series) -> float | None:
    defined = [number for number in numbers if number is not None]
    return math.fsum(defined) / len(defined) if defined else None
