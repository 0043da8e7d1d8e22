"""What makes each factor: small pure functions, which the table in `factors.py` puts together.

Nothing is held in fp64 as a whole on the CPU: products are taken block by block from the stored
entries (`Operand`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from geoscope.errors import NumericsError
from geoscope.linalg import (
    Factors,
    Operand,
    factorise,
    principal_angles,
)
from geoscope.linalg.changes import (
    Side,
    changed_mask,
    expected_unchanged_shares,
    side,
    unchanged_shares,
)
from geoscope.linalg.factor_update import FactorUpdate
from geoscope.linalg.grids import Grid, grids_of
from geoscope.linalg.isotropic import isotropic_spreads
from geoscope.linalg.perturbed import mean_angles, tuned_spectra
from geoscope.linalg.product import Product
from geoscope.linalg.storage import FloatFormat
from geoscope.metrics.collapse import INTRUDER_DIRECTIONS
from geoscope.metrics.masks import MASK_RANK, mask_overlaps
from geoscope.metrics.nulls import iid_spectra, marchenko_pastur_median
from geoscope.metrics.storage_notes import base_notes, storage_notes
from geoscope.metrics.subspaces import (
    Overlaps,
    directions_edge,
    has_subspace,
    matches,
    settled,
    solver_edge,
    vectors_of,
)
from geoscope.profile import stage
from geoscope.records import Quantisation

__all__ = [
    "MASKS",
    "RULES",
    "Depth",
    "Methods",
    "Settings",
    "angles",
    "base_remarks",
    "bulk_median",
    "cells",
    "cross",
    "cross_cut",
    "entry_sizes",
    "expected_shares",
    "factored_facts",
    "iid",
    "intruder_basis",
    "intruder_matches",
    "intruders",
    "masks",
    "pair_edge",
    "pair_remarks",
    "product_median",
    "sampled_angles",
    "sampled_spectra",
    "shares",
    "sides",
    "update_norm",
    "update_rounding",
    "whole_spectrum",
]

# Rules by which an entry counts as unchanged (`unchanged.*`, `isotropic.*`).
RULES = ("relative", "absolute", "exact")
# Masks of the base, and what is told of each: name of the factor, and where `MaskOverlaps` has it.
_OVERLAPS = (("", "overlap"), (".density", "density"), (".matched", "matched"))
MASKS = {
    f"masks.{key}{suffix}": (key, attribute)
    for key in ("low", "principal", "control")
    for suffix, attribute in _OVERLAPS
}
Methods = tuple[Mapping[str, Any], ...]
Cells = tuple[tuple[Side, Side] | None, ...]


@dataclass(frozen=True)
class Settings:
    """What decides the numbers, apart from the weights.

    ks: subspace dimensions asked for.
    solver: `auto` or `exact`.
    dtype: `float64`, or `float32` for spectra of devices without fp64.
    curves: take the base's whole basis.
    quick: leading triplets only; what needs a whole spectrum is then not applicable.
    """

    ks: tuple[int, ...] = (8, 64)
    solver: str = "auto"
    dtype: str = "float64"
    curves: bool = False
    masks: bool = False
    quick: bool = False
    seed: int = 0


@dataclass(frozen=True)
class Depth:
    """How far a matrix is factorised.

    whole: all singular values.
    values: so many leading ones.
    vectors: so many leading triplets.
    cuts: the subspace dimensions that will be used.
    """

    whole: bool = False
    values: int = 0
    vectors: int = 0
    cuts: tuple[int, ...] = ()

    def __or__(self, other: Depth) -> Depth:
        """What serves both."""
        return Depth(
            self.whole or other.whole,
            max(self.values, other.values),
            max(self.vectors, other.vectors),
            tuple(sorted({*self.cuts, *other.cuts})),
        )


# --- from the stored entries --------------------------------------------------------------------


def sides(weights: Tensor, rounding: Sequence[Quantisation | None]) -> tuple[Side, ...]:
    """Norm, rounding noise, format and values of each stored matrix.

    rounding: what storing codes rounded away, for which nothing is sought in the entries.
    """
    unseen = [i for i, known in enumerate(rounding) if known is None]
    whole = len(unseen) == len(weights)
    grids = dict(zip(unseen, grids_of(weights if whole else weights[unseen]), strict=True))
    return tuple(
        _side(weight, known, grids.get(i))
        for i, (weight, known) in enumerate(zip(weights, rounding, strict=True))
    )


def _side(weight: Tensor, known: Quantisation | None, grid: Grid | None) -> Side:
    entries = side(weight)
    if not 1e-150 < entries.norm < 1e150 and bool(weight.any()):
        raise NumericsError(
            "the squared weights are too large or too small for float64; scale the model by a "
            "constant"
        )
    if known is not None:
        fmt = FloatFormat(known.name, known.fraction_bits, -6)
        return replace(entries, noise=known.size, fmt=fmt, quantisation=known)
    if grid is None:
        return entries
    return replace(entries, noise=grid.noise_with(entries.noise), grid=grid)


def entry_sizes(sides: Sequence[Side], weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Norm, rounding noise and spacing at 1; (b,) each."""
    rows = [(side.norm, side.noise, side.fmt.eps) for side in sides]
    norm, noise, eps = (_column(numbers, weights) for numbers in zip(*rows, strict=True))
    return norm, noise, eps


