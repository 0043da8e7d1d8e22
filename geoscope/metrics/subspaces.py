"""Which directions does a matrix have, and which are the choice of its storage or of the solver?

Beyond the rank, and inside a repeated singular value, singular vectors are any orthonormal basis.
What is measured along them says nothing, so it has to be left out or taken of the whole subspace.
"""

from __future__ import annotations

import torch
from torch import Tensor

from geoscope.linalg import Factors
from geoscope.metrics.collapse import INTRUDER_COSINE

__all__ = [
    "LEAST_GAP",
    "Overlaps",
    "directions_edge",
    "has_subspace",
    "matches",
    "settled",
    "solver_edge",
    "vectors_of",
]

# Least (σ_k − σ_{k+1})/σ_k of a cut that defines a subspace, to the accuracy of every solver.
LEAST_GAP = 1e-6
# Times the edge of iid noise that rounding reaches where rows and columns differ in size.
_UNEVEN = 3.0

Overlaps = tuple[Tensor, Tensor]


def vectors_of(factors: Factors) -> tuple[Tensor, Tensor]:
    """U and Vh of factors that were asked for with vectors."""
    if factors.U is None or factors.Vh is None:
        raise ValueError("these factors hold no vectors")
    return factors.U, factors.Vh


def directions_edge(factors: Factors, noise: Tensor, shape: tuple[int, int]) -> Tensor:
    """(b,): σ up to here may be rounding of what is stored, or the solver's; no direction then.

    noise: ‖rounding‖_F, (b,). As iid noise it reaches noise·(1/√m + 1/√n); in rows and columns of
    different size up to three times that.
    """
    m, n = shape
    stored = _UNEVEN * noise * (m**-0.5 + n**-0.5)
    return torch.maximum(stored, solver_edge(factors, shape))


def solver_edge(factors: Factors, shape: tuple[int, int]) -> Tensor:
    """(b,): error of each σ as it was computed, at least that of an exact SVD."""
    bounds = [float(method.get("bound") or 0.0) for method in factors.methods]
    errors = factors.S.new_tensor(bounds).clamp_min(max(shape) * torch.finfo(torch.float64).eps)
    return errors * factors.S[..., 0]


def has_subspace(factors: Factors, edge: Tensor, *, k: int, shape: tuple[int, int]) -> Tensor:
    """(b,): whether the leading k-subspace is the matrix's: σ_k above `edge`, a gap behind it.

    The whole of a square matrix's space needs no direction of its own, only a matrix.
    """
    if k == max(shape):
        return factors.S[..., 0] > 0
    last = factors.S[..., k - 1]
    behind = factors.S[..., k] if k < min(shape) else torch.zeros_like(last)
    return (last > edge) & (last - behind > LEAST_GAP * last)


def matches(
    left: Tensor, right: Tensor, base: Factors, *, edge: Tensor, noise: Tensor
) -> tuple[Overlaps, Overlaps]:
    """Left and right: cos² of each tuned vector with each base direction, (b, k, K), and the most
    that a direction not at hand can have, (b, k).

    left: (b, k, m), right: (b, k, n). Directions that rounding mixes are one: where σ lie closer
    than twice the rounding of an entry, noise/√(mn), their cos² are summed. Directions of σ ≤ edge
    are rounding themselves and match nothing.
    """
    U, Vh = vectors_of(base)
    S = base.S[..., : Vh.shape[-2]]
    apart = 2 * noise / (U.shape[-2] * Vh.shape[-1]) ** 0.5
    apart = torch.maximum(apart, LEAST_GAP * S[..., 0])
    group = torch.nn.functional.pad((-S.diff(dim=-1) > apart[:, None]).cumsum(-1), (1, 0))
    known = (S > edge[:, None])[:, None]

    def side(overlaps: Tensor) -> Overlaps:
        energies = overlaps.square()
        places = group[:, None].expand_as(energies)
        together = torch.zeros_like(energies).scatter_add_(-1, places, energies * known)
        # The last group may go on beyond the vectors at hand.
        last = together.gather(-1, places[..., -1:]).squeeze(-1)
        return together, 1 - energies.sum(-1) + last

    return side(left @ U), side(right @ Vh.mT)


def settled(found: Overlaps) -> bool:
    """Whether the vectors seen decide for each row if its largest |cos| reaches the threshold."""
    energies, unseen = found
    limit = INTRUDER_COSINE**2
    return bool(((energies.amax(-1) >= limit) | (unseen < limit)).all())
