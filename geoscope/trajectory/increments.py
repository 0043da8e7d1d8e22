"""What is kept of a series of checkpoints: the inner products of its increments.

H_ij = ⟨δ_i, δ_j⟩ with δ_i = W_i − W_{i−1} is T × T, whatever the size of the weights. The Gram
matrix of the updates Δ_i = W_i − W_0 is G = L·H·Lᵀ with L the lower-triangular ones. H is the one
to keep: its entries do not share large common parts, so that nothing cancels
(docs/methods.md#increments).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from geoscope.errors import NonFiniteError, NumericsError
from geoscope.linalg import blas
from geoscope.linalg.product import Product
from geoscope.linalg.storage import effective_format, rounding_energy
from geoscope.profile import stage

__all__ = [
    "Increments",
    "increment_gram",
    "increments_of_inner",
    "increments_of_products",
    "increments_of_weights",
]

# Entries of a block of all checkpoints: 2 MB in fp64, which a cache holds; on other devices few
# steps.
_BLOCK, _BLOCK_ELSEWHERE = 1 << 18, 1 << 24


@dataclass(frozen=True)
class Increments:
    """What one pass over a series keeps of one tensor, or of a sum of tensors.

    steps: t_0 (base) < t_1 < … < t_T. H: (T, T) fp64, ⟨δ_i, δ_j⟩. rounding: N_0 … N_T, Σulp²/12 of
    each checkpoint as stored. base_energy: ‖W_0‖². along: ⟨W_0, δ_i⟩, (T,), where the base was read
    beside the checkpoints. grids: of one tensor the grid that each checkpoint lies on, "" for none;
    N holds its rounding.
    """

    steps: tuple[float, ...]
    H: Tensor
    rounding: tuple[float, ...]
    base_energy: float
    along: Tensor | None = None
    grids: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        T = len(self.steps) - 1
        if T < 1 or tuple(self.H.shape) != (T, T) or len(self.rounding) != T + 1:
            shape = "×".join(map(str, self.H.shape))
            raise NumericsError(
                f"got {len(self.steps)} steps, a {shape} Gram matrix and {len(self.rounding)} "
                "rounding energies; needed are T + 1, T × T and T + 1, with T ≥ 1"
            )
        for before, after in pairwise(self.steps):
            if not before < after:
                raise NumericsError(
                    f"step {after:g} follows step {before:g}; steps must increase, the base first"
                )

    def __len__(self) -> int:
        """T, the number of checkpoints after the base."""
        return len(self.steps) - 1

    def __add__(self, other: Increments) -> Increments:
        """Of both tensors together: module, layer and model are sums. Same steps."""
        if self.steps != other.steps:
            raise NumericsError(
                f"series of {len(self)} and {len(other)} checkpoints have different steps; "
                "only series of the same steps add up"
            )
        return Increments(
            self.steps,
            self.H + other.H,
            tuple(one + two for one, two in zip(self.rounding, other.rounding, strict=True)),
            self.base_energy + other.base_energy,
            None if self.along is None or other.along is None else self.along + other.along,
        )

    @property
    def G(self) -> Tensor:
        """⟨Δ_i, Δ_j⟩ = L·H·Lᵀ, (T, T)."""
        return self.H.cumsum(0).cumsum(1)

    @property
    def base_cosines(self) -> tuple[float | None, ...]:
        """⟨W_0, W_i⟩/(‖W_0‖‖W_i‖), i = 1 … T; None where a side is zero, or not known."""
        if self.along is None:
            return (None,) * len(self)
        inner = self.base_energy + self.along.cumsum(0)
        energy = (inner + self.along.cumsum(0) + self.G.diagonal()).clamp_min(0)
        cosines = inner / (self.base_energy * energy).sqrt()
        return tuple(one if math.isfinite(one) else None for one in cosines.clamp(-1, 1).tolist())

    @property
    def elapsed(self) -> Tensor:
        """t_i − t_0, i = 1 … T, (T,): steps since the base, where Δ is zero."""
        return torch.tensor([t - self.steps[0] for t in self.steps[1:]], dtype=torch.float64)

    @property
    def gaps(self) -> Tensor:
        """Δt_i = t_i − t_{i−1}, (T,)."""
        return torch.tensor(self.steps, dtype=torch.float64).diff()

    def observed(self, count: int) -> Increments:
        """The first `count` checkpoints after the base."""
        if not 1 <= count <= len(self):
            raise NumericsError(f"a series of {len(self)} checkpoints has no first {count}")
        return Increments(
            self.steps[: count + 1],
            self.H[:count, :count],
            self.rounding[: count + 1],
            self.base_energy,
            None if self.along is None else self.along[:count],
        )


def increment_gram(G: Tensor) -> Tensor:
    """H of a Gram matrix of updates: L⁻¹·G·L⁻ᵀ, differences along both sides. (T, T)."""
    padded = torch.nn.functional.pad(G.to(torch.float64), (1, 0, 1, 0))
    return padded.diff(dim=0).diff(dim=1)


@stage("increments")
def increments_of_weights(
    steps: Sequence[float], weights: Sequence[Tensor], *, rounding: Sequence[float] | None = None
) -> Increments:
    """Of one tensor at every step, the base first: upcast, then subtract, in blocks of entries.

    Each stored entry is upcast once for all products. weights: T + 1 tensors of one shape and of
    any float dtype. rounding: N_0 … N_T where they are known already; else they are measured.
    Raises NumericsError for entries that are not finite.
    """
    if len({tuple(W.shape) for W in weights}) != 1 or len(weights) != len(steps):
        shapes = sorted({"×".join(map(str, W.shape)) for W in weights})
        raise NumericsError(
            f"{len(weights)} weights of shape {', '.join(shapes)} at {len(steps)} steps; "
            "one weight per step is needed, all of one shape"
        )
    T = len(weights) - 1
    noise = [0.0] * (T + 1)
    flat = [W.reshape(-1) for W in weights]
    device = flat[0].device
    formats = [effective_format(W) for W in weights] if rounding is None else []
    block_entries = _BLOCK if device.type == "cpu" else _BLOCK_ELSEWHERE
    width = min(flat[0].numel(), max(1, block_entries // (T + 1)))
    room = torch.empty(T + 1, width, dtype=torch.float64, device=device)
    inner = torch.zeros(T + 1, T + 1, dtype=torch.float64)  # of W_0, δ_1 … δ_T
    for start in range(0, flat[0].numel(), width):
        block = room[:, : min(width, flat[0].numel() - start)]
        for row, W in zip(block, flat, strict=True):
            row.copy_(W[start : start + width])
        for i, fmt in enumerate(formats):
            noise[i] += float(rounding_energy(block[i].clone(), fmt))
        for before, after in reversed([*pairwise(block)]):
            after.sub_(before)
        if device.type == "cpu":
            blas.gemm(block, block, inner, add=True, Bt=True)
        else:
            inner += (block @ block.T).cpu()
    return increments_of_inner(
        steps,
        inner,
        noise if rounding is None else rounding,
        is_finite=lambda i: bool(torch.isfinite(flat[i]).all()),
    )


def increments_of_inner(
    steps: Sequence[float],
    inner: Tensor,
    rounding: Sequence[float],
    *,
    is_finite: Callable[[int], bool],
) -> Increments:
    """Of the inner products of W_0, δ_1 … δ_T, (T + 1, T + 1).

    is_finite: whether the entries of a checkpoint, by number, all are. Raises NumericsError.
    """
    if not bool(torch.isfinite(inner).all()):
        broken = int((~torch.isfinite(inner.diagonal())).nonzero()[0])
        if is_finite(broken):
            raise NumericsError(f"step {steps[broken]:g}: squares of the entries overflow fp64")
        raise NonFiniteError(f"step {steps[broken]:g} holds NaN or infinity")
    H = inner[1:, 1:]
    return Increments(
        tuple(map(float, steps)),
        (H + H.T) / 2,
        tuple(rounding),
        float(inner[0, 0]),
        inner[0, 1:].clone(),
    )


@stage("increments")
def increments_of_products(
    steps: Sequence[float],
    updates: Sequence[Product],
    *,
    rounding: Sequence[float],
    base_energy: float,
) -> Increments:
    """Of one tensor under adapters, from their factors; nothing is made dense.

    updates: Δ_1 … Δ_T, each a stack of one; an adapter that does not start at zero brings its
    initial factors with it (docs/methods.md#adapters-as-inputs). steps and rounding have T + 1
    entries, the base first. δ_i = Δ_i − Δ_{i−1} is a product of rank 2r.
    """
    taken = [updates[0]]
    taken += [after - before for before, after in pairwise(updates)]
    H = torch.zeros(len(taken), len(taken), dtype=torch.float64)
    for i, one in enumerate(taken):
        for j in range(i + 1):
            H[i, j] = H[j, i] = float(one.inner(taken[j]))
    return Increments(tuple(map(float, steps)), H, tuple(rounding), base_energy)
