"""From a pair of stored matrices to the factors that metrics take; each is computed once.

The vocabulary (b = stack of matrices of one shape, K = largest subspace dimension asked for):

    base.S, tuned.S, update.S               (b, q)     singular values, descending; not with `quick`
    base.top@j, tuned.top@j, update.top@j   (b, ≥ j)   the leading ones: at least j of them
    base.norm, tuned.norm, update.norm      (b,)       Frobenius norms
    base.noise, tuned.noise                 (b,)       √(Σulp²/12): what storing them rounded away
    update.noise                            (b,)       tuned.noise, and that of a quantised base
    update.grid                             (b,)       what of it is the rounding of grids; or 0
    base.eps, tuned.eps                     (b,)       spacing at 1 of the storage format
    unchanged.relative|absolute|exact       (b,)       shares of entries that did not move
    isotropic.relative|absolute|exact       (b,)       the same, expected of an isotropic update
    cross.right, cross.left                 (b, K)     ‖ΔW v_j‖², ‖u_jᵀΔW‖²
    cross.core                              (b, K, K)  (u_iᵀΔW v_j)²
    cross.cut@k                             (b,)       1, NaN where the base has no subspace of k
    base.edge                               (b,)       σ up to here may be rounding
    angles.left@k, angles.right@k           (b, k)     principal angles base/tuned
    intruders.left, intruders.right         (b, ≤10)   max_i |⟨u_j(W1), u_i(W0)⟩|
    masks.low|principal|control             (b,)       overlaps; .density and .matched behind
    rank.nominal, rank.max                  (b,)       of an update in factors: r, and its limit
    {base,tuned,update}.bulk_median         ()         median of the Marchenko-Pastur law; inf
                                                       for an update in factors

Nothing is held in fp64 as a whole on the CPU: products are taken block by block from the stored
entries (`Operand`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from geoscope.errors import NumericsError
from geoscope.linalg import (
    Factors,
    Operand,
    factorise,
    factorise_leading,
    principal_angles,
)
from geoscope.linalg.changes import Side, changed_mask, expected_unchanged, side, unchanged
from geoscope.linalg.factor_update import FactorUpdate
from geoscope.linalg.grids import grid_of
from geoscope.linalg.isotropic import isotropic_spread
from geoscope.linalg.product import Product, factorise_product
from geoscope.linalg.storage import FP8
from geoscope.metrics.collapse import INTRUDER_DIRECTIONS
from geoscope.metrics.masks import MASK_RANK, mask_overlaps
from geoscope.metrics.metric import ROLES
from geoscope.metrics.nulls import marchenko_pastur_median
from geoscope.metrics.storage_notes import base_notes, storage_notes
from geoscope.metrics.subspaces import (
    directions_edge,
    has_subspace,
    matches,
    settled,
    solver_edge,
    vectors_of,
)

__all__ = ["PairFactors", "Rounding", "Settings", "pair_factors", "update_factors"]

# What FP8 blocks rounded away in base and tuned, as Frobenius norms; None for another storage.
Rounding = tuple[float | None, float | None]


@dataclass(frozen=True)
class Settings:
    """What decides the numbers, apart from the weights.

    ks: subspace dimensions asked for. curves: take the base's whole basis. solver: `auto` or
    `exact`. dtype: `float64`, or `float32` for spectra of devices without fp64. quick: leading
    triplets only; what needs a whole spectrum is then not applicable.
    """

    ks: tuple[int, ...] = (8, 64)
    solver: str = "auto"
    dtype: str = "float64"
    curves: bool = False
    masks: bool = False
    quick: bool = False
    seed: int = 0


@dataclass(frozen=True)
class PairFactors:
    """Factors of a stack of pairs, and how each was got (one mapping a matrix)."""

    shape: tuple[int, int]
    values: Mapping[str, Tensor]
    methods: tuple[Mapping[str, Mapping[str, Any]], ...]
    notes: tuple[tuple[str, ...], ...]


@dataclass
class _Work:
    """The factors under construction; `base` keeps the base's vectors while they are needed."""

    settings: Settings
    values: dict[str, Tensor] = field(default_factory=dict)
    methods: dict[str, tuple[Mapping[str, Any], ...]] = field(default_factory=dict)
    base: Factors | None = None

    def factorise(
        self,
        role: str,
        A: Operand | Product,
        *,
        takes: frozenset[str],
        vectors: int = 0,
        cuts: Sequence[int],
    ) -> Factors:
        """The factors of A: its whole spectrum, or the leading triplets where these do.

        Leading values alone are exact to rounding; leading vectors come from an fp32 space, so that
        angles are good to 1e-5 and not to 1e-8: they do with `quick` only. Kept as `role`.S and
        `role`.top@j; how they were got under `role`.S.
        """
        settings = self.settings
        whole = f"{role}.S" in takes and not settings.quick
        values_do = not (whole or vectors)
        asked = settings.solver == "exact" or settings.dtype != "float64"
        if isinstance(A, Product):
            factors = factorise_product(A, vectors=vectors, cuts=cuts)
        elif (settings.quick or values_do) and not asked:
            # One more than is taken, for the gap behind the last.
            values = max(_leading_values(takes, role), vectors) + 1
            factors = factorise_leading(
                A,
                min(values, min(A.shape)),
                cuts=cuts,
                seed=settings.seed,
                near=self.base if role == "tuned" else None,
                values_only=vectors == 0,
            )
        else:
            dtype = torch.float64 if settings.dtype == "float64" else torch.float32
            factors = factorise(A, vectors=vectors, cuts=cuts, solver=settings.solver, dtype=dtype)
        self.methods[f"{role}.S"] = factors.methods
        if whole:
            self.values[f"{role}.S"] = factors.S
        self.values[f"{role}.top"] = factors.S
        for name in takes:
            if name.startswith(f"{role}.top@"):
                self.values[name] = factors.S
        return factors


