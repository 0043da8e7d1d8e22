"""What is a series of checkpoints? Arguments in any order, sorted by the steps in their names.

    series = open_series(["runs/grpo"])                      # or its folders, a glob, Hub branches
    [point.step for point in series.points]                  # [20, 40, 60, …]

Nothing is guessed: what has no number or no weights is passed over and listed with its reason, the
same step twice is an error, epochs and steps are not mixed, nor models and adapters. Headers are
read here; data on demand, by the checkpoint or adapter of each point.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Literal

from geoscope.errors import CheckpointError, HubError, OptionError, first_names
from geoscope.foreign import parsed, small_text
from geoscope.formats.layout import is_index, parse_object
from geoscope.formats.readers import is_readable
from geoscope.formats.refused import is_never_opened
from geoscope.models.checkpoint import Checkpoint
from geoscope.models.ungathered import refuse_ungathered
from geoscope.names import in_natural_order
from geoscope.peft.adapter import Adapter
from geoscope.peft.config import ADAPTER_CONFIG
from geoscope.peft.folder import EXTRAPOLATION, RECORD
from geoscope.records import Skipped
from geoscope.sources.common_folder import in_common_folder
from geoscope.sources.hub.progress import OnDownload
from geoscope.sources.locate import Location, locate
from geoscope.sources.memory import LiveAdapter
from geoscope.sources.open import open_location
from geoscope.sources.places import below, find_places
from geoscope.sources.reference import LocalReference
from geoscope.sources.run_folder import (
    Candidate,
    candidates,
    is_run_folder,
    run_folder,
    runs_below,
)
from geoscope.sources.signs import Kind
from geoscope.sources.steps import Step

__all__ = ["Series", "SeriesPoint", "open_series", "series_in_memory"]

_NO_NUMBER = "no step number in its name; set the steps by hand with `steps`"
_NO_WEIGHTS = "a file without weights"


@dataclass(frozen=True)
class SeriesPoint:
    """A checkpoint of a series. Of `checkpoint` and `adapter` one is None.

    given: as it was named. place: the sub-folder that was chosen, what it holds, and over what.
    """

    step: int
    given: str
    place: str
    kind: Literal["model", "adapter"]
    checkpoint: Checkpoint | None = None
    adapter: Adapter | None = None

    @property
    def resolved(self) -> str:
        """The path, or org/name@commit, of what was opened."""
        if self.checkpoint is not None:
            return self.checkpoint.ref.resolved
        assert self.adapter is not None  # one of the two
        return self.adapter.resolved


@dataclass(frozen=True)
class Series:
    """Checkpoints by step, all of one kind.

    passed_over: what is not a point, `missing` where a step is lost with it.
    notes: one-line remarks.
    unit: what the numbers count, `step` or `epoch`. start: the number of what the series starts
    from, where that is one of the checkpoints that were given; it is not a point then.
    """

    points: tuple[SeriesPoint, ...]
    passed_over: tuple[Skipped, ...] = ()
    notes: tuple[str, ...] = ()
    unit: str = "step"
    start: int | None = None

    @property
    def steps(self) -> tuple[int, ...]:
        return tuple(point.step for point in self.points)

    @property
    def kind(self) -> Literal["model", "adapter"]:
        return self.points[0].kind


def open_series(
    references: Sequence[str],
    *,
    steps: Sequence[int] | None = None,
    alpha: float | None = None,
    starts: Mapping[str, str] | None = None,
    on_progress: OnDownload | None = None,
) -> Series:
    """The series that the references name, sorted by step, whatever their order.

    references: see geoscope/sources/run_folder.py. steps: one number for each reference, in
    their order, in place of those in the names. alpha: as of `open_adapter`. starts: resolved place
    of what the series starts from → what that is; it is taken out. on_progress: as of
    `open_checkpoint`.
    Raises OptionError for references that make no series, CheckpointError when nothing is left.
    """
    found = candidates(references)
    passed: tuple[Skipped, ...] = ()
    if steps is not None:
        found = _by_hand(found, steps)
    elif len(found) == 1 and _is_run(found[0]):
        found, passed = run_folder(found[0])
    opened: list[tuple[Candidate, SeriesPoint]] = []
    lost: list[tuple[Candidate, Skipped]] = []
    for one in _in_order(in_common_folder(found)):
        point = _open(one, alpha, on_progress)
        if isinstance(point, Skipped):
            lost.append((one, point))
            continue
        opened.append((one, point))
    opened, repeated = _without_repeats(opened)
    opened, masters = _without_masters(opened)
    repeated += masters
    read = {point.step for _, point in opened}
    opened, taken = _without_starts(opened, starts or {})
    apart = tuple(Skipped(*each) for each in taken.values())
    skipped = _sorted((*passed, *(_lost(*each, read) for each in lost), *repeated, *apart))
    if not opened:
        raise _nothing(skipped)
    unit = _one_unit(opened)
    points = tuple(sorted((point for _, point in opened), key=lambda point: point.step))
    _check_steps(points)
    _check_kinds(points)
    notes = _place_notes(opened)
    notes += [f"{one.name}: {one.reason}" for one in apart]
    notes += [f"{one.name}: {one.reason}; the step is lost" for one in skipped if one.missing]
    if unit == "epoch":
        notes.append("the numbers of this series are epochs, not steps")
    return Series(points, skipped, tuple(notes), unit, max(taken, default=None))


def series_in_memory(
    models: Sequence[Checkpoint | Adapter | LiveAdapter], steps: Sequence[int] | None
) -> Series:
    """The series of models that are open, or in memory; each has its step by hand.

    Raises OptionError for steps that are not given, and as `open_series` does.
    """
    if steps is None or len(steps) != len(models):
        count = "none" if steps is None else f"{len(steps)}"
        raise OptionError(
            f"`steps`: one number for each of the {len(models)} models is needed, {count} given"
        )
    points = sorted(map(_point_in_memory, models, steps), key=lambda point: point.step)
    _check_steps(points)
    _check_kinds(points)
    for point in points:
        if point.checkpoint is not None:
            refuse_ungathered(point.checkpoint)
    return Series(tuple(points))


def _point_in_memory(model: Checkpoint | Adapter | LiveAdapter, step: int) -> SeriesPoint:
    if not isinstance(model, Checkpoint):
        adapter = model.adapter if isinstance(model, LiveAdapter) else model
        return SeriesPoint(int(step), adapter.given, "in memory", "adapter", adapter=adapter)
    return SeriesPoint(int(step), model.ref.given, "in memory", "model", checkpoint=model)


def _by_hand(found: Sequence[Candidate], steps: Sequence[int]) -> tuple[Candidate, ...]:
    if len(found) != len(steps):
        raise OptionError(
            f"`steps` has {len(steps)} numbers for {len(found)} checkpoints; "
            "name each checkpoint and give one number for each, in their order"
        )
    if any(step < 0 for step in steps):
        raise OptionError(f"`steps` has {min(steps)}; steps are whole numbers from 0 on")
    return tuple(replace(one, step=Step(int(step))) for one, step in zip(found, steps, strict=True))


def _is_run(one: Candidate) -> bool:
    return isinstance(one.reference, LocalReference) and is_run_folder(one.reference.path)


def _in_order(found: Sequence[Candidate]) -> list[Candidate]:
    """By step, then by name; those without a step last: the order of the arguments is no matter."""
    place = {given: i for i, given in enumerate(in_natural_order({one.given for one in found}))}

    def key(one: Candidate) -> tuple[bool, int, int]:
        return one.step is None, one.step.number if one.step else 0, place[one.given]

    return sorted(found, key=key)


def _sorted(skipped: Sequence[Skipped]) -> tuple[Skipped, ...]:
    place = {name: i for i, name in enumerate(in_natural_order({one.name for one in skipped}))}
    return tuple(sorted(skipped, key=lambda one: (place[one.name], one.reason)))


def _lost(one: Candidate, skipped: Skipped, read: Collection[int]) -> Skipped:
    """Marked as missing where no other folder has its step."""
    if one.step is None or skipped.reason == _NO_WEIGHTS or _is_predicted(one):
        return skipped
    return replace(skipped, missing=one.step.number not in read)


# --- one candidate ------------------------------------------------------------------------------


def _open(
    one: Candidate, alpha: float | None, on_progress: OnDownload | None
) -> SeriesPoint | Skipped:
    """The point, or why there is none."""
    reason = _no_candidate(one)
    if reason is not None or one.step is None:
        return Skipped(one.given, reason or _NO_NUMBER)
    label = f"{one.step.unit} {one.step.number}"
    if _is_predicted(one):
        return Skipped(one.given, f"{label}: predicted by extrapolate, and not trained")
    try:
        choice, opened = _opened(one, alpha, on_progress)
        if isinstance(opened, Checkpoint):
            refuse_ungathered(opened)
    except HubError:
        raise  # a branch without weights is passed over like a folder, a Hub that fails is not
    except CheckpointError as error:
        return Skipped(one.given, f"{label}: {error}")
    if isinstance(opened, Adapter):
        return SeriesPoint(one.step.number, one.given, choice, "adapter", adapter=opened)
    return SeriesPoint(one.step.number, one.given, choice, "model", checkpoint=opened)


def _is_predicted(one: Candidate) -> bool:
    """Whether `extrapolate` wrote it."""
    if not isinstance(one.reference, LocalReference):
        return False
    try:
        record = parsed(small_text(one.reference.path / RECORD))
    except (OSError, ValueError):
        return False
    if not isinstance(record, dict):
        return False
    return record.get("schema") == EXTRAPOLATION or record.get("method") == "extrapolated"


def _no_candidate(one: Candidate) -> str | None:
    """Why something on this disk can be no checkpoint at all: what a shell's glob brings along."""
    if not isinstance(one.reference, LocalReference):
        return None
    path = one.reference.path
    if path.is_file() and not _may_hold_weights(path.name):
        return _NO_WEIGHTS
    if not path.is_dir() or find_places(path):
        return None
    if one.step is not None:
        return None  # opening it says what is wrong
    if is_run_folder(path):
        return "a run folder with steps of its own; give it alone"
    runs = runs_below(path)
    return "a folder without weights" + (f"; steps are in {first_names(runs)}" if runs else "")


