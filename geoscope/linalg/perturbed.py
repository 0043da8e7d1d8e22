"""What does an isotropic update do to the spectrum and to the leading subspaces of this base?

First-order perturbation fails where singular values lie closer together than the noise, at the cut
or in the bulk. W0 + ω·G is then sampled, cheaply: it has the law of diag(σ) + ω·G, in which values
that lie near each other interact by small dense matrices, and those far apart by perturbation.
Draws depend on the seed and the shape alone.
"""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from geoscope.linalg.iid import iid_spectra
from geoscope.profile import stage

__all__ = ["angle_bound", "mean_angles", "tuned_spectra"]

# Directions behind the cut that are in the dense block; those beyond couple to first order, this
# many one by one, the others as a Wishart matrix of their mean variance.
_BEHIND, _APART = 32, 128
# Draws: the mean of k angles is the steadier the larger k is.
_DIRECTIONS = 128
_FEWEST_DRAWS = 4
# Most of a tangent: a direction that is free to turn.
_FREE = 1e6
# Values of one dense block of a spectrum, of which the middle half is kept; more, up to a most,
# where more values lie within ω of each other: four times as many, twice as many of a crowd.
_BLOCK, _CROWDED, _MOST = 16, 32, 512
# Least σ_k/σ_1 whose vectors the Gram matrix tells.
_GRAM = 1e-5
# Rows of a part of the matrix of all pairs of values.
_ROWS = 64
# Values sampled in all, and most steps from ω = 0 to ω.
_VALUES = 4096
_MOST_STEPS = 8


