"""Where the wings meet: checkpoints are paired, streamed, measured and judged; a Report comes out.

    compare("base/", "tuned/")                       everything, as `geoscope compare` does
    compare("base/", "tuned/", kind="collapse")      the families of one command

What is computed follows from the kind: its families of METRICS, the factors they take, and for the
kinds with a verdict the numbers behind it.
"""

from __future__ import annotations

import math
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import chain, combinations
from typing import Any

import torch
from torch import Tensor

from geoscope import __version__
from geoscope.checkpoints import Checkpoint, open_checkpoint, pair
from geoscope.engine import (
    Batch,
    Outcome,
    default_memory,
    estimate_seconds,
    parse_memory,
    plan,
    resolve_device,
    resolve_dtype,
    stream,
)
from geoscope.errors import GeoscopeError, NumericsError, OptionError, Stopped
from geoscope.linalg.changes import nonfinite_entries, side, unchanged
from geoscope.metrics import (
    METRICS,
    VERDICT_IDS,
    Instance,
    Judged,
    Measured,
    Settings,
    aggregate,
    instances,
    judge,
    judge_model,
    measure,
    measure_nothing,
    pair_factors,
    verdict_dimension,
)
from geoscope.metrics.curves import curves
from geoscope.metrics.overlaps import overlap
from geoscope.names import Selection
from geoscope.records import (
    Coverage,
    Curve,
    LayerRecord,
    Overlap,
    Pairing,
    Provenance,
    Report,
    Run,
    Skipped,
    Status,
    Summary,
    Verdict,
    WeightPair,
)
from geoscope.report.survey import Survey

__all__ = [
    "KINDS",
    "VERDICT_KINDS",
    "Interrupted",
    "Options",
    "Prepared",
    "Progress",
    "compare",
    "ids_of",
    "prepare",
    "survey",
]

# kind of report → families of METRICS in it
KINDS: Mapping[str, tuple[str, ...]] = {
    "collapse": ("size", "collapse"),
    "anisotropy": ("size", "spectrum"),
    "alignment": ("size", "update_alignment", "base_alignment", "masks"),
    "compare": ("size", "spectrum", "update_alignment", "base_alignment", "collapse", "masks"),
}
VERDICT_KINDS = ("collapse", "compare")
# With several tuned models these also hold the overlaps of their updates.
OVERLAP_KINDS = ("alignment", "compare")


@dataclass(frozen=True)
class Options:
    """What may be chosen; every field is an option of the command line.

    ks: subspace dimensions of the @k columns. solver: `auto`, or `exact` for LAPACK's SVD of every
    matrix. max_memory: such as `8GB`; default 4 × the largest pair in fp32 + 500 MB. jobs: worker
    threads on the CPU; default one a core. limits: thresholds of the verdict, by their names.
    """

    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    layers: frozenset[int] | None = None
    ks: tuple[int, ...] = (8, 64)
    device: str = "auto"
    dtype: str = "float64"
    solver: str = "auto"
    max_memory: str | None = None
    jobs: int | None = None
    seed: int = 0
    curves: bool = False
    masks: bool = False
    limits: Mapping[str, float] | None = None

    def __post_init__(self) -> None:
        if not self.ks or any(k < 1 for k in self.ks):
            raise OptionError(f"--k {list(self.ks)}: subspace dimensions are whole numbers from 1")
        if self.solver not in ("auto", "exact"):
            raise OptionError(f"--solver {self.solver!r} is not one of auto, exact")
        if self.jobs is not None and self.jobs < 1:
            raise OptionError(f"--jobs {self.jobs}: at least one worker is needed")

    @property
    def selection(self) -> Selection:
        return Selection(self.include, self.exclude, self.layers)

    @property
    def settings(self) -> Settings:
        return Settings(
            ks=self.ks,
            solver=self.solver,
            dtype=self.dtype,
            curves=self.curves,
            masks=self.masks,
            seed=self.seed,
        )


def _ignore(*_: Any) -> None:
    return None


@dataclass(frozen=True)
class Progress:
    """Who is told what happens; by default nobody.

    on_download(file, bytes done, bytes in all); on_plan(prepared); on_pair(done, total, name).
    """

    on_download: Callable[[str, int, int], None] = _ignore
    on_plan: Callable[[Prepared], None] = _ignore
    on_pair: Callable[[int, int, str], None] = _ignore


