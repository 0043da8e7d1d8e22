"""A run while it trains: each checkpoint against the base and the one before, once it is whole.

One line of JSON a step goes to geoscope.jsonl in the run's folder. It holds no times, so that a
watcher that was killed and started again leaves the same file.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from geoscope.arguments import Place, path_of
from geoscope.engine import estimate_seconds
from geoscope.errors import CheckpointError, GeoscopeError, OptionError, ReportError
from geoscope.files import encoded
from geoscope.foreign import (
    COUNT,
    COUNTS,
    INDEX,
    Form,
    check_fields,
    parsed,
    reason,
    shown,
    small_bytes,
)
from geoscope.kinds import KINDS
from geoscope.models.checkpoint import Checkpoint
from geoscope.names import in_natural_order
from geoscope.peft.adapter import Adapter
from geoscope.records import LayerRecord, Report
from geoscope.sources.open import open_model_or_adapter
from geoscope.sources.saves import Save, completed_by_trainer, is_whole, saves_of
from geoscope.verbs.models import open_model, open_tuned
from geoscope.verbs.options import Options
from geoscope.verbs.pairs.compare import compare, measure_adapter
from geoscope.verbs.pairs.prepare import Prepared, prepare
from geoscope.verbs.series import depth
from geoscope.verbs.series.between import changes_between
from geoscope.verbs.series.ranks import is_of
from geoscope.verbs.series.watch_options import WatchOptions

__all__ = ["LOG", "Observation", "recorded", "scalars", "watch"]

LOG = "geoscope.jsonl"
_SCHEMA = "geoscope.watch/1"
MEASURED, FAILED, GONE = "MEASURED", "FAILED", "GONE"
_START_AGAIN = "move it away, and start again"
_LAYERS = Form(
    "a list of whole numbers", lambda value: isinstance(value, list) and COUNTS.holds(value)
)
# Kept beside the columns of compare.
_RANKS = ("effective_rank", "top_share", "lift", "update_sparsity_exact")
# Of what changed since the checkpoint before.
_BETWEEN = ("relative_update", "update_sparsity_exact", "update.stable_rank")


@dataclass(frozen=True)
class Observation:
    """What came of one checkpoint. record: its line. report: against the base; None without."""

    record: Mapping[str, Any]
    report: Report | None = None

    @property
    def step(self) -> int:
        return self.record["step"]


def watch(
    run: Place,
    *,
    options: WatchOptions | None = None,
    once: bool = False,
    until: int | None = None,
    interval: float = 30.0,
    sleep: Callable[[float], None] = time.sleep,
) -> Iterator[Observation]:
    """Measures each checkpoint of a run as it becomes whole, and writes its line.

    run: the folder that the trainer saves in. once: what is there now, and no more. until: ends
    after that step. interval: seconds between two looks; a save of which the trainer says nothing
    has to stand still as long. Steps that geoscope.jsonl holds are not measured again.
    Raises OptionError, CheckpointError for a run or base that is not there, ReportError where the
    file cannot be written.
    """
    watcher = _Watcher(path_of(run, "run"), options or WatchOptions(), interval)
    while True:
        for observation in watcher.look():
            yield observation
            if until is not None and observation.step >= until:
                return
        if once:
            return
        sleep(interval)


class _Watcher:
    """One run. What was measured is read from its file: nothing is lost with the process."""

    def __init__(self, run: Path, options: WatchOptions, interval: float) -> None:
        self.run, self.options, self.interval = run, options, interval
        self.base = None if options.base is None else open_model(options.base)
        self.lines = _Lines(run / LOG)

    def look(self) -> Iterator[Observation]:
        """The checkpoints that are whole and were not measured, by step."""
        saves = saves_of(self.run)
        for save in saves:
            if save.step.number % self.options.every or save.step.number in self.lines.steps():
                continue
            if not is_whole(save, saves, stand=self.interval) or not save.is_unchanged():
                continue
            is_said = completed_by_trainer(save, saves) is True
            found = self._measured(save, self._before(save, saves), is_said=is_said)
            if found is not None:
                self.lines.add(found.record)
                yield found

    def _before(self, save: Save, saves: Sequence[Save]) -> Save | None:
        """The last measured checkpoint before this one, as far as it is still there."""
        known = self.lines.steps()
        return next(
            (one for one in reversed(saves) if one.step < save.step and one.step.number in known),
            None,
        )

    def _measured(self, save: Save, before: Save | None, *, is_said: bool) -> Observation | None:
        """None for one that is looked at again: it changed while it was read, or cannot be read and
        nobody said that it is whole."""
        try:
            found = self._compared(save, before)
        except GeoscopeError as error:
            if isinstance(error, OptionError):
                raise
            if not save.is_there:
                return Observation(_line(save, GONE, reason="deleted while it was read"))
            if not save.is_unchanged() or not (is_said or not isinstance(error, CheckpointError)):
                return None
            return Observation(_line(save, FAILED, reason=str(error)))
        if save.is_unchanged():
            return found
        gone = _line(save, GONE, reason="deleted while it was read")
        return None if save.is_there else Observation(gone)

    def _compared(self, save: Save, before: Save | None) -> Observation:
        model = open_model_or_adapter(str(save.path), alpha=self.options.lora_alpha)
        options = self.options.pairs
        if self.base is None:
            if not isinstance(model, Adapter):
                raise OptionError(f"{save.path}: a whole model, and no `base` to compare it with")
            report = measure_adapter(str(save.path), "anisotropy", options=options)
            return Observation(self._record(save, report), report)
        options = self._sampled(self.base, save, options)
        report = compare(self.base, str(save.path), kind="compare", options=options)
        record = self._record(save, report)
        if options.layers is not None and self.options.layers is None:
            record["layers_measured"] = sorted(options.layers)
        if before is not None and before.is_there:
            record |= self._change(self.base, before, save, options)
        return Observation(record, report)

    def _sampled(self, base: Checkpoint, save: Save, options: Options) -> Options:
        """With the sample of layers that fits the time; that of the steps before, if any."""
        if self.options.seconds is None or self.options.layers is not None:
            return options
        known = self.lines.sample()
        if known is None:
            known = _sample(prepare(base, str(save.path), options), self.options.seconds)
        return options if known is None else replace(options, layers=frozenset(known))

    def _change(
        self, base: Checkpoint, before: Save, save: Save, options: Options
    ) -> dict[str, Any]:
        """What changed since the checkpoint before; nothing where that one is gone."""
        alone = replace(options, initial_adapter=None)
        try:
            first = open_tuned(
                str(before.path),
                base,
                initial=options.initial_adapter,
                alpha=options.lora_alpha,
            )
            report = compare(first, str(save.path), kind="anisotropy", options=alone)
        except CheckpointError:
            return {}
        numbers = {key: report[key] for key in _BETWEEN if key in report.summary.model}
        return {
            "before": before.step.number,
            "change": {key: one.value for key, one in numbers.items()},
            "change_nulls": {key: one.null for key, one in numbers.items() if one.null is not None},
            "changed": changes_between(report),
        }

    def _record(self, save: Save, report: Report) -> dict[str, Any]:
        return _line(save, MEASURED, **recorded(report, self.options.only))


def recorded(report: Report, only: Sequence[str] = ()) -> dict[str, Any]:
    """What a line holds of a report; only: as in `WatchOptions`."""
    model, nulls, verdict = report.summary.model, report.summary.nulls, report.summary.verdict
    kept = [key for key in model if is_of(key, only or (*KINDS["compare"].columns, *_RANKS))]
    return {
        "verdict": None if verdict is None else verdict.code,
        "matrices": len(report.coverage.matched),
        "missing": len(report.coverage.missing),
        "values": {key: model[key] for key in kept},
        "nulls": {key: nulls[key] for key in kept if key in nulls},
        "layers": _by_layer(report.layers, kept),
        "depth": _depth_profile(report.layers),
    }


def _depth_profile(layers: Sequence[LayerRecord]) -> dict[str, Any]:
    """Block → its share of Σ‖ΔW‖², and Σ i·share; with the shares of the parameters as nulls."""
    energies: dict[int, float] = {}
    parameters: dict[int, float] = {}
    for one in layers:
        norm = one.values.get("update.frobenius_norm")
        if one.layer is not None and norm is not None:
            energies[one.layer] = energies.get(one.layer, 0.0) + norm**2
            parameters[one.layer] = parameters.get(one.layer, 0.0) + math.prod(one.shape)
    shares, nulls = depth.shares(energies), depth.shares(parameters)
    return {
        "shares": {str(block): share for block, share in shares.items()},
        "nulls": {str(block): share for block, share in nulls.items()},
        "centre": depth.centre(shares),
        "centre_null": depth.centre(nulls),
    }


def _line(save: Save, status: str, **facts: Any) -> dict[str, Any]:
    return {
        "schema": _SCHEMA,
        "step": save.step.number,
        "checkpoint": save.path.name,
        "status": status,
        **facts,
    }


def _by_layer(layers: Sequence[LayerRecord], ids: Sequence[str]) -> dict[str, dict[str, float]]:
    """Block → id → mean over its matrices, of those that have a number."""
    blocks = in_natural_order({str(one.layer) for one in layers if one.layer is not None})
    found: dict[str, dict[str, float]] = {}
    for block in blocks:
        own = [one.values for one in layers if str(one.layer) == block]
        known = {key: [v for one in own if (v := one.get(key)) is not None] for key in ids}
        found[block] = {key: sum(some) / len(some) for key, some in known.items() if some}
    return found


def _sample(prepared: Prepared, seconds: float) -> list[int] | None:
    """Evenly spaced layers that are estimated to take no longer, one at least; None for all."""
    pairs = prepared.pairing.matrices
    layers = sorted({pair.layer for pair in pairs if pair.layer is not None})
    whole = estimate_seconds(pairs, workers=prepared.workers)
    if whole <= seconds or not layers:
        return None
    count = max(1, int(len(layers) * seconds / whole))
    return sorted({layers[(2 * i + 1) * len(layers) // (2 * count)] for i in range(count)})


class _Lines:
    """The file of a run: one line a step, whole or not there."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._cut_short()

    def add(self, record: Mapping[str, Any]) -> None:
        """One write at the end of the file, which is on the disk then. Raises ReportError."""
        text = json.dumps(record, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"
        try:
            with self.path.open("ab") as file:
                file.write(encoded(text))
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise self._unwritable(error) from None

    def steps(self) -> set[int]:
        return {int(record["step"]) for record in self._records()}

    def sample(self) -> list[int] | None:
        """The layers that were measured before; None where all were, or nothing was."""
        for record in self._records():
            if "layers_measured" in record:
                return list(record["layers_measured"])
        return None

    def _records(self) -> list[dict[str, Any]]:
        lines = self._content().split(b"\n")[:-1]
        try:
            return [_record(line, f"line {number}") for number, line in enumerate(lines, start=1)]
        except CheckpointError as error:
            raise ReportError(f"{self.path}: {error}") from None

    def _content(self) -> bytes:
        try:
            return small_bytes(self.path, INDEX)
        except FileNotFoundError:
            return b""
        except OSError as error:
            raise ReportError(
                f"{self.path}: cannot be read: {reason(error)}; move it away"
            ) from None

    def _cut_short(self) -> None:
        """Takes off a last line that a killed process left without its end."""
        content = self._content()
        if content and not content.endswith(b"\n"):
            try:
                with self.path.open("r+b") as file:
                    file.truncate(content.rfind(b"\n") + 1)
            except OSError as error:
                raise self._unwritable(error) from None

    def _unwritable(self, error: OSError) -> ReportError:
        return ReportError(f"{self.path}: cannot be written: {error.strerror or error}; make room")


def _record(line: bytes, label: str) -> dict[str, Any]:
    """Raises CheckpointError for what is not the line of a step."""
    try:
        record = parsed(line)
    except ValueError as error:
        raise CheckpointError(f"{label} is not JSON: {error}; {_START_AGAIN}") from None
    if not isinstance(record, dict) or record.get("step") is None:
        told = f"{label} is {shown(record)}, and must be a table with a step"
        raise CheckpointError(f"{told}; {_START_AGAIN}")
    check_fields(record, {"step": COUNT, "layers_measured": _LAYERS}, label, advice=_START_AGAIN)
    return record


def scalars(record: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a line: geoscope/<metric>, geoscope/layer_<i>/<metric>, and the like."""
    found = {f"geoscope/{key}": value for key, value in record.get("values", {}).items()}
    found |= {f"geoscope/change/{key}": v for key, v in record.get("change", {}).items()}
    profile = record.get("depth", {})
    found["geoscope/depth/centre"] = profile.get("centre")
    found |= {f"geoscope/layer_{b}/energy_share": v for b, v in profile.get("shares", {}).items()}
    changed = record.get("changed", {})
    found |= {f"geoscope/sync/{key}": value for key, value in (changed.get("sync") or {}).items()}
    for block, own in changed.get("layers", {}).items():
        found[f"geoscope/layer_{block}/changed_share"] = own["changed"]
    for block, own in record.get("layers", {}).items():
        found |= {f"geoscope/layer_{block}/{key}": value for key, value in own.items()}
    return {key: float(value) for key, value in found.items() if value is not None}
