"""How matrices combine into a module kind and a model (docs/methods.md#aggregation).

Only values that are numbers enter; an entry without any is null. Nulls combine by the same rule.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch

from geoscope.metrics.measure import Measured
from geoscope.metrics.metric import Instance
from geoscope.metrics.size import base_cosine

__all__ = ["aggregate"]

Terms = list[tuple[float, Measured]]


def aggregate(
    rows: Sequence[Measured], selected: Sequence[Instance]
) -> tuple[dict[str, float | int | None], dict[str, float]]:
    """Values and nulls over `rows`, for every id that any of them has."""
    values: dict[str, float | int | None] = {}
    nulls: dict[str, float] = {}
    for instance in selected:
        key = instance.id
        holders = [row for row in rows if key in row.values]
        if not holders:
            continue
        terms = [(float(value), row) for row in holders if (value := row.values[key]) is not None]
        values[key] = _combine(instance, terms)
        # The null of what was averaged: rows without a number count only when none has one.
        beside = [row for _, row in terms] or holders
        null_terms = [(row.nulls[key], row) for row in beside if key in row.nulls]
        if (null := _combine_nulls(instance, null_terms)) is not None:
            nulls[key] = null
    return values, nulls


def _combine(instance: Instance, terms: Terms) -> float | int | None:
    if not terms:
        return None
    value = _RULES[instance.metric.aggregate](instance, terms)
    if not math.isfinite(value):
        return None
    stays_whole = instance.metric.aggregate in ("sum", "max") or len({one for one, _ in terms}) == 1
    return round(value) if instance.metric.integer and stays_whole else value


def _combine_nulls(instance: Instance, terms: Terms) -> float | None:
    """Ratios have null 1 and cosines 0 whatever their parts; the rest combines like the values."""
    if not terms:
        return None
    if instance.metric.aggregate in ("base_cosine", "lift", "versus_base"):
        return terms[0][0]
    value = _RULES[instance.metric.aggregate](instance, terms)
    return value if math.isfinite(value) else None


def _mean(_: Instance, terms: Terms) -> float:
    return math.fsum(value for value, _ in terms) / len(terms)


def _sum(_: Instance, terms: Terms) -> float:
    return math.fsum(value for value, _ in terms)


def _max(_: Instance, terms: Terms) -> float:
    return max(value for value, _ in terms)


def _root_sum_square(_: Instance, terms: Terms) -> float:
    return math.sqrt(math.fsum(value * value for value, _ in terms))


def _weighted(weight: str) -> Callable[[Instance, Terms], float]:
    def rule(_: Instance, terms: Terms) -> float:
        total = math.fsum(row.weights.get(weight, 0.0) for _, row in terms)
        summed = math.fsum(value * row.weights.get(weight, 0.0) for value, row in terms)
        return _over(summed, total)

    return rule


def _relative_update(_: Instance, terms: Terms) -> float:
    """√(Σ‖ΔW‖²/Σ‖W0‖²) over changed matrices; 0 when nothing changed."""
    changed = [row for _, row in terms if row.weights["update"] > 0]
    if not changed:
        return 0.0
    update = math.fsum(row.weights["update"] for row in changed)
    return math.sqrt(_over(update, math.fsum(row.weights["base"] for row in changed)))


def _precision_ratio(_: Instance, terms: Terms) -> float:
    noise = math.fsum(row.weights["noise"] for _, row in terms)
    return math.sqrt(_over(noise, math.fsum(row.weights["update"] for _, row in terms)))


def _base_cosine(_: Instance, terms: Terms) -> float:
    """Σ⟨W0, W1⟩/√(Σ‖W0‖²·Σ‖W1‖²): the cosine of all matrices as one vector."""
    base, tuned, update = (
        math.sqrt(math.fsum(row.weights[side] for _, row in terms))
        for side in ("base", "tuned", "update")
    )
    return float(base_cosine(*torch.tensor([base, tuned, update], dtype=torch.float64)))


def _lift(instance: Instance, terms: Terms) -> float:
    """Captured energy over all energy, over its null combined likewise: C = lift·null."""
    nulls = [_two_sided_null(instance, row) for _, row in terms]
    captured = math.fsum(
        value * null * row.weights["update"]
        for (value, row), null in zip(terms, nulls, strict=True)
    )
    expected = math.fsum(
        null * row.weights["update"] for (_, row), null in zip(terms, nulls, strict=True)
    )
    return _over(captured, expected)


def _two_sided_null(instance: Instance, row: Measured) -> float:
    assert instance.k is not None
    return instance.k**2 / row.weights["parameters"]


def _versus_base(instance: Instance, terms: Terms) -> float:
    """Captured energy over the base's own share, both weighted by the update's energy."""
    shares = [row.weights[f"share@{instance.k}"] for _, row in terms]
    captured = math.fsum(
        value * share * row.weights["update"]
        for (value, row), share in zip(terms, shares, strict=True)
    )
    own = math.fsum(
        share * row.weights["update"] for (_, row), share in zip(terms, shares, strict=True)
    )
    return _over(captured, own)


def _over(numerator: float, denominator: float) -> float:
    return numerator / denominator if denominator > 0 else math.nan


_RULES: dict[str, Callable[[Instance, Terms], float]] = {
    "mean": _mean,
    "sum": _sum,
    "max": _max,
    "root_sum_square": _root_sum_square,
    "parameters": _weighted("parameters"),
    "energy": _weighted("update"),
    "changed": _weighted("changed"),
    "relative_update": _relative_update,
    "precision_ratio": _precision_ratio,
    "base_cosine": _base_cosine,
    "lift": _lift,
    "versus_base": _versus_base,
}
