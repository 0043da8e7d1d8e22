"""The limits of all verdicts: defaults, where they come from, and those put in their place."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from geoscope.errors import OptionError, first_names
from geoscope.linalg.precision import UNRESOLVED_ABOVE

__all__ = ["THRESHOLDS", "Threshold", "limits_in_force"]


@dataclass(frozen=True)
class Threshold:
    """A limit of the rules: default and where it comes from."""

    value: float
    standing: str


THRESHOLDS: Mapping[str, Threshold] = {
    "unrelated.cosine": Threshold(0.05, "ours"),
    "unrelated.deviations": Threshold(3.0, "ours"),
    "too_far.cosine": Threshold(0.6, "ours, algebra"),
    "init_mismatch.relative_update": Threshold(0.2, "ours, algebra"),
    "init_mismatch.spectral_share": Threshold(0.9, "ours, algebra"),
    "init_mismatch.versus_base": Threshold(1.2, "ours, algebra"),
    "undetermined.precision_ratio": Threshold(UNRESOLVED_ABOVE, "ours, docs/methods.md#floors"),
    "rank_collapse.top_share": Threshold(0.9, "ours"),
    "on_principal.energy_two_sided": Threshold(0.5, "ours; PiSSA ≈ .98, GeoRA ≤ .02"),
    "on_principal.spectral_share": Threshold(0.3, "ours"),
    "on_principal.spectral_lift": Threshold(10.0, "ours"),
    "on_principal.versus_base": Threshold(0.5, "ours"),
    "distorted.nss": Threshold(5e-2, "ours"),
    "distorted.rank_ratio": Threshold(0.9, "ours"),
    "distorted.angle": Threshold(math.radians(10), "2606.07082"),
    "distorted.angle_over_null": Threshold(2.0, "ours"),
    "off_principal.energy_two_sided": Threshold(0.05, "ours"),
    "off_principal.versus_base": Threshold(0.2, "ours"),
    "off_principal.energy_one_sided": Threshold(0.5, "ours"),
    "off_principal.angle": Threshold(math.radians(1), "2606.07082"),
    "off_principal.angle_over_null": Threshold(2.0, "ours"),
    "words.spectral_lift": Threshold(0.5, "ours"),
    "words.enriched": Threshold(2.0, "ours"),
    "words.avoids": Threshold(0.5, "ours"),
    "words.quantised_copy": Threshold(0.85, "ours; the rounding is known to 11 %"),
    "words.merge_agree": Threshold(0.5, "ours"),
    "words.merge_least": Threshold(0.1, "ours"),
    "capacity.saturated_k90": Threshold(0.75, "ours; a flat spectrum has .9"),
    "capacity.saturated_tail": Threshold(0.1, "ours"),
    "capacity.concentrated": Threshold(0.1, "ours"),
    "capacity.idle_k99": Threshold(0.5, "ours"),
    "lineage.between": Threshold(0.1, "ours; independent updates have 0"),
    "lineage.straight": Threshold(0.3, "ours; one direction has 1"),
    "lineage.growth": Threshold(0.25, "ours; independent updates have 1"),
    "lineage.merge_noise": Threshold(1.25, "ours; products and sum rounded have 1"),
    "lineage.merge_share": Threshold(0.2, "ours"),
}


def limits_in_force(given: Mapping[str, float] | None) -> dict[str, float]:
    """The thresholds' values, with those of `given` in place. Raises OptionError for others."""
    unknown = [key for key in given or () if key not in THRESHOLDS]
    if unknown:
        raise OptionError(f"no threshold {first_names(unknown)}; they are {', '.join(THRESHOLDS)}")
    return {key: threshold.value for key, threshold in THRESHOLDS.items()} | dict(given or {})
