"""`--verbose`: by which method each matrix was factorised, and how good that is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from geoscope.records import LayerRecord
from geoscope.report.grids import MATRIX
from geoscope.report.page import Block, Cell, Grid, Head
from geoscope.report.sections import Section

__all__ = ["methods_block"]

_ROLES = ("base", "tuned", "update")


def methods_block(section: Section) -> Block:
    """One row a matrix: the largest bounds, and how base, tuned and update were factorised.

    An exact SVD has no bound on subspaces.
    """
    heads = (MATRIX, Head("σ"), Head("subspace"), Head("how", is_words=True, is_long=True))
    rows = tuple(
        (
            Cell(layer.name),
            Cell(_largest(layer, "bound")),
            Cell(_largest(layer, "subspace_bound")),
            Cell(_how(layer.method)),
        )
        for layer in section.layers
        if layer.method
    )
    said = (
        "σ: bound on the error of every singular value, over the largest. "
        "subspace: bound on the sine of the error angle of the subspaces."
    )
    return Block("how each matrix was computed", (said,) if rows else (), Grid(heads, rows))


def _largest(layer: LayerRecord, key: str) -> str:
    bounds = [one[key] for one in layer.method.values() if one.get(key) is not None]
    return f"{max(bounds):.1e}" if bounds else ""


def _how(method: Mapping[str, Mapping[str, Any]]) -> str:
    """`gram-tridiagonal: base, tuned; svd: update (why)`."""
    roles: dict[str, list[str]] = {}
    for factor in sorted(method, key=_place):
        how, reason = str(method[factor].get("how")), method[factor].get("fallback")
        words = f"{how} ({reason})" if reason else how
        roles.setdefault(words, []).append(factor.removesuffix(".S"))
    return "; ".join(f"{', '.join(names)}: {how}" for how, names in roles.items())


def _place(factor: str) -> tuple[int, str]:
    role = factor.partition(".")[0]
    return _ROLES.index(role) if role in _ROLES else len(_ROLES), factor