def pair_factors(
    base: Tensor,
    tuned: Tensor | FactorUpdate,
    *,
    takes: frozenset[str],
    ks: Sequence[int],
    settings: Settings,
    rounding: Sequence[Rounding] = (),
) -> PairFactors:
    """All factors named in `takes` of a stack of pairs.

    base, tuned: (b, m, n), finite, in storage dtypes, on the device of the computation; of an
    adapter the update in its factors, of which what needs single entries is left out. ks: the
    dimensions of this shape, the verdict's among them. rounding: of each pair, where a side was
    stored in FP8 blocks. Of these, and of other grids, the rounding cells are not known, and what
    is expected of an isotropic update in them, the masks among it, is left out.
    """
    work = _Work(settings)
    notes: tuple[tuple[str, ...], ...] = ()
    m, n = base.shape[-2:]
    q = min(m, n)
    inside = sorted({k for k in ks if k <= q})
    rounding = rounding or [(None, None)] * len(base)
    W0 = Operand(base)
    sides: list[tuple[Side, Side]] = []
    if isinstance(tuned, FactorUpdate):
        notes = _from_factors(work, base, tuned, [one for one, _ in rounding])
        _of_update(work, tuned)
        update = tuned.product
    else:
        sides = _from_storage(work, base, tuned, takes, rounding)
        update = Operand(tuned, base)
    _spectra(work, W0, tuned, takes, inside)
    if "update.S" in takes or _any(takes, "update.top@"):
        work.factorise("update", update, takes=takes, cuts=())
    spectrum = work.values.get("update.S")  # Σσ² is the sum over the entries, without a pass
    work.values["update.norm"] = update.norm() if spectrum is None else spectrum.norm(dim=-1)
    if isinstance(tuned, Tensor):
        _add_update_noise(work.values, sides)
    if _any(takes, "cross."):
        _cross(work, update, inside)
    if isinstance(tuned, Tensor) and not any(one.is_quantised for pair in sides for one in pair):
        _isotropic(work, sides, (m, n), takes)
        if _any(takes, "masks."):
            _masks(work, base, tuned, sides)
    if isinstance(tuned, Tensor):
        noise = work.values["update.noise"].tolist()
        notes = tuple(
            storage_notes(base.dtype, tuned.dtype, *pair, base_counts=one > pair[1].noise)
            for pair, one in zip(sides, noise, strict=True)
        )
    return _found(work, (m, n), notes)


def update_factors(
    update: FactorUpdate, *, takes: frozenset[str], settings: Settings
) -> PairFactors:
    """Those factors of `takes` that an update in its factors has without its base."""
    work = _Work(settings)
    _of_update(work, update)
    work.factorise("update", update.product, takes=takes | {"update.S"}, cuts=())
    work.values["update.norm"] = work.values["update.top"].norm(dim=-1)
    return _found(work, update.product.shape, ((),) * len(update.product))