class Interrupted(GeoscopeError):
    """Stopped by a signal; `report` holds what was finished until then (None: nothing was)."""

    def __init__(self, report: Report | None, signum: int) -> None:
        done = len(report.layers) if report else 0
        super().__init__(f"interrupted after {done} matrices")
        self.report = report
        self.signum = signum


@dataclass(frozen=True)
class Prepared:
    """A pair of checkpoints before any heavy work: opened, matched, planned."""

    base: Checkpoint
    tuned: Checkpoint
    pairing: Pairing
    batches: tuple[Batch, ...]
    memory: int
    workers: int
    device: torch.device
    bytes_to_fetch: int


def prepare(base: str, tuned: str, options: Options, progress: Progress | None = None) -> Prepared:
    """Headers, pairing and plan of one pair of models; decomposes and downloads nothing."""
    progress = progress or Progress()
    device = resolve_device(options.device)
    resolve_dtype(options.dtype, device)
    left = open_checkpoint(base, on_progress=progress.on_download)
    right = open_checkpoint(tuned, on_progress=progress.on_download)
    pairing = pair(left, right, options.selection)
    memory = _memory(pairing, options, device)
    on_cpu = device.type == "cpu"
    workers = options.jobs or (_cores() if on_cpu else 1)
    names = [(one.base.name, one.tuned.name) for one in (*pairing.matrices, *pairing.vectors)]
    return Prepared(
        base=left,
        tuned=right,
        pairing=pairing,
        batches=plan(pairing.matrices, memory=memory, stack=not on_cpu),
        memory=memory,
        workers=workers,
        device=device,
        bytes_to_fetch=left.bytes_to_fetch([a for a, _ in names])
        + right.bytes_to_fetch([b for _, b in names]),
    )


def survey(prepared: Prepared, *, paired: bool) -> Survey:
    """What `inspect` shows: the models, their pairing, and what the work would take."""
    sides = (prepared.base, prepared.tuned) if paired else (prepared.base,)
    return Survey(
        models=tuple(
            {
                **side.ref.to_json(),
                "tensors": len(side.tensors),
                "parameters": sum(math.prod(one.shape) for one in side.tensors.values()),
                "bytes": sum(one.nbytes for one in side.tensors.values()),
                "model_type": side.config.get("model_type"),
            }
            for side in sides
        ),
        pairing=prepared.pairing,
        notes=tuple(dict.fromkeys(note for side in sides for note in side.notes)),
        bytes_to_fetch=prepared.bytes_to_fetch,
        memory=prepared.memory,
        workers=prepared.workers,
        device=str(prepared.device),
        seconds=estimate_seconds(prepared.pairing.matrices, workers=prepared.workers),
    )


def ids_of(kind: str, options: Options) -> tuple[str, ...]:
    """Every id that a report of this kind can hold; dimensions of the verdict stand as @k too."""
    shapes = [(8 * k, 8 * k) for k in range(1, 65)]  # every k_v that a shape can have
    return tuple(one.id for one in _all_selected(kind, options, shapes))


