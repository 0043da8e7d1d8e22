"""What a report says of two models beside the numbers of their matrices; it travels with a part."""

from __future__ import annotations

from dataclasses import dataclass

from geoscope.records import ModelRef, Pairing
from geoscope.verbs.adapters.cut_factors import cut_factors
from geoscope.verbs.adapters.start_check import SeenStart, has_unknown_start, seen_start
from geoscope.verbs.pairs.prepare import Prepared

__all__ = ["About", "about"]


@dataclass(frozen=True)
class About:
    """Two models, or an adapter alone.

    device: where the numbers were computed.
    notes: remarks on the models and on their pairing.
    pairing: what corresponds to what, and what is left out.
    has_base: whether the base was read.
    start: what the update of an adapter looks like the start of.
    unknown_start: whether an adapter's product before training is not known.
    cut: a remark on factors that were not gathered.
    """

    base: ModelRef
    tuned: ModelRef
    device: str
    notes: tuple[str, ...]
    pairing: Pairing
    has_base: bool
    start: SeenStart | None = None
    unknown_start: bool = False
    cut: str | None = None


def about(prepared: Prepared, *, is_whole: bool = True) -> About:
    """is_whole: the work was not interrupted, so that what needs weights is looked at, too."""
    return About(
        base=prepared.base.ref,
        tuned=prepared.tuned.ref,
        device=prepared.device,
        notes=tuple(dict.fromkeys([*prepared.base.notes, *prepared.tuned.notes, *prepared.notes])),
        pairing=prepared.pairing,
        has_base=prepared.has_base,
        start=seen_start(prepared) if is_whole else None,
        unknown_start=has_unknown_start(prepared.tuned),
        cut=cut_factors(prepared.tuned) if is_whole else None,
    )
