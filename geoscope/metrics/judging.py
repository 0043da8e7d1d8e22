"""What every verdict is made of: conditions on numbers, a code a matrix, shares and counts."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["Check", "MatrixVerdict", "clause", "explained", "flagged_names", "shares_of"]


@dataclass(frozen=True)
class MatrixVerdict:
    """The verdict on one matrix; `checks` holds every condition that was looked at.

    k: the subspace dimension of the rules, None where they have none.
    """

    code: str
    k: int | None
    clause: str
    words: str
    checks: tuple[Check, ...]

    def to_json(self) -> dict[str, Any]:
        entry: dict[str, Any] = {"code": self.code}
        if self.k is not None:
            entry["k"] = self.k
        if self.clause:
            entry["clause"] = self.clause
        if self.words:
            entry["words"] = self.words
        return entry


@dataclass(frozen=True)
class Check:
    """One condition: `value` on the stated side of `limit`. value None: no number.

    `left_out`: the angle does not apply to this matrix (a complete basis), so the condition is
    dropped from its rule (docs/verdict.md#per-matrix); a condition on any other missing number does
    not hold.
    """

    code: str
    name: str
    value: float | None
    sign: str
    limit: float
    standing: str
    left_out: bool = False

    @property
    def holds(self) -> bool:
        if self.value is None:
            return self.left_out
        return _SIGNS[self.sign](self.value, self.limit)


_SIGNS: dict[str, Callable[[float, float], bool]] = {
    ">": lambda value, limit: value > limit,
    "<": lambda value, limit: value < limit,
    "≥": lambda value, limit: value >= limit,
    "≤": lambda value, limit: value <= limit,
}


def clause(checks: Sequence[Check]) -> str:
    return " and ".join(
        f"{check.name} {_number(check.value)} {check.sign} {_number(check.limit)}"
        for check in checks
    )


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}"


def shares_of(
    energy: Sequence[float], judged: Sequence[MatrixVerdict], codes: Sequence[str]
) -> dict[str, float]:
    """Share of the whole that each code holds, in the order of the codes."""
    total = math.fsum(energy)
    held = {
        code: [e for e, one in zip(energy, judged, strict=True) if one.code == code]
        for code in codes
    }
    return {code: math.fsum(part) / total for code, part in held.items() if part}


def flagged_names(
    names: Sequence[str],
    energy: Sequence[float],
    judged: Sequence[MatrixVerdict],
    codes: Sequence[str],
) -> tuple[str, ...]:
    """Names of the matrices with one of these codes, most energy first."""
    found = [
        (-e, name) for name, e, one in zip(names, energy, judged, strict=True) if one.code in codes
    ]
    return tuple(name for _, name in sorted(found))


def explained(judged: Sequence[MatrixVerdict]) -> tuple[dict[str, Any], ...]:
    """Each condition of the rules once, with how often it held and the range of what it met."""
    groups: dict[tuple[str, str, str, str], list[Check]] = {}
    for one in judged:
        for check in one.checks:
            name = check.name.replace(f"({one.k})", "(k)").replace(f"E_{one.k}", "E_k")
            groups.setdefault((check.code, name, check.sign, check.standing), []).append(check)
    entries = []
    for (code, name, sign, standing), checks in groups.items():
        met = [check.value for check in checks if check.value is not None]
        entries.append(
            {
                "code": code,
                "condition": f"{name} {sign}",
                "threshold": min(check.limit for check in checks),
                "standing": standing,
                "holds": sum(check.holds and not check.left_out for check in checks),
                "of": len(checks),
                "least": min(met, default=None),
                "largest": max(met, default=None),
            }
        )
    return tuple(entries)