def _memory(pairing: Pairing, options: Options, device: torch.device) -> int:
    if options.max_memory is not None:
        return parse_memory(options.max_memory)
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(0.8 * free)
    return default_memory(pairing.matrices)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def compare(
    base: str | os.PathLike[str],
    *tuned: str | os.PathLike[str],
    kind: str = "compare",
    options: Options | None = None,
    anchor: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
    argv: Sequence[str] = (),
) -> Report:
    """What training changed between a base and one or more tuned models.

    base, tuned: folders, files or Hub ids (`org/name[@revision]`). kind: `collapse`, `anisotropy`,
    `alignment` or `compare` (all families). anchor: another tuned model of the same base; the
    summary then holds each number as a ratio to the anchor's. Raises GeoscopeError: Interrupted
    with the partial report on Ctrl-C, others before anything is computed.

    >>> report = compare("base/", "tuned/", kind="collapse")  # doctest: +SKIP
    >>> report.summary.verdict.code  # doctest: +SKIP
    'OFF_PRINCIPAL'
    """
    options, progress = options or Options(), progress or Progress()
    if kind not in KINDS:
        raise OptionError(f"kind {kind!r} is not one of {', '.join(KINDS)}")
    if not tuned:
        raise OptionError("one tuned model is needed beside the base")
    started = time.perf_counter()
    pairs = combinations(range(1, len(tuned) + 1), 2)
    prepared = [prepare(os.fspath(base), os.fspath(one), options, progress) for one in tuned]
    beside = prepare(os.fspath(base), os.fspath(anchor), options, progress) if anchor else None
    runs: list[_Run] = []
    for one in prepared:
        progress.on_plan(one)
        runs.append(_run(one, kind, options, progress))
        if runs[-1].interrupted:
            break
    reference = None
    if beside is not None and not runs[-1].interrupted:
        progress.on_plan(beside)
        reference = _run(beside, kind, options, progress)
    overlaps: tuple[Overlap, ...] = ()
    if kind in OVERLAP_KINDS and len(runs) == len(prepared) and not runs[-1].interrupted:
        overlaps = tuple(chain.from_iterable(_overlaps(prepared, a, b, options) for a, b in pairs))
    report = _report(prepared, runs, kind, options, argv, time.perf_counter() - started)
    report = replace(report, overlaps=overlaps)
    if reference is not None:
        ratios = _anchored(runs[0], reference, os.fspath(anchor or ""))
        report = replace(report, summary=replace(report.summary, anchor=ratios))
    for run in (*runs, reference):
        if run is not None and run.interrupted is not None:
            raise Interrupted(report if report.layers else None, run.interrupted)
    return report


# --- one pair of models -------------------------------------------------------------------------


@dataclass(frozen=True)
class _Matrix:
    """Everything about one matrix, before it becomes a record."""

    pair: WeightPair
    row: Measured
    judged: Judged | None
    method: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    curves: Mapping[str, Curve] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    failure: str | None = None


@dataclass(frozen=True)
class _Run:
    """One tuned model: its matrices in the order of the pairing, and its norms and biases."""

    prepared: Prepared
    matrices: tuple[_Matrix, ...]
    vectors: tuple[LayerRecord, ...]
    selected: tuple[Instance, ...]
    verdict: Verdict | None
    interrupted: int | None  # the signal, when one stopped it


def _run(prepared: Prepared, kind: str, options: Options, progress: Progress) -> _Run:
    pairing = prepared.pairing
    prepared.base.fetch([one.base.name for one in (*pairing.matrices, *pairing.vectors)])
    prepared.tuned.fetch([one.tuned.name for one in (*pairing.matrices, *pairing.vectors)])
    found: dict[str, _Matrix] = {}
    interrupted = None
    outcomes = stream(
        prepared.batches,
        read=_reader(prepared),
        work=_worker(kind, options),
        device=prepared.device,
        workers=prepared.workers,
        memory=prepared.memory,
    )
    try:
        for outcome in outcomes:
            matrix = _with_note(outcome)
            found[matrix.pair.name] = matrix
            progress.on_pair(len(found), len(pairing.matrices), matrix.pair.name)
        vectors = tuple(_vector(prepared, one) for one in pairing.vectors)
    except (KeyboardInterrupt, Stopped) as stop:
        interrupted, vectors = getattr(stop, "signum", int(signal.SIGINT)), ()
    matrices = tuple(found[one.name] for one in pairing.matrices if one.name in found)
    return _Run(
        prepared=prepared,
        matrices=matrices,
        vectors=vectors,
        selected=_all_selected(kind, options, {_two(one.pair.shape) for one in matrices}),
        verdict=_verdict(matrices, options) if kind in VERDICT_KINDS and matrices else None,
        interrupted=interrupted,
    )


def _reader(prepared: Prepared) -> Callable[[WeightPair], tuple[Tensor, Tensor]]:
    def read(one: WeightPair) -> tuple[Tensor, Tensor]:
        return prepared.base.read(one.base.name), prepared.tuned.read(one.tuned.name)

    return read


def _with_note(outcome: Outcome[_Matrix]) -> _Matrix:
    matrix = outcome.result
    return matrix if outcome.note is None else replace(matrix, notes=(*matrix.notes, outcome.note))


def _two(shape: tuple[int, ...]) -> tuple[int, int]:
    return shape[0], shape[1]


