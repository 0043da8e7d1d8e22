"""One sentence: does the run drift, or does it diffuse? By rules that can be read and overridden.

Share of variance explained and R² of a fitted line are high for a walk too; what tells the two
apart is whether increments point the same way (docs/methods.md#drift). So drift is judged by φ,
without the storage noise that can be subtracted, and by a sign-flip test (`walk.sign_flip_p`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from geoscope.linalg.precision import UNRESOLVED_ABOVE
from geoscope.records import Status
from geoscope.thresholds import MOTION_THRESHOLDS
from geoscope.trajectory.statistics import Statistics

__all__ = ["Motion", "drift_or_diffusion"]

_LIMIT = f"{UNRESOLVED_ABOVE:g}".removeprefix("0")


@dataclass(frozen=True)
class Motion:
    """code: one of MOTION.codes (`kinds.py`). text: a sentence with the numbers behind it."""

    code: str
    text: str


def drift_or_diffusion(
    stats: Statistics, *, thresholds: Mapping[str, float] = MOTION_THRESHOLDS
) -> Motion:
    """Whether the increments share a direction.

    DRIFT: p ≤ level at T ≥ few; with fewer checkpoints φ ≥ few_drift and no pattern of signs above
    the true one. NO_DRIFT: neither. UNDETERMINED: T < least, or rounding is above .6 of the
    increments, or the update is not finite.
    """
    T = len(stats.steps)
    status = stats.status_of("drift_fraction_corrected")
    if status is Status.ZERO_UPDATE:
        return Motion("NO_UPDATE", "no update: all checkpoints equal the base")
    if status is Status.BELOW_RESOLUTION:
        noise = stats.values["step_precision_ratio"]
        return Motion(
            "UNDETERMINED",
            f"undetermined: rounding is {_number(noise)} of the increments as stored "
            f"(limit {_LIMIT}); compare checkpoints further apart, or saved in fp32",
        )
    share, p = stats.values["drift_fraction_corrected"], stats.values["drift_p"]
    if share is None or p is None or thresholds["least"] > T:
        return Motion(
            "UNDETERMINED",
            f"undetermined: {T} checkpoint{'s' * (T != 1)} after the base; "
            f"{thresholds['least']:g} are needed, {thresholds['few']:g} for weak drift",
        )
    few = thresholds["few"] > T
    drifts = (share >= thresholds["few_drift"] and p < 1.5 * 2.0 ** (1 - T)) if few else (
        p <= thresholds["level"] and share > 0
    )  # fmt: skip
    code = "DRIFT" if drifts else "NO_DRIFT"
    return Motion(code, _sentence(stats, code, share, p, thresholds))


def _sentence(
    stats: Statistics, code: str, share: float, p: float, thresholds: Mapping[str, float]
) -> str:
    T = len(stats.steps)
    numbers = f"φ = {share:.3f}, a walk has 0; sign-flip p = {p:.2g}, T = {T}"
    if thresholds["few"] > T:
        numbers += f"; p cannot be below {2.0 ** (1 - T):.2g} at this T"
    if code == "DRIFT":
        kind = "mostly drift" if share >= 0.5 else "drift beside diffusion"
        return (
            f"{kind}: increments share a direction that holds {_percent(share)} of the energy of "
            f"an interval ({numbers})"
        )
    cosine = stats.values["increment_cosine_corrected"]
    if cosine is not None and cosine <= thresholds["reversal"]:
        return f"no drift: successive increments undo one another (cosine {cosine:.2f}; {numbers})"
    tail = ""
    if thresholds["few"] > T:
        tail = f"; drift below φ = {thresholds['few_drift']:g} would not be seen at this T"
    return f"no drift: the increments are those of a random walk ({numbers}){tail}"


def _number(value: float | None) -> str:
    return "all" if value is None else f"{value:.2f}"


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %" if share < 0.1 else f"{100 * share:.0f} %"
