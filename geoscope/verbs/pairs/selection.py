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
    judge = KINDS[kind].judge
    with_verdict = () if judge is None else RULES[judge].ids
    found = []
    for metric in METRICS:
        if metric.option is not None and not getattr(options, metric.option):
            continue
        for instance in instances(metric, dimensions(options, shape)):
            template = (
                instance.id if instance.k is None else instance.id.replace(f"@{instance.k}", "@k")
            )
            if metric.family in KINDS[kind].families or template in with_verdict:
                found.append(instance)
    return found


def all_selected(
    kind: str, options: Options, shapes: Iterable[tuple[int, int]]
) -> tuple[Instance, ...]:
    found = {one.id: one for shape in sorted(shapes) for one in selected(kind, options, shape)}
    return tuple(found.values())


def ids_of(kind: str, options: Options) -> tuple[str, ...]:
    """Every id that a report of this kind can hold; dimensions of the verdict stand as @k too."""
    shapes = [(8 * k, 8 * k) for k in range(1, 65)]  # every k_v that a shape can have
    return tuple(one.id for one in all_selected(kind, options, shapes))