def _column(numbers: Sequence[float], beside: Tensor) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64, device=beside.device)


def shares(base: Tensor, tuned: Tensor) -> tuple[Tensor, ...]:
    """Shares of entries that did not move, by each of RULES; (b,) each."""
    rows = unchanged_shares(base, tuned)
    return tuple(_column([getattr(row, rule) for row in rows], base) for rule in RULES)


def cells(base: Sequence[Side], tuned: Sequence[Side]) -> Cells | None:
    """The sides of each pair, None where a grid hides the rounding cells of its entries; None
    where one hides those of every pair."""
    pairs = tuple(
        None if before.is_quantised or after.is_quantised else (before, after)
        for before, after in zip(base, tuned, strict=True)
    )
    return pairs if any(pairs) else None


def expected_shares(cells: Cells, norms: Tensor, shape: tuple[int, int]) -> tuple[Tensor, ...]:
    """`shares` expected of an isotropic update that measures as large once it is stored; NaN
    without cells."""
    entries = (shape[0] * shape[1]) ** 0.5
    known = [(i, pair) for i, pair in enumerate(cells) if pair is not None]
    pairs, sizes = [pair for _, pair in known], norms.tolist()
    spreads = isotropic_spreads(pairs, [sizes[i] / entries for i, _ in known])
    found = torch.full((len(RULES), len(cells)), math.nan, dtype=torch.float64)
    expected = expected_unchanged_shares(
        [base for base, _ in pairs], [tuned.fmt for _, tuned in pairs], spreads
    )
    for (i, _), row in zip(known, expected, strict=True):
        found[:, i] = torch.tensor([getattr(row, rule) for rule in RULES])
    return tuple(found.to(norms.device))


def update_norm(update: Operand | Product, spectrum: Tensor | None) -> Tensor:
    """‖ΔW‖_F, (b,); where the spectrum is at hand Σσ² saves a pass over the entries."""
    return update.norm() if spectrum is None else spectrum.norm(dim=-1)


def update_rounding(
    base: Tensor,
    tuned: Tensor,
    norm: Tensor,
    base_sides: Sequence[Side],
    tuned_sides: Sequence[Side],
) -> tuple[Tensor, Tensor]:
    """Rounding noise of the update, and what of it is the rounding of grids; (b,) each.

    That of the tuned side and of a quantised base, in quadrature. Training mostly starts from the
    weights before they were quantised: the base's error is in the update then. An update of half
    that size or less cannot hold it, and started from the grid.
    """
    base = base * base.new_tensor([side.is_quantised for side in base_sides])
    base = torch.where(norm > base / 2, base, 0.0)
    grid = tuned * tuned.new_tensor([side.is_quantised for side in tuned_sides])
    return torch.hypot(tuned, base), torch.hypot(grid, base)


def factored_facts(update: FactorUpdate) -> tuple[Tensor, ...]:
    """Of an update in its factors: its noise (twice: the tuned weight is never stored), no grid's
    noise, spacing at 1, nominal rank, and the rank of the product; (b,) each."""
    ones = torch.ones_like(update.noise)
    numbers = (update.fmt.eps, update.nominal, update.product.rank)
    return update.noise, update.noise, 0 * ones, *(number * ones for number in numbers)


