"""How far ahead a method may be believed (docs/methods.md#credible-horizon, `ours`).

Pairs (o, τ) are grouped by the number of checkpoints ahead, τ − o. A group passes when the median
over origins of the skill 1 − Σerr/Σerr_hold (sums over tensors) is above 0, the 5 % bootstrap
bound of that median (tensors drawn with replacement) is too, and at least 3 origins reach it. The
horizon is the least distance in steps of the last group that passes together with all nearer
ones; 0 when the nearest fails.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import takewhile

import numpy as np
import torch
from torch import Tensor

from geoscope.linalg.quantile import quantile
from geoscope.trajectory.backtest import Backtest

__all__ = ["Distance", "Horizon", "credible_horizon"]

LEVEL = 0.05
LEAST_ORIGINS = 3
# Entries of the table of draws that is held at once.
_TABLE = 1 << 22


@dataclass(frozen=True)
class Distance:
    """A group of pairs that are equally many checkpoints apart.

    steps: least t_τ − t_o in it. origins: with anything to predict. skill: median over them, None
    without one; bound: its 5 % bootstrap bound; floor: the same median of ΣN_o/Σerr_hold, what the
    removal of storage rounding could give. error: √(Σerr/Σ‖Δ_τ‖²), and held: that of hold.
    """

    checkpoints: int
    steps: float
    origins: int
    skill: float | None
    bound: float | None
    floor: float | None
    error: float | None
    held: float | None

    @property
    def passes(self) -> bool:
        """Whether prediction this far ahead is credible."""
        return self._above(0.0)

    @property
    def is_resolved(self) -> bool:
        """Whether it is so beyond what storage rounding explains."""
        return self._above(self.floor or 0.0)

    def _above(self, least: float) -> bool:
        if self.skill is None or self.bound is None or self.origins < LEAST_ORIGINS:
            return False
        return self.skill > least and self.bound > least


@dataclass(frozen=True)
class Horizon:
    """steps: the credible horizon, 0 for none; resolved: as far as the skill is above what storage
    rounding explains, at most `steps`. stopped_by: what failed at the next distance, `skill`,
    `bound`, `origins`, or `end` when all distances with enough origins passed.
    """

    steps: float
    resolved: float
    stopped_by: str
    distances: tuple[Distance, ...]


def credible_horizon(test: Backtest, method: str, *, seed: int = 0, draws: int = 999) -> Horizon:
    """The horizon of a method by name, `damped(linear)` say. Seeded; on the CPU.

    With one tensor there is nothing to resample and the bound is the median itself: give the
    matrices one by one, never their sum.
    """
    chosen = test.rolling.nonzero()[:, 0]
    error, held = test.error(method)[:, chosen], test.held[:, chosen]
    size, distance = test.size[:, chosen], test.distance[chosen]
    ahead = (test.targets - test.origins)[chosen]
    rounding, total_held = test.rounding[:, chosen].sum(0), held.sum(0)
    drawn_error, drawn_held = _resampled(error, held, seed, draws)
    distances = []
    for group in sorted(set(ahead.tolist())):
        here = ahead == group
        usable = here & (total_held > 0)
        skills = _skills(error.sum(0)[usable], total_held[usable])
        medians = _median(_skills(drawn_error[:, usable], drawn_held[:, usable]))
        total = float(size[:, here].sum())
        distances.append(
            Distance(
                group,
                float(distance[here].min()),
                int(usable.sum()),
                float(_median(skills)) if len(skills) else None,
                quantile(medians, LEVEL) if len(skills) else None,
                float(_median((rounding / total_held)[usable])) if len(skills) else None,
                (float(error[:, here].sum()) / total) ** 0.5 if total > 0 else None,
                (float(held[:, here].sum()) / total) ** 0.5 if total > 0 else None,
            )
        )
    return _horizon(tuple(distances))


def _horizon(distances: tuple[Distance, ...]) -> Horizon:
    passed = list(takewhile(lambda one: one.passes, distances))
    resolved = list(takewhile(lambda one: one.is_resolved, distances))
    steps, far = (one[-1].steps if one else 0.0 for one in (passed, resolved))
    if len(passed) < len(distances):
        return Horizon(steps, far, _failure(distances[len(passed)], steps), distances)
    return Horizon(steps, far, "end" if distances else "origins", distances)


def _failure(one: Distance, reached: float) -> str:
    if one.skill is None or one.origins < LEAST_ORIGINS:
        return "end" if reached > 0 else "origins"
    return "skill" if one.skill <= 0 else "bound"


def _skills(error: Tensor, held: Tensor) -> Tensor:
    """1 − err/err_hold; a draw of tensors that did not move shows no skill: 0."""
    return torch.where(held > 0, 1 - error / torch.where(held > 0, held, 1), 0.0)


def _median(values: Tensor) -> Tensor:
    """Over the last dimension; the mean of the middle two where their number is even."""
    if values.shape[-1] == 0:
        return values.new_zeros(values.shape[:-1])
    return torch.from_numpy(np.asarray(np.median(values.numpy(), axis=-1)))


def _resampled(error: Tensor, held: Tensor, seed: int, draws: int) -> tuple[Tensor, Tensor]:
    """Sums over tensors drawn with replacement, (draws, P) each."""
    count = len(error)
    generator = torch.Generator().manual_seed(seed)
    at_once = max(1, _TABLE // count)
    errors, helds = [], []
    for start in range(0, draws, at_once):
        now = min(at_once, draws - start)
        picked = torch.randint(count, (now, count), generator=generator)
        times = torch.zeros(now, count, dtype=torch.float64)
        times.scatter_add_(1, picked, torch.ones(now, count, dtype=torch.float64))
        errors.append(times @ error)
        helds.append(times @ held)
    return torch.cat(errors), torch.cat(helds)
