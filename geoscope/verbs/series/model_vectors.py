"""Norms and biases of whole models over a series. `next` alone predicts them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from geoscope.models.checkpoint import Checkpoint
from geoscope.models.pairing import pair
from geoscope.names import NameMap, in_natural_order
from geoscope.trajectory.next_predictor import VectorExample
from geoscope.verbs.fetching import fetch
from geoscope.verbs.options import Progress
from geoscope.verbs.series.options import FollowOptions
from geoscope.verbs.series.tensors import MatchedSeries, ModelTensor

__all__ = ["ModelVector", "model_vectors"]


@dataclass(frozen=True)
class ModelVector:
    """(checkpoint, name there) at every step, the base first."""

    places: tuple[tuple[Checkpoint, str], ...]

    def example(self, horizon: int) -> VectorExample:
        """What a network of its length learns from."""
        weights = torch.stack([one.read(name).double() for one, name in self.places])
        return VectorExample.of(weights, horizon)

    def moved(self, step: Tensor) -> Tensor:
        """W_T + step, in the dtype of W_T."""
        last, stored = self.places[-1]
        weight = last.read(stored)
        return (weight.double() + step).to(weight.dtype)


def model_vectors(
    found: MatchedSeries, options: FollowOptions, progress: Progress
) -> Mapping[str, ModelVector]:
    """Of a series of whole models the vectors that all have with one length, by name."""
    tensor = next(iter(found.tensors.values()))
    assert isinstance(tensor, ModelTensor)  # adapters were refused
    base, *checkpoints = [checkpoint for checkpoint, _ in tensor.places]
    rules = NameMap(options.map_name)
    pairings = [pair(base, one, options.selection, rules).vectors for one in checkpoints]
    names = [{one.name: one for one in own} for own in pairings]
    common = in_natural_order(set(names[0]).intersection(*names[1:]))
    vectors = {
        name: ModelVector(
            (
                (base, names[0][name].base.name),
                *((one, own[name].tuned.name) for one, own in zip(checkpoints, names, strict=True)),
            )
        )
        for name in common
    }
    fetch(
        (
            (one, [vector.places[i][1] for vector in vectors.values()])
            for i, one in enumerate((base, *checkpoints))
        ),
        progress,
    )
    return vectors
