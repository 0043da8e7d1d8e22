"""Numbers of one subject of a series, as they are collected."""

from __future__ import annotations

from dataclasses import dataclass, field

from geoscope.records import Collected

__all__ = ["SeriesNumbers", "Steps"]

Steps = tuple[float | None, ...]


@dataclass(frozen=True, kw_only=True)
class SeriesNumbers(Collected):
    """Values of one subject with all that stands beside them. series: id → one number a step."""

    series: dict[str, Steps] = field(default_factory=dict)
