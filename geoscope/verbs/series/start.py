"""Where does a series start? Base, or adapter before training, may be among the checkpoints.

The start itself is taken out and tells the step at which the series begins: 0 where nothing does.
Of epochs the first may be 0, and trained (torchtune): each is then read as one later.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from geoscope.errors import OptionError
from geoscope.foreign import local_path
from geoscope.models.checkpoint import Checkpoint
from geoscope.models.pairing import match
from geoscope.names import NameMap
from geoscope.peft.adapter import Adapter
from geoscope.records import Skipped
from geoscope.sources.series import Series, SeriesPoint

__all__ = ["BASE", "INITIAL", "after_start", "equal_adapters", "equal_models", "has_no_update"]

# What a series starts from, as notes name it.
BASE, INITIAL = "the base", "the adapter before training"


def after_start(series: Series, is_start: Callable[[SeriesPoint], bool], start: str) -> Series:
    """The checkpoints behind the start, with the step of that in `start`.

    is_start: whether a checkpoint of step 0 holds what the series starts from. start: what that is,
    as messages name it. Raises OptionError for a checkpoint that is not after it.
    """
    first = series.points[0]
    if series.start is None and first.step == 0 and is_start(first):
        series = _without(series, first, start)
    elif series.start is None and series.unit == "epoch" and _counts_from_zero(series):
        series = _one_later(series)
    begin = series.start or 0
    before = [point for point in series.points if point.step <= begin]
    if before:
        unit = series.unit
        raise OptionError(
            f"{before[0].given}: {unit} {before[0].step} must come after the start of the series "
            f"({start}, {unit} {begin}), and its weights are not those of the start. Leave one of "
            "the two out, or set all steps with `steps`"
        )
    return series


def _without(series: Series, point: SeriesPoint, start: str) -> Series:
    reason = f"holds the weights of {start}; taken out of the series, as its start"
    return replace(
        series,
        points=series.points[1:],
        passed_over=(*series.passed_over, Skipped(point.given, reason)),
        notes=(*series.notes, f"{point.given}: {reason}"),
        start=point.step,
    )


def _counts_from_zero(series: Series) -> bool:
    """Whether there is an epoch 0, given or beside those that are given."""
    beside = {local_path(point.given).parent / "epoch_0" for point in series.points}
    return series.points[0].step == 0 or any(path.is_dir() for path in beside)


def _one_later(series: Series) -> Series:
    note = (
        "epochs count from 0 here, and epoch_0 is trained (torchtune): epoch_0 is read as epoch 1, "
        "and so on; `steps` sets other numbers"
    )
    points = tuple(replace(point, step=point.step + 1) for point in series.points)
    return replace(series, points=points, notes=(*series.notes, note))


# --- equal weights ------------------------------------------------------------------------------


def equal_models(one: Checkpoint, other: Checkpoint, names: NameMap) -> bool:
    """Whether all tensors that both have are equal in value."""
    pairs = match(one.tensors, other.tensors, names).pairs
    return bool(pairs) and all(
        mine.shape == theirs.shape and _equal(one.read(mine.name), other.read(theirs.name))
        for mine, theirs in sorted(pairs, key=lambda pair: pair[0].nbytes)
    )


def _equal(one: Tensor, other: Tensor) -> bool:
    wide = torch.promote_types(one.dtype, other.dtype)
    return torch.equal(one.to(wide), other.to(wide))


def equal_adapters(one: Adapter, other: Adapter) -> bool:
    """Whether all factors are equal in value."""
    return one.modules.keys() == other.modules.keys() and all(
        a.shape == b.shape and _equal(a, b)
        for name in one.modules
        for a, b in zip(one.factors(name), other.factors(name), strict=True)
    )


def has_no_update(adapter: Adapter) -> bool:
    """Whether every product is zero, by a factor that is."""
    return not any(
        all(factor.any() for factor in adapter.factors(name)) for name in adapter.modules
    )
