"""The linear extrapolators: Ŵ = W0 + Σ_i w_i·Δ_i over observed checkpoints.

See docs/methods.md#extrapolators. Times are counted from the base (t − t_0), where Δ = 0, so that
"through the origin" and "from the base" mean what they say when a series starts at its own first
checkpoint. All in fp64.

With X = [1, t] and x* = (1, t*)ᵀ, h = X(XᵀX)⁻¹x* is the value at t* of the least-squares line:
h_i = 1/T + (t_i − t̄)(t* − t̄)/Σ(t − t̄)². e_T takes the last checkpoint seen.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from geoscope.errors import OptionError
from geoscope.linalg.small import gram_eigen
from geoscope.trajectory.increments import Increments
from geoscope.trajectory.prediction import MethodInput, Prediction

__all__ = ["EXTRAPOLATORS", "Weighted"]

# G (b, T, T) of b matrices, t (T,) and targets (k,) from the base → weights (b or 1, k, T).
Rule = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Weighted:
    """A method that weighs the observed Δ_i.

    rule: for stacks, see `Rule`.
    least: checkpoints after the base that it needs.
    standing: `paper`, `reimpl`, `ours` or `baseline`.
    """

    name: str
    rule: Rule
    least: int
    formula: str
    source: str
    standing: str

    def weights(self, observed: Increments, target: float) -> Tensor:
        """(T,), for a real step. Raises OptionError."""
        if len(observed) < self.least:
            raise OptionError(
                f"{self.name}: {len(observed)} checkpoints after the base, {self.least} are "
                "needed; give more, or take hold"
            )
        ahead = torch.tensor([target - observed.steps[0]], dtype=torch.float64)
        return self.rule(observed.G[None], observed.elapsed, ahead)[0, 0]

    def predict(self, seen: MethodInput, target: float) -> Prediction:
        return Prediction(self.weights(seen.increments, target))


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


def _leading(G: Tensor, weights: Tensor) -> Tensor:
    """U_1·U_1ᵀ·w for weights (b or 1, k, T), U_1 the top eigenvector of the uncentred G.

    A G without energy stands for Δ = 0 and gives 0.
    """
    leading = []
    for gram in G:
        values, vectors = gram_eigen(gram)
        leading.append(vectors[:, :1] * (values[:1] > 0))
    U = torch.stack(leading)
    return (weights @ U) @ U.mT


def _relex(G: Tensor, t: Tensor, targets: Tensor) -> Tensor:
    """RELEX: the leading temporal coefficient by its own line.

    The same as c = Σ^½·Uᵀ fitted on t and W0 + ĉ(t*)·Vᵀ. The published code fits on the row
    number; here it is the real step.
    """
    return _leading(G, _linear(G, t, targets))


def _relex_pinned(G: Tensor, t: Tensor, targets: Tensor) -> Tensor:
    """RELEX that keeps what of the last checkpoint lies outside U_1."""
    last = _hold(G, t, targets)
    return last + _leading(G, _linear(G, t, targets) - last)


EXTRAPOLATORS: Mapping[str, Weighted] = {
    method.name: method
    for method in (
        Weighted("hold", _hold, 1, "e_T", "last checkpoint seen", "baseline"),
        Weighted("two_point", _from_base, 1, "(t*/t_T)·e_T", "2601.04537", "paper"),
        Weighted("linear", _linear, 2, "h", "least squares with intercept", "ours"),
        Weighted("linear_origin", _linear_origin, 1, "t*·t_i/Σt²", "least squares", "ours"),
        Weighted("relex", _relex, 2, "U_1U_1ᵀh", "2605.21468", "paper"),
        Weighted(
            "relex_pinned", _relex_pinned, 2, "e_T + U_1U_1ᵀ(h − e_T)", "2605.21468", "reimpl"
        ),
    )
}
