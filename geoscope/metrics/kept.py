"""Factors that are made once: of a base for all its tuned models, of an update for all overlaps.

Numbers are those without, bit by bit: what is recalled is what the same call gave before.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from geoscope.linalg import Factors, Operand, concatenate, factorise

__all__ = ["PHI_DIMENSIONS", "Recall", "leading_of_update", "overlap_cuts", "values_of_updates"]

PHI_DIMENSIONS = (1, 8, 16)

# (number in the stack, facts, how to make them) → factors of one matrix, kept from before or made.
Recall = Callable[[int, Mapping[str, Any], Callable[[], Factors]], Factors]


def overlap_cuts(ks: Sequence[int], q: int) -> list[int]:
    """The subspace dimensions of overlaps that matrices with a shorter side q have."""
    return [k for k in (*ks, *PHI_DIMENSIONS) if k <= q]


def leading_of_update(
    update: Operand, cuts: Sequence[int], solver: str, recall: Recall | None, i: int
) -> Factors:
    """All values of an update, one matrix, and the vectors that its overlaps take."""
    make = partial(factorise, update, vectors=max(cuts), cuts=cuts, solver=solver)
    facts = {"cuts": list(cuts), "solver": solver, "update": True}
    return make() if recall is None else recall(i, facts, make)


def values_of_updates(updates: Operand, ks: Sequence[int], recall: Recall) -> Factors | None:
    """All values of updates whose overlaps will be asked for: their vectors are kept meanwhile.

    By Gram matrices, where values come before vectors and do not depend on them. None where
    overlaps have no cut, or where the vectors took another method.
    """
    cuts = overlap_cuts(ks, min(updates.shape))
    if not cuts:
        return None
    count = range(len(updates))
    rows = [leading_of_update(updates.row(i), cuts, "auto", recall, i) for i in count]
    whole = rows[0] if len(rows) == 1 else concatenate(rows)
    if any(method["fallback"] is not None for method in whole.methods):
        return None
    methods = tuple({**method, "subspace_bound": None} for method in whole.methods)
    return replace(whole, U=None, Vh=None, methods=methods)
