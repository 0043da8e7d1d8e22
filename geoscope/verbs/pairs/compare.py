"""The whole path in one function: two models or more, or an adapter alone."""

from __future__ import annotations

import signal
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from geoscope.errors import OptionError, Stopped
from geoscope.kinds import KINDS, PAIR_KINDS
from geoscope.metrics import limits_in_force
from geoscope.metrics.merging import merging_outlook
from geoscope.records import Overlap, Report, Skipped
from geoscope.sources.memory import Model, Opened, as_model_or_reference, as_models_or_references
from geoscope.verbs.choices import chosen
from geoscope.verbs.options import Interrupted, Options, Progress
from geoscope.verbs.pairs.about import about
from geoscope.verbs.pairs.alone import prepare_alone
from geoscope.verbs.pairs.assemble import anchored, assemble, coverage_without
from geoscope.verbs.pairs.prepare import Prepared, prepare
from geoscope.verbs.pairs.run import TunedRun, run_one
from geoscope.verbs.pairs.several import overlaps_of

__all__ = ["compare", "measure_adapter"]


def compare(
    base: Model,
    *tuned: Model,
    kind: str = "compare",
    options: Options | None = None,
    anchor: Model | None = None,
    progress: Progress | None = None,
    argv: Sequence[str] = (),
    **named: Any,
) -> Report:
    """What training changed between a base and one or more tuned models.

    base, tuned: folders, files or Hub ids (`org/name[@revision]`), state dicts, modules, or open
    checkpoints; of tensors in memory nothing is written, changed or kept. kind: `collapse`,
    `anisotropy`, `alignment`, `capacity` or `compare` (all but capacity). anchor: another tuned
    model of the same base; the summary then holds each number as a ratio to the anchor's. named:
    fields of `Options`, in place of those in `options`. Raises GeoscopeError: Interrupted with the
    partial report on Ctrl-C, others before anything is computed.

    >>> report = compare("base/", "tuned/", kind="collapse")  # doctest: +SKIP
    >>> report.summary.verdict.code  # doctest: +SKIP
    'OFF_PRINCIPAL'
    """
    options, progress = chosen(Options, options, named), progress or Progress()
    if kind not in PAIR_KINDS:
        raise OptionError(f"kind {kind!r} is not one of {', '.join(PAIR_KINDS)}")
    if not tuned:
        raise OptionError("one tuned model is needed beside the base")
    first = as_model_or_reference(base, "base")
    started = time.perf_counter()
    others = as_models_or_references(tuned, "tuned")
    several = KINDS[kind].overlaps and len(others) > 1
    prepared = [
        replace(prepare(first, one, options, progress), is_one_of_several=several) for one in others
    ]
    _check_initial(prepared, options)
    beside = None
    given = None if anchor is None else as_model_or_reference(anchor, "anchor")
    if given is not None:
        alone = replace(options, initial_adapter=None)  # which is of the tuned model
        beside = prepare(first, given, alone, progress)
    runs: list[TunedRun] = []
    for one in prepared:
        progress.on_plan(one.planned)
        runs.append(run_one(one, kind, options, progress))
        if runs[-1].interrupted:
            break
    reference = None
    if beside is not None and not runs[-1].interrupted:
        progress.on_plan(beside.planned)
        reference = run_one(beside, kind, options, progress)
    sides = [run.about for run in runs]
    sides += [about(each, is_whole=False) for each in prepared[len(runs) :]]
    report = assemble(sides, runs, kind, options, argv, time.perf_counter() - started)
    if several and len(runs) == len(prepared) and not runs[-1].interrupted:
        try:
            found = overlaps_of(prepared, options)
        except (KeyboardInterrupt, Stopped) as stop:
            raise Interrupted(report, getattr(stop, "signum", int(signal.SIGINT))) from None
        overlaps = tuple(one for one in found if isinstance(one, Overlap))
        failed = [one for one in found if isinstance(one, Skipped)]
        outlook = _outlook(report, overlaps, len(tuned), options)
        report = replace(
            report,
            overlaps=overlaps,
            coverage=coverage_without(report.coverage, failed),
            summary=replace(report.summary, merging=outlook),
        )
    if reference is not None:
        ratios = anchored(runs[0], reference, _label(given))
        report = replace(report, summary=replace(report.summary, anchor=ratios))
    for run in (*runs, reference):
        if run is not None and run.interrupted is not None:
            raise Interrupted(report if report.layers else None, run.interrupted)
    return report


def _outlook(
    report: Report, overlaps: Sequence[Overlap], count: int, options: Options
) -> dict[str, Any] | None:
    """How the updates would merge, by the matrices where rounding does not hide one of them."""
    limits = limits_in_force(options.limits)
    hidden = {
        layer.name
        for layer in report.layers
        if (layer.values.get("precision_ratio") or 0) > limits["undetermined.precision_ratio"]
    }
    seen = [overlap for overlap in overlaps if overlap.name not in hidden]
    return merging_outlook(seen, count, limits)


def measure_adapter(
    reference: Model,
    kind: str,
    *,
    options: Options | None = None,
    progress: Progress | None = None,
    argv: Sequence[str] = (),
    **named: Any,
) -> Report:
    """A report of kind `anisotropy` or `capacity` on an adapter alone.

    What takes the base is not applicable. Raises GeoscopeError, Interrupted on Ctrl-C.
    """
    options, progress = chosen(Options, options, named), progress or Progress()
    started = time.perf_counter()
    prepared = prepare_alone(as_model_or_reference(reference, "reference"), options, progress)
    progress.on_plan(prepared.planned)
    run = run_one(prepared, kind, options, progress)
    report = assemble([run.about], [run], kind, options, argv, time.perf_counter() - started)
    if run.interrupted is not None:
        raise Interrupted(report if report.layers else None, run.interrupted)
    return report


def _label(model: Opened | None) -> str | None:
    """A reference as it was given; what is open has a name of its own."""
    return model if isinstance(model, str) else None


def _check_initial(prepared: Sequence[Prepared], options: Options) -> None:
    """Raises OptionError where `--initial-adapter` is of no tuned model, or of several."""
    if options.initial_adapter is None:
        return
    adapters = [side for side in prepared if side.tuned.is_adapted]
    if len(adapters) != 1:
        if not adapters:
            raise OptionError(
                "`initial_adapter` needs an adapter as the tuned model, and none is one; leave it "
                "out"
            )
        raise OptionError(
            f"`initial_adapter` belongs to one adapter, but {len(adapters)} tuned models are "
            "adapters; compare them one by one"
        )
