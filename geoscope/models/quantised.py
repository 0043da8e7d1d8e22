"""Which weights of a model are stored as codes and scales that geoscope reads?

They stand among the tensors under the name and in the shape that the live model has; what they are
read with stands there no more.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from geoscope.formats.four_bit import BnbWeight, bnb_states, bnb_weight, mx_weights
from geoscope.formats.fp8 import fp8_weights
from geoscope.formats.quantised import Quantised
from geoscope.formats.refused import block_of
from geoscope.models.checkpoint import Source
from geoscope.records import TensorInfo

__all__ = ["quantised_weights", "with_weights"]


def quantised_weights(
    stored: Mapping[str, TensorInfo], config: Mapping[str, Any], source: Source
) -> tuple[dict[str, Quantised], str | None]:
    """Name of a weight → how it is read; and the first FP8 tensor whose scale is absent or odd.

    Of bitsandbytes the small tensors that hold the shapes are read.
    """
    weights, odd = fp8_weights(stored, block_of(config))
    weights |= mx_weights(stored)
    weights |= {weight.info.name: weight for weight in _bnb_weights(stored, source)}
    return weights, odd


def _bnb_weights(stored: Mapping[str, TensorInfo], source: Source) -> Iterator[BnbWeight]:
    states = list(bnb_states(stored))
    wanted: dict[str, list[str]] = {}
    for _, _, state in states:
        wanted.setdefault(state.source, []).append(state.name)
    if wanted:
        source.fetch(wanted)
    for name, kind, state in states:
        text = bytes(source.open(state.source).read(state.name, None).reshape(-1).tolist())
        weight = bnb_weight(name, kind, state, text, stored)
        if weight is not None:
            yield weight


def with_weights(
    stored: Mapping[str, TensorInfo], weights: Mapping[str, Quantised]
) -> dict[str, TensorInfo]:
    """The tensors of a model, sorted by name: quantised weights in place of their parts."""
    parts = {part.name for weight in weights.values() for part in weight.parts}
    rest = {name: info for name, info in stored.items() if name not in parts}
    return dict(sorted((rest | {name: weight.info for name, weight in weights.items()}).items()))
