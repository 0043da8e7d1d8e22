"""Numbers, and why one is marked or missing. Nothing is ever replaced by 0, 1 or -1."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import NamedTuple, overload

__all__ = ["Collected", "Curve", "Numbers", "Reading", "Status", "Steps", "Values", "reading"]

Values = Mapping[str, float | int | None]
# One number for each step of a series.
Steps = tuple[float | None, ...]


@dataclass(frozen=True, slots=True)
class Curve(Sequence[tuple[float, float]]):
    """Points of a figure, a sequence of (x, y).

    x: where, ascending; the same for all matrices of one shape.
    y: how much there, to four significant digits.
    """

    x: tuple[float, ...]
    y: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.x) != len(self.y):
            raise ValueError(f"a curve has {len(self.x)} x and {len(self.y)} y")

    @classmethod
    def through(cls, points: Iterable[tuple[float, float]]) -> Curve:
        """The curve through these points."""
        pairs = tuple(points)
        return cls(tuple(x for x, _ in pairs), tuple(y for _, y in pairs))

    @overload
    def __getitem__(self, key: int) -> tuple[float, float]: ...

    @overload
    def __getitem__(self, key: slice) -> tuple[tuple[float, float], ...]: ...

    def __getitem__(
        self, key: int | slice
    ) -> tuple[float, float] | tuple[tuple[float, float], ...]:
        return tuple(zip(self.x, self.y, strict=True))[key]

    def __len__(self) -> int:
        return len(self.x)


class Status(StrEnum):
    """Why a number is marked or missing. Members stand in order of precedence.

    See docs/methods.md#statuses.
    """

    NON_FINITE = "NON_FINITE"
    ZERO_UPDATE = "ZERO_UPDATE"
    NOT_APPLICABLE = "NOT_APPLICABLE"
    NOT_CONVERGED = "NOT_CONVERGED"
    BELOW_RESOLUTION = "BELOW_RESOLUTION"
    CAUTION = "CAUTION"
    OK = "OK"

    @property
    def is_null(self) -> bool:
        """Whether a value with this status is None."""
        return self not in (Status.OK, Status.CAUTION)

    @property
    def sentence(self) -> str:
        """One sentence for the user."""
        return _SENTENCES[self]


_SENTENCES = {
    Status.NON_FINITE: "The tensor holds NaN or Inf.",
    Status.ZERO_UPDATE: "The update is exactly zero, so the quantity is undefined.",
    Status.NOT_APPLICABLE: "The quantity is not defined for this matrix.",
    Status.NOT_CONVERGED: "No method reached its residual bound, or computing it failed.",
    Status.BELOW_RESOLUTION: "Storage rounding is as large as what would be measured.",
    Status.CAUTION: "Storage rounding is a visible part of this number.",
    Status.OK: "Defined and resolved.",
}


class Reading(NamedTuple):
    """A number beside its null; value is None where it is undefined, null where there is none.

    status: of one matrix; None of numbers over several.
    """

    value: float | int | None
    null: float | None
    status: Status | None = None


def reading(
    key: str, values: Values, nulls: Mapping[str, float], status: Mapping[str, Status] | None = None
) -> Reading:
    """The number of an id; one that has a role is that of the update where none is named.

    Raises KeyError with near names.
    """
    full = key if key in values else f"update.{key}"
    if full not in values:
        near = [value for value in values if key.partition("@")[0] in value] or list(values)
        raise KeyError(f"no number {key!r} here; near: {', '.join(near[:8])}")
    known = None if status is None else status.get(full, Status.OK)
    return Reading(values[full], nulls.get(full), known)


@dataclass(frozen=True, kw_only=True)
class Numbers:
    """Numbers of one subject, each beside its null and its status.

    values: id → number, None exactly where `status[id]` is a null status.
    nulls: id → what chance gives for the same shape and size.
    status: id → why it is marked or missing; OK is not listed.
    raw: id → the number behind a BELOW_RESOLUTION.
    """

    values: Values = field(default_factory=dict)
    nulls: Mapping[str, float] = field(default_factory=dict)
    status: Mapping[str, Status] = field(default_factory=dict)
    raw: Mapping[str, float] = field(default_factory=dict)

    def __getitem__(self, key: str) -> Reading:
        """Value, null and status of an id: `record["stable_rank"].value`. Raises KeyError."""
        return reading(key, self.values, self.nulls, self.status)

    def status_of(self, key: str) -> Status:
        """OK where none is listed."""
        return self.status.get(key, Status.OK)


@dataclass(frozen=True, kw_only=True)
class Collected(Numbers):
    """Numbers as they are collected, in dicts; `put` keeps values, status and raw in step."""

    values: dict[str, float | int | None] = field(default_factory=dict)
    nulls: dict[str, float] = field(default_factory=dict)
    status: dict[str, Status] = field(default_factory=dict)
    raw: dict[str, float] = field(default_factory=dict)

    def put(self, key: str, value: float | None, status: Status = Status.OK) -> None:
        """A number with its status; None is NOT_APPLICABLE where the status says nothing else."""
        if value is None and not status.is_null:
            status = Status.NOT_APPLICABLE
        self.values[key] = None if status.is_null else value
        if status is not Status.OK:
            self.status[key] = status
        if status is Status.BELOW_RESOLUTION and value is not None:
            self.raw[key] = value

    def add(self, others: Numbers, names: Mapping[str, str] | None = None) -> None:
        """All of `others`, under new names where `names` has one."""
        new = names or {}
        self.values.update({new.get(key, key): value for key, value in others.values.items()})
        self.nulls.update({new.get(key, key): value for key, value in others.nulls.items()})
        self.status.update({new.get(key, key): value for key, value in others.status.items()})
        self.raw.update({new.get(key, key): value for key, value in others.raw.items()})