def _worker(kind: str, options: Options) -> Callable[[Batch, Tensor, Tensor], Sequence[_Matrix]]:
    """The work on one stack: finite matrices are measured together, the others say why not."""

    def work(batch: Batch, base: Tensor, tuned: Tensor) -> list[_Matrix]:
        bad = [
            nonfinite_entries(a) + nonfinite_entries(b) for a, b in zip(base, tuned, strict=True)
        ]
        good = [i for i, count in enumerate(bad) if not count]
        results: dict[int, _Matrix] = {}
        for i, count in enumerate(bad):
            if count:
                reason = f"{count} entries are NaN or Inf"
                results[i] = _failed(batch.pairs[i], kind, options, Status.NON_FINITE, reason)
        if good:
            whole = len(good) == len(bad)
            stacks = (base, tuned) if whole else (base[good], tuned[good])
            pairs = [batch.pairs[i] for i in good]
            results |= zip(good, _measured(pairs, *stacks, kind, options), strict=True)
        return [results[i] for i in range(len(bad))]

    return work


def _failed(one: WeightPair, kind: str, options: Options, status: Status, reason: str) -> _Matrix:
    shape = _two(one.shape)
    row = measure_nothing(_selected(kind, options, shape), shape, status, seed=options.seed)
    judged = _judged(row, shape, kind, options)
    return _Matrix(one, row, judged, notes=(reason,), failure=f"{status.value}: {reason}")


def _measured(
    pairs: Sequence[WeightPair], base: Tensor, tuned: Tensor, kind: str, options: Options
) -> list[_Matrix]:
    shape = _two(pairs[0].shape)
    selected = _selected(kind, options, shape)
    try:
        factors = pair_factors(
            base,
            tuned,
            takes=_takes(selected),
            ks=[k for k in _dimensions(options, shape) if k <= min(shape)],
            settings=options.settings,
        )
    except NumericsError as error:
        if len(pairs) > 1:  # find the one that fails; the others are fine
            return [
                matrix
                for i, one in enumerate(pairs)
                for matrix in _measured([one], base[i : i + 1], tuned[i : i + 1], kind, options)
            ]
        return [_failed(pairs[0], kind, options, Status.NOT_CONVERGED, str(error))]
    rows = measure(factors, selected, seed=options.seed)
    values = {name: tensor.cpu() for name, tensor in factors.values.items()}
    return [
        _Matrix(
            pair=one,
            row=row,
            judged=_judged(row, shape, kind, options),
            method=factors.methods[i],
            curves=curves(kind, values, shape, i, seed=options.seed),
            notes=factors.notes[i],
        )
        for i, (one, row) in enumerate(zip(pairs, rows, strict=True))
    ]


def _judged(row: Measured, shape: tuple[int, int], kind: str, options: Options) -> Judged | None:
    if kind not in VERDICT_KINDS:
        return None
    return judge(row, verdict_dimension(shape), options.limits)


# --- what is measured ---------------------------------------------------------------------------


def _dimensions(options: Options, shape: tuple[int, int]) -> tuple[int, ...]:
    """The dimensions of the @k ids of one shape, the verdict's among them."""
    return tuple(sorted({*options.ks, verdict_dimension(shape)}))


def _selected(kind: str, options: Options, shape: tuple[int, int]) -> list[Instance]:
    """The instances of METRICS that a report of this kind holds for one shape."""
    with_verdict = VERDICT_IDS if kind in VERDICT_KINDS else ()
    found = []
    for metric in METRICS:
        if metric.option is not None and not getattr(options, metric.option):
            continue
        for one in instances(metric, _dimensions(options, shape)):
            template = one.id if one.k is None else one.id.replace(f"@{one.k}", "@k")
            if metric.family in KINDS[kind] or template in with_verdict:
                found.append(one)
    return found


def _all_selected(
    kind: str, options: Options, shapes: Iterable[tuple[int, int]]
) -> tuple[Instance, ...]:
    found = {one.id: one for shape in sorted(shapes) for one in _selected(kind, options, shape)}
    return tuple(found.values())


def _takes(selected: Iterable[Instance]) -> frozenset[str]:
    """The union of the factors that the instances and their nulls take."""
    names: set[str] = set()
    for one in selected:
        names.update(one.takes)
        if one.metric.null is not None:
            names.update(one.metric.null.takes)
    return frozenset(names)


