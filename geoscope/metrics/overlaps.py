"""Do two tuned models move the same weights in the same directions?

See docs/methods.md#two-tuned-models. Taken from the updates ΔW_a, ΔW_b themselves, never from
adapter factors alone: these are only defined up to a change of basis.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product

import torch
from torch import Tensor

from geoscope.linalg import Operand, principal_angles
from geoscope.linalg.changes import (
    Side,
    changed_mask,
    matched_spread,
    side,
    unchanged_cell,
    unchanged_probability,
)
from geoscope.linalg.factor_update import FactorUpdate
from geoscope.linalg.product import Product, factorise_product
from geoscope.linalg.storage import effective_format
from geoscope.metrics.kept import PHI_DIMENSIONS, Recall, leading_of_update, overlap_cuts

__all__ = ["UpdateOf", "overlap", "updates_of"]

Values = dict[str, float | int | None]
_CHANGED = ("changed_shared", "changed_only_a", "changed_only_b")
# Below this share of an update's energy nothing is left beside its head.
_NOTHING_LEFT = 1e-12


@dataclass(frozen=True, eq=False)
class _Base:
    """A base of one matrix, (1, m, n), as it is stored."""

    weight: Tensor

    @cached_property
    def values(self) -> Side:
        return side(self.weight[0])


@dataclass(frozen=True, eq=False)
class UpdateOf:
    """The update of one matrix by one tuned model. What overlaps take of it is computed when it is
    first asked for, and kept.

    tuned: (1, m, n) as stored, or the update in its factors. ks: subspace dimensions. recall:
    where factors of updates are kept, this one as `number`.
    """

    base: _Base
    tuned: Tensor | FactorUpdate
    ks: tuple[int, ...]
    solver: str
    recall: Recall | None
    number: int

    @cached_property
    def change(self) -> Operand | Product:
        tuned, base = self.tuned, self.base.weight
        return tuned.product if isinstance(tuned, FactorUpdate) else Operand(tuned, base)

    @cached_property
    def norm(self) -> float:
        return float(self.change.norm())

    @cached_property
    def leading(self) -> tuple[Tensor, Tensor, float] | None:
        """Leading left and right vectors as columns, as many as its rank at most; and its largest
        singular value. None where no subspace is asked for.

        What changed in few entries has few directions: vectors beyond them are the solver's choice.
        """
        cuts = overlap_cuts(self.ks, min(self.change.shape))
        if not cuts:
            return None
        if isinstance(self.change, Product):
            factors = factorise_product(self.change, vectors=max(cuts), cuts=cuts)
        else:
            factors = leading_of_update(self.change, cuts, self.solver, self.recall, self.number)
        assert factors.U is not None and factors.Vh is not None
        S = factors.S[0]
        rank = int((S > max(self.change.shape) * torch.finfo(S.dtype).eps * S[0]).sum())
        return factors.U[0, :, :rank], factors.Vh[0, :rank].mT, float(S[0])

    @cached_property
    def mask(self) -> Tensor:
        """Entries that changed by the relative rule, (m, n) bool; of a stored weight."""
        return changed_mask(self.base.weight[0], self.weight)

    @cached_property
    def differs(self) -> Tensor:
        """Entries that differ as stored."""
        return torch.ne(self.weight, self.base.weight[0])

    @cached_property
    def grew(self) -> Tensor:
        """Entries that are larger than in the base."""
        return torch.gt(self.weight, self.base.weight[0])

    @cached_property
    def shown(self) -> Tensor:
        """Probability that an entry changes under an isotropic update that changes as many entries,
        for each value of the base."""
        values, fmt = self.base.values, effective_format(self.weight)
        density = int(self.mask.sum()) / self.mask.numel()
        cell = unchanged_cell(values.levels, fmt)
        spread = matched_spread(values, density, fmt)
        return 1 - unchanged_probability(values.levels, cell, spread)

    @property
    def weight(self) -> Tensor:
        """The stored weight, (m, n)."""
        assert isinstance(self.tuned, Tensor)
        return self.tuned[0]


def updates_of(
    base: Tensor,
    tuned: Sequence[Tensor | FactorUpdate],
    *,
    ks: Sequence[int],
    solver: str = "auto",
    recall: Recall | None = None,
) -> list[UpdateOf]:
    """The updates of one matrix by several tuned models, for `overlap` of any two of them.

    base: (1, m, n), stored dtype; tuned: the same, or the update in its factors. recall: where
    factors of the updates are kept, by their number.
    """
    own = _Base(base)
    return [UpdateOf(own, one, tuple(ks), solver, recall, i) for i, one in enumerate(tuned)]


def overlap(
    a: UpdateOf, b: UpdateOf, *, in_blocks: bool = False
) -> tuple[Values, dict[str, float]]:
    """Values and nulls of two updates of one matrix.

    in_blocks: one of them was stored as codes, whose rounding cells are not known; the Jaccard
    index has no null then. A quantity that is undefined (an update is zero, k exceeds q or its
    rank; single entries of an update in its factors) is None.
    """
    (m, n), ks = a.base.weight.shape[-2:], a.ks
    q = min(m, n)
    values: Values = {}
    nulls: dict[str, float] = {}
    both = a.norm > 0 and b.norm > 0
    values["update_cosine"] = update_cosine(a, b) if both else None
    nulls["update_cosine"] = 0.0
    are_stored = isinstance(a.tuned, Tensor) and isinstance(b.tuned, Tensor)
    if are_stored:
        _masks(values, nulls, a, b, in_blocks=in_blocks)
    else:
        values |= dict.fromkeys(("mask_jaccard", "sign_conflict", *_CHANGED))
    values |= {"head_cosine": None, "residual_cosine": None}
    left = right = None
    if both and a.leading is not None and b.leading is not None:
        (U0, V0, s0), (U1, V1, s1) = a.leading, b.leading
        left, right = (U0, U1), (V0, V1)
        heads = _Head(a, U0[:, 0], V0[:, 0], s0), _Head(b, U1[:, 0], V1[:, 0], s1)
        values |= _split_cosines(*heads, float(values["update_cosine"] or 0))
    # What a quantised base lost is in both updates, and agrees with itself.
    if not (in_blocks and are_stored):
        nulls |= {"head_cosine": 0.0, "residual_cosine": 0.0}
    _subspaces(values, nulls, "left", left, (m, q), ks)
    _subspaces(values, nulls, "right", right, (n, q), ks)
    return values, nulls


@dataclass(frozen=True)
class _Head:
    """The leading triplet of an update: u (m,), v (n,), σ."""

    update: UpdateOf
    u: Tensor
    v: Tensor
    sigma: float

    def inner(self, other: UpdateOf) -> float:
        """⟨σ·u·vᵀ, Δ⟩ = σ·uᵀΔv."""
        image = other.change.right(self.v.reshape(1, 1, -1).contiguous())[0, 0]
        return self.sigma * float(image @ self.u)

    @property
    def rest(self) -> float:
        """‖Δ − σ·u·vᵀ‖²."""
        return self.update.norm**2 - self.sigma**2


def _split_cosines(first: _Head, second: _Head, cosine: float) -> Values:
    """Cosines of the leading triplets H of two updates, and of what is left, R = Δ − H:

        cos(H_a, H_b) = (u_a·u_b)(v_a·v_b)
        ⟨R_a, R_b⟩ = ⟨Δ_a, Δ_b⟩ − ⟨H_a, Δ_b⟩ − ⟨Δ_a, H_b⟩ + ⟨H_a, H_b⟩

    from products with vectors alone, so of factors exact. None for a rest of an update of rank 1.
    Null 0, standard deviation 1/√(mn).   [2606.02252]
    """
    head = float(first.u @ second.u) * float(first.v @ second.v)
    norms = first.update.norm, second.update.norm
    rests = first.rest, second.rest
    if any(rest <= _NOTHING_LEFT * norm**2 for rest, norm in zip(rests, norms, strict=True)):
        return {"head_cosine": head, "residual_cosine": None}
    inner = cosine * norms[0] * norms[1] - first.inner(second.update) - second.inner(first.update)
    inner += first.sigma * second.sigma * head
    return {"head_cosine": head, "residual_cosine": inner / math.sqrt(rests[0] * rests[1])}


def _subspaces(
    values: Values,
    nulls: dict[str, float],
    side: str,
    bases: tuple[Tensor, Tensor] | None,
    sizes: tuple[int, int],
    ks: Sequence[int],
) -> None:
    """Captures φ(i, j) and mean angles between the leading subspaces of the two updates."""
    dimension, q = sizes
    first, second = (0, 0) if bases is None else (bases[0].shape[1], bases[1].shape[1])
    for i, j in product(PHI_DIMENSIONS, repeat=2):
        key = f"phi_{side}@{i},{j}"
        values[key] = None
        if max(i, j) <= q:
            nulls[key] = max(i, j) / dimension
            if bases is not None and i <= first and j <= second:
                values[key] = subspace_capture(bases[0][:, :i], bases[1][:, :j])
    for k in ks:
        key = f"update_angle_{side}_mean@{k}"
        values[key] = None
        if k <= q and k < dimension:
            # E cos² between random subspaces is k/dimension.
            nulls[key] = math.acos(math.sqrt(k / dimension))
            if bases is not None and k <= min(first, second):
                angles = principal_angles(bases[0][:, :k], bases[1][:, :k])
                values[key] = float(angles.mean())


def update_cosine(a: UpdateOf, b: UpdateOf) -> float:
    """⟨ΔW_a, ΔW_b⟩/(‖ΔW_a‖‖ΔW_b‖), in [−1, 1]; null 0, sd 1/√(mn)."""
    return _inner(a.change, b.change) / (a.norm * b.norm)


def _inner(first: Operand | Product, second: Operand | Product) -> float:
    if isinstance(first, Product) and isinstance(second, Product):
        return float(first.inner(second))
    if isinstance(first, Operand) and isinstance(second, Operand):
        pairs = zip(first.blocks(0), second.blocks(0), strict=True)
        return sum(float(torch.tensordot(x, y)) for (_, x), (_, y) in pairs)
    if isinstance(first, Product):
        return _inner(second, first)
    assert isinstance(second, Product)
    images = first.right(second.A.contiguous())  # Δ·a_k as rows, (1, r, m)
    return float((images * (second.B * second.scale[:, None, :]).mT).sum())


def subspace_capture(Q0: Tensor, Q1: Tensor) -> float:
    """φ(i, j) = ‖Q0ᵀQ1‖_F²/min(i, j), in [0, 1]; null max(i, j)/d.   (d, i), (d, j) [2106.09685]"""
    return float((Q0.mT @ Q1).square().sum()) / min(Q0.shape[1], Q1.shape[1])


def _masks(
    values: Values, nulls: dict[str, float], a: UpdateOf, b: UpdateOf, *, in_blocks: bool
) -> None:
    """Jaccard index of the changed masks, shares of all entries that both changed or one alone, and
    opposite signs among jointly changed entries.

    Signs are taken of all entries that differ as stored: those of a wide file that cross the edge
    of a bf16 cell, as the masks have them, mostly agree on the nearer edge whatever the updates.
    """
    base, shared = a.base.weight, int((a.mask & b.mask).sum())
    counts = (shared, int(a.mask.sum()) - shared, int(b.mask.sum()) - shared)
    union = sum(counts)
    values["mask_jaccard"] = shared / union if union else None
    values |= {key: count / base.numel() for key, count in zip(_CHANGED, counts, strict=True)}
    if union and bool(base.any()) and not in_blocks:  # of a zero base, rounding favours no weight
        expected = _expected_shares(a, b)
        nulls |= dict(zip(_CHANGED, expected, strict=True))
        nulls["mask_jaccard"] = expected[0] / sum(expected)
    joint = a.differs & b.differs
    both = int(joint.sum())
    apart = a.grew != b.grew
    values["sign_conflict"] = int((apart & joint).sum()) / both if both else None
    nulls["sign_conflict"] = 0.5


def _expected_shares(a: UpdateOf, b: UpdateOf) -> tuple[float, float, float]:
    """Shares of entries changed in both, in the first alone and in the second alone, expected of
    independent isotropic updates with the measured densities.

    Rounding alone puts both masks on the small weights, so that p₁p₂, which takes them for
    independent, is far too low (docs/methods-notes.md).
    """
    counts = a.base.values.counts
    total = float(counts.sum())
    parts = (a.shown * b.shown, a.shown, b.shown)
    shares = [float(torch.dot(counts, part)) / total for part in parts]
    return shares[0], shares[1] - shares[0], shares[2] - shares[0]
