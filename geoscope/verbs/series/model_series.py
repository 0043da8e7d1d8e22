"""A series of whole models: the weights that all of them have with one shape."""

from __future__ import annotations

from collections.abc import Sequence

from geoscope.errors import OptionError, PairingError
from geoscope.models.checkpoint import Checkpoint
from geoscope.models.pairing import is_resized, match, pair
from geoscope.models.split import common_config, narrowed
from geoscope.models.ungathered import refuse_ungathered
from geoscope.names import NameMap, in_natural_order
from geoscope.peft.adapted import AdaptedCheckpoint
from geoscope.records import Pairing, Skipped
from geoscope.sources.series import Series
from geoscope.verbs.models import in_parts as parts_of
from geoscope.verbs.series.adapted import is_made_of
from geoscope.verbs.series.options import FollowOptions
from geoscope.verbs.series.start import BASE, after_start, equal_models
from geoscope.verbs.series.tensors import MatchedSeries, ModelTensor, SeriesTensor, lost_steps

__all__ = ["model_series"]


def model_series(
    series: Series,
    options: FollowOptions,
    start: Checkpoint | None,
    *,
    in_parts: bool,
) -> MatchedSeries:
    rules = NameMap(options.map_name)
    series, base, checkpoints = _from_base(series, start, rules)
    steps = series.steps if start is None else (series.start or 0, *series.steps)
    whole, notes = base, ()
    if in_parts:
        config = common_config(base, *checkpoints)
        base, *checkpoints = [parts_of(one, config) for one in (base, *checkpoints)]
        notes = base.notes[len(whole.notes) :]
    notes += rules.notes(name for one in (base, *checkpoints) for name in one.tensors)
    if options.allow_vocab_resize:
        base, checkpoints, resized = _common_rows(base, checkpoints, rules)
        notes += resized
    pairings = [pair(base, one, options.selection, rules) for one in checkpoints]
    notes += _resized_notes(pairings)
    names = [{matrix.name: matrix for matrix in found.matrices} for found in pairings]
    common = [name for name in names[0] if all(name in found for found in names)]
    absent = {name for found in names for name in found} - set(common)
    absent |= {name for found in pairings for name in found.missing}
    if not common:
        raise PairingError(
            f"{base.ref.given}: no matrix is in all {len(checkpoints)} checkpoints with one shape; "
            "see `geoscope inspect` on the first and the last"
        )
    tensors: dict[str, SeriesTensor] = {}
    left: list[Skipped] = []
    is_made = all(is_made_of(whole, checkpoint) for checkpoint in checkpoints)
    for name in in_natural_order(common):
        pairs = [found[name] for found in names]
        places = (
            (base, pairs[0].base.name),
            *((one, two.tuned.name) for one, two in zip(checkpoints, pairs, strict=True)),
        )
        if len({one.tensors[stored].transposed for one, stored in places}) > 1:
            absent.add(name)
            continue
        m, n = pairs[0].shape
        if is_made and all(one.leaves(stored) for one, stored in places[1:]):
            left.append(Skipped(name, "not adapted"))
            continue
        tensors[name] = ModelTensor(name, (m, n), places, is_made)
    return MatchedSeries(
        steps=steps,
        tensors=tensors,
        refs=(base.ref, checkpoints[-1].ref),
        points=tuple(point.given for point in series.points),
        skipped=(*series.passed_over, *pairings[0].skipped, *left),
        missing=(*in_natural_order(absent), *lost_steps(series)),
        notes=(*series.notes, *notes),
        series=series,
        base=base,
        in_parts=in_parts,
    )


def _common_rows(
    base: Checkpoint, checkpoints: Sequence[Checkpoint], names: NameMap
) -> tuple[Checkpoint, list[Checkpoint], tuple[str, ...]]:
    """All with the rows of embeddings and output heads that every one of them has; and remarks.

    An adapter over its base has the rows of the base, and stays as it is.
    """
    found = list(checkpoints)
    if any(isinstance(one, AdaptedCheckpoint) for one in (base, *found)):
        return base, found, ()
    heights: dict[str, list[int]] = {}
    partners: list[tuple[int, str, str]] = []
    for number, one in enumerate(found):
        for mine, theirs in match(base.tensors, one.tensors, names).pairs:
            if mine.name in base.tied_to and theirs.name in one.tied_to:
                continue  # counted under the other name
            if is_resized(mine.name, mine.shape, theirs.shape) or mine.shape == theirs.shape:
                heights.setdefault(mine.name, [*mine.shape[:1]]).extend(theirs.shape[:1])
                partners.append((number, mine.name, theirs.name))
    common = {name: min(rows) for name, rows in heights.items() if len({*rows}) > 1}
    for number, mine, theirs in partners:
        if mine in common:
            found[number] = narrowed(found[number], theirs, common[mine])
    for name, rows in common.items():
        base = narrowed(base, name, rows)
    notes = (
        f"{name}: {' or '.join(map(str, sorted({*heights[name]})))} rows; the first {rows}, which "
        "all models have, are followed"
        for name, rows in common.items()
    )
    return base, found, tuple(notes)


def _resized_notes(pairings: Sequence[Pairing]) -> tuple[str, ...]:
    """On embeddings and output heads in scope that are not followed, for their rows differ."""
    notes = (
        f"{one.name}: {one.base[0]} rows in the base, {one.tuned[0]} in a checkpoint; "
        "`allow_vocab_resize` follows the rows that all have"
        for found in pairings
        for one in found.shape_mismatch
        if one.name in found.missing and is_resized(one.name, one.base, one.tuned)
    )
    return tuple(dict.fromkeys(notes))


def _from_base(
    series: Series, base: Checkpoint | None, names: NameMap
) -> tuple[Series, Checkpoint, list[Checkpoint]]:
    """The series, its base, and the models after that; without a base the first one is it."""
    if base is not None:
        refuse_ungathered(base)
        series = after_start(
            series,
            lambda point: (
                point.checkpoint is not None and equal_models(base, point.checkpoint, names)
            ),
            BASE,
        )
    found = [point.checkpoint for point in series.points if point.checkpoint is not None]
    if base is None and len(found) > 1:
        return series, found[0], found[1:]
    if base is None or not found:
        given = [point.given for point in series.points] or [one.name for one in series.passed_over]
        raise OptionError(f"{given[-1]}: one checkpoint makes no series; give more, or `base`")
    return series, base, found