# --- norms and biases ---------------------------------------------------------------------------


def _vector(prepared: Prepared, one: WeightPair) -> LayerRecord:
    """Norm of change and changed share of a 1-D tensor; never part of a spectral summary."""
    before = prepared.base.read(one.base.name)
    after = prepared.tuned.read(one.tuned.name)
    values: dict[str, float | int | None]
    status: dict[str, Status] = {}
    ids = ("relative_update", "update.frobenius_norm", "update_sparsity", "update_sparsity_exact")
    if nonfinite_entries(before) + nonfinite_entries(after):
        values = dict.fromkeys(ids)
        status = dict.fromkeys(ids, Status.NON_FINITE)
    else:
        size = float(torch.linalg.vector_norm(after.double() - before.double()))
        base_norm = side(before).norm
        shares = unchanged(before, after)
        numbers = (size / base_norm if base_norm else None, size, shares.relative, shares.exact)
        values = dict(zip(ids, numbers, strict=True))
        if not base_norm:
            status["relative_update"] = Status.NOT_APPLICABLE
    return LayerRecord(one.name, one.layer, one.module, one.shape, values, status=status)


# --- several tuned models -----------------------------------------------------------------------


def _overlaps(prepared: Sequence[Prepared], a: int, b: int, options: Options) -> Iterator[Overlap]:
    """Overlaps of the updates of the tuned models number a and b, matrix by matrix."""
    first, second = prepared[a - 1], prepared[b - 1]
    other = {one.base.name: one.tuned.name for one in second.pairing.matrices}
    common = [one for one in first.pairing.matrices if one.base.name in other]

    def read(one: WeightPair) -> tuple[Tensor, Tensor, Tensor]:
        base, tuned = first.base.read(one.base.name), first.tuned.read(one.tuned.name)
        return base, tuned, second.tuned.read(other[one.base.name])

    def work(batch: Batch, *stacks: Tensor) -> list[tuple[Any, dict[str, float]] | None]:
        return [
            None
            if any(nonfinite_entries(one[i]) for one in stacks)
            else overlap(*(one[i : i + 1] for one in stacks), ks=options.ks, solver=options.solver)
            for i in range(len(batch.pairs))
        ]

    found = stream(
        plan(common, memory=first.memory, stack=first.device.type != "cpu"),
        read=read,
        work=work,
        device=first.device,
        workers=first.workers,
        memory=first.memory,
    )
    results = {outcome.pair.name: outcome.result for outcome in found}
    for one in common:
        result = results[one.name]
        if result is not None:
            yield Overlap(one.name, a, b, *result)


# --- the report ---------------------------------------------------------------------------------


def _verdict(matrices: Sequence[_Matrix], options: Options) -> Verdict:
    return judge_model(
        [one.pair.name for one in matrices],
        [one.pair.module for one in matrices],
        [one.row for one in matrices],
        [one.judged for one in matrices if one.judged is not None],
        options.limits,
    )


def _record(one: _Matrix, tuned: int | None) -> LayerRecord:
    return LayerRecord(
        name=one.pair.name,
        layer=one.pair.layer,
        module=one.pair.module,
        shape=one.pair.shape,
        values=one.row.values,
        nulls=one.row.nulls,
        status=one.row.status,
        raw=one.row.raw,
        verdict=None if one.judged is None else one.judged.to_json(),
        method=one.method,
        curves=one.curves,
        notes=one.notes,
        tuned=tuned,
    )


def _report(
    prepared: Sequence[Prepared],
    runs: Sequence[_Run],
    kind: str,
    options: Options,
    argv: Sequence[str],
    seconds: float,
) -> Report:
    several = len(prepared) > 1
    refs = (prepared[0].base.ref, *(one.tuned.ref for one in prepared))
    records = [
        _record(one, i + 1 if several else None)
        for i, run in enumerate(runs)
        for one in run.matrices
    ]
    vectors = [
        replace(one, tuned=i + 1 if several else None)
        for i, run in enumerate(runs)
        for one in run.vectors
    ]
    return Report(
        kind=kind,
        provenance=Provenance(
            tool_version=__version__,
            argv=tuple(argv or sys.argv),
            refs=refs,
            device=str(prepared[0].device),
            compute_dtype=options.dtype,
            seed=options.seed,
            parameters=_parameters(options),
            seconds=seconds,
        ),
        coverage=_coverage(runs),
        layers=tuple(records),
        summary=_summary(runs, several=several),
        vectors=tuple(vectors),
    )


