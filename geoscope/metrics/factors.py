"""From a pair of stored matrices to the factors that metrics take; each is computed once.

The vocabulary (b = stack of matrices of one shape, K = base vectors at hand, at least the largest
dimension asked for):

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
    base.edge, tuned.edge                   (b,)       σ up to here may be rounding
    angles.left@k, angles.right@k           (b, k)     principal angles base/tuned
    intruders.left, intruders.right         (b, ≤10)   max_i |⟨u_j(W1), u_i(W0)⟩|
    masks.low|principal|control             (b,)       overlaps; .density and .matched behind
    rank.nominal, rank.max                  (b,)       of an update in factors: r, and its limit
    {base,tuned,update}.bulk_median         ()         median of the Marchenko-Pastur law; inf
                                                       for an update in factors
    iid.S                                   (draws, q) spectra of Gaussian matrices
    sampled.S                               (b, draws, q) of the base with isotropic updates
    sampled.left@k, sampled.right@k         (b,)       mean angles that those turn

FACTORS says what makes each and from what. A factor is one row there and one function in
`providers.py`. Rows start from what `pair_factors` and `update_factors` give: *.weights and
*.rounding, or update.factored; shape, settings, and how deep each role is factorised. `*.triplets`,
`*.operand` and `base.basis` hold whole matrices or bases, and are let go after their last use.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import or_
from types import MappingProxyType
from typing import Any

from torch import Tensor

from geoscope.linalg import Operand
from geoscope.linalg.factor_update import FactorUpdate
from geoscope.metrics import factorising, providers
from geoscope.metrics.collapse import INTRUDER_DIRECTIONS
from geoscope.metrics.kept import Recall
from geoscope.metrics.masks import MASK_RANK
from geoscope.metrics.metric import ROLES
from geoscope.metrics.providers import MASKS, RULES, Depth, Settings
from geoscope.metrics.resolver import Provider, Step, plan, resolve
from geoscope.records import Quantisation

__all__ = [
    "FACTORS",
    "GIVEN",
    "PairFactors",
    "Recall",
    "Rounding",
    "Settings",
    "pair_factors",
    "update_factors",
]

# What storing base and tuned as codes rounded away; None for another storage.
Rounding = tuple[Quantisation | None, Quantisation | None]


@dataclass(frozen=True)
class PairFactors:
    """Factors of a stack of pairs, and how each was got (one mapping a matrix)."""

    shape: tuple[int, int]
    values: Mapping[str, Tensor]
    methods: tuple[Mapping[str, Mapping[str, Any]], ...]
    notes: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class _Frame:
    """What decides how deep a matrix is factorised for a row."""

    q: int
    ks: tuple[int, ...]
    settings: Settings


# --- how deep a row has a role factorised: (frame, k) → Depth -----------------------------------


def _all_values(_frame: _Frame, _k: int | None) -> Depth:
    return Depth(whole=True)


def _leading_values(_frame: _Frame, k: int | None) -> Depth:
    return Depth(values=k or 0)


def _subspace(_frame: _Frame, k: int | None) -> Depth:
    return Depth(vectors=k or 0, cuts=(k or 0,))


def _crossing(frame: _Frame, _k: int | None) -> Depth:
    if frame.settings.curves:  # a basis to the end: its last vectors are to be as good
        return Depth(vectors=frame.q, cuts=(*frame.ks, frame.q))
    return Depth(vectors=max(frame.ks, default=0), cuts=frame.ks)


def _intruding(frame: _Frame, _k: int | None) -> Depth:
    return Depth(vectors=min(frame.q, INTRUDER_DIRECTIONS))


def _masking(frame: _Frame, _k: int | None) -> Depth:
    return Depth(vectors=MASK_RANK if frame.q >= MASK_RANK else 0)


# --- the table ----------------------------------------------------------------------------------


def _stored(role: str) -> tuple[Provider, ...]:
    """What the stored entries of base or tuned tell."""
    weights, sides = f"{role}.weights", f"{role}.sides"
    sizes = tuple(f"{role}.{name}" for name in ("norm", "noise", "eps"))
    return (
        Provider((sides,), (weights, f"{role}.rounding"), providers.sides),
        Provider(sizes, (sides, weights), providers.entry_sizes),
    )


def _factorised(
    role: str, reuses: tuple[str, ...] = (), fn: Any = factorising.factorised
) -> tuple[Provider, ...]:
    """The factorisation of a role, and its values."""
    triplets, top = f"{role}.triplets", f"{role}.top"
    return (
        Provider(
            (triplets, top, f"how.{role}.S"),
            (f"{role}.operand", f"{role}.depth", "settings"),
            fn,
            reuses=reuses,
            drops=(triplets,),
        ),
        Provider(
            (f"{role}.S",), (top, "settings"), providers.whole_spectrum, asks={role: _all_values}
        ),
        Provider((f"{top}@k",), (top,), lambda top, *, k: top, asks={role: _leading_values}),
    )


def _operand(role: str, needs: tuple[str, ...], fn: Any) -> Provider:
    return Provider((f"{role}.operand",), needs, fn, drops=(f"{role}.operand",))


_SIDES = ("base.sides", "tuned.sides")
_WEIGHTS = ("base.weights", "tuned.weights")
_NOISES = ("base.noise", "tuned.noise")
_EDGES = ("base.edge", "tuned.edge")
_TRIPLETS = ("base.triplets", "tuned.triplets")

# In the order in which they are computed where needs leave a choice.
FACTORS: tuple[Provider, ...] = (
    *_stored("base"),
    *_stored("tuned"),
    Provider(
        ("tuned.noise", "update.noise", "update.grid", "tuned.eps", "rank.nominal", "rank.max"),
        ("update.factored",),
        providers.factored_facts,
    ),
    Provider(("tuned.norm",), ("update.factored", "base.weights"), FactorUpdate.tuned_norm),
    Provider(tuple(f"unchanged.{rule}" for rule in RULES), _WEIGHTS, providers.shares),
    _operand("base", ("base.weights",), Operand),
    *_factorised("base", reuses=("base.recall",), fn=factorising.base_factors),
    Provider(
        ("base.edge",), ("base.triplets", "shape", "base.noise"), providers.pair_edge,
    ),
    _operand("tuned", ("tuned.weights",), Operand),
    _operand(
        "tuned", ("update.factored", "base.weights"),
        lambda update, base: Operand(update.over(base)),
    ),
    *_factorised("tuned", reuses=("base.triplets",)),
    Provider(("tuned.edge",), ("tuned.triplets", "shape", *_NOISES), providers.pair_edge),
    Provider(
        ("angles.left@k", "angles.right@k"),
        (*_TRIPLETS, *_EDGES),
        providers.angles,
        asks={"base": _subspace, "tuned": _subspace},
    ),
    Provider(
        ("intruders.leading",),
        ("tuned.triplets", "base.triplets", "base.edge", *_NOISES),
        providers.intruder_matches,
        drops=("intruders.leading",),
    ),
    Provider(
        ("base.basis", "how.base.basis"),
        ("base.operand", "base.triplets", "intruders.leading", "settings"),
        providers.intruder_basis,
        drops=("base.basis",),
    ),
    Provider(
        ("intruders.left", "intruders.right"),
        ("tuned.triplets", "base.basis", "base.edge", *_NOISES, "base.triplets",
         "intruders.leading", "tuned.edge"),
        providers.intruders,
        asks={"base": _intruding, "tuned": _intruding},
    ),
    _operand("update", ("tuned.weights", "base.weights"), Operand),
    _operand("update", ("update.factored",), lambda update: update.product),
    *_factorised("update", reuses=("update.recall",), fn=factorising.update_factors),
    Provider(("update.norm",), ("update.operand",), providers.update_norm, reuses=("update.S",)),
    Provider(
        ("update.noise", "update.grid"),
        (*_NOISES, "update.norm", *_SIDES),
        providers.update_rounding,
    ),
    Provider(
        ("cross.cut@k",), ("base.triplets", "base.edge", "shape"), providers.cross_cut,
        asks={"base": _subspace},
    ),
    Provider(
        ("cross.right", "cross.left", "cross.core"),
        ("update.operand", "base.triplets"),
        providers.cross,
        asks={"base": _crossing},
    ),
    Provider(("cells",), _SIDES, providers.cells),
    Provider(
        tuple(f"isotropic.{rule}" for rule in RULES),
        ("cells", "update.norm", "shape"),
        providers.expected_shares,
    ),
    Provider(
        (*MASKS, "masks.changed"),
        ("cells", *_WEIGHTS, "base.triplets"),
        providers.masks,
        asks={"base": _masking},
    ),
    Provider(("notes",), (*_WEIGHTS, *_SIDES, "update.noise"), providers.pair_remarks),
    Provider(("notes",), ("base.sides",), providers.base_remarks),
    Provider(("update.bulk_median",), ("rank.max",), providers.product_median),
    *(Provider((f"{role}.bulk_median",), ("shape",), providers.bulk_median) for role in ROLES),
    Provider(("iid.S",), ("shape", "settings"), providers.iid),
    Provider(
        ("sampled.S",), ("base.S", "update.norm", "shape", "settings"), providers.sampled_spectra,
    ),
    Provider(
        ("sampled.left@k", "sampled.right@k"),
        ("base.S", "update.norm", "shape", "settings"),
        providers.sampled_angles,
    ),
)  # fmt: skip

_ALWAYS_GIVEN = frozenset({"shape", "settings", *(f"{role}.depth" for role in ROLES)})
# What rows may start from.
GIVEN = _ALWAYS_GIVEN | {
    *(*_WEIGHTS, "base.rounding", "tuned.rounding"),
    *("base.recall", "update.recall", "update.factored"),
}
# What weights in an aggregate and precision floors read, whatever the metrics take.
_SIZES = frozenset(
    {*(f"{role}.norm" for role in ROLES), *(f"{role}.noise" for role in ROLES)}
    | {"update.grid", "rank.max", "notes"}
)


def pair_factors(
    base: Tensor,
    tuned: Tensor | FactorUpdate,
    *,
    takes: frozenset[str],
    ks: Sequence[int],
    settings: Settings,
    rounding: Sequence[Rounding] = (),
    recall: Mapping[str, Recall] = MappingProxyType({}),
) -> PairFactors:
    """All factors named in `takes` of a stack of pairs, and the sizes that floors need.

    base, tuned: (b, m, n), finite, in storage dtypes, on the device of the computation; of an
    adapter the update in its factors, of which what needs single entries is left out. ks: the
    dimensions of this shape, the verdict's among them. rounding: of each pair, where a side was
    stored as codes. Of these, and of other grids, the rounding cells are not known, and what
    is expected of an isotropic update in them, the masks among it, is left out. recall: role,
    `base` or `update` → where factors of it are kept.
    """
    pairs = rounding or [(None, None)] * len(base)
    given: dict[str, Any] = {"base.weights": base, "base.rounding": [noise for noise, _ in pairs]}
    given |= {f"{role}.recall": one for role, one in recall.items()}
    if isinstance(tuned, FactorUpdate):
        given["update.factored"] = tuned
    else:
        given |= {"tuned.weights": tuned, "tuned.rounding": [noise for _, noise in pairs]}
    m, n = base.shape[-2:]
    return _factors(given, (m, n), takes, ks, settings)


def update_factors(
    update: FactorUpdate, *, takes: frozenset[str], settings: Settings
) -> PairFactors:
    """Those factors of `takes` that an update in its factors has without its base."""
    return _factors({"update.factored": update}, update.product.shape, takes, (), settings)


def _factors(
    given: dict[str, Any],
    shape: tuple[int, int],
    takes: frozenset[str],
    ks: Sequence[int],
    settings: Settings,
) -> PairFactors:
    frame = _Frame(min(shape), tuple(sorted({k for k in ks if k <= min(shape)})), settings)
    wanted = frozenset(name for name in takes if _is_inside(name, frame.ks)) | _SIZES
    steps = plan(FACTORS, wanted, _ALWAYS_GIVEN.union(given))
    given |= {"shape": shape, "settings": settings}
    given |= {f"{role}.depth": _depth(role, steps, frame) for role in ROLES}
    made = resolve(steps, given)
    how = {name.removeprefix("how."): made[name] for name in made if name.startswith("how.")}
    count = len(made["update.norm"])
    return PairFactors(
        shape=shape,
        values={name: value for name, value in made.items() if isinstance(value, Tensor)},
        methods=tuple({name: rows[i] for name, rows in how.items()} for i in range(count)),
        notes=made.get("notes", ((),) * count),
    )


def _is_inside(name: str, ks: tuple[int, ...]) -> bool:
    """Whether this shape has the subspace that a name is about; leading values do always."""
    stem, _, k = name.partition("@")
    return not k or stem.endswith(".top") or int(k) in ks


def _depth(role: str, steps: Sequence[Step], frame: _Frame) -> Depth:
    """How deep a role is factorised to serve all steps."""
    asked = [
        step.provider.asks[role](frame, step.k) for step in steps if role in step.provider.asks
    ]
    return reduce(or_, asked, Depth())
