"""The limits of all verdicts: defaults, where they come from, and those put in their place.

`--limit` sets those of THRESHOLDS. Fixed, and not set by it:

- MOTION_THRESHOLDS and LOSSY below;
- the code of half of the energy, or of the matrices, is that of the model
  (`metrics/verdict.py`, `metrics/capacity_verdict.py`), and of more than half of them that of a
  model that is far from its base;
- a cosine reads as unrelated up to half of `too_far.cosine` at most (`metrics/distance.py`);
- NSS up to half of the anchor's preserves the spectrum (`verbs/pairs/assemble.py`);
- what looks like a start: 20 % and 90 % (`adapters/blind_start.py`), in half of three matrices,
  asked for ρ above 5 % (`verbs/adapters/start_check.py`);
- the classes of precision: FLOORS (`metrics/precision.py`).
"Study", and an AUC, are of docs/study.md: how well the number of a limit tells failed runs there.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from geoscope.errors import OptionError, first_names

__all__ = ["LOSSY", "MOTION_THRESHOLDS", "THRESHOLDS", "Threshold", "limits_in_force"]


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
    "undetermined.precision_ratio": Threshold(0.6, "ours, docs/methods.md#floors"),
    "rank_collapse.top_share": Threshold(0.9, "ours, unsupported by the study"),
    "on_principal.energy_two_sided": Threshold(0.5, "ours, not reached by the study"),
    "on_principal.spectral_share": Threshold(0.3, "study, AUC .92 [.88, .96]"),
    "on_principal.spectral_lift": Threshold(10.0, "ours, not reached by the study"),
    "on_principal.versus_base": Threshold(0.5, "ours, unsupported by the study"),
    "distorted.nss": Threshold(5e-2, "study, AUC .98 [.96, .99]"),
    "distorted.rank_ratio": Threshold(0.9, "study, AUC .98 [.96, .99]"),
    "distorted.angle": Threshold(math.radians(10), "2606.07082; AUC .97 [.95, .99]"),
    "distorted.angle_over_null": Threshold(2.0, "ours, unsupported by the study"),
    "off_principal.energy_two_sided": Threshold(0.05, "ours, unsupported by the study"),
    "off_principal.versus_base": Threshold(0.2, "ours, unsupported by the study"),
    "off_principal.energy_one_sided": Threshold(0.5, "ours, unsupported by the study"),
    "off_principal.angle": Threshold(math.radians(1), "2606.07082; AUC .97 [.95, .99]"),
    "off_principal.angle_over_null": Threshold(2.0, "ours, unsupported by the study"),
    "words.spectral_lift": Threshold(0.5, "ours"),
    "words.enriched": Threshold(2.0, "ours"),
    "words.avoids": Threshold(0.5, "ours"),
    "words.few_directions": Threshold(0.5, "ours"),
    "words.many_directions": Threshold(2.0, "ours"),
    "words.quantised_copy": Threshold(0.85, "ours; the rounding is known to 11 %"),
    "words.merge_agree": Threshold(0.5, "ours"),
    "words.merge_least": Threshold(0.1, "ours"),
    "capacity.saturated_k90": Threshold(0.75, "ours, unsupported by the study"),
    "capacity.saturated_tail": Threshold(0.1, "ours, unsupported by the study"),
    "capacity.concentrated": Threshold(0.1, "ours, not reached by the study"),
    "capacity.idle_k99": Threshold(0.5, "ours, unsupported by the study"),
    "lineage.between": Threshold(0.1, "ours; independent updates have 0"),
    "lineage.straight": Threshold(0.3, "ours; one direction has 1"),
    "lineage.growth": Threshold(0.25, "ours; independent updates have 1"),
    "lineage.merge_noise": Threshold(1.25, "ours; products and sum rounded have 1"),
    "lineage.merge_share": Threshold(0.2, "ours"),
    "capacity.collapse_rank": Threshold(16, "ours"),
}

# Of series, all ours. Below `few` checkpoints the test cannot reach its level, and φ itself must be
# large.
MOTION_THRESHOLDS: Mapping[str, float] = {
    "level": 0.01,  # largest p-value of the sign-flip test that is called drift
    "few": 8,  # checkpoints after the base from which 2^(1−T) is below the level
    "few_drift": 0.1,  # φ that is called drift with fewer, if no other pattern of signs beats it
    "least": 3,  # checkpoints after the base below which nothing is said
    "reversal": -0.1,  # corrected increment cosine at or below which steps undo one another
}

# Relative error of a weight, and of the logits in fp32, above which a start is not the model.
LOSSY = 1e-5


def limits_in_force(given: Mapping[str, float] | None) -> dict[str, float]:
    """The thresholds' values, with those of `given` in place. Raises OptionError for others."""
    unknown = [key for key in given or () if key not in THRESHOLDS]
    if unknown:
        raise OptionError(f"no threshold {first_names(unknown)}; they are {', '.join(THRESHOLDS)}")
    return {key: threshold.value for key, threshold in THRESHOLDS.items()} | dict(given or {})