def _of_update(work: _Work, update: FactorUpdate) -> None:
    """Rounding noise, spacing and ranks; what the base rounded is in no product."""
    product = update.product
    ones = torch.ones_like(update.noise)
    work.values["update.noise"] = work.values["tuned.noise"] = update.noise
    work.values["update.grid"] = 0 * ones
    work.values["tuned.eps"] = update.fmt.eps * ones
    work.values["rank.nominal"] = update.nominal * ones
    work.values["rank.max"] = product.rank * ones


def _found(work: _Work, shape: tuple[int, int], notes: tuple[tuple[str, ...], ...]) -> PairFactors:
    values = work.values
    median = values["update.norm"].new_tensor(marchenko_pastur_median(min(shape) / max(shape)))
    values |= {f"{role}.bulk_median": median for role in ROLES}
    if "rank.max" in values:  # no singular value of a product is noise but by its factors' rounding
        values["update.bulk_median"] = median.new_tensor(float("inf"))
    return PairFactors(
        shape=shape,
        values=values,
        methods=tuple(
            {name: methods[i] for name, methods in work.methods.items()} for i in range(len(notes))
        ),
        notes=notes,
    )


def _leading_values(takes: frozenset[str], role: str) -> int:
    """How many leading singular values of a role are taken."""
    prefix = f"{role}.top@"
    return max((int(name[len(prefix) :]) for name in takes if name.startswith(prefix)), default=0)


def _any(takes: frozenset[str], prefix: str) -> bool:
    """Whether a factor of this kind is taken; the factors of a kind come together."""
    return any(name.startswith(prefix) for name in takes)


def _from_storage(
    work: _Work,
    base: Tensor,
    tuned: Tensor,
    takes: frozenset[str],
    rounding: Sequence[Rounding],
) -> list[tuple[Side, Side]]:
    """Norms, rounding noise and changed shares, straight from the stored entries."""
    sides = [
        (_side(before, noise), _side(after, other))
        for before, after, (noise, other) in zip(base, tuned, rounding, strict=True)
    ]

    def column(numbers: Sequence[float]) -> Tensor:
        return torch.tensor(numbers, dtype=torch.float64, device=base.device)

    for role, which in (("base", 0), ("tuned", 1)):
        work.values[f"{role}.norm"] = column([pair[which].norm for pair in sides])
        work.values[f"{role}.noise"] = column([pair[which].noise for pair in sides])
        work.values[f"{role}.eps"] = column([pair[which].fmt.eps for pair in sides])
    if _any(takes, "unchanged."):
        shares = [unchanged(before, after) for before, after in zip(base, tuned, strict=True)]
        for rule in ("relative", "absolute", "exact"):
            work.values[f"unchanged.{rule}"] = column([getattr(one, rule) for one in shares])
    return sides


def _from_factors(
    work: _Work, base: Tensor, update: FactorUpdate, rounding: Sequence[float | None]
) -> tuple[tuple[str, ...], ...]:
    """Norms and rounding noise of a base and of an update in its factors; remarks on each base.

    The tuned weight is never stored: what is rounded is the factors.
    """
    sides = [_side(weight, noise) for weight, noise in zip(base, rounding, strict=True)]

    def column(numbers: Sequence[float]) -> Tensor:
        return torch.tensor(numbers, dtype=torch.float64, device=base.device)

    work.values["base.norm"] = column([one.norm for one in sides])
    work.values["base.noise"] = column([one.noise for one in sides])
    work.values["base.eps"] = column([one.fmt.eps for one in sides])
    work.values["tuned.norm"] = update.tuned_norm(base)
    return tuple(base_notes(one) for one in sides)


def _side(weight: Tensor, noise: float | None) -> Side:
    """noise: what FP8 blocks rounded away, which the entries do not show; other grids they do."""
    found = side(weight)
    if not 1e-150 < found.norm < 1e150 and bool(weight.any()):
        raise NumericsError("squares of the weights leave fp64: multiply the model by a constant")
    if noise is not None:
        return replace(found, noise=noise, fmt=FP8)
    grid = grid_of(weight)
    return found if grid is None else replace(found, noise=grid.noise_with(found.noise), grid=grid)