@stage("nulls")
def mean_angles(
    S: Tensor, spread: float, *, k: int, shape: tuple[int, int], seed: int
) -> tuple[Tensor, Tensor]:
    """Mean principal angle between the leading k-subspaces of W0 and W0 + ω·G, left and right.

    S: (q,) descending, k ≤ q; spread: ω√(mn) → two times (draws,), radians. Directions up to k + 24
    turn in a dense block diag(σ) + ω·G. A direction j beyond it enters vector i with a tangent of
    variance ω²(σ̂_i² + σ_j²)/(σ̂_i² − σ_j²)², σ_j = 0 outside the span.
    """
    if spread == 0:
        return torch.zeros(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    noise = _Noise((seed, *shape, k), max(_FEWEST_DRAWS, math.ceil(_DIRECTIONS / k)))
    omega, inner = spread / math.sqrt(shape[0] * shape[1]), min(len(S), k + _BEHIND)
    U, values, V = _leading(S[:inner].diag() + omega * noise.normal(inner, inner), k)
    energy = values[:, None].square()

    def leaked(side: int) -> Tensor:
        others = torch.cat([S[inner:].square(), S.new_zeros(side - len(S))])[:, None]
        sizes = omega * (energy + others).sqrt() / (energy - others)
        sizes = sizes.nan_to_num(nan=_FREE).clamp(0, _FREE)
        apart, rest = sizes[:, :_APART], sizes[:, _APART:]
        tangents = [apart * noise.normal(*apart.shape[1:])]
        if rest.shape[1] > 0:
            mean = rest.square().mean(1, keepdim=True).sqrt()
            tangents.append(mean * noise.triangle(rest.shape[1], k))
        return sum(part.mT @ part for part in tangents)  # pyright: ignore[reportReturnType]

    left, right = _angles(U, leaked(shape[0])), _angles(V, leaked(shape[1]))
    return left.mean(-1), right.mean(-1)


def _leading(matrices: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """U (..., q, k), values (..., k) and V (..., q, k); half the time of an SVD."""
    vectors = torch.linalg.eigh(matrices.mT @ matrices).eigenvectors
    V = vectors[..., -k:].flip(-1)
    images = matrices @ V
    values = images.norm(dim=-2)
    if bool((values[..., -1] > _GRAM * values[..., 0]).all()):
        return images / values[..., None, :], values, V
    U, values, Vh = torch.linalg.svd(matrices)
    return U[..., :k], values[..., :k], Vh.mT[..., :k]


class _Noise:
    """Gaussian stacks of `draws` matrices, from a seed of the given numbers."""

    def __init__(self, seed: tuple[int, ...], draws: int) -> None:
        self._generator, self._draws = np.random.default_rng(seed), draws

    def normal(self, *size: int) -> Tensor:
        return torch.from_numpy(self._generator.standard_normal((self._draws, *size)))

    def triangle(self, rows: int, columns: int) -> Tensor:
        """A factor with the Gram matrix, in law, of a Gaussian matrix of that size (Bartlett)."""
        if rows < columns:
            return self.normal(rows, columns)
        degrees = np.broadcast_to(rows - np.arange(columns), (self._draws, columns))
        diagonal = torch.from_numpy(np.sqrt(self._generator.chisquare(degrees)))
        return self.normal(columns, columns).triu(1) + diagonal.diag_embed()


def _angles(vectors: Tensor, leaked: Tensor) -> Tensor:
    """Angles to the first k axes of vectors (..., d, k) that hold `leaked` (..., k, k) outside.

    sin² are the eigenvalues of L⁻¹(B + leaked)L⁻ᵀ, L·Lᵀ = 1 + leaked, B the part below row k.
    """
    k = vectors.shape[-1]
    below = vectors[:, k:]
    L = torch.linalg.cholesky(torch.eye(k, dtype=torch.float64) + leaked)
    half = torch.linalg.solve_triangular(L, below.mT @ below + leaked, upper=False)
    sines = torch.linalg.solve_triangular(L, half.mT, upper=False)
    return torch.linalg.eigvalsh(sines).clamp(0, 1).sqrt().asin()


def angle_bound(S: Tensor, spread: float, *, k: int, shape: tuple[int, int]) -> float:
    """RMS tangent to first order without any cap: at least what noise of this size turns.

    √(Σ_{i≤k<j}ω²(σ_i²+σ_j²)/(σ_i²−σ_j²)²/k) with M dimensions; infinite at a degenerate cut.
    """
    energy, M = S.square(), max(shape)
    kept, dropped = energy[:k, None], torch.cat([energy[k:], energy.new_zeros(M - len(S))])
    pairs = (kept + dropped) / (kept - dropped).square()
    total = float(pairs.nan_to_num(nan=math.inf).sum())
    return spread * math.sqrt(total / (k * shape[0] * shape[1]))


@stage("nulls")
def tuned_spectra(S: Tensor, spread: float, *, shape: tuple[int, int], seed: int) -> Tensor:
    """Singular values of W0 + ω·G, (draws, q), descending; S: (q,), spread: ω√(mn).

    λ = σ² moves by dλ_i = 2√(λ_i dt)·g_i + (M + Σ_{j≠i}(λ_i + λ_j)/(λ_i − λ_j))dt from t = 0 to ω²
    (Dyson's motion of a Wishart matrix). In each step neighbours move as the values of a dense
    block; those farther away enter the drift. [Bru 1991, Wishart processes]
    """
    q, M = min(shape), max(shape)
    omega, draws = spread / math.sqrt(q * M), max(2, math.ceil(_VALUES / q))
    if spread == 0:
        return S.expand(draws, q)
    noise = _Noise((seed, q, M), draws)
    kept = int((S > omega / 2).sum())
    if q - kept <= _BLOCK:  # else they are one: a Gaussian matrix outside of the others
        kept = q
    # The farther the middle value moves, the more steps; a single block is exact in one.
    far = omega * math.sqrt(M) / max(float(S[: max(kept, 1)].median()), omega)
    steps = min(_MOST_STEPS, 1 + math.floor(20 * far)) if kept > _BLOCK else min(kept, 1)
    found = S[:kept].expand(draws, -1)
    crowd = _crowd(S[:kept], omega)
    width = min(kept, max(_BLOCK, min(_CROWDED, 4 * crowd), min(_MOST, 2 * crowd)))
    for _ in range(steps):
        found = _moved(found, omega**2 / steps, M + q - kept, width, noise)
    if kept < q:
        rest = omega * iid_spectra(q - kept, M - kept, seed)[:draws]
        found = torch.cat([found, rest], -1).sort(-1, descending=True).values
    return found


def _crowd(S: Tensor, omega: float) -> int:
    """Most values within ω of one of them."""
    ascending = S.flip(0).contiguous()
    low, high = (torch.searchsorted(ascending, ascending + shift) for shift in (-omega, omega))
    return int((high - low).max()) if len(S) else 0


def _moved(S: Tensor, time: float, M: int, width: int, noise: _Noise) -> Tensor:
    """One step of `tuned_spectra`: blocks of neighbours, of each the values nearest its middle."""
    q = S.shape[-1]
    starts = [*range(0, q - width, max(width // 2, 1)), q - width]
    blocks = S[:, torch.tensor(starts)[:, None] + torch.arange(width)].diag_embed()
    blocks = blocks + math.sqrt(time) * noise.normal(*blocks.shape[1:])
    values = torch.linalg.eigvalsh(blocks.mT @ blocks).flip(-1)
    energy, before = torch.empty_like(S), S.square().mean(0)
    ends = [(first + second + width) // 2 for first, second in pairwise(starts)]
    own = torch.empty(q, dtype=torch.long)
    for i, (start, (first, last)) in enumerate(zip(starts, pairwise([0, *ends, q]), strict=True)):
        own[first:last] = start
        energy[:, first:last] = values[:, i, first - start : last - start]
    energy += time * (M - width + _push(before, own, width))
    return energy.clamp_min(0).sort(-1, descending=True).values.sqrt()


def _push(before: Tensor, starts: Tensor, width: int) -> Tensor:
    """Σ(λ_i + λ_j)/(λ_i − λ_j) over the j outside the block of i, that from starts_i on; (q,).

    Equal values do not push each other. (λ_i + λ_j)/(λ_i − λ_j) = 2λ_i/(λ_i − λ_j) − 1.
    """
    q, parts = len(before), []
    repeated = bool((before.diff() == 0).any())
    for mine, start in zip(before.split(_ROWS), starts.split(_ROWS), strict=True):
        apart = mine[:, None] - before
        band = slice(int(start[0]), int(start[-1]) + width)
        places = torch.arange(q)[band]
        within = (places >= start[:, None]) & (places < start[:, None] + width)
        apart[:, band].masked_fill_(within, math.inf)
        pushing = q - width
        if repeated:
            apart.masked_fill_(apart == 0, math.inf)
            pushing = torch.isfinite(apart).sum(-1)
        parts.append(2 * mine * apart.reciprocal_().sum(-1) - pushing)
    return torch.cat(parts)
