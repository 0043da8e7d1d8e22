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

__all__ = ["factorise_leading"]


def factorise_leading(
    A: Operand,
    k: int,
    *,
    cuts: Sequence[int] = (),
    seed: int = 0,
    budget: int | None = None,
    near: Factors | None = None,
    certified: int | None = None,
    room: Tensor | None = None,
) -> Factors:
    """The leading k triplets of A alone; S (b, k).

    Certified block Lanczos where that is cheaper than the whole spectrum (see choice.py). A matrix
    on which it does not converge within the budget (a flat spectrum, mostly) goes through its Gram
    matrix instead, and its `fallback` says so. near: factors of matrices close to these, from
    which the search starts. certified: how many of the leading vectors have to be right, default
    all k. The others may be rough, and no bound is stated for them. room: as for
    `leading_triplets`, on the CPU.
    """
    start = None
    if near is not None and near.U is not None and near.Vh is not None:
        start = near.Vh if A.is_tall else near.U.mT
    wanted = k if certified is None else certified
    options: dict[str, Any] = {"seed": seed, "budget": budget, "certified": wanted}
    as_stack = A.plus.device.type != "cpu"
    return _leading(A, k, cuts, start, options, room=room, as_stack=as_stack)


def _leading(
    A: Operand,
    k: int,
    cuts: Sequence[int],
    start: Tensor | None,
    options: dict[str, Any],
    *,
    room: Tensor | None = None,
    as_stack: bool,
) -> Factors:
    """The search where it pays, matrix by matrix or on the whole stack; else Gram matrices."""
    values_only = options["certified"] == 0
    found: list[Leading | None] = [None] * len(A)
    reasons: list[str | None] = [None] * len(A)
    if as_stack:
        if leading_pays_stacked(A.shape, k):
            found = [*stacked_leading(A, k, start=start, **options)]
    elif leading_pays(A.shape, k, values_only=values_only):
        starts = [None] * len(A) if start is None else list(start)
        for i, one in enumerate(starts):
            try:
                found[i] = leading_triplets(A.row(i), k, start=one, room=room, **options)
            except (NumericsError, RuntimeError) as error:
                reasons[i] = f"block Lanczos failed: {error}"
    parts = {
        i: _of_leading(one, values_only=values_only)
        for i, one in enumerate(found)
        if one is not None and one.converged
    }
    if rest := [i for i in range(len(A)) if i not in parts]:
        some = A.rows(rest) if parts else A
        whole = factorise(some, vectors=k, cuts=[cut for cut in cuts if cut <= k])
        for n, i in enumerate(rest):
            reason = reasons[i] if (tried := found[i]) is None else _flat(tried)
            parts[i] = _first(take(whole, n), k, reason)
    return concatenate([parts[i] for i in range(len(A))])


def _of_leading(found: Leading, *, values_only: bool) -> Factors:
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
