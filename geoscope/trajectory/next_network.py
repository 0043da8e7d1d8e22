"""NExt's network (2604.11446): a bottleneck for far, one for near, and one over both.

Lin(256→d)·Lin(d→256)·ReLU·Lin(256→d)·Lin(d→256), rightmost first, for each; on their results
Lin(256→d)·Lin(2d→256)·ReLU·Lin(256→2d)·Lin(2d→256).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

__all__ = ["Predictor"]


class Predictor(nn.Module):
    """out(far, near) of length d, ≈ 15·width·d parameters."""

    def __init__(self, length: int, width: int, generator: torch.Generator) -> None:
        super().__init__()

        def bottleneck(a: int, b: int, c: int) -> nn.Sequential:
            first, last = _Narrow(a, width, b, generator), _Narrow(b, width, c, generator)
            return nn.Sequential(first, nn.ReLU(), last)

        self.far = bottleneck(length, length, length)
        self.near = bottleneck(length, length, length)
        self.out = bottleneck(2 * length, 2 * length, length)

    def forward(self, far: Tensor, near: Tensor) -> Tensor:
        return self.out(torch.cat([self.far(far), self.near(near)], -1))


class _Narrow(nn.Module):
    """Lin(a → width), then Lin(width → b): one affine map, made whole where that is less work."""

    def __init__(self, a: int, width: int, b: int, generator: torch.Generator) -> None:
        super().__init__()
        self.first, self.second = _linear(a, width, generator), _linear(width, b, generator)

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.first, self.second
        a, width, b = first.in_features, first.out_features, second.out_features
        if (width + len(x)) * a * b >= len(x) * width * (a + b):
            return second(first(x))
        bias = second.weight @ first.bias + second.bias
        return nn.functional.linear(x, second.weight @ first.weight, bias)


def _linear(a: int, b: int, generator: torch.Generator) -> nn.Linear:
    """torch's usual start, U(±1/√a) for weights and biases, from a seed of its own."""
    layer = nn.Linear(a, b, device="meta").to_empty(device="cpu")
    bound = 1 / math.sqrt(a)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.uniform_(-bound, bound, generator=generator)
    return layer
