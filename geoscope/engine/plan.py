"""What is computed together: batches of equal shape under the memory budget. Pure, on headers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from heapq import nlargest
from typing import Protocol

from geoscope.arguments import bytes_of
from geoscope.linalg.choice import rates
from geoscope.records import WeightPair

__all__ = [
    "BASELINE",
    "Batch",
    "Shaped",
    "asked_memory",
    "default_memory",
    "device_memory",
    "estimate_seconds",
    "is_small",
    "least_memory",
    "needed_memory",
    "plan",
    "room_for_batches",
]

# A process with torch loaded and nothing done; counted apart from the matrices.
BASELINE = 500 * 10**6

# Of a device's free memory the share that is planned with; what remains is for the libraries'
# handles, for fixed workspaces and for what does not fit between other pieces.
_PLANNED = 0.8
# Most stored bytes of one batch. More makes no kernel faster, and what is read ahead lies in
# page-locked memory of the host.
_STORED_AT_MOST = 4 * 10**9
# On the CPU pairs below so many stored bytes are stacked, up to so many bytes in work: beyond,
# what a stack saves is small beside the factorisations. The stack of a worker stays near its cache.
_SMALL = 10**6
_MAX_STACK_BYTES = 32 * 10**6
# Stacks of one shape for each worker, so that all end at about the same time.
_STACKS_PER_WORKER = 4

_ANY = 1 << 60  # more than any machine has

# Seconds of one core (docs/scale.md#a-cost-model): a matrix, an entry of it, and what a
# factorisation takes beside products and eigenvalues, as a multiple of these.
_A_MATRIX = 0.005
_AN_ENTRY = 7e-8
_BESIDE = 1.4


class Shaped(Protocol):
    """A matrix, or two of one shape."""

    @property
    def shape(self) -> tuple[int, ...]: ...


@dataclass(frozen=True)
class Batch:
    """Pairs of one shape and one pair of dtypes, computed in one stack."""

    pairs: tuple[WeightPair, ...]
    shape: tuple[int, int]
    working_bytes: int


def least_memory(pairs: Iterable[WeightPair]) -> int:
    """4 × the largest pair counted in fp32, plus 500 MB for the process."""
    largest = max((_entries(pair) for pair in pairs), default=0)
    return 4 * (2 * 4 * largest) + BASELINE


def default_memory(
    pairs: Sequence[WeightPair], *, workers: int, available: int, entry_bytes: int = 0
) -> int:
    """Room for every worker's largest batch and the one that is read ahead, on the CPU.

    At most half of the `available` bytes, and at least `least_memory`. entry_bytes: as in `plan`.
    """
    wanted = _wanted(pairs, available, workers, entry_bytes)
    return max(least_memory(pairs), min(wanted, available // 2))


def needed_memory(pairs: Sequence[WeightPair], *, workers: int, entry_bytes: int) -> int:
    """As `default_memory`, of a machine with room for it."""
    return max(least_memory(pairs), _wanted(pairs, _ANY, workers, entry_bytes))


def asked_memory(pairs: Iterable[WeightPair], text: str) -> int:
    """The bound that was asked for: a size, or `min`. Raises OptionError."""
    return least_memory(pairs) if text == "min" else bytes_of(text, "max_memory", others=", or min")


def _wanted(pairs: Sequence[WeightPair], memory: int, workers: int, entry_bytes: int) -> int:
    batches = plan(pairs, memory=memory, workers=workers, entry_bytes=entry_bytes)
    return BASELINE + sum(nlargest(workers + 1, (batch.working_bytes for batch in batches)))


def device_memory(free: Iterable[int]) -> int:
    """What to plan with on each of several devices, from the free bytes of all."""
    return int(_PLANNED * min(free))


def room_for_batches(memory: int) -> int:
    """What a bound on the process leaves for batches in flight."""
    return max(memory - BASELINE, 0)


def plan(
    pairs: Sequence[WeightPair],
    *,
    memory: int,
    stack: bool = False,
    parts: int = 1,
    workers: int = 0,
    entry_bytes: int = 0,
) -> tuple[Batch, ...]:
    """Batches in order of falling size, so that the longest work starts first.

    stack: put several equal pairs into a batch (GPU): as many as fit half of the memory, because
    the next batch is there while one is computed; without it parallelism comes from workers (CPU).
    parts: into how many batches pairs of one shape are cut at least, so that devices share them.
    workers: on the CPU, among which small pairs are shared out in stacks; 0 for a pair a batch.
    entry_bytes: what is held beside for each entry of a matrix. The numbers depend on none of this.
    """
    room = room_for_batches(memory)
    groups: dict[tuple[tuple[int, ...], str, str], list[WeightPair]] = {}
    for pair in pairs:
        groups.setdefault((pair.shape, pair.base.dtype, pair.tuned.dtype), []).append(pair)
    batches = []
    for members in groups.values():
        first = members[0]
        need = working_bytes(first, stack=stack) + entry_bytes * _entries(first)
        size = 1
        if stack:
            most = min(room // (2 * need), _STORED_AT_MOST // max(_stored(first), 1))
            size = _height(len(members), most, parts)
        elif workers and is_small(first):
            each = _small_bytes(first) + entry_bytes * _entries(first)
            most = min(room // (workers + 1), _MAX_STACK_BYTES) // each
            size = _height(len(members), most, _STACKS_PER_WORKER * workers)
            need = need if size == 1 else each
        for start in range(0, len(members), size):
            part = tuple(members[start : start + size])
            shape = (part[0].shape[0], part[0].shape[1])
            batches.append(Batch(part, shape, need * len(part)))
    return tuple(sorted(batches, key=lambda batch: -batch.working_bytes))


def _height(count: int, most: int, parts: int) -> int:
    """Of even stacks of so many pairs, in `parts` stacks or more, of `most` pairs or fewer."""
    return _ceil(count, max(parts, _ceil(count, max(1, most))))


def _small_bytes(pair: WeightPair) -> int:
    """Peak bytes of one small pair of a stack: as read and in fp64, vectors of three roles with
    their images and energies, and sampled spectra."""
    m, n = pair.shape
    q = min(m, n)
    return _stored(pair) + 8 * (3 * m * n + 4 * q * (m + n) + 4 * q * q + 2 * 4096)


def working_bytes(pair: WeightPair, *, stack: bool = False) -> int:
    """Peak bytes of one pair in work: as read, a Gram matrix, and leading vectors of both sides.

    512 fp64 rows stand for the vectors of three roles; products go by two blocks of 1024 rows. In a
    stack on a device a batched eigensolver holds the Gram matrices, all eigenvectors and its own
    work, and a Krylov space the matrices in fp32.
    """
    m, n = pair.shape
    q = min(m, n)
    beside = 8 * q * (q + 2 * 1024)
    if stack:
        beside = max(beside, 5 * 8 * q * q, 2 * 4 * m * n)
    return _stored(pair) + beside + 512 * 8 * (m + n)


def is_small(pair: WeightPair) -> bool:
    """Whether calls take longer than arithmetic, so that the CPU takes such pairs in stacks."""
    return _stored(pair) < _SMALL


def _stored(pair: WeightPair) -> int:
    return pair.base.memory_bytes + pair.tuned.memory_bytes


def _ceil(a: int, b: int) -> int:
    return -(-a // b)


def estimate_seconds(pairs: Iterable[Shaped], *, workers: int) -> float:
    """Rough time on the CPU of the committed rates: what a matrix costs whatever its size, passes
    over its entries, and a Gram matrix and its eigenvalues for each of three roles."""
    table, seconds = rates(), 0.0
    for pair in pairs:
        q, long = min(pair.shape), max(pair.shape)
        spectra = 3 * (long * q**2 / table.gram64 + 4 / 3 * q**3 / table.tridiagonal) / 1e9
        seconds += _A_MATRIX + _AN_ENTRY * q * long + _BESIDE * spectra
    return seconds / workers


def _entries(pair: WeightPair) -> int:
    return pair.shape[0] * pair.shape[1]
