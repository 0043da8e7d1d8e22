"""Extrapolators from the leading pair of each update: spatial_rank1, alpha_rank1.

See docs/methods.md#extrapolators. They are not linear in Δ, so the Gram matrix alone does not tell
their errors. What a pass has to keep besides is C[τ, i, j] = u_iᵀ·Δ_τ·v_j, T³ numbers per tensor:
every prediction here is Z = σ̂·û·v̂ᵀ with û = Σa_iu_i and v̂ = Σb_jv_j, so that ⟨Z, Δ_τ⟩ =
σ̂·aᵀC_τb and ‖Z‖² = σ̂². The signs of the pairs are aligned first, so that no number depends on
those of the solver.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from geoscope.errors import NumericsError, OptionError
from geoscope.trajectory.backtest import PredictionProducts, pairs_of
from geoscope.trajectory.increments import Increments
from geoscope.trajectory.prediction import MethodInput, Pair, Prediction, last_of
from geoscope.trajectory.rank1 import Rank1Path, align_signs

__all__ = [
    "SPATIAL",
    "Pair",
    "Spatial",
    "alpha_rank1",
    "outer_moves",
    "spatial_moves",
    "spatial_rank1",
]

# 1 − cos below which two directions are one, and 1 + cos below which they are opposite.
_SAME = 1e-13


# --- where the pair is going --------------------------------------------------------------------


@dataclass(frozen=True)
class _Prediction:
    """sigma (k,), left and right (k, o): coefficients of û and v̂ on the aligned u_i and v_i."""

    sigma: Tensor
    left: Tensor
    right: Tensor


def _predict(
    sigma: Tensor, by_left: Tensor, by_right: Tensor, t: Tensor, targets: Tensor
) -> _Prediction:
    """From what was observed: σ1 (o,), Grams of aligned u and v (o, o), t (o,), targets (k,)."""
    moved = sigma > 0
    return _Prediction(
        _power_law(sigma[moved], t[moved], targets),
        _tangent_step(by_left, moved, t.log(), targets.log()),
        _tangent_step(by_right, moved, t.log(), targets.log()),
    )


def _power_law(sigma: Tensor, t: Tensor, targets: Tensor) -> Tensor:
    """exp of the least-squares line of ln σ1 on ln t; (k,). One σ1 > 0 stays as it is."""
    x, y = t.log(), sigma.log()
    centred = x - x.mean()
    spread = centred.square().sum()
    slope = (centred @ y) / spread if len(x) > 1 else spread
    return (y.mean() + slope * (targets.log() - x.mean())).exp()


def _tangent_step(gram: Tensor, moved: Tensor, t: Tensor, targets: Tensor) -> Tensor:
    """Along the great circle through the last direction, at the speed of the observed ones; (k, o).

    gram: of the aligned directions (o, o). t (o,), targets (k,): on any clock; it is ln t here,
    that of σ1's power law, for directions settle and a constant speed in t overshoots.

    The logarithm of u_i at u_o is θ_i/sin θ_i·(u_i − cos θ_i·u_o); ω is the least-squares slope of
    the logarithms on t_i − t_o, and û = cos(|ω|s)·u_o + sin(|ω|s)·ω/|ω| with s = t* − t_o. A
    direction that stands still, or moves on a great circle at constant speed, is met exactly.
    """
    cosine = gram[:, -1].clamp(-1, 1)
    apart = (1 - cosine > _SAME) & (1 + cosine > _SAME) & moved
    angle = torch.where(apart, cosine, 0.0).arccos()
    stretch = torch.where(apart, angle / angle.sin(), 0.0)
    behind = torch.where(moved, t - t[-1], 0.0)
    slope = behind / behind.square().sum().clamp_min(torch.finfo(t.dtype).tiny)
    omega = slope * stretch
    omega[-1] = omega[-1] - (slope * stretch * cosine).sum()
    speed = (omega @ gram @ omega).clamp_min(0).sqrt()
    last = torch.zeros_like(omega)
    last[-1] = 1
    if not float(speed) > 0:
        return last.expand(len(targets), -1)
    ahead = (speed * (targets - t[-1]))[:, None]
    return ahead.cos() * last + ahead.sin() * omega / speed


def spatial_rank1(path: Rank1Path, observed: Increments, target: float) -> Pair:
    """Z(t*) of `spatial_rank1`: σ1 by its power law, u and v by a tangent step. Of zero updates: 0.

    path: the leading pairs of Δ_1 … Δ_T.
    """
    path = _checked(path, observed)
    if float(path.sigma[-1]) == 0:
        return Pair(0.0, path.u[-1], path.v[-1])
    ahead = torch.tensor([target - observed.steps[0]], dtype=torch.float64)
    found = _predict(path.sigma, path.u @ path.u.T, path.v @ path.v.T, observed.elapsed, ahead)
    return Pair(float(found.sigma[0]), found.left[0] @ path.u, found.right[0] @ path.v)


def alpha_rank1(path: Rank1Path) -> Pair:
    """‖Δ_T‖_F·u1·v1ᵀ, the rank-1 part of the last update with its norm restored (AlphaRL)."""
    return Pair(float(path.norm[-1]), path.u[-1], path.v[-1])


@dataclass(frozen=True)
class _Origin:
    """One tensor at an origin o with P targets τ; (u, v) is the leading pair of Δ_o, Z(τ) the
    prediction of `spatial_rank1`.

    size: ‖Δ_o‖².
    sigma: σ_1 of Δ_o.
    last: ⟨u·vᵀ, Δ_o⟩.
    toward: ⟨Δ_o, Δ_τ − Δ_o⟩, (P,).
    along: ⟨u·vᵀ, Δ_τ − Δ_o⟩, (P,).
    guess: σ̂ of Z(τ), (P,).
    seen: ⟨Z(τ), Δ_o⟩, (P,).
    ahead: ⟨Z(τ), Δ_τ − Δ_o⟩, (P,).
    overlap: ⟨Z(τ), u·vᵀ⟩, (P,).
    """

    size: Tensor
    sigma: Tensor
    last: Tensor
    toward: Tensor
    along: Tensor
    guess: Tensor
    seen: Tensor
    ahead: Tensor
    overlap: Tensor


@dataclass(frozen=True)
class Spatial:
    """A method that predicts pairs from the leading pairs of the updates.

    pairs: of the path, what was observed and a target.
    moves: the same from inner products alone, for the backtest: (⟨ΔŴ − Δ_o, Δ_τ − Δ_o⟩,
    ‖ΔŴ − Δ_o‖²), (P,) each.
    is_pinned: whether the rest of the last checkpoint stays.
    """

    name: str
    pairs: Callable[[Rank1Path, Increments, float], tuple[Pair, ...]]
    moves: Callable[[_Origin], tuple[Tensor, Tensor]]
    is_pinned: bool = False

    def predict(self, seen: MethodInput, target: float) -> Prediction:
        if seen.path is None:
            raise OptionError(f"{self.name}: leading pairs are needed; take `directions`")
        last = last_of(len(seen.increments))
        pairs = self.pairs(seen.path, seen.increments, target)
        return Prediction(last if self.is_pinned else torch.zeros_like(last), pairs)


def _in_place_of_the_last(path: Rank1Path, seen: Increments, target: float) -> tuple[Pair, ...]:
    """Z(t*) and −Z_T."""
    last = Pair(float(path.sigma[-1]), path.u[-1], path.v[-1])
    return spatial_rank1(path, seen, target), last * -1


def _path_moves(at: _Origin) -> tuple[Tensor, Tensor]:
    """W0 + Z(t*)."""
    return at.ahead - at.toward, at.guess.square() - 2 * at.seen + at.size


def _pinned_moves(at: _Origin) -> tuple[Tensor, Tensor]:
    """W_T + Z(t*) − Z_T, as relex_pinned does."""
    energy = at.guess.square() - 2 * at.sigma * at.overlap + at.sigma.square()
    return at.ahead - at.sigma * at.along, energy


def _alpha_moves(at: _Origin) -> tuple[Tensor, Tensor]:
    """W0 + ‖Δ_T‖·u1·v1ᵀ."""
    norm = at.size.sqrt()
    return norm * at.along - at.toward, (2 * at.size - 2 * norm * at.last).expand(len(at.along))


def _path_pair(path: Rank1Path, seen: Increments, target: float) -> tuple[Pair, ...]:
    return (spatial_rank1(path, seen, target),)


def _alpha_pair(path: Rank1Path, seen: Increments, target: float) -> tuple[Pair, ...]:
    return (alpha_rank1(path),)


SPATIAL: Mapping[str, Spatial] = {
    method.name: method
    for method in (
        Spatial("spatial_rank1", _path_pair, _path_moves),
        Spatial("spatial_rank1_pinned", _in_place_of_the_last, _pinned_moves, is_pinned=True),
        Spatial("alpha_rank1", _alpha_pair, _alpha_moves),
    )
}


def _checked(path: Rank1Path, increments: Increments) -> Rank1Path:
    """The path with aligned signs."""
    if len(path) != len(increments):
        raise NumericsError(
            f"a path of {len(path)} steps and increments of {len(increments)} do not belong "
            "together"
        )
    return align_signs(path)[0]


# --- held-out errors ----------------------------------------------------------------------------


def spatial_moves(
    paths: Mapping[str, Rank1Path],
    increments: Mapping[str, Increments],
    products: Mapping[str, Tensor],
) -> dict[str, PredictionProducts]:
    """The moves of SPATIAL on all tensors, in the order of `increments`, for `backtest(others=)`.

    products: u_iᵀ·Δ_τ·v_j of each path by τ, i and j, (T, T, T); of i, j ≤ τ, for others are not
    known yet at τ. A tensor whose last update is zero is held.
    """
    rows: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in SPATIAL}
    for name, inc in increments.items():
        if name not in paths or name not in products:
            raise OptionError(
                f"{name}: no rank-1 path and pair products; give those of all tensors"
            )
        moves = _tensor_moves(paths[name], inc, products[name])
        for method in SPATIAL:
            rows[method].append(moves[method])
    return {method: _stacked(own) for method, own in rows.items()}


def _stacked(rows: list[tuple[Tensor, Tensor]]) -> PredictionProducts:
    return PredictionProducts(torch.stack([a for a, _ in rows]), torch.stack([e for _, e in rows]))


def _tensor_moves(
    path: Rank1Path, inc: Increments, products: Tensor
) -> dict[str, tuple[Tensor, Tensor]]:
    """method → (ahead (P,), energy (P,)) of one tensor."""
    T, nothing = len(inc), inc.elapsed.new_zeros
    if tuple(products.shape) != (T, T, T):
        raise NumericsError(
            f"pair products of shape {tuple(products.shape)}; {(T, T, T)} is needed"
        )
    aligned = _checked(path, inc)
    # The products were taken with the signs as they came.
    left, right = (
        (raw * turned).sum(1).sign() for raw, turned in ((path.u, aligned.u), (path.v, aligned.v))
    )
    C = products * left[:, None] * right
    grams = aligned.u @ aligned.u.T, aligned.v @ aligned.v.T
    rows = {name: [(nothing(0), nothing(0))] for name in SPATIAL}
    for o in range(2, T):
        moved = float(path.sigma[o - 1]) > 0
        origin = _origin(o, path.sigma, grams, inc, C) if moved else None
        for name, method in SPATIAL.items():
            still = nothing(T - o), nothing(T - o)
            rows[name].append(still if origin is None else method.moves(origin))
    return {
        name: (torch.cat([a for a, _ in own]), torch.cat([e for _, e in own]).clamp_min(0))
        for name, own in rows.items()
    }


def _origin(
    o: int, sigma: Tensor, grams: tuple[Tensor, Tensor], inc: Increments, C: Tensor
) -> _Origin:
    """Checkpoints 1 … o are known, and o + 1 … T are the targets.

    sigma: σ1 of all T. grams: of the aligned u and v, (T, T) each. C: (T, T, T), aligned, too.
    """
    here, t, (by_left, by_right) = o - 1, inc.elapsed, grams
    guess = _predict(sigma[:o], by_left[:o, :o], by_right[:o, :o], t[:o], t[o:])
    weighted, last = guess.sigma[:, None] * guess.left, C[:, here, here]
    seen = torch.einsum("ki,ij,kj->k", weighted, C[here, :o, :o], guess.right)
    later = torch.einsum("ki,kij,kj->k", weighted, C[o:, :o, :o], guess.right)
    size = inc.G[here, here].clamp_min(0)
    return _Origin(
        size=size,
        sigma=sigma[here],
        last=last[here],
        toward=inc.G[here, o:] - size,
        along=last[o:] - last[here],
        guess=guess.sigma,
        seen=seen,
        ahead=later - seen,
        overlap=(weighted @ by_left[:o, here]) * (guess.right @ by_right[:o, here]),
    )


def outer_moves(
    inc: Increments, guesses: Mapping[int, Pair], products: Mapping[int, Tensor], horizon: int
) -> tuple[Tensor, Tensor]:
    """(ahead, energy), (P,) each, of predictions W_o + c·σ̂·û·v̂ᵀ such as those of NExt.

    guesses: origin o → the step predicted for `horizon` checkpoints ahead; c is the distance in
    steps over that of `horizon` checkpoints. products: origin → ûᵀΔ_τv̂ of every τ, (T,).
    Origins without a guess hold.
    """
    T, t = len(inc), inc.elapsed
    pairs = pairs_of(T)
    ahead, energy = (torch.zeros(len(pairs), dtype=torch.float64) for _ in range(2))
    unit = float(t[-1]) / T * horizon
    for place, (o, tau) in enumerate(pairs):
        if o in guesses:
            length = float(t[tau - 1] - t[o - 1]) / unit * guesses[o].sigma
            ahead[place] = length * (products[o][tau - 1] - products[o][o - 1])
            energy[place] = length * length
    return ahead, energy
