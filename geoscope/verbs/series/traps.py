"""Signs that a series is not what it seems, each said in one line.

From the increments of all matrices together: what is wrong with a checkpoint is wrong with all of
its weights.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import median

from geoscope.linalg.precision import UNRESOLVED_ABOVE
from geoscope.trajectory.increments import Increments
from geoscope.trajectory.storage_noise import (
    step_precision_ratios,
    with_exact_base,
)

__all__ = ["series_traps"]

# A step is a jump when it is this many times as fast as the median of the steps that moved.
_JUMP = 10
# Steps that are named before the rest is counted.
_NAMED = 3


def series_traps(total: Increments, *, adapters: bool, base_exact: bool) -> tuple[str, ...]:
    """One line for each sign. total: of all matrices that were followed.

    adapters: whether the series is one of adapters. base_exact: whether training began from the
    base as its file holds it, so that the base has no rounding of its own.
    """
    exact = with_exact_base(total) if base_exact else total
    return (
        *_equal_to_base(total, adapters=adapters),
        *_identical(total),
        *_jumps(total, adapters=adapters),
        *_below_rounding(exact),
    )


def _equal_to_base(total: Increments, *, adapters: bool) -> list[str]:
    """Checkpoints at the start of a series, or all of them, without any update."""
    count = _still_at_start(total)
    if not count:
        return []
    which = "every step" if count == len(total) else _steps(total.steps[1 : count + 1])
    if adapters:
        return [f"{which}: the adapter's update is zero; saved before training?"]
    return [f"{which}: merged directory equals the base; did you mean `lora_adapter/`?"]


def _identical(total: Increments) -> list[str]:
    """Checkpoints that repeat the one before."""
    energies = total.H.diagonal().tolist()
    return [
        f"steps {total.steps[i]:g} and {total.steps[i + 1]:g} are identical: duplicate save"
        for i in range(_still_at_start(total), len(total))
        if energies[i] == 0
    ]


def _still_at_start(total: Increments) -> int:
    """How many checkpoints equal the base before the first that does not."""
    energies = total.H.diagonal().tolist()
    return next((i for i, energy in enumerate(energies) if energy > 0), len(energies))


def _jumps(total: Increments, *, adapters: bool) -> list[str]:
    """Steps of more than 10 × the median speed.

    Both as a drift goes, ‖δ‖/Δt, and as a walk does, ‖δ‖/√Δt: each is level for one of them at any
    spacing, and the two are the same at equal spacing.
    """
    lengths = total.H.diagonal().clamp_min(0).sqrt()
    rows = [
        one.where(lengths > 0, math.nan).tolist()
        for one in (lengths / total.gaps, lengths / total.gaps.sqrt())
    ]
    levels = [median([x for x in row if x == x] or [math.nan]) for row in rows]
    reason = "resumed from another base"
    if adapters:
        reason += ", or an adapter that did not start at zero: give `initial_adapter`"
    found: list[str] = []
    for i, speeds in enumerate(zip(*rows, strict=True)):
        times = min(speed / level for speed, level in zip(speeds, levels, strict=True))
        if times > _JUMP:
            found.append(
                f"step {total.steps[i + 1]:g}: jump in ‖ΔW‖, {times:.3g} × as fast as the median "
                f"step; {reason}"
            )
    return found


def _below_rounding(total: Increments) -> list[str]:
    """Increments that are mostly the rounding of their two ends, ν(δ) above .6."""
    ratios = step_precision_ratios(total)
    below = [
        (ratio, step)
        for ratio, step in zip(ratios, total.steps[1:], strict=True)
        if ratio is not None and ratio > UNRESOLVED_ABOVE
    ]
    if not below:
        return []
    steps = _steps([step for _, step in below])
    return [
        f"{steps}: increments below rounding, ν(δ) up to {max(below)[0]:.2g}; they look driftless "
        "whatever the run did; save in fp32, or further apart"
    ]


def _steps(steps: Sequence[float]) -> str:
    """`step 20`, `steps 20, 40, 60 and 9 more`."""
    named = ", ".join(f"{step:g}" for step in steps[:_NAMED])
    more = f" and {len(steps) - _NAMED} more" if len(steps) > _NAMED else ""
    return f"step{'s' if len(steps) > 1 else ''} {named}{more}"