def _add_update_noise(values: dict[str, Tensor], sides: Sequence[tuple[Side, Side]]) -> None:
    """The tuned side's rounding, and that of a quantised base, in quadrature; (b,).

    Training mostly starts from the weights before they were quantised: the base's error is in the
    update then. An update of half that size or less cannot hold it, and started from the grid.
    """
    quantised = values["base.noise"].new_tensor(
        [[one.is_quantised for one in pair] for pair in sides]
    )
    base, tuned = values["base.noise"] * quantised[:, 0], values["tuned.noise"]
    base = torch.where(values["update.norm"] > base / 2, base, 0.0)
    values["update.noise"] = torch.hypot(tuned, base)
    values["update.grid"] = torch.hypot(tuned * quantised[:, 1], base)


def _isotropic(
    work: _Work, sides: list[tuple[Side, Side]], shape: tuple[int, int], takes: frozenset[str]
) -> None:
    """Changed shares expected of an isotropic update that measures as large once it is stored."""
    if not _any(takes, "isotropic."):
        return
    norms = work.values["update.norm"]
    entries = (shape[0] * shape[1]) ** 0.5
    shares = [
        expected_unchanged(
            before, after.fmt, isotropic_spread(before, after, float(norm) / entries)
        )
        for (before, after), norm in zip(sides, norms, strict=True)
    ]
    for rule in ("relative", "absolute", "exact"):
        work.values[f"isotropic.{rule}"] = norms.new_tensor([getattr(one, rule) for one in shares])


def _spectra(
    work: _Work,
    W0: Operand,
    tuned_weight: Tensor | FactorUpdate,
    takes: frozenset[str],
    ks: Sequence[int],
) -> None:
    """Spectra and leading subspaces of base and tuned; angles and intruders between them."""
    angles = _any(takes, "angles.")
    base_vectors, tuned_vectors = _vectors(work.settings, min(W0.shape), takes, ks)
    if not (base_vectors or "base.S" in takes or _any(takes, "base.top@")):
        return
    cuts = ks if base_vectors else ()
    work.base = base = work.factorise("base", W0, takes=takes, vectors=base_vectors, cuts=cuts)
    shape = (W0.shape[-2], W0.shape[-1])
    work.values["base.edge"] = directions_edge(base, work.values["base.noise"], shape)
    if not (tuned_vectors or "tuned.S" in takes or _any(takes, "tuned.top@")):
        return
    cuts = ks if angles else ()
    is_update = isinstance(tuned_weight, FactorUpdate)
    W1 = Operand(tuned_weight.over(W0.plus) if is_update else tuned_weight)
    tuned = work.factorise("tuned", W1, takes=takes, vectors=tuned_vectors, cuts=cuts)
    tuned_noise = torch.hypot(work.values["base.noise"], work.values["tuned.noise"])
    edge = directions_edge(tuned, tuned_noise, shape)
    if angles:
        _angles(work, base, tuned, edge, ks)
    if _any(takes, "intruders."):
        _intruders(work, W0, base, tuned, edge)


def _vectors(
    settings: Settings, q: int, takes: frozenset[str], ks: Sequence[int]
) -> tuple[int, int]:
    """How many leading triplets of base and of tuned are needed."""
    angles = _any(takes, "angles.")
    crossing = _any(takes, "cross.")
    leading = max(ks, default=0)
    base = leading if crossing or angles else 0
    tuned = leading if angles else 0
    if crossing and settings.curves:
        base = q
    if _any(takes, "intruders."):
        base, tuned = (max(one, min(q, INTRUDER_DIRECTIONS)) for one in (base, tuned))
    if _any(takes, "masks.") and q >= MASK_RANK:
        base = max(base, MASK_RANK)
    return base, tuned


def _angles(
    work: _Work, base: Factors, tuned: Factors, tuned_edge: Tensor, ks: Sequence[int]
) -> None:
    """Principal angles of the leading subspaces; NaN for a complete basis or an undefined one."""
    U0, V0 = vectors_of(base)
    U1, V1 = vectors_of(tuned)
    shape = (U0.shape[-2], V0.shape[-1])
    for k in ks:
        defined = has_subspace(base, work.values["base.edge"], k=k, shape=shape)
        defined &= has_subspace(tuned, tuned_edge, k=k, shape=shape)
        for which, before, after in (("left", U0, U1), ("right", V0.mT, V1.mT)):
            angles = principal_angles(before[..., :k], after[..., :k])
            known = (defined & (k < before.shape[-2]))[:, None]
            work.values[f"angles.{which}@{k}"] = torch.where(known, angles, torch.nan)


