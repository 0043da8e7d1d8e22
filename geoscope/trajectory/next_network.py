"""NExt's network (2604.11446): a bottleneck for far, one for near, and one over both.

Lin(256→d)·Lin(d→256)·ReLU·Lin(256→d)·Lin(d→256), rightmost first, for each; on their results
Lin(256→d)·Lin(2d→256)·ReLU·Lin(256→2d)·Lin(2d→256).

Gradients are written out: they go straight into one buffer, which one call of the optimiser takes.
Of few rows and much weight, autograd's copies and small calls are a third of a step.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

__all__ = ["Predictor"]

# Of what a part of a network gives: slope of the loss by that, and whether the slope by the input
# is asked for → that slope. Slopes by the parameters are added to `keep` times their `grad`.
_Back = Callable[[Tensor, bool], Tensor | None]


class Predictor(nn.Module):
    """out(far, near) of length d, ≈ 15·width·d parameters."""

    def __init__(self, length: int, width: int, generator: torch.Generator) -> None:
        super().__init__()

        def bottleneck(a: int, b: int, c: int) -> _Bottleneck:
            return _Bottleneck(
                _Narrow(a, width, b, generator), nn.ReLU(), _Narrow(b, width, c, generator)
            )

        self.far = bottleneck(length, length, length)
        self.near = bottleneck(length, length, length)
        self.out = bottleneck(2 * length, 2 * length, length)

    def forward(self, far: Tensor, near: Tensor) -> Tensor:
        return self.out(torch.cat([self.far(far), self.near(near)], -1))

    def joined_parameters(self) -> nn.Parameter:
        """One vector of all parameters, and one of their gradients, that they become views of."""
        own = list(self.parameters())
        joined = nn.Parameter(torch.cat([one.data.flatten() for one in own]))
        joined.grad = torch.zeros_like(joined)
        sizes = [one.numel() for one in own]
        parts = zip(own, joined.data.split(sizes), joined.grad.split(sizes), strict=True)
        for parameter, values, slopes in parts:
            parameter.data = values.view_as(parameter)
            parameter.grad = slopes.view_as(parameter)
        return joined

    @torch.no_grad()
    def differentiate(
        self, far: Tensor, near: Tensor, slope: Callable[[Tensor], Tensor], *, keep: float
    ) -> None:
        """Add ∂loss/∂parameter to `keep` times the `grad` of each. slope: out → ∂loss/∂out."""
        d = far.shape[1]
        from_far, back_far = self.far.traced(far, keep)
        from_near, back_near = self.near.traced(near, keep)
        out, back = self.out.traced(torch.cat([from_far, from_near], -1), keep)
        both = back(slope(out), True)
        assert both is not None
        back_far(both[:, :d], False)
        back_near(both[:, d:], False)


class _Bottleneck(nn.Sequential):
    """Two `_Narrow` with a ReLU between them."""

    def traced(self, x: Tensor, keep: float) -> tuple[Tensor, _Back]:
        first, relu, last = self
        assert isinstance(first, _Narrow) and isinstance(last, _Narrow)
        inner, back_first = first.traced(x, keep)
        inner = relu(inner)
        out, back_last = last.traced(inner, keep)

        def back(slope: Tensor, wanted: bool) -> Tensor | None:
            by_inner = back_last(slope, True)
            assert by_inner is not None
            return back_first(by_inner.mul_(inner > 0), wanted)

        return out, back


class _Narrow(nn.Module):
    """Lin(a → width), then Lin(width → b): one affine map, made whole where that is less work."""

    def __init__(self, a: int, width: int, b: int, generator: torch.Generator) -> None:
        super().__init__()
        self.first, self.second = _linear(a, width, generator), _linear(width, b, generator)

    def forward(self, x: Tensor) -> Tensor:
        if not self._whole(len(x)):
            return self.second(self.first(x))
        return nn.functional.linear(x, *self._map())

    def traced(self, x: Tensor, keep: float) -> tuple[Tensor, _Back]:
        """The output and how its slope goes back."""
        return self._through_map(x, keep) if self._whole(len(x)) else self._in_turn(x, keep)

    def _whole(self, rows: int) -> bool:
        a, width, b = self.first.in_features, self.first.out_features, self.second.out_features
        return (width + rows) * a * b < rows * width * (a + b)

    def _map(self) -> tuple[Tensor, Tensor]:
        A, B = self.first, self.second
        return B.weight @ A.weight, B.weight @ A.bias + B.bias

    def _in_turn(self, x: Tensor, keep: float) -> tuple[Tensor, _Back]:
        A, B = self.first, self.second
        inner = A(x)

        def back(slope: Tensor, wanted: bool) -> Tensor | None:
            _add(B.weight, slope.T, inner, keep)
            _add(B.bias, slope.T, None, keep)
            by_inner = slope @ B.weight
            _add(A.weight, by_inner.T, x, keep)
            _add(A.bias, by_inner.T, None, keep)
            return by_inner @ A.weight if wanted else None

        return B(inner), back

    def _through_map(self, x: Tensor, keep: float) -> tuple[Tensor, _Back]:
        A, B = self.first, self.second
        weight, bias = self._map()

        def back(slope: Tensor, wanted: bool) -> Tensor | None:
            by_weight, by_bias = slope.T @ x, slope.sum(0)
            _add(B.weight, by_weight, A.weight.T, keep)
            B.weight.grad.addr_(by_bias, A.bias)  # pyright: ignore[reportOptionalMemberAccess]
            _add(A.weight, B.weight.T, by_weight, keep)
            _add(A.bias, B.weight.T, by_bias[:, None], keep)
            _add(B.bias, by_bias[:, None], None, keep)
            return slope @ weight if wanted else None

        return nn.functional.linear(x, weight, bias), back


def _add(parameter: Tensor, left: Tensor, right: Tensor | None, keep: float) -> None:
    """grad ← keep·grad + left·right; of a bias the right one is a column, by default of ones."""
    grad = parameter.grad
    assert grad is not None
    if grad.dim() == 1:
        column = left.new_ones(left.shape[1]) if right is None else right[:, 0]
        grad.addmv_(left, column, beta=keep)
    else:
        assert right is not None
        grad.addmm_(left, right, beta=keep)


def _linear(a: int, b: int, generator: torch.Generator) -> nn.Linear:
    """torch's usual start, U(±1/√a) for weights and biases, from a seed of its own."""
    layer = nn.Linear(a, b, device="meta").to_empty(device="cpu")
    bound = 1 / math.sqrt(a)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.uniform_(-bound, bound, generator=generator)
    return layer
