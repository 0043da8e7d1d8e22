"""Which matrices ask for a look first, and why these."""

from __future__ import annotations

from geoscope.records import LayerRecord
from geoscope.report.sections import Section, dimension, with_dimension

__all__ = ["worst", "worst_words"]


def worst(section: Section, most: int) -> list[LayerRecord]:
    """Those the verdict flags, worst first, else the largest by the kind's number."""
    flagged = section.verdict.flagged if section.verdict else ()
    if flagged:
        by_name = {layer.name: layer for layer in section.layers}
        return [by_name[name] for name in flagged if name in by_name][:most]
    sized = [
        (value, layer)
        for layer in section.layers
        if (value := _at_own_k(section.kind.worst, layer)) is not None
    ]
    sized.sort(key=lambda item: -item[0])
    return [layer for _, layer in sized[:most]]


def worst_words(section: Section) -> str:
    """What these are."""
    flagged = section.verdict.flagged if section.verdict else ()
    if flagged:
        return f"flagged: {len(flagged)} of {len(section.layers)} matrices, worst first"
    label = section.kind.worst.removesuffix("@k").replace("_", " ")
    return f"largest {label}"


def _at_own_k(pattern: str, layer: LayerRecord) -> float | int | None:
    return layer.values.get(with_dimension(pattern, dimension(layer)))
