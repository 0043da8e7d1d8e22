"""Where along the depth the update's energy is: its share by block, and their centre."""

from __future__ import annotations

import math
from collections.abc import Mapping

from geoscope.names import layer_index
from geoscope.trajectory.increments import Increments
from geoscope.verbs.series.numbers import SeriesNumbers, Steps

__all__ = ["add_depth", "centre", "shares"]


def shares(parts: Mapping[int, float]) -> dict[int, float]:
    """Block → its part of the sum; nothing of a sum of 0."""
    whole = math.fsum(parts.values())
    return {block: parts[block] / whole for block in sorted(parts)} if whole > 0 else {}


def centre(parts: Mapping[int, float]) -> float | None:
    """Σ block·share, of shares by block."""
    return math.fsum(block * share for block, share in parts.items()) if parts else None


def add_depth(
    numbers: SeriesNumbers,
    increments: Mapping[str, Increments],
    sizes: Mapping[str, tuple[int, int]],
) -> None:
    """`depth_centre` Σ_b b·e_b and `depth_share@b` e_b = Σ‖Δ‖² of block b over all blocks.

    increments, sizes: of every matrix by its name. Null: energy in proportion to the entries.
    """
    blocks = {name: block for name in increments if (block := layer_index(name)) is not None}
    if not blocks:
        return
    steps = len(next(iter(increments.values())))
    profiles = [_profile(blocks, increments, i) for i in range(steps)]
    entries: dict[int, float] = {}
    for name, block in blocks.items():
        entries[block] = entries.get(block, 0.0) + math.prod(sizes[name])
    nulls = shares(entries)
    _put(numbers, "depth_centre", tuple(map(centre, profiles)), centre(nulls))
    for block, null in nulls.items():
        row = tuple(profile.get(block) for profile in profiles)
        _put(numbers, f"depth_share@{block}", row, null)


def _profile(
    blocks: Mapping[str, int], increments: Mapping[str, Increments], step: int
) -> dict[int, float]:
    """Shares of the energy of the update at a step."""
    energies: dict[int, float] = {}
    for name, block in blocks.items():
        energy = max(0.0, float(increments[name].G[step, step]))
        energies[block] = energies.get(block, 0.0) + energy
    return shares(energies)


def _put(numbers: SeriesNumbers, key: str, row: Steps, null: float | None) -> None:
    """A number, of the last step, with its null and its series."""
    numbers.put(key, row[-1])
    numbers.series[f"{key}_by_step"] = row
    if null is not None:
        numbers.nulls[key] = null
