"""The limits of all verdicts: defaults, where they come from, and those put in their place.

"Study", and an AUC, are of docs/study.md: how well the number of a limit tells failed runs there.
"""

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
    "rank_collapse.top_share": Threshold(0.9, "ours, unsupported by the study"),
    "on_principal.energy_two_sided": Threshold(0.5, "ours, not reached by the study"),
    "on_principal.spectral_share": Threshold(0.3, "study, AUC .92 [.87, .96]"),
    "on_principal.spectral_lift": Threshold(10.0, "ours, not reached by the study"),
    "on_principal.versus_base": Threshold(0.5, "ours, unsupported by the study"),
    "distorted.nss": Threshold(5e-2, "study, AUC .98 [.95, .99]"),
    "distorted.rank_ratio": Threshold(0.9, "study, AUC .97 [.94, .99]"),
    "distorted.angle": Threshold(math.radians(10), "2606.07082; AUC .97 [.94, .99]"),
    "distorted.angle_over_null": Threshold(2.0, "ours, unsupported by the study"),
    "off_principal.energy_two_sided": Threshold(0.05, "ours, unsupported by the study"),
    "off_principal.versus_base": Threshold(0.2, "ours, unsupported by the study"),
    "off_principal.energy_one_sided": Threshold(0.5, "ours, unsupported by the study"),
    "off_principal.angle": Threshold(math.radians(1), "2606.07082; AUC .97 [.94, .99]"),
    "off_principal.angle_over_null": Threshold(2.0, "ours, unsupported by the study"),
    "words.spectral_lift": Threshold(0.5, "ours"),
    "words.enriched": Threshold(2.0, "ours"),
    "words.avoids": Threshold(0.5, "ours"),
    "words.quantised_copy": Threshold(0.85, "ours; the rounding is known to 11 %"),
    "capacity.saturated_k90": Threshold(0.75, "ours, unsupported by the study"),
    "capacity.saturated_tail": Threshold(0.1, "ours, unsupported by the study"),
    "capacity.concentrated": Threshold(0.1, "ours, not reached by the study"),
    "capacity.idle_k99": Threshold(0.5, "ours, unsupported by the study"),
}


def limits_in_force(given: Mapping[str, float] | None) -> dict[str, float]:
    """The thresholds' values, with those of `given` in place. Raises OptionError for others."""
    unknown = [key for key in given or () if key not in THRESHOLDS]
    if unknown:
        raise OptionError(f"no threshold {first_names(unknown)}; they are {', '.join(THRESHOLDS)}")
    return {key: threshold.value for key, threshold in THRESHOLDS.items()} | dict(given or {})