def pair_remarks(
    base: Tensor,
    tuned: Tensor,
    base_sides: Sequence[Side],
    tuned_sides: Sequence[Side],
    noise: Tensor,
) -> tuple[tuple[str, ...], ...]:
    """What is to be said about the storage of each pair."""
    return tuple(
        storage_notes(base.dtype, tuned.dtype, before, after, base_counts=counted > after.noise)
        for before, after, counted in zip(base_sides, tuned_sides, noise.tolist(), strict=True)
    )


def base_remarks(sides: Sequence[Side]) -> tuple[tuple[str, ...], ...]:
    """What is to be said about the storage of each base of an update in its factors."""
    return tuple(base_notes(side) for side in sides)


# --- factorisations -----------------------------------------------------------------------------


def whole_spectrum(S: Tensor, settings: Settings) -> Tensor | None:
    """All singular values; absent with `quick`."""
    return None if settings.quick else S


def pair_edge(factors: Factors, shape: tuple[int, int], *noises: Tensor) -> Tensor:
    """(b,): σ up to here may be rounding of what is stored."""
    noise = noises[0] if len(noises) == 1 else torch.hypot(*noises)
    return directions_edge(factors, noise, shape)


# --- base and tuned -----------------------------------------------------------------------------


def angles(
    base: Factors, tuned: Factors, base_edge: Tensor, tuned_edge: Tensor, *, k: int
) -> tuple[Tensor, ...]:
    """Principal angles of the leading subspaces, left and right, (b, k); NaN for a complete basis
    or an undefined one."""
    (U0, V0), (U1, V1) = vectors_of(base), vectors_of(tuned)
    shape = (U0.shape[-2], V0.shape[-1])
    defined = has_subspace(base, base_edge, k=k, shape=shape)
    defined &= has_subspace(tuned, tuned_edge, k=k, shape=shape)
    turned = []
    for before, after in ((U0, U1), (V0.mT, V1.mT)):
        if k < before.shape[-2]:
            measured = principal_angles(before[..., :k], after[..., :k])
            turned.append(torch.where(defined[:, None], measured, torch.nan))
        else:
            turned.append(before.new_full((len(before), k), torch.nan))
    return tuple(turned)


def _tuned_directions(tuned: Factors) -> tuple[Tensor, Tensor]:
    """The leading tuned vectors as rows, left (b, ≤10, m) and right (b, ≤10, n)."""
    U, Vh = vectors_of(tuned)
    return U[..., :INTRUDER_DIRECTIONS].mT, Vh[..., :INTRUDER_DIRECTIONS, :]


def intruder_matches(
    tuned: Factors, base: Factors, edge: Tensor, base_noise: Tensor, tuned_noise: Tensor
) -> tuple[Overlaps, Overlaps]:
    """cos² of each leading tuned vector with the base directions at hand."""
    noise = torch.hypot(base_noise, tuned_noise)
    return matches(*_tuned_directions(tuned), base, edge=edge, noise=noise)


def intruder_basis(
    W0: Operand, base: Factors, leading: tuple[Overlaps, Overlaps], settings: Settings
) -> tuple[Factors | None, Methods | None]:
    """The base's directions that settle what is an intruder, and how they were got if anew.

    The leading ones mostly do: either one of them reaches ½, or they leave so little of the tuned
    vector unexplained that no other can. Otherwise the whole basis; with `quick` it stays open.
    """
    q = min(W0.shape)
    if q == vectors_of(base)[1].shape[-2] or all(map(settled, leading)):
        return base, None
    if settings.quick:
        return None, None
    whole = factorise(W0, vectors=q, solver=settings.solver)
    return whole, whole.methods


def intruders(
    tuned: Factors,
    basis: Factors,
    edge: Tensor,
    base_noise: Tensor,
    tuned_noise: Tensor,
    base: Factors,
    leading: tuple[Overlaps, Overlaps],
    tuned_edge: Tensor,
) -> tuple[Tensor, ...]:
    """Largest |cos| of each leading tuned vector with any thin singular vector of the base.

    1 for what is not a direction of the tuned matrix.
    """
    if basis is not base:
        leading = intruder_matches(tuned, basis, edge, base_noise, tuned_noise)
    defined = (base.S[..., :1] > 0) & (tuned.S[..., :1] > 0)
    stored = tuned.S[..., :INTRUDER_DIRECTIONS] <= tuned_edge[:, None]
    cosines = (torch.where(stored, 1.0, energies.amax(-1).sqrt()) for energies, _ in leading)
    return tuple(torch.where(defined, cosine, torch.nan) for cosine in cosines)