def _parameters(options: Options) -> dict[str, Any]:
    """The options that decide the numbers; how fast they come is left out."""
    chosen = asdict(options)
    for name in ("device", "dtype", "seed", "jobs", "max_memory", "limits"):
        del chosen[name]
    chosen["layers"] = None if options.layers is None else sorted(options.layers)
    return {key: list(v) if isinstance(v, tuple) else v for key, v in chosen.items()}


def _coverage(runs: Sequence[_Run]) -> Coverage:
    """Of all runs together: what any of them could not compare is missing."""
    matched: dict[str, None] = {}
    missing: dict[str, None] = {}
    skipped: dict[tuple[str, str], Skipped] = {}
    for run in runs:
        pairing = run.prepared.pairing
        missing.update(dict.fromkeys(pairing.missing))
        skipped.update({(one.name, one.reason): one for one in pairing.skipped})
        done = {one.pair.name for one in run.matrices}
        for one in run.matrices:
            if one.failure is None:
                matched[one.pair.name] = None
            else:
                skipped[one.pair.name, one.failure] = Skipped(one.pair.name, one.failure, True)
                missing[one.pair.name] = None
        for one in pairing.matrices:
            if one.name not in done:
                reason = "interrupted before it was computed"
                skipped[one.name, reason] = Skipped(one.name, reason, True)
                missing[one.name] = None
    pairings = [run.prepared.pairing for run in runs]
    return Coverage(
        matched=tuple(name for name in matched if name not in missing),
        base_only=_union(one.base_only for one in pairings),
        tuned_only=_union(one.tuned_only for one in pairings),
        shape_mismatch=_union(one.shape_mismatch for one in pairings),
        skipped=tuple(skipped.values()),
        renamed=_union(one.renamed for one in pairings),
        missing=tuple(missing),
    )


def _union(parts: Iterable[Sequence[Any]]) -> tuple[Any, ...]:
    return tuple(dict.fromkeys(item for part in parts for item in part))


def _summary(runs: Sequence[_Run], *, several: bool) -> Summary:
    """Aggregates of the first tuned model, and with several of each under `runs`."""
    parts = [_aggregates(run) for run in runs]
    model, nulls, modules, module_nulls = parts[0]
    numbered = tuple(
        Run(i + 1, part[0], part[1], part[2], run.verdict)
        for i, (run, part) in enumerate(zip(runs, parts, strict=True))
    )
    return Summary(
        model=model,
        nulls=nulls,
        modules=modules,
        module_nulls=module_nulls,
        verdict=runs[0].verdict,
        runs=numbered if several else (),
    )


_Values = dict[str, float | int | None]


def _aggregates(
    run: _Run,
) -> tuple[_Values, dict[str, float], dict[str, _Values], dict[str, dict[str, float]]]:
    values, nulls = aggregate([one.row for one in run.matrices], run.selected)
    kinds = dict.fromkeys(one.pair.module for one in run.matrices)
    per_kind = {
        kind: aggregate([one.row for one in run.matrices if one.pair.module == kind], run.selected)
        for kind in kinds
    }
    return (
        values,
        nulls,
        {kind: part[0] for kind, part in per_kind.items()},
        {kind: part[1] for kind, part in per_kind.items()},
    )


def _anchored(run: _Run, anchor: _Run, given: str) -> dict[str, Any]:
    """Every number of the model as a ratio to the anchor's (METHODS §3, `--anchor`).

    spectrum_preserving: mean NSS at most half of the anchor's; None where one has no number.
    """
    ours, theirs = _aggregates(run)[0], _aggregates(anchor)[0]
    ratios: dict[str, float | None] = {}
    for key, value in ours.items():
        other = theirs.get(key)
        ratios[key] = value / other if value is not None and other else None
    nss, other = ours.get("nss"), theirs.get("nss")
    preserving = None if nss is None or other is None else nss <= 0.5 * other
    return {
        "ref": anchor.prepared.tuned.ref.to_json() | {"given": given},
        "ratios": ratios,
        "spectrum_preserving": preserving,
    }
