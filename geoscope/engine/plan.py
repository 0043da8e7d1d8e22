"""What is computed together: batches of equal shape under the memory budget. Pure, on headers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from geoscope.errors import OptionError
from geoscope.records import WeightPair

__all__ = [
    "Batch",
    "default_memory",
    "estimate_seconds",
    "parse_memory",
    "plan",
    "room_for_batches",
]

# A process with torch loaded and nothing done; counted apart from the matrices.
BASELINE = 500 * 10**6

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "KB": 10**3, "MB": 10**6, "GB": 10**9}

# fp64 flops a second of one CPU core in what dominates, the Gram matrix and its eigenvalues; only
# the printed estimate hangs on it.
_FLOPS = 25e9


@dataclass(frozen=True)
class Batch:
    """Pairs of one shape and one pair of dtypes, computed in one stack."""

    pairs: tuple[WeightPair, ...]
    shape: tuple[int, int]
    working_bytes: int


def default_memory(pairs: Iterable[WeightPair]) -> int:
    """4 × the largest pair counted in fp32, plus 500 MB for the process."""
    largest = max((_entries(pair) for pair in pairs), default=0)
    return 4 * (2 * 4 * largest) + BASELINE


def parse_memory(text: str) -> int:
    """Bytes of `--max-memory`: `8GB`, `500M`, `2000000000`. Raises OptionError."""
    number = text.strip().upper().rstrip("BKMG")
    unit = text.strip().upper()[len(number) :]
    try:
        size = int(float(number) * _UNITS[unit])
    except (KeyError, ValueError, OverflowError):
        size = -1
    if size < 0:
        raise OptionError(f"--max-memory {text!r}: write a size such as 8GB or 500M")
    return size


def room_for_batches(memory: int) -> int:
    """What a bound on the process leaves for batches in flight."""
    return max(memory - BASELINE, 0)


def plan(
    pairs: Sequence[WeightPair], *, memory: int, stack: bool, entry_bytes: int = 0
) -> tuple[Batch, ...]:
    """Batches in order of falling size, so that the longest work starts first.

    stack: put as many equal pairs into a batch as fit the memory (GPU); without it every batch
    holds one pair, and parallelism comes from workers (CPU). The numbers do not depend on it.
    entry_bytes: what is held beside for each entry of a matrix.
    """
    room = room_for_batches(memory)
    groups: dict[tuple[tuple[int, ...], str, str], list[WeightPair]] = {}
    for pair in pairs:
        groups.setdefault((pair.shape, pair.base.dtype, pair.tuned.dtype), []).append(pair)
    batches = []
    for members in groups.values():
        need = working_bytes(members[0]) + entry_bytes * _entries(members[0])
        size = max(1, room // need) if stack else 1
        for start in range(0, len(members), size):
            part = tuple(members[start : start + size])
            shape = (part[0].shape[0], part[0].shape[1])
            batches.append(Batch(part, shape, need * len(part)))
    return tuple(sorted(batches, key=lambda batch: -batch.working_bytes))


def working_bytes(pair: WeightPair) -> int:
    """Peak bytes of one pair in work: as stored, a Gram matrix, and leading vectors of both sides.

    512 fp64 rows stand for the vectors of three roles; products go by two blocks of 1024 rows.
    """
    m, n = pair.shape
    q = min(m, n)
    return pair.base.nbytes + pair.tuned.nbytes + 8 * q * (q + 2 * 1024) + 512 * 8 * (m + n)


def estimate_seconds(pairs: Iterable[WeightPair], *, workers: int) -> float:
    """Rough time on the CPU: a Gram matrix and its eigen-decomposition for each of three roles."""
    flops = 0.0
    for pair in pairs:
        m, n = max(pair.shape), min(pair.shape)
        flops += 3 * (2 * m * n * n + 6 * n**3)
    return flops / _FLOPS / workers


def _entries(pair: WeightPair) -> int:
    return pair.shape[0] * pair.shape[1]
