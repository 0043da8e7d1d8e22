"""The linear extrapolators: Ŵ = W0 + Σ_i w_i·Δ_i over observed checkpoints.

See docs/methods.md#extrapolators. Times are counted from the base (t − t_0), where Δ = 0, so that
"through the origin" and "from the base" mean what they say when a series starts at its own first
checkpoint. All in fp64.

With X = [1, t] and x* = (1, t*)ᵀ, h = X(XᵀX)⁻¹x* is the value at t* of the least-squares line:
h_i = 1/T + (t_i − t̄)(t* − t̄)/Σ(t − t̄)². e_T takes the last checkpoint seen.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from geoscope.errors import OptionError
from geoscope.linalg.small import gram_eigen
from geoscope.trajectory.increments import Increments

__all__ = [
    "EXTRAPOLATORS",
    "Extrapolator",
    "between",
    "damp",
    "expo",
    "extrapolator",
    "relex",
    "relex_pinned",
    "undamped",
    "weights_of",
]

# G (b, T, T) of b matrices, t (T,) and targets (k,) from the base → weights (b or 1, k, T).
Rule = Callable[[Tensor, Tensor, Tensor], Tensor]

# Directions of G with less than this share of its largest eigenvalue are rounding.
_NOTHING = 1e-14


@dataclass(frozen=True)
class Extrapolator:
    """One way to weigh the observed Δ_i. Called with what was observed: weights (T,) at a step.

    rule: for stacks, see `Rule`. least: checkpoints after the base that it needs. standing:
    `paper`, `reimpl`, `ours` or `baseline`.
    """

    name: str
    rule: Rule
    least: int
    formula: str
    source: str
    standing: str

    def __call__(self, observed: Increments, target: float) -> Tensor:
        if len(observed) < self.least:
            raise OptionError(
                f"{self.name}: {len(observed)} checkpoints after the base, {self.least} are "
                "needed; give more, or take hold"
            )
        ahead = torch.tensor([target - observed.steps[0]], dtype=torch.float64)
        return self.rule(observed.G[None], observed.elapsed, ahead)[0, 0]


def damp(weights: Tensor, factor: float) -> Tensor:
    """e_T + λ(w − e_T) for weights (…, T)."""
    last = torch.zeros_like(weights)
    last[..., -1] = 1
    return last + factor * (weights - last)


def _hold(G: Tensor, t: Tensor, targets: Tensor) -> Tensor:
    weights = t.new_zeros(1, len(targets), len(t))
    weights[..., -1] = 1
    return weights


def _from_base(G: Tensor, t: Tensor, targets: Tensor) -> Tensor:
    return _hold(G, t, targets) * (targets / t[-1])[:, None]


def _linear(G: Tensor, t: Tensor, targets: Tensor) -> Tensor:
    centred = t - t.mean()
    slope = (targets - t.mean())[:, None] * centred / centred.square().sum()
    return (1 / len(t) + slope)[None]


def _linear_origin(G: Tensor, t: Tensor, targets: Tensor) -> Tensor:
    return (targets[:, None] * t / t.square().sum())[None]


def between(first: int, second: int) -> Extrapolator:
    """The line through two checkpoints, (1 − b)·e_a + b·e_c with b = (t* − t_a)/(t_c − t_a).

    first, second: places among the checkpoints after the base, 0 the first, −1 the last seen.
    (−2, −1), the last two, amplifies the noise of the last step.
    """

    def rule(G: Tensor, t: Tensor, targets: Tensor) -> Tensor:
        count = len(t)
        a, c = (place + count if place < 0 else place for place in (first, second))
        if not (0 <= a < count and 0 <= c < count and a != c):
            raise OptionError(
                f"two_point between checkpoints {first} and {second}: {count} are there; "
                "name two of them"
            )
        b = (targets - t[a]) / (t[c] - t[a])
        weights = t.new_zeros(len(targets), count)
        weights[:, a], weights[:, c] = 1 - b, b
        return weights[None]

    need = max(-place if place < 0 else place + 1 for place in (first, second))
    return Extrapolator(
        f"two_point({first},{second})", rule, max(2, need), "(1 − b)·e_a + b·e_c", "2601.04537",
        "paper",
    )  # fmt: skip


def expo(alpha: float) -> Extrapolator:
    """ExPO: (1 + α)·e_T, whatever the step asked for."""

    def rule(G: Tensor, t: Tensor, targets: Tensor) -> Tensor:
        return (1 + alpha) * _hold(G, t, targets)

    return Extrapolator(f"expo({alpha:g})", rule, 1, "(1 + α)·e_T", "2404.16792", "paper")


def _projected(G: Tensor, rank: int, weights: Tensor) -> Tensor:
    """U_k·U_kᵀ·w for weights (b or 1, k, T), U_k the top eigenvectors of the uncentred G.

    Eigenvectors without energy stand for Δ = 0 and are left out.
    """
    leading = []
    for one in G:
        values, vectors = gram_eigen(one)
        leading.append(vectors[:, :rank] * (values[:rank] > _NOTHING * values[0]))
    U = torch.stack(leading)
    return (weights @ U) @ U.mT


def relex(rank: int = 1) -> Extrapolator:
    """RELEX: each of the `rank` leading temporal coefficients by its own line, U_kU_kᵀh.

    The same as c = Σ^½·Uᵀ fitted on t and W0 + ĉ(t*)·Vᵀ. The published code fits on the row
    number; here it is the real step.
    """

    def rule(G: Tensor, t: Tensor, targets: Tensor) -> Tensor:
        return _projected(G, rank, _linear(G, t, targets))

    name = "relex" if rank == 1 else f"relex({rank})"
    return Extrapolator(name, rule, 2, "U_kU_kᵀh", "2605.21468", "paper")


def relex_pinned(rank: int = 1) -> Extrapolator:
    """e_T + U_kU_kᵀ(h − e_T): RELEX that keeps what of the last checkpoint lies outside U_k."""

    def rule(G: Tensor, t: Tensor, targets: Tensor) -> Tensor:
        last = _hold(G, t, targets)
        return last + _projected(G, rank, _linear(G, t, targets) - last)

    name = "relex_pinned" if rank == 1 else f"relex_pinned({rank})"
    return Extrapolator(name, rule, 2, "e_T + U_kU_kᵀ(h − e_T)", "2605.21468", "reimpl")


EXTRAPOLATORS: Mapping[str, Extrapolator] = {
    one.name: one
    for one in (
        Extrapolator("hold", _hold, 1, "e_T", "last checkpoint seen", "baseline"),
        Extrapolator("two_point", _from_base, 1, "(t*/t_T)·e_T", "2601.04537", "paper"),
        Extrapolator("linear", _linear, 2, "h", "least squares with intercept", "ours"),
        Extrapolator("linear_origin", _linear_origin, 1, "t*·t_i/Σt²", "least squares", "ours"),
        relex(),
        relex_pinned(),
    )
}

_NUMBER = r"-?\d+(?:\.\d+)?"
_CALL = re.compile(rf"(\w+)\(({_NUMBER}(?:,{_NUMBER})*)\)")
_DAMPED = re.compile(r"damped\((.+)\)")


def undamped(method: str) -> str | None:
    """`linear` for `damped(linear)`; None for a method that is not damped."""
    match = _DAMPED.fullmatch(method)
    return match.group(1) if match else None


def extrapolator(name: str) -> Extrapolator:
    """By its name: one of EXTRAPOLATORS, `relex(2)`, `relex_pinned(2)`, `two_point(-2,-1)`,
    `expo(0.5)`. Raises OptionError.
    """
    if name in EXTRAPOLATORS:
        return EXTRAPOLATORS[name]
    match = _CALL.fullmatch(name.replace(" ", ""))
    if match is not None:
        numbers = [float(part) for part in match.group(2).split(",")]
        whole = [int(number) for number in numbers if number.is_integer()]
        kind = match.group(1), len(numbers), len(whole)
        if kind == ("two_point", 2, 2):
            return between(*whole)
        if kind in (("relex", 1, 1), ("relex_pinned", 1, 1)) and whole[0] >= 1:
            return (relex if match.group(1) == "relex" else relex_pinned)(whole[0])
        if kind[:2] == ("expo", 1):
            return expo(numbers[0])
    raise OptionError(
        f"{name!r} is no linear extrapolator; take one of {', '.join(EXTRAPOLATORS)}, "
        "relex(RANK), relex_pinned(RANK), two_point(A,B), expo(ALPHA)"
    )


def weights_of(
    method: str, observed: Increments, target: float, *, factors: Mapping[str, float] | None = None
) -> Tensor:
    """Weights (T,) of a method by name, `damped(…)` too, for a real target step.

    factors: method → λ*, as `Backtest.factors` gives them; needed for the damped ones.
    """
    inner = undamped(method)
    if inner is None:
        return extrapolator(method)(observed, target)
    if factors is None or inner not in factors:
        raise OptionError(f"{method}: no damping factor of {inner} is known; backtest it first")
    return damp(extrapolator(inner)(observed, target), factors[inner])
