"""What `extrapolate` predicted, in folders or in memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

__all__ = ["Extrapolation"]


@dataclass(frozen=True)
class Extrapolation:
    """What was predicted. chosen: tensor → method. skill: pooled held-out skill of what was asked
    for. folders: one model in each; without `out` none, and the tensors of each are in `models`.
    config: adapter_config.json of a predicted adapter. rank, discarded: of a predicted adapter, and
    the part of the predicted update's energy that this rank leaves out. horizon: credible distance
    in steps; ahead: the distance that was asked for.
    """

    out: Path | None
    target: int
    last: int
    method: str
    chosen: Mapping[str, str] = field(repr=False)
    skill: float | None
    horizon: float
    notes: tuple[str, ...]
    folders: tuple[Path, ...]
    rank: int | None = None
    discarded: float | None = None
    config: Mapping[str, Any] | None = field(default=None, repr=False)
    models: tuple[Mapping[str, Tensor], ...] = field(default=(), repr=False)

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        """Of the model or adapter, of a family the first; empty where they were written."""
        return self.models[0] if self.models else {}

    @property
    def ahead(self) -> int:
        return self.target - self.last

    @property
    def counts(self) -> dict[str, int]:
        return dict(Counter(self.chosen.values()).most_common())