def _may_hold_weights(name: str) -> bool:
    return is_index(name) or (is_readable(name) and not is_never_opened(name))


def _opened(
    candidate: Candidate, alpha: float | None, on_progress: OnDownload | None
) -> tuple[str, Checkpoint | Adapter]:
    """What lies where, and over what it was chosen; an adapter comes before a model."""
    reference = candidate.reference
    if isinstance(reference, LocalReference) and (folder := candidate.folder):
        reference = LocalReference(below(reference.given, folder), reference.path / folder)
    location = locate(reference, adapter_first=True, on_progress=on_progress)
    if location.kind is Kind.ADAPTER and alpha is None:
        _refuse_zero_alpha(location)
    opened = open_location(location, alpha=alpha)
    choice = location.choice
    if candidate.folder:
        choice = f"{candidate.folder}/{choice.removeprefix('./')}"
    if isinstance(opened, Adapter) and location.kind is Kind.SHARDS:
        choice = f"{choice}, read as an adapter"
    return choice, opened


def _refuse_zero_alpha(location: Location) -> None:
    """Raises CheckpointError for an adapter of an old merger, which wrote no scaling."""
    if ADAPTER_CONFIG not in location.folder.names():
        return  # said when the adapter is opened
    config = parse_object(location.folder.text(ADAPTER_CONFIG), location.label)
    # AdaLoRA takes 0 for its own rank.
    if config.get("peft_type", "LORA") == "LORA" and config.get("lora_alpha") == 0:
        raise CheckpointError(
            f"{location.label}: lora_alpha is 0: written by an old merger; set it in "
            f"{ADAPTER_CONFIG} to the alpha of the training"
        )


