"""Between checkpoints: which share of the stored entries changed, and what sending them costs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from geoscope.records import LayerRecord, Report
from geoscope.trajectory.changed import POSITION_BYTES, ChangedEntries
from geoscope.verbs.series.numbers import SeriesNumbers

__all__ = ["CHANGES", "add_changes", "changes_between"]

# Ids of numbers: means over the steps.
CHANGES = ("changed_share", "sync_share", "sync_share_gaps", "sync_break_even", "sync_bytes")
_UNCHANGED = "update_sparsity_exact"
_VALUE_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4, "float64": 8}


def add_changes(numbers: SeriesNumbers, changed: ChangedEntries | None) -> None:
    """CHANGES and their series. Of an adapter none: a sync sends the adapter itself."""
    if changed is None:
        for key in CHANGES:
            numbers.put(key, None)
        return
    numbers.put("changed_share", _mean(changed.shares))
    numbers.put("sync_share", _mean(changed.sync_shares))
    numbers.put("sync_share_gaps", _mean(changed.gap_sync_shares))
    numbers.put("sync_break_even", changed.break_even)
    numbers.put("sync_bytes", _mean(changed.sent))
    null, even = _mean(changed.expected_shares), changed.break_even
    if null is not None:
        numbers.nulls["changed_share"] = null
        if even is not None:
            numbers.nulls["sync_share"] = null / even
    numbers.series.update(
        changed_share_by_step=changed.shares,
        changed_share_null=changed.expected_shares,
        sync_share_by_step=changed.sync_shares,
        sync_bytes_by_step=changed.sent,
    )


def _mean(steps: Sequence[float | None]) -> float | None:
    """Over the steps; None where one has no number."""
    known = [one for one in steps if one is not None]
    return math.fsum(known) / len(known) if known and len(known) == len(steps) else None


# --- of a report on two checkpoints ---------------------------------------------------------------


def changes_between(report: Report) -> dict[str, Any]:
    """What a report on two checkpoints tells of their stored entries: `sync`, `modules`, `layers`.

    `sync`: entries, changed, and bytes of positions (32 bits) and values, with the share of a full
    copy and the share of changed entries at which both are equal; None of adapters, which are
    themselves what a sync sends, and where dtypes differ. `modules`, `layers`: share of changed
    entries by module kind and by block, with its null.
    """
    rows = [one for one in report.layers if one.values.get(_UNCHANGED) is not None]
    return {
        "sync": _sync(rows, report.provenance.refs[-1].storage_dtype),
        "modules": _shares(rows, lambda one: one.module),
        "layers": _shares(rows, lambda one: None if one.layer is None else str(one.layer)),
    }


def _sync(rows: Sequence[LayerRecord], dtype: str) -> dict[str, float] | None:
    size, entries = _VALUE_BYTES.get(dtype), sum(map(_entries, rows))
    if size is None or not entries:
        return None
    changed = sum(round(_entries(one) * _changed(one.values)) for one in rows)
    sent = changed * (POSITION_BYTES + size)
    return {
        "entries": entries,
        "changed": changed,
        "bytes": sent,
        "share": sent / (entries * size),
        "break_even": size / (POSITION_BYTES + size),
    }


def _shares(rows: Sequence[LayerRecord], part_of: Any) -> dict[str, dict[str, float]]:
    """Part → share of changed entries, and its null where every matrix has one."""
    parts: dict[str, list[LayerRecord]] = {}
    for one in rows:
        if (part := part_of(one)) is not None:
            parts.setdefault(part, []).append(one)
    found: dict[str, dict[str, float]] = {}
    for part, own in parts.items():
        found[part] = {"changed": _weighted(own, [_changed(one.values) for one in own])}
        if all(_UNCHANGED in one.nulls for one in own):
            found[part]["null"] = _weighted(own, [_changed(one.nulls) for one in own])
    return found


def _weighted(rows: Sequence[LayerRecord], shares: Sequence[float]) -> float:
    sizes = list(map(_entries, rows))
    return math.fsum(n * share for n, share in zip(sizes, shares, strict=True)) / sum(sizes)


def _changed(numbers: Mapping[str, float | None]) -> float:
    same = numbers[_UNCHANGED]
    assert same is not None  # rows without one were left out
    return 1.0 - same


def _entries(one: LayerRecord) -> int:
    return math.prod(one.shape)