# --- the update along the base ------------------------------------------------------------------


def cross_cut(base: Factors, edge: Tensor, shape: tuple[int, int], *, k: int) -> Tensor:
    """1, NaN where the base has no subspace of k; (b,)."""
    return torch.where(has_subspace(base, edge, k=k, shape=shape), 1.0, torch.nan)


def cross(update: Operand | Product, base: Factors) -> tuple[Tensor, ...]:
    """Energies of the update along the base's singular directions: right, left and core."""
    U, Vh = vectors_of(base)
    edge = solver_edge(base, (U.shape[-2], Vh.shape[-1]))
    defined = base.S[..., : Vh.shape[-2]] > edge[:, None]
    # (b, K, m): ΔW v_j as rows, (b, K, n): u_jᵀΔW as rows
    right, left = update.both(Vh, U.mT.contiguous())
    core = (right @ U).mT.square()
    return (
        torch.where(defined, right.square().sum(-1), torch.nan),
        torch.where(defined, left.square().sum(-1), torch.nan),
        torch.where(defined[:, :, None] & defined[:, None], core, torch.nan),
    )


def masks(cells: Cells, base: Tensor, tuned: Tensor, factors: Factors) -> tuple[Tensor, ...]:
    """Overlaps of the changed mask with the base's masks and their matched nulls, as in MASKS;
    and the number of changed entries. (b,) each; NaN without cells."""
    rows = [
        None
        if pair is None
        else mask_overlaps(
            base[i],
            _reconstruction(factors, i),
            changed_mask(base[i], tuned[i]),
            base_side=pair[0],
            tuned_format=pair[1].fmt,
        )
        for i, pair in enumerate(cells)
    ]
    overlaps = (
        [math.nan if row is None else getattr(row, attribute).get(key, math.nan) for row in rows]
        for key, attribute in MASKS.values()
    )
    changed = [math.nan if row is None else float(row.changed) for row in rows]
    return tuple(_column(numbers, base) for numbers in (*overlaps, changed))


def _reconstruction(base: Factors, i: int) -> Tensor | None:
    """The leading part of matrix i in fp32; None where it has fewer directions."""
    if base.Vh is None or base.Vh.shape[-2] < MASK_RANK:
        return None
    U, Vh = vectors_of(base)
    scaled = base.S[i, :MASK_RANK, None] * Vh[i, :MASK_RANK]
    return _product(U[i, :, :MASK_RANK], scaled)


def _product(left: Tensor, right: Tensor) -> Tensor:
    """left @ right in fp32, computed in fp64 a few rows at a time."""
    out = torch.empty(len(left), right.shape[1], dtype=torch.float32, device=left.device)
    for rows, part in zip(left.split(512), out.split(512), strict=True):
        part.copy_(rows @ right)
    return out


# --- what chance gives --------------------------------------------------------------------------


def bulk_median(shape: tuple[int, int]) -> Tensor:
    """Median of the Marchenko-Pastur law, ()."""
    median = marchenko_pastur_median(min(shape) / max(shape))
    return torch.tensor(median, dtype=torch.float64)


def product_median(_rank: Tensor) -> Tensor:
    """∞: no singular value of a product is noise but by its factors' rounding."""
    return torch.tensor(float("inf"), dtype=torch.float64)


def iid(shape: tuple[int, int], settings: Settings) -> Tensor:
    """Spectra of Gaussian matrices, (draws, q)."""
    return iid_spectra(*shape, settings.seed)


@stage("metrics")
def sampled_spectra(S: Tensor, norms: Tensor, shape: tuple[int, int], settings: Settings) -> Tensor:
    """Spectra of the base with isotropic updates of the measured sizes, (b, draws, q)."""
    return tuned_spectra(S.cpu(), norms.cpu(), shape=shape, seed=settings.seed)


@stage("metrics")
def sampled_angles(
    S: Tensor, norms: Tensor, shape: tuple[int, int], settings: Settings, *, k: int
) -> tuple[Tensor, ...]:
    """Mean angles that isotropic updates of the measured sizes turn, left and right, (b,)."""
    both = mean_angles(S.cpu(), norms.cpu(), k=k, shape=shape, seed=settings.seed)
    return tuple(draws.mean(-1) for draws in both)
