"""A series of adapters whose updates are no products: each is followed as the model that it makes.

DoRA, IA3, OFT and their like exist on a base alone. Over the given base every step is a checkpoint
of fp64 weights, made one matrix at a time.
"""

from __future__ import annotations

from dataclasses import replace

from geoscope.errors import OptionError, UnsupportedFormat
from geoscope.models.checkpoint import Checkpoint
from geoscope.names import NameMap
from geoscope.peft.adapted import AdaptedCheckpoint
from geoscope.peft.adapter import Adapter
from geoscope.sources.series import Series, SeriesPoint
from geoscope.verbs.adapted_model import adapted

__all__ = ["as_models", "is_made_of", "not_predicted", "of_a_base"]


def of_a_base(adapter: Adapter) -> str | None:
    """What such an adapter is called; None where all its updates are products."""
    return next(
        (module.called for module in adapter.modules.values() if module.kind == "base"), None
    )


def as_models(
    series: Series, base: Checkpoint | None, initial: Adapter | None, names: NameMap
) -> Series:
    """The series with a checkpoint over the base in place of each adapter.

    base: as stored. Raises OptionError without one, and for a start that is not zero.
    """
    first = series.points[0].adapter
    assert first is not None  # a series has one kind
    called = of_a_base(first)
    if base is None:
        raise OptionError(
            f"{first.given}: the update of {called} cannot be computed without the base model; "
            "give that as `base`"
        )

    def over(point: SeriesPoint) -> SeriesPoint:
        assert point.adapter is not None
        made = adapted(base, base, point.adapter, initial, names)
        return replace(point, kind="model", adapter=None, checkpoint=made)

    note = f"{called}: every step is the model that it makes of the base, in fp64"
    points = tuple(over(point) for point in series.points)
    return replace(series, points=points, notes=(*series.notes, note))


def is_made_of(whole: Checkpoint, checkpoint: Checkpoint) -> bool:
    """Whether the weights are those of a base, as stored, with an adapter: then what storing the
    base rounded away is in both."""
    return isinstance(checkpoint, AdaptedCheckpoint) and checkpoint.whole is whole


def not_predicted(adapter: Adapter) -> UnsupportedFormat:
    """The error of what writes a predicted adapter."""
    return UnsupportedFormat(
        f"{adapter.given}: {of_a_base(adapter)} is not predicted by its factors alone; merge every "
        "step into the base (PeftModel.merge_and_unload) and give the merged folders"
    )
