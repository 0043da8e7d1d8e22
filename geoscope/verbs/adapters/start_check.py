"""Did an adapter that says nothing of it begin as a part of its base? Asked of a few matrices."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass

import torch

from geoscope.adapters.blind_start import blind_start
from geoscope.errors import GeoscopeError
from geoscope.linalg.factor_update import FactorUpdate
from geoscope.models.checkpoint import Checkpoint
from geoscope.peft.adapted import AdaptedCheckpoint
from geoscope.records import WeightPair
from geoscope.verbs.pairs.prepare import Prepared

__all__ = ["LARGE", "SeenStart", "has_unknown_start", "seen_start"]

# Matrices that are looked at, the smallest ones: all begin alike.
_LOOKED_AT = 3
# ρ above which an adapter without a known start is named for it.
LARGE = 0.05


@dataclass(frozen=True)
class SeenStart:
    """method: pissa, milora, olora or geora. seen, of: matrices that look so, and looked at."""

    method: str
    seen: int
    of: int

    @property
    def text(self) -> str:
        return (
            f"on {self.seen} of {self.of} inspected matrices, the update looks like the initial "
            f"adapter of {self.method}. That start would then be counted twice; give the adapter "
            "as it was before training as `initial_adapter`"
        )


def has_unknown_start(tuned: Checkpoint) -> bool:
    """Whether an adapter's product before training is not known."""
    return isinstance(tuned, AdaptedCheckpoint) and tuned.start is None


def seen_start(prepared: Prepared) -> SeenStart | None:
    """What at least half of a few matrices look like; None where the start is known or zero.

    Reads the smallest adapted matrices of the base.
    """
    tuned = prepared.tuned
    if not isinstance(tuned, AdaptedCheckpoint) or not tuned.lies_over(prepared.base):
        return None
    if tuned.start is not None or not prepared.has_base:
        return None
    factored = [
        matrix
        for matrix in prepared.pairing.matrices
        if (change := tuned.changes.get(matrix.tuned.name)) is not None
        and change.has_factors
        and change.rows is None
    ]
    smallest = sorted(factored, key=lambda one: (math.prod(one.shape), one.name))[:_LOOKED_AT]
    found = [_seen(prepared, tuned, one) for one in smallest]
    counts = Counter(one for one in found if one is not None).most_common(1)
    if not counts or 2 * counts[0][1] < len(found):
        return None
    method, seen = counts[0]
    return SeenStart(method, seen, len(found))


def _seen(prepared: Prepared, tuned: AdaptedCheckpoint, one: WeightPair) -> str | None:
    change = tuned.changes[one.tuned.name]
    assert change.module is not None
    first = prepared.devices[0]
    device = first if first.type == "cuda" else torch.device("cpu")  # MPS has no fp64
    factors = [x[None].to(device) for x in tuned.update(prepared.base, one.tuned.name)]
    update = FactorUpdate.of(factors)
    try:
        return blind_start(
            prepared.base.read(one.base.name).to(device),
            update.product,
            rank=change.module.rank,
            scaling=change.module.scaling,
        )
    except GeoscopeError:  # a matrix that is not finite, said when it is measured
        return None
