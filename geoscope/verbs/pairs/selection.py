"""Which ids does a report hold? Families of METRICS by kind, over the dimensions of each shape."""

from __future__ import annotations

from collections.abc import Iterable

from geoscope.kinds import KINDS
from geoscope.metrics import METRICS, RULES, Instance, instances, verdict_dimension
from geoscope.verbs.options import Options

__all__ = [
    "all_selected",
    "dimensions",
    "ids_of",
    "selected",
    "verdict_k",
]


def dimensions(options: Options, shape: tuple[int, int]) -> tuple[int, ...]:
    """The dimensions of the @k ids of one shape, the verdict's among them."""
    return tuple(sorted({*options.ks, verdict_k(options, shape)}))


def verdict_k(options: Options, shape: tuple[int, int]) -> int:
    """k_v of a shape; with `quick` no larger than the largest dimension asked for."""
    k = verdict_dimension(shape)
    return min(k, max(options.ks)) if options.quick else k


def selected(kind: str, options: Options, shape: tuple[int, int]) -> list[Instance]:
    """The instances of METRICS that a report of this kind holds for one shape."""
    return _selected(kind, options, dimensions(options, shape))


def _selected(kind: str, options: Options, ks: Iterable[int]) -> list[Instance]:
    """The same with the dimensions `ks`."""
    judge = KINDS[kind].judge
    with_verdict = () if judge is None else RULES[judge].ids
    return [
        instance
        for metric in METRICS
        if metric.option is None or getattr(options, metric.option)
        for instance in instances(metric, ks)
        if metric.family in KINDS[kind].families or _template(instance) in with_verdict
    ]


def _template(instance: Instance) -> str:
    """The id with @k in place of its dimension."""
    return instance.id if instance.k is None else instance.id.replace(f"@{instance.k}", "@k")


def all_selected(
    kind: str, options: Options, shapes: Iterable[tuple[int, int]]
) -> tuple[Instance, ...]:
    # many shapes have the same dimensions
    every = dict.fromkeys(dimensions(options, shape) for shape in sorted(shapes))
    found = {one.id: one for ks in every for one in _selected(kind, options, ks)}
    return tuple(found.values())


def ids_of(kind: str, options: Options) -> tuple[str, ...]:
    """Every id that a report of this kind can hold; dimensions of the verdict stand as @k too."""
    shapes = [(8 * k, 8 * k) for k in range(1, 65)]  # every k_v that a shape can have
    every = sorted({k for shape in shapes for k in dimensions(options, shape)})
    return tuple(instance.id for instance in _selected(kind, options, every))
