"""How the matrices of a comparison are shared out among machines: from headers alone."""

from __future__ import annotations

from collections.abc import Sequence

from geoscope.engine import estimate_seconds
from geoscope.records import WeightPair

__all__ = ["fitting", "shares"]

# Seconds that a byte takes to be read, beside those of computing: 1 GB/s.
_SECONDS_A_BYTE = 1e-9
# A share of a cluster has so much of these at most, or one matrix: a node is not long away with it,
# and not busier with starting than with work.
_SECONDS, _BYTES, _MATRICES = 10.0, 1e9, 256


def fitting(pairs: Sequence[WeightPair]) -> int:
    """Into how many shares a cluster takes the matrices; it does not depend on the cluster."""
    seconds = sum(map(_cost, pairs))
    nbytes = sum(pair.base.nbytes + pair.tuned.nbytes for pair in pairs)
    most = max(seconds / _SECONDS, nbytes / _BYTES, len(pairs) / _MATRICES)
    return max(1, min(len(pairs), round(most + 0.5)))


def shares(pairs: Sequence[WeightPair], of: int) -> list[tuple[WeightPair, ...]]:
    """So many shares, each in the order of the pairing.

    In the order of the files, cut where the work is even: a machine reads few files.
    """
    by_file = sorted(pairs, key=lambda pair: (pair.tuned.source, pair.base.source))
    costs = [_cost(pair) for pair in by_file]
    total, before, owners = sum(costs), 0.0, dict[str, int]()
    for pair, cost in zip(by_file, costs, strict=True):
        owners[pair.name] = min(int(of * (before + cost / 2) / total), of - 1)
        before += cost
    shared: list[list[WeightPair]] = [[] for _ in range(of)]
    for pair in pairs:
        shared[owners[pair.name]].append(pair)
    return [tuple(share) for share in shared]


def _cost(pair: WeightPair) -> float:
    nbytes = pair.base.nbytes + pair.tuned.nbytes
    return estimate_seconds([pair], workers=1) + _SECONDS_A_BYTE * nbytes
