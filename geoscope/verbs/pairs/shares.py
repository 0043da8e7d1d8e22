"""How the matrices of a comparison are shared out among machines: from headers alone."""

from __future__ import annotations

from collections.abc import Sequence

from geoscope.engine import estimate_seconds
from geoscope.engine import shares as engine
from geoscope.records import WeightPair

__all__ = ["fitting", "shares"]


def fitting(pairs: Sequence[WeightPair]) -> int:
    """Into how many shares a cluster takes the matrices; it does not depend on the cluster."""
    return engine.fitting([_work(pair) for pair in pairs])


def shares(pairs: Sequence[WeightPair], of: int) -> list[tuple[WeightPair, ...]]:
    """So many shares, each in the order of the pairing; a machine reads few files."""
    return engine.shared(pairs, [_work(pair) for pair in pairs], of)


def _work(pair: WeightPair) -> engine.Work:
    return engine.Work(
        files=(pair.tuned.source, pair.base.source),
        computing=estimate_seconds([pair], workers=1),
        nbytes=pair.base.nbytes + pair.tuned.nbytes,
    )