# --- the series as a whole ----------------------------------------------------------------------


def _without_repeats(
    opened: Sequence[tuple[Candidate, SeriesPoint]],
) -> tuple[list[tuple[Candidate, SeriesPoint]], list[Skipped]]:
    """The same place at the same step, named twice (overlapping globs): once is enough."""
    kept: dict[tuple[int, str], tuple[Candidate, SeriesPoint]] = {}
    repeated: list[Skipped] = []
    for one, point in opened:
        key = point.step, point.resolved
        if key in kept:
            repeated.append(Skipped(point.given, f"given twice, as {kept[key][1].given} too"))
        else:
            kept[key] = one, point
    return list(kept.values()), repeated


def _without_masters(
    opened: Sequence[tuple[Candidate, SeriesPoint]],
) -> tuple[list[tuple[Candidate, SeriesPoint]], list[Skipped]]:
    """DeepSpeed's shards of a step give way to the model that OpenRLHF saved of it beside them."""
    plain = {point.step: point.given for _, point in opened if not _is_zero(point)}
    kept = [(one, point) for one, point in opened if not (_is_zero(point) and point.step in plain)]
    passed = [
        Skipped(point.given, f"step {point.step} is read from {plain[point.step]}")
        for _, point in opened
        if _is_zero(point) and point.step in plain
    ]
    return kept, passed


