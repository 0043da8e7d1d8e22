"""A report cut into one section per tuned model, and what the tables and figures ask of a section.

Nothing depends on the order of a mapping, so that a report renders the same fresh and read back.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from geoscope.kinds import Kind
from geoscope.records import LayerRecord, ModelRef, Report, Status, Steps, Values, Verdict
from geoscope.report.numbers import shorten
from geoscope.report.tables import kind_of

__all__ = [
    "Section",
    "Subject",
    "answering",
    "base_label",
    "dimension",
    "dimensions",
    "sections",
    "with_dimension",
]

# The order of a transformer block; other kinds follow as they come.
_MODULES = (
    *("q_proj", "k_proj", "v_proj", "qkv_proj", "o_proj"),
    *("gate_proj", "up_proj", "gate_up_proj", "down_proj"),
)


@dataclass(frozen=True)
class Subject:
    """What one row is about: numbers, their nulls, and the matrices that they come from."""

    values: Values
    nulls: Mapping[str, float]
    layers: tuple[LayerRecord, ...]

    @cached_property
    def k(self) -> int | None:
        """The subspace dimension shown for this row: the one most of its matrices have."""
        found = Counter(k for layer in self.layers if (k := dimension(layer)) is not None)
        return min(found, key=lambda k: (-found[k], k)) if found else None

    @cached_property
    def own_ks(self) -> list[int]:
        """The subspace dimensions that its matrices have, ascending."""
        return sorted({k for layer in self.layers if (k := dimension(layer)) is not None})

    @cached_property
    def telling_ks(self) -> list[int]:
        """The k of its ids that say something: some matrix's own k, or within q/8 of one."""
        largest = max((min(layer.shape) // 8 for layer in self.layers), default=0)
        return [k for k in dimensions(self.values) if k <= largest or k in self.own_ks]

    def is_cautioned(self, key: str) -> bool:
        """Whether a number that went into `key` is marked CAUTION."""
        return any(layer.status_of(key) is Status.CAUTION for layer in self.layers)

    def numbered(self, key: str) -> int:
        """How many of the matrices have a number for `key`."""
        return sum(layer.values.get(key) is not None for layer in self.layers)


@dataclass(frozen=True)
class Section:
    """One tuned model, numbered as in `provenance.refs`: its aggregates and its matrices.

    kind: of the report.
    steps: of a series, the base first; series: id → one number a step.
    limits: thresholds that were set, of a kind without a verdict.
    """

    kind: Kind
    tuned: int
    label: str
    whole: Subject
    modules: Mapping[str, Subject]
    verdict: Verdict | None
    distance: Mapping[str, Any] | None = None
    steps: tuple[int, ...] = ()
    series: Mapping[str, Steps] = field(default_factory=dict[str, Steps])
    limits: Mapping[str, float] = field(default_factory=dict[str, float])

    @property
    def layers(self) -> tuple[LayerRecord, ...]:
        return self.whole.layers


def sections(report: Report) -> tuple[Section, ...]:
    """One section, or one for each of several tuned models."""
    summary, kind = report.summary, kind_of(report.kind)
    if not summary.runs:
        whole = Subject(summary.model, summary.nulls, report.layers)
        modules = _modules(report.layers, summary.modules, summary.module_nulls)
        label, verdict = _tuned_label(report, 1), summary.verdict
        ends = summary.distance, summary.steps, summary.series
        limits = _limits(report)
        return (Section(kind, 1, label, whole, modules, verdict, *ends, limits=limits),)
    found: list[Section] = []
    for run in summary.runs:
        layers = tuple(layer for layer in report.layers if layer.tuned == run.tuned)
        modules = _modules(layers, run.modules, run.module_nulls)
        whole = Subject(run.model, run.nulls, layers)
        label = _tuned_label(report, run.tuned)
        ends = run.verdict, run.distance
        limits = _limits(report)
        found.append(Section(kind, run.tuned, label, whole, modules, *ends, limits=limits))
    return tuple(found)


def answering(report: Report) -> tuple[Section, ...]:
    """The sections that answer: of a kind with one answer for all models the report itself."""
    parts, summary, kind = sections(report), report.summary, kind_of(report.kind)
    if len(parts) == 1 or not kind.answer.is_joint:
        return parts
    whole = Subject(summary.model, summary.nulls, ())
    return (Section(kind, 0, base_label(report), whole, {}, summary.verdict),)


def _limits(report: Report) -> Mapping[str, float]:
    """The thresholds that were set, where no verdict has them."""
    return report.provenance.parameters.get("limits") or {}


def _modules(
    layers: tuple[LayerRecord, ...],
    values: Mapping[str, Values],
    nulls: Mapping[str, Mapping[str, float]],
) -> dict[str, Subject]:
    """A subject for each module kind, in the order of a block."""
    order = dict.fromkeys(layer.module for layer in layers)
    order.update(dict.fromkeys(sorted(values)))
    known = [module for module in _MODULES if module in order]
    subjects: dict[str, Subject] = {}
    for module in [*known, *(module for module in order if module not in known)]:
        own = tuple(layer for layer in layers if layer.module == module)
        subjects[module] = Subject(values.get(module, {}), nulls.get(module, {}), own)
    return subjects


def base_label(report: Report) -> str:
    """The base by a short name."""
    refs = report.provenance.refs
    return _label(refs[0]) if refs else "base"


def _tuned_label(report: Report, tuned: int) -> str:
    refs = report.provenance.refs
    return _label(refs[tuned]) if 0 <= tuned < len(refs) else f"tuned {tuned}"


def _label(ref: ModelRef) -> str:
    return shorten(ref.tail, 40)


def dimension(layer: LayerRecord) -> int | None:
    """The k of a matrix: that of its verdict, else the largest with k ≤ q/8, else the smallest.

    q/8 is the verdict's own rule (docs/methods.md#captured-energy): beyond it the isotropic values
    are no longer small, up to k = q, where they tell nothing.
    """
    if layer.verdict is not None and layer.verdict.get("k") is not None:
        return int(layer.verdict["k"])
    found = dimensions(layer.values)
    small = [k for k in found if k <= min(layer.shape) // 8]
    return max(small) if small else min(found, default=None)


def dimensions(keys: Iterable[str], stem: str = r"(?:energy|angle|lift|gap)\w*") -> list[int]:
    """The k's of all ids `stem@k`, ascending."""
    pattern = re.compile(rf"{stem}@(\d{{1,9}})")
    return sorted({int(match[1]) for key in keys if (match := pattern.fullmatch(key))})


def with_dimension(key: str, k: int | None) -> str:
    """The id of a quantity at k: `lift@k` → `lift@64`; other ids as they are."""
    return f"{key.removesuffix('@k')}@{k}" if key.endswith("@k") else key
