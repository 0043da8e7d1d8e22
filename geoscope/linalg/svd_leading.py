"""The leading triplets of a stack, by what is cheapest and certified for its shape and device."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from geoscope.errors import NumericsError
from geoscope.linalg.certificate import Leading
from geoscope.linalg.choice import leading_pays, leading_pays_stacked
from geoscope.linalg.leading import leading_triplets
from geoscope.linalg.operand import Operand
from geoscope.linalg.stacked_leading import stacked_leading
from geoscope.linalg.svd import Factors, concatenate, factorise, take

__all__ = ["completed", "factorise_leading", "factors_of"]


def factorise_leading(
    A: Operand,
    k: int,
    *,
    cuts: Sequence[int] = (),
    seed: int = 0,
    budget: int | None = None,
    near: Factors | None = None,
    certified: int | None = None,
) -> Factors:
    """The leading k triplets of A alone; S (b, k).

    Certified block Lanczos where that is cheaper than the whole spectrum (see choice.py). A matrix
    on which it does not converge within the budget (a flat spectrum, mostly) goes through its Gram
    matrix instead, and its `fallback` says so. near: factors of matrices close to these, from
    which the search starts. certified: how many of the leading vectors have to be right, default
    all k. The others may be rough, and no bound is stated for them.
    """
    start = None if near is None else _start(near, tall=A.is_tall)
    wanted = k if certified is None else certified
    options: dict[str, Any] = {"seed": seed, "budget": budget, "certified": wanted}
    as_stack = A.plus.device.type != "cpu"
    return _leading(A, k, cuts, start, options, as_stack=as_stack)


def _leading(
    A: Operand,
    k: int,
    cuts: Sequence[int],
    start: Tensor | None,
    options: dict[str, Any],
    *,
    as_stack: bool,
) -> Factors:
    """The search where it pays, matrix by matrix or on the whole stack; else Gram matrices."""
    wanted = options["certified"]
    found: list[_Tried] = [(None, None)] * len(A)
    if as_stack:
        if leading_pays_stacked(A.shape, k):
            found = [(one, None) for one in stacked_leading(A, k, start=start, **options)]
    elif leading_pays(A.shape, k, values_only=wanted == 0):
        starts = [None] * len(A) if start is None else list(start)
        found = [_tried(A.row(i), k, start=one, **options) for i, one in enumerate(starts)]
    return _completed(A, k, cuts, found, values_only=wanted == 0)


def completed(A: Operand, k: int, tried: Leading, *, cuts: Sequence[int] = ()) -> Factors:
    """Factors of what a search found of one matrix; by its Gram matrix if it did not converge."""
    return _completed(A, k, cuts, [(tried, None)], values_only=False)


_Tried = tuple[Leading | None, str | None]


def _tried(A: Operand, k: int, **options: Any) -> _Tried:
    """What a search finds, or why it failed."""
    try:
        return leading_triplets(A, k, **options), None
    except (NumericsError, RuntimeError) as error:
        return None, f"block Lanczos failed: {error}"


def _completed(
    A: Operand, k: int, cuts: Sequence[int], found: Sequence[_Tried], *, values_only: bool
) -> Factors:
    """Of what was not found, the whole spectrum through Gram matrices, with the reason."""
    parts = {
        i: factors_of(one, values_only=values_only)
        for i, (one, _) in enumerate(found)
        if one is not None and one.converged
    }
    if rest := [i for i in range(len(A)) if i not in parts]:
        some = A.rows(rest) if parts else A
        whole = factorise(some, vectors=k, cuts=[cut for cut in cuts if cut <= k])
        for n, i in enumerate(rest):
            tried, reason = found[i]
            reason = reason if tried is None else _flat(tried)
            parts[i] = _first(take(whole, n), k, reason)
    return concatenate([parts[i] for i in range(len(A))])


def _start(near: Factors, *, tall: bool) -> Tensor | None:
    """Rows of the shorter side from which a search starts, (b, k, q)."""
    if near.U is None or near.Vh is None:
        return None
    return near.Vh if tall else near.U.mT


def factors_of(found: Leading, *, values_only: bool = False) -> Factors:
    """Of one matrix, of what a search found."""
    # Without a gap there is no subspace to bound, and reports hold no infinity.
    stated = not values_only and math.isfinite(found.sine)
    method = {
        "how": f"block-lanczos-{found.dimension}" if found.dimension else "zero",
        "bound": found.bound,
        "subspace_bound": found.sine if stated else None,
        "fallback": None,
    }
    return Factors(found.S[None], found.U.T[None], found.Vh[None], (method,))


def _flat(tried: Leading) -> str:
    return f"block Lanczos reached residual {tried.residual:.1e} only: a flat spectrum"


def _first(one: Factors, k: int, reason: str | None) -> Factors:
    """The leading k values of a whole spectrum, and why it was taken."""
    (method,) = one.methods
    reason = method["fallback"] or reason
    return replace(one, S=one.S[..., :k], methods=({**method, "fallback": reason},))
