"""How many stored entries change from one checkpoint to the next, and what sending them costs.

A sparse weight sync sends the changed entries alone: their positions and their new values, as they
are stored (slime's page on delta weight sync, verl's `delta_sharded`, TRL's delta sync;
2602.03839 says why so few change). Positions are 32-bit numbers, or gaps of 16 bits where every gap
of a tensor fits, else of 32.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from geoscope.linalg.changes import Side, expected_unchanged
from geoscope.linalg.isotropic import isotropic_spread
from geoscope.profile import stage

__all__ = ["POSITION_BYTES", "ChangedEntries", "StepChange", "changed_step", "expected_change"]

POSITION_BYTES = 4
_SHORT_GAP_BYTES, _LONGEST_SHORT_GAP = 2, (1 << 16) - 1
# Entries of one step: a block stays in a cache.
_BLOCK = 1 << 17
# Where each part of so many entries has one that changed, no gap inside is long.
_PART = (_LONGEST_SHORT_GAP + 1) // 2
# Integers as wide as a float, by its bytes.
_CODES = {2: torch.int16, 4: torch.int32, 8: torch.int64}

_Counts = tuple[float | None, ...]


@dataclass(frozen=True)
class StepChange:
    """Of one tensor from one checkpoint to the next.

    changed: entries whose stored number is another.
    gap_bytes: of a position as a gap, 2 or 4.
    """

    changed: int
    gap_bytes: int


@dataclass(frozen=True)
class ChangedEntries:
    """Over a series, of one tensor or of a sum of tensors; every tuple has T numbers.

    entries: m·n.
    changed: entries whose stored number changed since the step before.
    expected: the same of an isotropic increment that measures as large once it is stored; None
    where a grid hides the rounding cells.
    full: bytes of a full copy; None where codes are stored, whose scales travel, too.
    sent: bytes of changed values and their positions of 32 bits; None where `full` is.
    sent_gaps: the same with positions as gaps.
    """

    entries: int
    changed: tuple[int, ...]
    expected: _Counts
    full: _Counts
    sent: _Counts
    sent_gaps: _Counts

    def __add__(self, other: ChangedEntries) -> ChangedEntries:
        pairs = {
            key: _sums(getattr(self, key), getattr(other, key))
            for key in ("expected", "full", "sent", "sent_gaps")
        }
        changed = tuple(a + b for a, b in zip(self.changed, other.changed, strict=True))
        return ChangedEntries(self.entries + other.entries, changed, **pairs)

    @classmethod
    def of(
        cls,
        entries: int,
        steps: Sequence[StepChange],
        expected: Sequence[float | None],
        value_bytes: Sequence[int | None],
    ) -> ChangedEntries:
        """value_bytes: of an entry at each step, None where it is stored as a code."""
        pairs = list(zip(steps, value_bytes, strict=True))
        return cls(
            entries,
            tuple(step.changed for step in steps),
            tuple(None if share is None else share * entries for share in expected),
            tuple(None if size is None else entries * size for size in value_bytes),
            tuple(_sent(step, POSITION_BYTES, size) for step, size in pairs),
            tuple(_sent(step, step.gap_bytes, size) for step, size in pairs),
        )

    @property
    def shares(self) -> tuple[float, ...]:
        """Changed entries over all, step by step."""
        return tuple(count / self.entries for count in self.changed)

    @property
    def expected_shares(self) -> _Counts:
        """Of an isotropic increment of the same size."""
        return tuple(None if one is None else one / self.entries for one in self.expected)

    @property
    def sync_shares(self) -> _Counts:
        """Bytes of a sync over those of a full copy, step by step."""
        return _ratios(self.sent, self.full)

    @property
    def gap_sync_shares(self) -> _Counts:
        """The same with positions as gaps."""
        return _ratios(self.sent_gaps, self.full)

    @property
    def break_even(self) -> float | None:
        """Share of changed entries at which positions and values are as many bytes as a full copy.

        b/(b + 4) for entries of b bytes: 1/3 in bf16, 1/2 in fp32.
        """
        if None in self.full:
            return None
        full = math.fsum(size for size in self.full if size is not None)
        return full / (full + POSITION_BYTES * self.entries * len(self.full))


def _sums(one: _Counts, other: _Counts) -> _Counts:
    return tuple(None if a is None or b is None else a + b for a, b in zip(one, other, strict=True))


def _ratios(parts: _Counts, wholes: _Counts) -> _Counts:
    return tuple(
        None if part is None or not whole else part / whole
        for part, whole in zip(parts, wholes, strict=True)
    )


def _sent(step: StepChange, position_bytes: int, value_bytes: int | None) -> float | None:
    return None if value_bytes is None else step.changed * (position_bytes + value_bytes)


@stage("entries")
def changed_step(before: Tensor, after: Tensor) -> StepChange:
    """Entries whose number is another, and how long their gaps are. Equal shape, any float dtypes.

    Of one dtype these are the entries whose bits differ, but for the sign of a zero. The first gap
    counts from the start.
    """
    first, second = before.reshape(-1), after.reshape(-1)
    changed, last, longest = 0, -1, 0
    for start in range(0, len(first), _BLOCK):
        block = slice(start, start + _BLOCK)
        differs = _changed_entries(first[block], second[block])
        count = int(np.count_nonzero(differs))
        if count:
            longest = max(longest, start + int(differs.argmax()) - last, _long_gap(differs))
            changed, last = changed + count, start + differs.tobytes().rfind(b"\1")
    is_short = longest <= _LONGEST_SHORT_GAP
    return StepChange(changed, _SHORT_GAP_BYTES if is_short else POSITION_BYTES)


def _changed_entries(before: Tensor, after: Tensor) -> np.ndarray:
    """Which entries of a block hold another number, bool."""
    codes = _CODES.get(before.dtype.itemsize)
    if before.dtype != after.dtype or codes is None:
        return _numbers(before) != _numbers(after)
    # On bits: a short format need not be made wide.
    one, other = (block.cpu().view(codes).numpy() for block in (before, after))
    changed, minus_zero = one != other, np.iinfo(one.dtype).min
    if len(one) and minus_zero in (one.min(), other.min()):
        changed &= (one | other) != minus_zero
    return changed


def _long_gap(differs: np.ndarray) -> int:
    """The longest gap between entries of a block that changed; 0 where all of them are short."""
    parts = differs[: len(differs) // _PART * _PART].reshape(-1, _PART)
    if parts.any(axis=1).all():
        return 0
    return int(np.diff(np.flatnonzero(differs)).max(initial=0))


def _numbers(block: Tensor) -> np.ndarray:
    """Of short formats in fp32, which holds them all."""
    return (block if block.dtype.itemsize > 2 else block.float()).cpu().numpy()


def expected_change(before: Side, after: Side, rms: float) -> float | None:
    """Share of entries that an isotropic increment changes; as the null of `update_sparsity_exact`.

    rms: ‖δ‖_F/√(mn) as measured. The increment N(0, s²) is added to the numbers of `before` and
    rounded to the format of `after`, with the s whose stored increment measures as large. None
    where either side lies on a grid (docs/methods.md#unchanged-entries).
    """
    if before.is_quantised or after.is_quantised:
        return None
    return 1.0 - expected_unchanged(before, after.fmt, isotropic_spread(before, after, rms)).exact
