"""What is kept between runs: results of matrices, factors, and tensors of Hub models."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from geoscope.engine.cache import ResultCache
from geoscope.engine.factor_cache import FactorCache
from geoscope.folders import results_folder
from geoscope.sources.hub.range_cache import clear_tensors, kept_tensors, tensors_folder
from geoscope.verbs.pairs.matrices import factors_folder

__all__ = ["Kept", "caches"]


@dataclass(frozen=True)
class Kept:
    """One kind of what is kept.

    folder: where.
    what: "results".
    sizes: bytes of each file.
    clear: removes all of it, and says how many files that were.
    """

    folder: Path
    what: str
    sizes: tuple[int, ...]
    clear: Callable[[], int]


def caches() -> tuple[Kept, ...]:
    """All that is kept on this machine."""
    results = ResultCache(results_folder())
    factors = FactorCache(factors_folder(results))
    return (
        Kept(results.folder, "results", _sizes(results.files()), results.clear),
        Kept(tensors_folder(), "tensors of Hub models", _sizes(kept_tensors()), clear_tensors),
        Kept(factors.folder, "factors of matrices", _sizes(factors.files()), factors.clear),
    )


def _sizes(paths: Iterable[Path]) -> tuple[int, ...]:
    return tuple(path.stat().st_size for path in paths)
