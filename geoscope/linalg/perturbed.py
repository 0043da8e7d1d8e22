"""What does an isotropic update do to the spectrum and to the leading subspaces of this base?

First-order perturbation fails where singular values lie closer together than the noise, at the cut
or in the bulk. W0 + ω·G is then sampled, cheaply: it has the law of diag(σ) + ω·G, in which values
that lie near each other interact by small dense matrices, and those far apart by perturbation.
Draws depend on the seed and the shape alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from hashlib import sha256
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from geoscope.linalg.iid import iid_spectra
from geoscope.profile import stage

__all__ = ["angle_bound", "mean_angles", "tuned_spectra"]

# Directions behind the cut that may be in the dense block, the fewest that do; those beyond couple
# to first order, this many one by one, the others as a Wishart matrix of their mean variance.
_DENSE_MARGINS, _FIRST_ORDER_DIRECTIONS = (0, 8, 16, 32), 128
# Draws: the mean of k angles is the steadier the larger k is.
_DIRECTIONS = 128
_FEWEST_DRAWS = 4
# tan² of a direction up to which first order does: angles are then within 1 %, less than their
# standard error.
_LITTLE = 2e-3
# Most of a tangent: a direction that is free to turn.
_FREE = 1e6
# Values of one dense block of a spectrum, of which the middle half is kept; more, up to a most,
# where more values lie within ω of each other: four times as many, twice as many of a crowd.
_BLOCK, _CROWDED, _MOST = 16, 32, 512
# Least σ_k/σ_1 whose vectors the Gram matrix tells.
_GRAM = 1e-5
# Rows of a part of the matrix of all pairs of values.
_ROWS = 64
# Times ω from both neighbours a value moves by itself: by (ω/gap)² its variance is off then.
_APART = 10.0
# Blocks of one call: they stay near the cache.
_BLOCKS = 1 << 9
# Values sampled in all, and most steps from ω = 0 to ω.
_VALUES = 4096
_MOST_STEPS = 8
# Tangents of a side that are kept, in all draws: 16 MB at most for all that is kept.
_FEW_TANGENTS = 512
# Numbers of a stack in one step: they stay near the cache. Numbers of a draw that is kept.
_AT_ONCE = 1 << 19
_KEPT = 1 << 18


@stage("nulls")
def mean_angles(
    S: Tensor, spread: Tensor | float, *, k: int, shape: tuple[int, int], seed: int
) -> tuple[Tensor, Tensor]:
    """Mean principal angle between the leading k-subspaces of W0 and W0 + ω·G, left and right.

    S: (…, q) descending, k ≤ q; spread: ω√(mn), (…) → two times (…, draws), radians. A direction j
    enters vector i ≤ k with a tangent of variance ω²(σ̂_i² + σ_j²)/(σ̂_i² − σ_j²)², σ_j = 0 outside
    the span. Where these sum to .002 or more for some direction, first order does not do: those
    next to the cut, up to k + 32, turn in a dense block diag(σ) + ω·G.
    """
    spectra, sizes = S.reshape(-1, S.shape[-1]), torch.as_tensor(spread, dtype=S.dtype).reshape(-1)
    left, right = (S.new_empty(len(spectra), _draws_of(k)) for _ in range(2))
    margins = _margins(spectra, sizes, k=k, shape=shape)
    for margin in margins.unique().tolist():
        (which,) = (margins == margin).nonzero(as_tuple=True)
        inner = min(S.shape[-1], k + margin) if margin else 0
        noise = _AngleNoise.of(seed, shape, k, inner)
        apart = max(shape) * k + 4 * inner**2 + (_FIRST_ORDER_DIRECTIONS + k) * k
        for some in which.split(max(1, _AT_ONCE // (_draws_of(k) * apart))):
            if inner:
                found = _turned(spectra[some], sizes[some], noise, k=k, shape=shape)
            else:
                found = _little_turned(spectra[some], sizes[some], noise, k=k, shape=shape)
            left[some], right[some] = found
    return left.unflatten(0, S.shape[:-1] or (1,)), right.unflatten(0, S.shape[:-1] or (1,))


def _draws_of(k: int) -> int:
    return max(_FEWEST_DRAWS, math.ceil(_DIRECTIONS / k))


def _margins(S: Tensor, spread: Tensor, *, k: int, shape: tuple[int, int]) -> Tensor:
    """How many directions behind the cut have to be in the dense block, (b,); 0: there is none.

    tan² of no direction, kept or not, sums to more than _LITTLE over those that turn to first
    order. S: (b, q), spread: (b,).
    """
    (m, n), q = shape, S.shape[-1]
    omega = (spread / math.sqrt(m * n)).square()
    kept, dropped = S[:, :k, None].square(), S[:, None, k:].square()
    pairs = (kept + dropped) / (kept - dropped).square()
    outside = (max(m, n) - q) / kept[..., 0]
    margins = torch.full((len(S),), _DENSE_MARGINS[-1])
    for margin in reversed(_DENSE_MARGINS[:-1]):
        apart = pairs[..., margin:]
        sums = (apart.sum(-1) + outside).amax(-1)
        if apart.shape[-1]:
            sums = torch.maximum(sums, apart.sum(-2).amax(-1))
        margins[sums * omega <= _LITTLE] = margin  # NaN, of σ_k = σ_k+1 = 0, is not
    return margins


def _turned(
    S: Tensor, spread: Tensor, noise: _AngleNoise, *, k: int, shape: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """`mean_angles` of a stack (b, q), (b,), with a dense block; 0 where nothing is added."""
    omega = (spread / math.sqrt(shape[0] * shape[1]))[:, None, None, None]
    inner = noise.inner.shape[-1]
    U, values, V = _leading(S[:, None, :inner].diag_embed() + omega * noise.inner, k)

    def turned(vectors: Tensor, side: int, tangents: _Tangents) -> Tensor:
        if k == side:
            return S.new_zeros(len(S), len(noise.inner))  # the subspace is the whole space
        sizes = (omega * _unit_sizes(values, S, inner, side)).clamp(0, _FREE)
        apart, rest = _leaked(sizes.nan_to_num(nan=_FREE), tangents)
        leaked = _gram(apart) if rest is None else _gram(apart) + _gram(rest)
        return torch.where(spread[:, None] > 0, _angles(vectors, leaked).sum(-1) / k, 0.0)

    return turned(U, shape[0], noise.left), turned(V, shape[1], noise.right)


def _little_turned(
    S: Tensor, spread: Tensor, noise: _AngleNoise, *, k: int, shape: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """`mean_angles` of a stack (b, q), (b,), to first order: tangents grow with ω.

    Those of ω = 1 are kept: a base is asked for the null of an update and for that of rounding,
    and has several tuned models.
    """
    omega = (spread / math.sqrt(shape[0] * shape[1]))[:, None, None]
    kept: list[list[Tensor]] = [[] for _ in S]
    if _draws_of(k) * k <= _FEW_TANGENTS:
        digests = [sha256(row.numpy().tobytes()).digest() for row in S]
        kept = [_unit_tangents(noise.drawn_for, digest) for digest in digests]
    if new := [i for i, both in enumerate(kept) if not both]:
        sides = _unit(S[new], shape[0], noise.left, k), _unit(S[new], shape[1], noise.right, k)
        for i, *both in zip(new, *sides, strict=True):
            kept[i][:] = both
    left, right = (
        (omega * torch.stack(tangents)).atan().sum(-1) / k for tangents in zip(*kept, strict=True)
    )
    return left, right


@lru_cache(maxsize=2048)
def _unit_tangents(drawn_for: tuple[int, ...], spectrum: bytes) -> list[Tensor]:
    """Where those of a spectrum, by its digest, are kept: left and right; empty at first."""
    return []


def _unit(S: Tensor, side: int, noise: _Tangents, k: int) -> Tensor:
    """Tangents of the principal angles at ω = 1 that are not 0, (b, draws, ≤ k)."""
    if k == side:
        return S.new_zeros(len(S), len(noise[0]), 1)  # the subspace is the whole space
    apart, rest = _leaked(_unit_sizes(S[:, None, :k], S, k, side), noise)
    if rest is None:
        energy = torch.linalg.eigvalsh(_gram(apart if apart.shape[-2] >= k else apart.mT))
    else:
        energy = torch.linalg.eigvalsh(_gram(apart) + _gram(rest))
    return energy.clamp_min(0).sqrt()


def _unit_sizes(values: Tensor, S: Tensor, inner: int, side: int) -> Tensor:
    """√(σ̂_i² + σ_j²)/(σ̂_i² − σ_j²), (b, draws, d, k), of values σ̂ (b, draws, k) and what lies
    behind the first `inner` of S (b, q); σ_j = 0 of the directions of this side outside the span.
    """
    energy = values[..., None, :].square()
    others = torch.nn.functional.pad(S[:, inner:].square(), (0, side - S.shape[-1]))
    others = others[:, None, :, None]
    return (energy + others).sqrt() / (energy - others)


def _leaked(sizes: Tensor, noise: _Tangents) -> tuple[Tensor, Tensor | None]:
    """Tangents of directions one by one, and a factor of the Gram matrix of the rest."""
    apart, rest = noise
    tangents = sizes[..., :_FIRST_ORDER_DIRECTIONS, :] * apart
    if rest is None:
        return tangents, None
    mean = sizes[..., _FIRST_ORDER_DIRECTIONS:, :].square().mean(-2, keepdim=True)
    return tangents, mean.sqrt() * rest


def _gram(tangents: Tensor) -> Tensor:
    return tangents.mT @ tangents


def _leading(matrices: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """U (b, draws, q, k), values (b, draws, k) and V (b, draws, q, k); half the time of an SVD."""
    vectors = torch.linalg.eigh(matrices.mT @ matrices).eigenvectors
    V = vectors[..., -k:].flip(-1)
    images = matrices @ V
    values = images.norm(dim=-2)
    U = images / values[..., None, :]
    for i in (values[..., -1] <= _GRAM * values[..., 0]).any(-1).nonzero().flatten().tolist():
        left, S, Vh = torch.linalg.svd(matrices[i])
        U[i], values[i], V[i] = left[..., :k], S[..., :k], Vh.mT[..., :k]
    return U, values, V


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

    def tangents(self, rows: int, columns: int) -> tuple[Tensor, Tensor | None]:
        """Those of rows outside: of some one by one, of the rest a factor of their Gram matrix."""
        apart, rest = (
            self.normal(min(rows, _FIRST_ORDER_DIRECTIONS), columns),
            rows - _FIRST_ORDER_DIRECTIONS,
        )
        return apart, self.triangle(rest, columns) if rest > 0 else None


_Tangents = tuple[Tensor, Tensor | None]


@dataclass(frozen=True)
class _AngleNoise:
    """What `mean_angles` draws of a shape: the dense block, of size 0 where first order does, and
    tangents on both sides. drawn_for: seed, sides and k."""

    drawn_for: tuple[int, ...]
    inner: Tensor
    left: _Tangents
    right: _Tangents

    @classmethod
    def of(cls, seed: int, shape: tuple[int, int], k: int, inner: int) -> _AngleNoise:
        draws = _draws_of(k)
        numbers = draws * (inner**2 + 2 * k * (_FIRST_ORDER_DIRECTIONS + k))
        return _drawn(numbers, _angle_noise, seed, shape, k, inner, draws)


@lru_cache(maxsize=16)
def _angle_noise(seed: int, shape: tuple[int, int], k: int, inner: int, draws: int) -> _AngleNoise:
    noise = _Noise((seed, *shape, k), draws)
    block = noise.normal(inner, inner)
    left, right = (noise.tangents(side - (inner or k), k) for side in shape)
    return _AngleNoise((seed, *shape, k), block, left, right)


def _drawn(numbers: int, draw: Any, *arguments: Any) -> Any:
    """What a cached function draws; it keeps no draw of very many numbers."""
    return (draw if numbers <= _KEPT else draw.__wrapped__)(*arguments)


def _angles(vectors: Tensor | None, leaked: Tensor) -> Tensor:
    """Angles to the first k axes of vectors (..., d, k) that hold `leaked` (..., k, k) outside.

    sin² are the eigenvalues of L⁻¹(B + leaked)L⁻ᵀ, L·Lᵀ = 1 + leaked, B the part below row k.
    Without vectors B = 0: tan² are the eigenvalues of `leaked`.
    """
    if vectors is None:
        return torch.linalg.eigvalsh(leaked).clamp_min(0).sqrt().atan()
    k = vectors.shape[-1]
    below = vectors[..., k:, :]
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
def tuned_spectra(
    S: Tensor, spread: Tensor | float, *, shape: tuple[int, int], seed: int
) -> Tensor:
    """Singular values of W0 + ω·G, (…, draws, q), descending; S: (…, q), spread: ω√(mn), (…).

    λ = σ² moves by dλ_i = 2√(λ_i dt)·g_i + (M + Σ_{j≠i}(λ_i + λ_j)/(λ_i − λ_j))dt from t = 0 to ω²
    (Dyson's motion of a Wishart matrix). In each step neighbours move as the values of a dense
    block; those farther away enter the drift. [Bru 1991, Wishart processes]
    """
    q, M = min(shape), max(shape)
    spectra = S.reshape(-1, q)
    omega = torch.as_tensor(spread, dtype=S.dtype).reshape(-1) / math.sqrt(q * M)
    draws = max(2, math.ceil(_VALUES / q))
    found = spectra[:, None].repeat(1, draws, 1)
    for motion, which in _motions(spectra, omega, M):
        noise = _drawn(draws * motion.numbers, _spectrum_noise, seed, (q, M), draws, motion)
        for some in torch.tensor(which).split(max(1, _AT_ONCE // (draws * motion.block_numbers))):
            found[some] = motion.moved(spectra[some], omega[some], M, noise, seed)
    return found.unflatten(0, S.shape[:-1]) if S.ndim > 1 else found[0]


def _motions(S: Tensor, omega: Tensor, M: int) -> Iterable[tuple[_Motion, list[int]]]:
    """How the spectra (b, q) move, and which do so alike; not those to which nothing is added."""
    groups: dict[_Motion, list[int]] = {}
    kept = (S > omega[:, None] / 2).sum(-1).tolist()
    for i, (count, step) in enumerate(zip(kept, omega.tolist(), strict=True)):
        if step != 0:
            groups.setdefault(_Motion.of(S[i], step, M, count), []).append(i)
    return groups.items()


@dataclass(frozen=True)
class _Motion:
    """Of how many leading values the motion is followed, in how many steps, and the width of a
    dense block; what lies below is a Gaussian matrix outside of these."""

    q: int
    kept: int
    steps: int
    width: int

    @classmethod
    def of(cls, S: Tensor, omega: float, M: int, kept: int) -> _Motion:
        q = len(S)
        if q - kept <= _BLOCK:  # else they are one: a Gaussian matrix outside of the others
            kept = q
        # The farther the middle value moves, the more steps; a single block is exact in one.
        far = omega * math.sqrt(M) / max(float(S[: max(kept, 1)].median()), omega)
        steps = min(_MOST_STEPS, 1 + math.floor(20 * far)) if kept > _BLOCK else min(kept, 1)
        crowd = _largest_cluster(S[:kept], omega)
        width = min(kept, max(_BLOCK, min(_CROWDED, 4 * crowd), min(_MOST, 2 * crowd)))
        return cls(q, kept, steps, width)

    @property
    def starts(self) -> list[int]:
        """First value of each block."""
        q, width = self.kept, self.width
        return [*range(0, q - width, max(width // 2, 1)), q - width]

    @property
    def block_numbers(self) -> int:
        """Numbers of a draw in the blocks of one step."""
        return max(self.q, len(self.starts) * self.width**2)

    @property
    def numbers(self) -> int:
        """Numbers of a draw."""
        return self.steps * self.block_numbers

    def moved(
        self, S: Tensor, omega: Tensor, M: int, noise: tuple[Tensor, ...], seed: int
    ) -> Tensor:
        """`tuned_spectra` of a stack (b, q), (b,) that moves so."""
        draws = max(2, math.ceil(_VALUES / self.q))
        found = S[:, None, : self.kept].expand(-1, draws, -1)
        time, outside = omega.square() / max(self.steps, 1), self.q - self.kept
        for step in noise:
            found = self._step(found, time[:, None, None], M + outside, step)
        if outside:
            rest = iid_spectra(outside, M - self.kept, seed)[:draws]
            found = torch.cat([found, omega[:, None, None] * rest], -1)
            found = found.sort(-1, descending=True).values
        return found

    def _step(self, S: Tensor, time: Tensor, M: int, noise: Tensor) -> Tensor:
        """One step of all draws, (b, draws, q).

        Values that lie apart from all others move one by one. Of a block with others these are the
        eigenvalues nearest its middle.
        """
        block, place = self._own_blocks
        before = S.square().mean(-2)
        one = noise[:, block, place, place]  # (draws, q)
        drift = _drift_term(before)
        energy = (S + time.sqrt() * one).square() + time * (M - 1 + drift)[:, None]
        crowded = ~_stand_alone(before, time[:, 0] * self.steps)
        in_blocks = crowded.double() @ self._is_own
        matrix, number = (in_blocks > 0).nonzero(as_tuple=True)
        if not len(matrix):
            return _descending(energy)
        starts, width = torch.tensor(self.starts), self.width

        def of_blocks(matrix: Tensor, number: Tensor) -> Tensor:
            """Energies of some blocks (p, draws, width). What the drift holds of values in the
            block moves them already."""
            inside = starts[number, None] + torch.arange(width)
            dense = S[matrix[:, None], :, inside].mT.diag_embed()
            dense = dense + time[matrix].sqrt()[..., None] * noise[:, number].transpose(0, 1)
            values = torch.linalg.eigvalsh(dense.mT @ dense).flip(-1)
            mine = before[matrix[:, None], inside]
            outside = drift[matrix[:, None], inside] - _drift_term(mine)
            return values + time[matrix] * (M - width + outside)[:, None]

        parts = zip(matrix.split(_BLOCKS), number.split(_BLOCKS), strict=True)
        values = torch.cat([of_blocks(*part) for part in parts])
        found = torch.zeros(in_blocks.shape, dtype=torch.long)
        found[matrix, number] = torch.arange(len(matrix))
        which, value = crowded.nonzero(as_tuple=True)
        energy[which, :, value] = values[found[which, block[value]], :, place[value]]
        return _descending(energy)

    @cached_property
    def _own_blocks(self) -> tuple[Tensor, Tensor]:
        """For each value the block in whose middle it lies, and its place there; (q,) each."""
        starts = torch.tensor(self.starts)
        ends = [(first + second + self.width) // 2 for first, second in pairwise(self.starts)]
        values = torch.arange(self.kept)
        block = torch.searchsorted(torch.tensor(ends, dtype=torch.long), values, right=True)
        return block, values - starts[block]

    @cached_property
    def _is_own(self) -> Tensor:
        """1 for the block each value belongs to, (q, blocks)."""
        return torch.nn.functional.one_hot(self._own_blocks[0], len(self.starts)).double()


def _stand_alone(energy: Tensor, time: Tensor) -> Tensor:
    """Which values lie _APART·ω or more from both neighbours; energy: (b, q), time: (b, 1)."""
    S = energy.sqrt()
    far = (S[:, :-1] - S[:, 1:]) >= _APART * time.sqrt()
    pad = torch.nn.functional.pad
    return pad(far, (1, 0), value=True) & pad(far, (0, 1), value=True)


def _descending(energy: Tensor) -> Tensor:
    return energy.clamp_min(0).sort(-1, descending=True).values.sqrt()


@lru_cache(maxsize=16)
def _spectrum_noise(
    seed: int, sides: tuple[int, int], draws: int, motion: _Motion
) -> tuple[Tensor, ...]:
    """Of each step the noise of all blocks, (draws, blocks, width, width)."""
    noise, size = _Noise((seed, *sides), draws), (len(motion.starts), motion.width, motion.width)
    return tuple(noise.normal(*size) for _ in range(motion.steps))


def _largest_cluster(S: Tensor, omega: float) -> int:
    """Most values within ω of one of them."""
    ascending = S.flip(0).contiguous()
    low, high = (torch.searchsorted(ascending, ascending + shift) for shift in (-omega, omega))
    return int((high - low).max()) if len(S) else 0


def _drift_term(energy: Tensor) -> Tensor:
    """Σ_{j≠i}(λ_i + λ_j)/(λ_i − λ_j) of stacks of values (b, q).

    Equal values do not push each other. (λ_i + λ_j)/(λ_i − λ_j) = 2λ_i/(λ_i − λ_j) − 1.
    """
    q, parts = energy.shape[-1], []
    repeated = bool((energy.diff(dim=-1) == 0).any())
    for start, mine in zip(range(0, q, _ROWS), energy.split(_ROWS, -1), strict=True):
        apart = mine[..., None] - energy[:, None]
        apart.diagonal(offset=start, dim1=-2, dim2=-1).fill_(math.inf)
        pushing: Tensor | int = q - 1
        if repeated:
            apart.masked_fill_(apart == 0, math.inf)
            pushing = torch.isfinite(apart).sum(-1)
        parts.append(2 * mine * apart.reciprocal_().sum(-1) - pushing)
    return torch.cat(parts, -1)
