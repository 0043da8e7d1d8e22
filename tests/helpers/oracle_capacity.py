"""How much of its rank does an update use? Straight from section 7 of the methods reference.

As `oracle`: plain numpy, dense, fp64, and no code of the package. An update in factors is made
dense here, and the rounding of its factors is summed entry by entry.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tests.helpers.oracle import FLOORS, least_k, participation_ratio, perplexity, signal_edge, ulp

CAPACITY: tuple[str, ...] = (
    "nominal_rank",
    "effective_rank_share",
    "entropy_rank_share",
    "k90_share",
    "k99_share",
    "tail_ratio",
    "suggested_rank",
)
_CLASS = {
    "effective_rank_share": "amplitude",
    "entropy_rank_share": "energy",
    "k90_share": "energy",
    "k99_share": "amplitude",
    "tail_ratio": "amplitude",
}
Part = tuple[np.ndarray, np.ndarray, float]


@dataclass(frozen=True)
class CapacityRow:
    """Numbers, what is kept of those below resolution, nulls and statuses by id; the verdict."""

    values: dict[str, float | None]
    raw: dict[str, float]
    nulls: dict[str, float]
    status: dict[str, str]
    code: str


def product_of(parts: Sequence[Part]) -> np.ndarray:
    """s·B·A of the first part without those of the others, (m, n)."""
    first, *rest = (s * (B @ A) for B, A, s in parts)
    return first - sum(rest, np.zeros_like(first))


def factor_noise(parts: Sequence[Part], storage: str) -> float:
    """√E‖s(dB·A + B·dA)‖_F² of all parts: every entry of every factor errs by ulp/√12."""
    total = 0.0
    for B, A, s in parts:
        of_B, of_A = ulp(B, storage) ** 2 / 12, ulp(A, storage) ** 2 / 12
        total += s**2 * np.sum(of_B @ A**2 + B**2 @ of_A)
    return float(np.sqrt(total))


def of_factors(parts: Sequence[Part], storage: str, *, nominal: int | None = None) -> CapacityRow:
    """Of s·B·A (m, n), without its start where a second part is given. nominal: r of the config."""
    update = product_of(parts)
    rank = min(sum(B.shape[1] for B, _, _ in parts), *update.shape)
    asked = parts[0][0].shape[1] if nominal is None else nominal
    return _row(update, factor_noise(parts, storage), rank, asked)


def of_pair(base: np.ndarray, tuned: np.ndarray, storage: str) -> CapacityRow:
    """Of two stored matrices."""
    noise = float(np.sqrt(np.sum(ulp(tuned, storage) ** 2) / 12))
    return _row(tuned - base, noise, None, None)


def _row(update: np.ndarray, noise: float, rank: int | None, nominal: int | None) -> CapacityRow:
    S = np.linalg.svd(update, compute_uv=False)
    values: dict[str, float | None] = dict.fromkeys(CAPACITY)
    raw: dict[str, float] = {}
    nulls: dict[str, float] = {}
    status: dict[str, str] = dict.fromkeys(CAPACITY, "NOT_APPLICABLE")
    if nominal is not None:
        values["nominal_rank"] = nominal
        del status["nominal_rank"]
    if rank is not None:
        nulls = dict.fromkeys(("effective_rank_share", "entropy_rank_share", "tail_ratio"), 1.0)
        flat = np.ones(rank)
        nulls |= {f"k{level}_share": least_k(flat, level / 100) / rank for level in (90, 99)}
    if not update.any():
        status |= dict.fromkeys(CAPACITY[1:], "ZERO_UPDATE")
        return CapacityRow(values, raw, nulls, status, "NO_UPDATE")

    numbers: dict[str, float] = {}
    if rank is not None:
        numbers = {
            "effective_rank_share": perplexity(S[:rank]) / rank,
            "entropy_rank_share": perplexity(S[:rank] ** 2) / rank,
            "k90_share": least_k(S[:rank], 0.90) / rank,
            "k99_share": least_k(S[:rank], 0.99) / rank,
            "tail_ratio": S[rank - 1] / S[0],
        }
    nu = noise / np.sqrt(np.sum(S**2))
    spread = 0.0 if rank is None else np.sqrt(rank / participation_ratio(S))
    for key, number in numbers.items():
        measure = nu * spread if _CLASS[key] == "amplitude" else nu
        ok, caution = FLOORS[_CLASS[key]]
        found = "OK" if measure <= ok else "CAUTION" if measure <= caution else "BELOW_RESOLUTION"
        _put(values, raw, status, key, float(number), found)
    m, n = update.shape
    edge = signal_edge(S, m, n, noise)
    if rank is not None:  # stored exactly: no bulk is noise, but what its factors rounded
        edge = noise / np.sqrt(m * n) * (np.sqrt(m) + np.sqrt(n))
        edge = max(edge, max(m, n) * 2.0**-52 * S[0])
    above = S[edge < S]
    needed = float(least_k(above, 0.9)) if len(above) else 0.0
    found = "OK" if len(above) else "BELOW_RESOLUTION"
    _put(values, raw, status, "suggested_rank", needed, found)
    return CapacityRow(values, raw, nulls, status, _code(values, rank, nominal))


def _put(
    values: dict[str, float | None],
    raw: dict[str, float],
    status: dict[str, str],
    key: str,
    number: float,
    found: str,
) -> None:
    if found == "BELOW_RESOLUTION":
        raw[key] = number
    else:
        values[key] = number
    status[key] = found
    if found == "OK":
        del status[key]


def _code(values: dict[str, float | None], rank: int | None, nominal: int | None) -> str:
    """First rule of section 7 that matches, for numbers that are all there."""
    if rank is None or nominal is None:
        return "FULL_UPDATE"
    k90, tail, effective, k99 = (
        values[key] for key in ("k90_share", "tail_ratio", "effective_rank_share", "k99_share")
    )
    if k90 is None or tail is None or effective is None or k99 is None:
        return "UNDETERMINED"
    if k90 >= 0.75 and tail >= 0.1:
        return "SATURATED"
    if effective < 0.1:
        return "RANK_COLLAPSE" if nominal >= 16 else "CONCENTRATED"
    return "IDLE" if k99 * rank / nominal <= 0.5 else "USED"
