"""What the study says of each limit of the verdict."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from benchmarks.study.claims import contrast
from benchmarks.study.limits import LIMITS
from benchmarks.study.outcomes import END, Study
from benchmarks.study.resampling import Estimate, estimate, resamples

__all__ = ["Standing", "standings"]


@dataclass(frozen=True)
class Standing:
    """auc: of the statistic in the direction of the limit. shares: of failed and of other runs that
    are beyond it. apart: the first share less the second."""

    name: str
    auc: Estimate
    shares: tuple[float | None, float | None]
    apart: Estimate
    healthy: bool

    @property
    def reached(self) -> bool:
        """Whether some runs are beyond the limit and some are not."""
        known = [share for share in self.shares if share is not None]
        return bool(known) and not all(s == 0 for s in known) and not all(s == 1 for s in known)

    @property
    def supported(self) -> bool:
        apart = self.apart.below < 0 if self.healthy else self.apart.above > 0
        return self.reached and self.auc.above > 0.5 and apart

    @property
    def words(self) -> str:
        """The standing as the table of limits says it."""
        if not self.reached:
            return "ours, not reached by the study"
        if not self.supported:
            return "ours, unsupported by the study"
        value, low, high = (_short(x) for x in (self.auc.value, self.auc.low, self.auc.high))
        return f"study, AUC {value} [{low}, {high}]"


def _short(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}".removeprefix("0")


def standings(study: Study) -> list[Standing]:
    """Every limit that speaks of damage or health, at the end of the runs."""
    rows, failed = [], study.failed
    counts = resamples(range(len(failed)))
    for name, limit in LIMITS.items():
        values = study.statistic(limit.statistic, END)
        upward = limit.above is not limit.healthy
        share = study.statistic(f"beyond.{name}", END)
        past = np.where(np.isfinite(share), share >= 0.5, np.nan)
        sides = tuple(_mean(past[side]) for side in (failed, ~failed))
        rows.append(
            Standing(
                name,
                estimate(values if upward else -values, failed, counts),
                (sides[0], sides[1]),
                contrast(past, failed, ~failed),
                limit.healthy,
            )
        )
    return rows


def _mean(values: np.ndarray) -> float | None:
    known = values[np.isfinite(values)]
    return float(known.mean()) if len(known) else None
