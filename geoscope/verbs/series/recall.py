"""What is kept of a tensor of a series between runs, so that a run that was stopped goes on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from geoscope.engine import matrix_boundary
from geoscope.engine.cache import (
    Recalled,
    ResultCache,
    content_of,
    packed,
    recalled_or_made,
    unpacked,
)
from geoscope.models.checkpoint import Checkpoint
from geoscope.trajectory.changed import ChangedEntries
from geoscope.trajectory.increments import Increments
from geoscope.trajectory.rank1 import Rank1Path
from geoscope.trajectory.scalar_r2 import ScalarR2Counts
from geoscope.verbs.series.options import FollowOptions
from geoscope.verbs.series.passes import Kept, measured
from geoscope.verbs.series.tensors import AdapterTensor, ModelTensor, SeriesTensor

__all__ = ["entry_of", "recalled_or_measured"]


def recalled_or_measured(
    tensor: SeriesTensor, steps: Sequence[float], options: FollowOptions, cache: ResultCache | None
) -> Recalled[Kept]:
    """What an earlier run kept of a tensor, or what the pass over it gives.

    Raises NumericsError, which is not kept.
    """
    weights = _weights(tensor)

    def facts() -> dict[str, Any]:
        return {
            "weights": [content_of(weight()) for weight in weights or ()],
            "facts": _facts(tensor),
            "steps": list(steps),
            "kind": "trajectory",
            "settings": [options.directions, options.scalar_r2, options.seed],
        }

    with matrix_boundary():
        return recalled_or_made(
            None if weights is None else cache,
            facts,
            lambda: measured(tensor, steps, options),
            entry_of,
            _kept,
        )


def _weights(tensor: SeriesTensor) -> list[Callable[[], Any]] | None:
    """Readers of all that the numbers hang on, each called once; None where making is the work."""
    if isinstance(tensor, ModelTensor):
        return None if tensor.is_made else [_reader(*place) for place in tensor.places]
    if not isinstance(tensor, AdapterTensor):
        return None
    module, expert = tensor.module, tensor.expert
    adapters = (*([] if tensor.initial is None else [tensor.initial]), *tensor.adapters)
    factors = [
        lambda side=side, adapter=adapter: adapter.factors(module)[side][expert]
        for adapter in adapters
        for side in (0, 1)
    ]
    return [*factors, *(_reader(*place) for place in tensor.places)]


def _reader(checkpoint: Checkpoint, name: str) -> Callable[[], Any]:
    return lambda: checkpoint.read(name)


def _facts(tensor: SeriesTensor) -> list[Any]:
    """What the entries do not tell: rounding of FP8 blocks, scalings of adapters, the start."""
    if isinstance(tensor, ModelTensor):
        return [checkpoint.rounding(name) for checkpoint, name in tensor.places]
    assert isinstance(tensor, AdapterTensor)
    adapters = (tensor.initial, *tensor.adapters)
    return [None if one is None else one.modules[tensor.module].scaling for one in adapters]


def entry_of(kept: Kept) -> dict[str, Any]:
    """What is kept of a tensor as the cache holds it."""
    inc, counts = kept.increments, kept.scalar_r2
    return {
        "increments": {
            **{key: getattr(inc, key) for key in ("steps", "rounding", "base_energy", "grids")},
            "H": packed(inc.H),
            "along": packed(inc.along),
        },
        "path": _packed_path(kept.path),
        "local": _packed_path(kept.local),
        "products": packed(kept.products),
        "method": kept.method,
        "scalar_r2": None if counts is None else [packed(counts.counts), counts.entries],
        "changed": None if kept.changed is None else asdict(kept.changed),
    }


def _packed_path(path: Rank1Path | None) -> dict[str, Any] | None:
    return None if path is None else {key: packed(value) for key, value in asdict(path).items()}


def _kept(entry: Any) -> Kept | None:
    """What `entry_of` gave; None for anything else."""
    try:
        inc, counts = entry["increments"], entry["scalar_r2"]
        lists = {key: tuple(inc[key]) for key in ("steps", "rounding", "grids")}
        H, along = unpacked(inc["H"]), unpacked(inc["along"])
        return Kept(
            Increments(H=H, along=along, base_energy=inc["base_energy"], **lists),
            _path(entry["path"]),
            _path(entry["local"]),
            unpacked(entry["products"]),
            entry["method"],
            None if counts is None else ScalarR2Counts(unpacked(counts[0]), counts[1]),
            _changed(entry["changed"]),
        )
    except (AttributeError, KeyError, IndexError, TypeError, ValueError):
        return None


def _changed(entry: Any) -> ChangedEntries | None:
    if entry is None:
        return None
    rows = {key: tuple(row) for key, row in entry.items() if key != "entries"}
    return ChangedEntries(entry["entries"], **rows)


def _path(entry: Any) -> Rank1Path | None:
    return None if entry is None else Rank1Path(**{k: unpacked(v) for k, v in entry.items()})
