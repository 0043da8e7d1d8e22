"""The factors of a matrix that an earlier run of `init-adapter` made, so that a rerun goes on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from torch import Tensor

from geoscope.adapters.factors import LoraFactors
from geoscope.engine.cache import (
    Recalled,
    ResultCache,
    content_of,
    packed,
    recalled_or_made,
    unpacked,
)
from geoscope.records import Status
from geoscope.verbs.adapters.options import InitOptions

__all__ = ["entry_of", "recalled_factors"]


def recalled_factors(
    W: Tensor, options: InitOptions, chosen: Mapping[str, Any], cache: ResultCache | None
) -> Recalled[LoraFactors]:
    """The initial factors of W (out, in), from the cache where it holds them.

    chosen: what the initialisation takes beside rank and alpha. Raises NumericsError, OptionError.
    """

    def facts() -> dict[str, Any]:
        return {
            "weight": content_of(W),
            "kind": "init-adapter",
            "settings": [options.method, options.rank, options.chosen_alpha, dict(chosen)],
            "device": W.device.type,
        }

    def made() -> LoraFactors:
        return options.initialisation(W, options.rank, alpha=options.chosen_alpha, **chosen)

    return recalled_or_made(cache, facts, made, entry_of, lambda entry: _factors(entry, W))


def entry_of(factors: LoraFactors) -> dict[str, Any]:
    """Factors as the cache holds them."""
    return {**asdict(factors), "A": packed(factors.A), "B": packed(factors.B)}


def _factors(entry: Any, W: Tensor) -> LoraFactors | None:
    """The factors of what was kept, on the device of W; None for anything else."""
    try:
        sides = {key: unpacked(entry[key]).to(W.device) for key in ("A", "B")}
        status = {key: Status(value) for key, value in entry["status"].items()}
        notes = tuple(entry["notes"])
        return LoraFactors(**{**entry, **sides, "status": status, "notes": notes})
    except (AttributeError, KeyError, TypeError, ValueError):
        return None
