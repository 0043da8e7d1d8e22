"""From the references of a series to its tensors: checkpoints, base, and what corresponds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from geoscope.errors import OptionError
from geoscope.models.checkpoint import Checkpoint
from geoscope.peft.adapter import Adapter
from geoscope.sources.memory import Opened
from geoscope.sources.open import open_adapter
from geoscope.sources.series import Series, open_series, series_in_memory
from geoscope.sources.steps import given_steps
from geoscope.verbs.models import open_model
from geoscope.verbs.options import Progress
from geoscope.verbs.series.adapter_series import adapter_series
from geoscope.verbs.series.model_series import model_series
from geoscope.verbs.series.options import FollowOptions
from geoscope.verbs.series.start import BASE, INITIAL
from geoscope.verbs.series.tensors import MatchedSeries

__all__ = ["open_followed"]


def open_followed(
    references: Sequence[Opened],
    options: FollowOptions,
    progress: Progress | None = None,
    *,
    start: Checkpoint | None = None,
    in_parts: bool = True,
) -> MatchedSeries:
    """The series and its base, matched tensor by tensor, from headers.

    start: the base, where it is open already and not a reference in the options.
    in_parts: fused and stacked tensors of models in parts; without it as they are stored.
    Raises OptionError, CheckpointError, PairingError.
    """
    progress = progress or Progress()
    steps = None if options.steps is None else given_steps(options.steps)
    base, initial = start, None
    if start is None and options.base is not None:
        base = open_model(options.base, on_progress=progress.on_download)
    if options.initial_adapter is not None:
        initial = open_adapter(
            options.initial_adapter, alpha=options.lora_alpha, on_progress=progress.on_download
        )
    series = _series(references, steps, options, _starts(base, initial), progress)
    if series.kind == "adapter":
        return _named(adapter_series(series, options, base, initial, in_parts=in_parts), start)
    if options.initial_adapter is not None:
        raise OptionError("`initial_adapter` is for series of adapters; these are whole models")
    if options.lora_alpha is not None:
        raise OptionError("`lora_alpha` is for series of adapters; these are whole models")
    return _named(model_series(series, options, base, in_parts=in_parts), start)


def _named(found: MatchedSeries, start: Checkpoint | None) -> MatchedSeries:
    """A base that was open already is not one that its reference opens again."""
    return replace(found, is_named=start is None)


def _series(
    references: Sequence[Opened],
    steps: Sequence[int] | None,
    options: FollowOptions,
    starts: Mapping[str, str],
    progress: Progress,
) -> Series:
    """From paths, or from models in memory. Raises OptionError for both together."""
    places = [reference for reference in references if isinstance(reference, str)]
    in_memory = [reference for reference in references if not isinstance(reference, str)]
    if places and in_memory:
        raise OptionError(
            "references: give either paths or models in memory, not both; open the paths first"
        )
    if in_memory:
        return series_in_memory(in_memory, steps)
    return open_series(
        places,
        steps=steps,
        alpha=options.lora_alpha,
        starts=starts,
        on_progress=progress.on_download,
    )


def _starts(base: Checkpoint | None, initial: Adapter | None) -> dict[str, str]:
    """Where what a series starts from lies → what it is."""
    found = {} if base is None else {base.ref.resolved: BASE}
    return found if initial is None else {**found, initial.resolved: INITIAL}
