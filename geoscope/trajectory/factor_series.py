"""A series of low-rank updates through the Gram matrices of its factors alone.

With B_i = B_0 + Σ_{k≤i} dB_k and A_i likewise, every Δ_i and δ_i is a product of sums of the blocks
B_0, dB_1 … dB_T and A_0, dA_1 … dA_T. Two Gram matrices, of all blocks of each side, then hold H
and the leading values of every update, and what is left is small: r × r or 2r × 2r. Differences of
stored numbers are taken before anything is squared, so that equal steps give zeros:

    δ_i = dB_i·A_i + B_{i−1}·dA_i        Δ_i = (B_i − B_0)·A_i + B_0·(A_i − A_0)

Where terms cancel so far that the squares lose them, there is no result, and the QRs of `Product`
are to be taken; see `gram_pairs`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from geoscope.linalg.factor_grams import GRAM_ERROR, gram_pairs
from geoscope.profile import stage
from geoscope.trajectory.rank1 import Rank1Path

__all__ = ["Factor", "FactorSeries"]

# B (m, r), A (r, n) and the scaling, as they are stored.
Factor = tuple[Tensor, Tensor, float]

# Relative error of H_ii and of σ1² up to which the Gram matrices are trusted.
_TRUSTED = 1e-10


@dataclass(frozen=True)
class FactorSeries:
    """Blocks of one tensor's factors, in fp64, and their Gram matrices.

    left: (T + 1, r, m), B_0ᵀ, dB_1ᵀ …; right: (T + 1, r, n), A_0, dA_1 …, without a start B_0 and
    A_0 are zero and dB_1 = B_1. gram_left, gram_right: (T + 1, r, T + 1, r). scale: s.
    """

    left: Tensor
    right: Tensor
    gram_left: Tensor
    gram_right: Tensor
    scale: float
    has_start: bool

    @classmethod
    @stage("factor grams")
    def of(cls, updates: Sequence[Factor], start: Factor | None) -> FactorSeries | None:
        """None where ranks or scalings differ: those products have no common blocks."""
        every = updates if start is None else [start, *updates]
        B, A, scale = every[0]
        if any(one.shape != B.shape or two.shape != A.shape or s != scale for one, two, s in every):
            return None
        left = _blocks([one.mT for one, _, _ in every], has_start=start is not None)
        right = _blocks([one for _, one, _ in every], has_start=start is not None)
        return cls(left, right, _gram(left), _gram(right), scale, start is not None)

    @property
    def H(self) -> Tensor | None:
        """⟨δ_i, δ_j⟩, (T, T); None where terms cancel too far, or are not finite."""
        left, right = self._steps(self.gram_left, 0), self._steps(self.gram_right, 1)
        H = self.scale**2 * (left * right).sum(dim=(1, 3))
        terms = self.scale**2 * (self._lengths(0) * self._lengths(1)).sum(-1).square()
        energy = H.diagonal()
        certain = bool(torch.isfinite(H).all()) and bool(
            (GRAM_ERROR * terms <= _TRUSTED * energy).all()
        )
        return (H + H.T) / 2 if certain else None

    def paths(self) -> tuple[Rank1Path, Rank1Path, dict[str, dict[str, Any]]] | None:
        """Leading pairs of every Δ_i and of every δ_i, and how well they are known.

        None where one is not certain to 1e-10.
        """
        found = [self._path(which) for which in ("updates", "steps")]
        if found[0] is None or found[1] is None:
            return None
        (whole, one), (local, two) = found[0], found[1]
        return whole, local, {"updates": one, "steps": two}

    @stage("pair products")
    def pair_products(self, path: Rank1Path) -> Tensor:
        """u_iᵀ·Δ_τ·v_j, (T, T, T) by τ, i, j, with the pairs of `path`."""
        terms = torch.zeros(len(path), len(path), len(path), dtype=torch.float64)
        for left, right in self._update_factors():
            seen = torch.einsum("im,trm->tir", path.u, left)
            terms += seen @ torch.einsum("jn,trn->tjr", path.v, right).mT
        return self.scale * terms

    # --- blocks -------------------------------------------------------------------------------

    def _update_factors(self) -> list[tuple[Tensor, Tensor]]:
        """Δ_i as a sum of products: pairs of (T, r, m) and (T, r, n)."""
        moved_left, moved_right = self.left[1:].cumsum(0), self.right[1:].cumsum(0)
        whole = self.right[:1] + moved_right
        if not self.has_start:
            return [(moved_left, whole)]
        return [(moved_left, whole), (self.left[:1].expand_as(moved_left), moved_right)]

    def _step_factors(self) -> list[tuple[Tensor, Tensor]]:
        """δ_i likewise."""
        left, right = self.left.cumsum(0), self.right.cumsum(0)
        return [(self.left[1:], right[1:]), (left[:-1], self.right[1:])]

    def _lengths(self, side: int) -> Tensor:
        """What the columns of each δ_i's factors are made of, (T, 2r): Σ_k‖dB_k‖ for B_i, which
        bounds the rounding of its Gram matrix even where the terms cancel."""
        blocks = (self.left, self.right)[side].square().sum(-1).sqrt()
        sums = blocks.cumsum(0)
        pair = (blocks[1:], sums[:-1]) if side == 0 else (sums[1:], blocks[1:])
        return torch.cat(pair, 1)

    def _steps(self, gram: Tensor, side: int) -> Tensor:
        """Gram matrix of all factors of one side of all δ_i, (T, 2r, T, 2r)."""
        one = gram.cumsum(2)
        both = one.cumsum(0)
        if side == 0:  # dB_i, B_{i−1}
            first, second = gram[1:, :, 1:], both[:-1, :, :-1]
            mixed = one[1:, :, :-1]
        else:  # A_i, dA_i
            first, second = both[1:, :, 1:], gram[1:, :, 1:]
            mixed = gram.cumsum(0)[1:, :, 1:]
        upper = torch.cat([first, mixed], 3)
        lower = torch.cat([mixed.permute(2, 3, 0, 1), second], 3)
        return torch.cat([upper, lower], 1)

    # --- leading pairs ------------------------------------------------------------------------

    def _path(self, which: str) -> tuple[Rank1Path, dict[str, Any]] | None:
        factors = self._update_factors() if which == "updates" else self._step_factors()
        # From the sums themselves: a sum of Gram matrices keeps the rounding of terms that cancel.
        left, right = (_own([pair[side] for pair in factors]) for side in (0, 1))
        if not (bool(torch.isfinite(left).all()) and bool(torch.isfinite(right).all())):
            return None
        pairs = gram_pairs(left, right)
        if not bool((pairs.error <= _TRUSTED).all()):
            return None
        energy = (left * right).sum(dim=(1, 2)).clamp_min(0)
        sigma, second = (self.scale * pairs.energies.sqrt()).unbind(-1)
        path = Rank1Path(
            sigma=sigma,
            second=second,
            norm=self.scale * energy.sqrt(),
            u=_combined(factors, pairs.left, 0),
            v=_combined(factors, pairs.right, 1),
        )
        bound = float(pairs.error.max()) / 2
        return path, {"how": "factor-grams", "bound": bound, "fallback": None}


def _blocks(factors: Sequence[Tensor], *, has_start: bool) -> Tensor:
    """(T + 1, r, length): the first factor, or zeros, and the differences of neighbours."""
    size = (len(factors) + (not has_start), *factors[0].shape)
    found = torch.zeros(size, dtype=torch.float64)
    for place, one in enumerate(factors, start=0 if has_start else 1):
        found[place] = one
    for place in range(len(found) - 1, 0, -1):
        found[place] -= found[place - 1]
    return found


def _gram(blocks: Tensor) -> Tensor:
    """(T + 1, r, T + 1, r)."""
    count, rank, length = blocks.shape
    flat = blocks.reshape(-1, length)
    return (flat @ flat.T).reshape(count, rank, count, rank)


def _own(parts: Sequence[Tensor]) -> Tensor:
    """Gram matrices of the factors of each step, (T, p, p). parts: (T, r, length) each."""
    rows = torch.cat(list(parts), 1)
    return rows @ rows.mT


def _combined(factors: Sequence[tuple[Tensor, Tensor]], coordinates: Tensor, side: int) -> Tensor:
    """Unit rows Σ_k c_k·(k-th column of the factor), (T, length); zeros where there is nothing."""
    rank = factors[0][0].shape[1]
    rows = torch.zeros(())
    for place, pair in enumerate(factors):
        part = coordinates[:, None, place * rank : (place + 1) * rank]
        rows = rows + (part @ pair[side])[:, 0]
    lengths = torch.linalg.vector_norm(rows, dim=-1, keepdim=True)
    return rows / lengths.where(lengths > 0, lengths.new_ones(()))