def _is_zero(point: SeriesPoint) -> bool:
    return point.place.startswith(f"./: {Kind.ZERO.value}")


def _without_starts(
    opened: Sequence[tuple[Candidate, SeriesPoint]], starts: Mapping[str, str]
) -> tuple[list[tuple[Candidate, SeriesPoint]], dict[int, tuple[str, str]]]:
    """The checkpoints that are not what the series starts from; step → name and reason of others.

    Links, relative paths and sub-folders that were chosen lead to the same place.
    """
    places = {_place(resolved): start for resolved, start in starts.items()}
    rest: list[tuple[Candidate, SeriesPoint]] = []
    taken: dict[int, tuple[str, str]] = {}
    for one, point in opened:
        start = places.get(_place(point.resolved))
        if start is None:
            rest.append((one, point))
        else:
            taken[point.step] = point.given, f"is {start}; taken out of the series, as its start"
    return rest, taken


def _place(resolved: str) -> str:
    """The same for every path that leads there; org/name@commit stays."""
    path = Path(resolved)
    return str(path.resolve()) if path.exists() else resolved


def _nothing(skipped: Sequence[Skipped]) -> CheckpointError:
    reasons = first_names([f"{one.name}: {one.reason}" for one in skipped], 2)
    return CheckpointError(
        f"none of the given paths is a checkpoint with a step number ({reasons})"
    )


def _one_unit(opened: Sequence[tuple[Candidate, SeriesPoint]]) -> str:
    by_unit = {one.step.unit: point.given for one, point in opened if one.step is not None}
    if len(by_unit) > 1:
        raise OptionError(
            f"{by_unit['epoch']} counts epochs and {by_unit['step']} steps; give those of one "
            "kind, or set the steps by hand with `steps`"
        )
    return next(iter(by_unit))


def _place_notes(opened: Sequence[tuple[Candidate, SeriesPoint]]) -> list[str]:
    """Where the weights lie below the folders of the steps, if in the same place of each."""
    places = {
        point.place
        if isinstance(one.reference, LocalReference) and one.reference.path.is_dir()
        else ""
        for one, point in opened
    }
    (place, *others) = places
    if others or not place or place.startswith("./"):
        return []
    return [f"weights of every step taken from {place}"]


def _check_steps(points: Sequence[SeriesPoint]) -> None:
    for one, other in pairwise(points):
        if one.step == other.step:
            raise OptionError(
                f"step {one.step} is there twice: {one.given} and {other.given}; give one of them"
            )


def _check_kinds(points: Sequence[SeriesPoint]) -> None:
    first = {kind: point for point in reversed(points) for kind in (point.kind,)}
    if len(first) > 1:
        adapter, model = first["adapter"], first["model"]
        raise OptionError(
            f"step {adapter.step} is an adapter ({adapter.resolved}) and step {model.step} a full "
            f"model ({model.resolved}); a series has one kind: name the sub-folders that are meant"
        )