def _intruders(work: _Work, W0: Operand, base: Factors, tuned: Factors, tuned_edge: Tensor) -> None:
    """Largest |cos| of each leading tuned vector with any thin singular vector of the base.

    The leading base vectors mostly settle it: either one of them reaches ½, or they leave so
    little of the tuned vector unexplained that no other can. Otherwise the whole basis is taken;
    with `quick` the intruders are then left open. 1 for what is no direction of the tuned matrix.
    """
    k = min(INTRUDER_DIRECTIONS, min(W0.shape))
    U1, V1 = vectors_of(tuned)
    left, right = U1[..., :k].mT, V1[..., :k, :]
    noise = torch.hypot(work.values["base.noise"], work.values["tuned.noise"])
    energies = matches(left, right, base, edge=work.values["base.edge"], noise=noise)
    if min(W0.shape) > vectors_of(base)[1].shape[-2] and not all(map(settled, energies)):
        if work.settings.quick:
            return
        whole = factorise(W0, vectors=min(W0.shape), solver=work.settings.solver)
        work.methods["base.basis"] = whole.methods
        energies = matches(left, right, whole, edge=work.values["base.edge"], noise=noise)
    defined = (base.S[..., :1] > 0) & (tuned.S[..., :1] > 0)
    stored = tuned.S[..., :k] <= tuned_edge[:, None]
    for which, found in zip(("left", "right"), energies, strict=True):
        cosines = torch.where(stored, 1.0, found[0].amax(-1).sqrt())
        work.values[f"intruders.{which}"] = torch.where(defined, cosines, torch.nan)


def _cross(work: _Work, update: Operand | Product, ks: Sequence[int]) -> None:
    """Energies of the update along the base's singular directions."""
    assert work.base is not None
    U, Vh = vectors_of(work.base)
    shape = (U.shape[-2], Vh.shape[-1])
    for k in ks:
        defined = has_subspace(work.base, work.values["base.edge"], k=k, shape=shape)
        work.values[f"cross.cut@{k}"] = torch.where(defined, 1.0, torch.nan)
    edge = solver_edge(work.base, shape)
    defined = work.base.S[..., : Vh.shape[-2]] > edge[:, None]
    # (b, K, m): ΔW v_j as rows, (b, K, n): u_jᵀΔW as rows
    right, left = update.both(Vh, U.mT.contiguous())
    for name, energies in (
        ("right", right.square().sum(-1)),
        ("left", left.square().sum(-1)),
        ("core", (right @ U).mT.square()),
    ):
        known = defined if name != "core" else defined[:, :, None] & defined[:, None]
        work.values[f"cross.{name}"] = torch.where(known, energies, torch.nan)


def _product(left: Tensor, right: Tensor) -> Tensor:
    """left @ right in fp32, computed in fp64 a few rows at a time."""
    out = torch.empty(len(left), right.shape[1], dtype=torch.float32, device=left.device)
    for rows, part in zip(left.split(512), out.split(512), strict=True):
        part.copy_(rows @ right)
    return out


def _masks(work: _Work, base: Tensor, tuned: Tensor, sides: Sequence[tuple[Side, Side]]) -> None:
    """Overlaps of the changed mask with the base's masks, and their matched nulls."""
    assert work.base is not None
    results = []
    for i, (before, after) in enumerate(zip(base, tuned, strict=True)):
        reconstruction = None
        if min(before.shape) >= MASK_RANK:
            U, Vh = vectors_of(work.base)
            scaled = work.base.S[i, :MASK_RANK, None] * Vh[i, :MASK_RANK]
            reconstruction = _product(U[i, :, :MASK_RANK], scaled)
        results.append(
            mask_overlaps(
                before,
                reconstruction,
                changed_mask(before, after),
                base_side=sides[i][0],
                tuned_format=sides[i][1].fmt,
            )
        )

    def column(numbers: Sequence[float]) -> Tensor:
        return torch.tensor(numbers, dtype=torch.float64, device=base.device)

    for key in ("low", "principal", "control"):
        for name, attribute in (("", "overlap"), (".density", "density"), (".matched", "matched")):
            numbers = [getattr(one, attribute).get(key, float("nan")) for one in results]
            work.values[f"masks.{key}{name}"] = column(numbers)
    work.values["masks.changed"] = column([float(one.changed) for one in results])
