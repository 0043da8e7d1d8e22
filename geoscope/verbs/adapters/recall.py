"""The factors of a matrix that an earlier run of `init-adapter` made, so that a rerun goes on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, NamedTuple

from torch import Tensor

from geoscope.adapters.factors import LoraFactors
from geoscope.engine.cache import ResultCache, content_of, packed, unpacked
from geoscope.records import Status
from geoscope.verbs.adapters.options import InitOptions

__all__ = ["Recalled", "entry_of", "recalled_or_made"]


class Recalled(NamedTuple):
    """Initial factors.

    key: under which the cache holds them, None where it does not.
    is_recalled: whether they come from there.
    """

    factors: LoraFactors
    key: str | None
    is_recalled: bool


def recalled_or_made(
    W: Tensor, options: InitOptions, chosen: Mapping[str, Any], cache: ResultCache | None
) -> Recalled:
    """The initial factors of W (out, in), from the cache where it holds them.

    chosen: what the initialisation takes beside rank and alpha. Raises NumericsError, OptionError.
    """
    if cache is None:
        return Recalled(_made(W, options, chosen), None, False)
    key = cache.key(
        {
            "weight": content_of(W),
            "kind": "init-adapter",
            "settings": [options.method, options.rank, options.chosen_alpha, dict(chosen)],
            "device": W.device.type,
        }
    )
    found = _recalled(cache.get(key), W)
    if found is not None:
        return Recalled(found, key, True)
    made = _made(W, options, chosen)
    cache.put(key, entry_of(made))
    return Recalled(made, key, False)


def entry_of(factors: LoraFactors) -> dict[str, Any]:
    """Factors as the cache holds them."""
    return {**asdict(factors), "A": packed(factors.A), "B": packed(factors.B)}


def _made(W: Tensor, options: InitOptions, chosen: Mapping[str, Any]) -> LoraFactors:
    return options.initialisation(W, options.rank, alpha=options.chosen_alpha, **chosen)


def _recalled(entry: Any, W: Tensor) -> LoraFactors | None:
    """The factors of what was kept, on the device of W; None for anything else."""
    try:
        sides = {key: unpacked(entry[key]).to(W.device) for key in ("A", "B")}
        status = {key: Status(value) for key, value in entry["status"].items()}
        notes = tuple(entry["notes"])
        return LoraFactors(**{**entry, **sides, "status": status, "notes": notes})
    except (AttributeError, KeyError, TypeError, ValueError):
        return None
