"""The nouns: what is passed between reading, computing and showing. Frozen, and without torch.

`Report` is the only currency between computing and rendering; its JSON form (schema
`geoscope.report/1`) is canonical and reads back equal. Numbers that are undefined are None and
carry a `Status`; nothing is ever replaced by 0, 1 or -1.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, cast

from geoscope.errors import ReportError

__all__ = [
    "NOT_READ",
    "SCHEMA",
    "Coverage",
    "Curve",
    "LayerRecord",
    "ModelRef",
    "Overlap",
    "Pairing",
    "Provenance",
    "Rename",
    "Report",
    "Run",
    "ShapeMismatch",
    "Skipped",
    "Status",
    "Steps",
    "Summary",
    "TensorInfo",
    "Values",
    "Verdict",
    "WeightPair",
]

SCHEMA = "geoscope.report/1"
# In place of the storage dtype of a model that is named and not looked at.
NOT_READ = "(base not read)"

Json = dict[str, Any]


class Status(StrEnum):
    """Why a number is marked or missing. Members stand in order of precedence.

    See docs/methods.md#statuses.
    """

    NON_FINITE = "NON_FINITE"
    ZERO_UPDATE = "ZERO_UPDATE"
    NOT_APPLICABLE = "NOT_APPLICABLE"
    NOT_CONVERGED = "NOT_CONVERGED"
    BELOW_RESOLUTION = "BELOW_RESOLUTION"
    CAUTION = "CAUTION"
    OK = "OK"

    @property
    def is_null(self) -> bool:
        """Whether a value with this status is None."""
        return self not in (Status.OK, Status.CAUTION)

    @property
    def sentence(self) -> str:
        """One sentence for the user."""
        return _SENTENCES[self]


_SENTENCES = {
    Status.NON_FINITE: "The tensor holds NaN or Inf.",
    Status.ZERO_UPDATE: "The update is exactly zero, so the quantity is undefined.",
    Status.NOT_APPLICABLE: "The quantity is not defined for this matrix.",
    Status.NOT_CONVERGED: "No method reached its residual bound, or computing it failed.",
    Status.BELOW_RESOLUTION: "Storage rounding is as large as what would be measured.",
    Status.CAUTION: "Storage rounding is a visible part of this number.",
    Status.OK: "Defined and resolved.",
}


@dataclass(frozen=True)
class TensorInfo:
    """One stored tensor, from the header alone.

    `shape` is (out, in) after the turns of the reading boundary; `transposed` says that the file
    holds it as (in, out) (Conv1D). `dtype` is the storage dtype, spelled as torch does
    (`bfloat16`), and `nbytes` counts it. `source` names the file.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    nbytes: int
    source: str
    transposed: bool = False

    @property
    def memory_bytes(self) -> int:
        """Bytes once it is read: FP8 becomes fp32."""
        return self.nbytes * (4 if self.dtype.startswith("float8") else 1)


@dataclass(frozen=True)
class WeightPair:
    """A base tensor and the tuned tensor that corresponds to it."""

    name: str
    layer: int | None
    module: str
    shape: tuple[int, ...]
    base: TensorInfo
    tuned: TensorInfo


@dataclass(frozen=True)
class Skipped:
    """A tensor that was not compared, and why.

    `missing` tells the two kinds apart: True for a matrix in scope that should have been compared
    (it makes the coverage PARTIAL), False for what is fine to leave out.
    """

    name: str
    reason: str
    missing: bool = False


@dataclass(frozen=True)
class ShapeMismatch:
    """Two tensors of one name and different shapes."""

    name: str
    base: tuple[int, ...]
    tuned: tuple[int, ...]


@dataclass(frozen=True)
class Rename:
    """A tuned name that was matched to a base name through its canonical form."""

    base: str
    tuned: str
    rule: str


@dataclass(frozen=True)
class Pairing:
    """What corresponds to what, and everything that does not. Made from headers alone.

    `matrices` are the 2-D weights in scope; `vectors` the norms and biases (norm of change and
    changed fraction only). `base_only`, `tuned_only` and `shape_mismatch` list every tensor of
    those kinds; `missing` holds the names among them that are matrices in scope.
    """

    matrices: tuple[WeightPair, ...]
    vectors: tuple[WeightPair, ...]
    base_only: tuple[str, ...]
    tuned_only: tuple[str, ...]
    shape_mismatch: tuple[ShapeMismatch, ...]
    skipped: tuple[Skipped, ...]
    renamed: tuple[Rename, ...]
    missing: tuple[str, ...]


@dataclass(frozen=True)
class ModelRef:
    """A model as it was given and as it was resolved.

    storage_dtype: of most weights; NOT_READ for a base that is not looked at.
    """

    given: str
    resolved: str
    commit: str | None
    storage_dtype: str

    @classmethod
    def not_read(cls, name: str | None) -> ModelRef:
        """A base that an adapter names, if it does, and that is not looked at."""
        return cls(name or NOT_READ, NOT_READ, None, NOT_READ)

    @property
    def is_read(self) -> bool:
        """Whether its weights were looked at; the base of an adapter alone is only named."""
        return self.storage_dtype != NOT_READ

    def to_json(self) -> Json:
        return {
            "given": self.given,
            "resolved": self.resolved,
            "commit": self.commit,
            "storage_dtype": self.storage_dtype,
        }

    @classmethod
    def from_json(cls, data: Json) -> ModelRef:
        return cls(data["given"], data["resolved"], data["commit"], data["storage_dtype"])


@dataclass(frozen=True)
class Provenance:
    """How a report came about; with it the run can be repeated."""

    tool_version: str
    argv: tuple[str, ...]
    refs: tuple[ModelRef, ...]
    device: str
    compute_dtype: str
    seed: int
    parameters: Mapping[str, Any]
    seconds: float

    def to_json(self) -> Json:
        return {
            "tool_version": self.tool_version,
            "argv": list(self.argv),
            "refs": [ref.to_json() for ref in self.refs],
            "device": self.device,
            "compute_dtype": self.compute_dtype,
            "seed": self.seed,
            "parameters": dict(self.parameters),
            "seconds": self.seconds,
        }

    @classmethod
    def from_json(cls, data: Json) -> Provenance:
        return cls(
            tool_version=data["tool_version"],
            argv=tuple(data["argv"]),
            refs=tuple(ModelRef.from_json(ref) for ref in data["refs"]),
            device=data["device"],
            compute_dtype=data["compute_dtype"],
            seed=data["seed"],
            parameters=data["parameters"],
            seconds=data["seconds"],
        )


@dataclass(frozen=True)
class Coverage:
    """What was compared and what was not. `status` is COMPLETE or PARTIAL.

    `missing` names the matrices in scope without a comparison: one-sided, reshaped, non-finite,
    not converged, unsupported. PARTIAL means that there is one.
    """

    matched: tuple[str, ...]
    base_only: tuple[str, ...] = ()
    tuned_only: tuple[str, ...] = ()
    shape_mismatch: tuple[ShapeMismatch, ...] = ()
    skipped: tuple[Skipped, ...] = ()
    renamed: tuple[Rename, ...] = ()
    missing: tuple[str, ...] = ()

    @property
    def status(self) -> str:
        return "PARTIAL" if self.missing else "COMPLETE"

    def to_json(self) -> Json:
        return {
            "status": self.status,
            "matched": list(self.matched),
            "base_only": list(self.base_only),
            "tuned_only": list(self.tuned_only),
            "shape_mismatch": [
                {"name": item.name, "base": list(item.base), "tuned": list(item.tuned)}
                for item in self.shape_mismatch
            ],
            "skipped": [{"name": item.name, "reason": item.reason} for item in self.skipped],
            "renamed": [
                {"base": item.base, "tuned": item.tuned, "rule": item.rule} for item in self.renamed
            ],
            "missing": list(self.missing),
        }

    @classmethod
    def from_json(cls, data: Json) -> Coverage:
        missing = tuple(data["missing"])
        return cls(
            matched=tuple(data["matched"]),
            base_only=tuple(data["base_only"]),
            tuned_only=tuple(data["tuned_only"]),
            shape_mismatch=tuple(
                ShapeMismatch(item["name"], tuple(item["base"]), tuple(item["tuned"]))
                for item in data["shape_mismatch"]
            ),
            skipped=tuple(
                Skipped(item["name"], item["reason"], item["name"] in missing)
                for item in data["skipped"]
            ),
            renamed=tuple(
                Rename(item["base"], item["tuned"], item["rule"]) for item in data["renamed"]
            ),
            missing=missing,
        )


Values = Mapping[str, float | int | None]
Curve = tuple[tuple[float, float], ...]
# One number for each step of a series.
Steps = tuple[float | None, ...]


@dataclass(frozen=True)
class LayerRecord:
    """All that was measured on one matrix (or, with `verdict` None, on one norm or bias).

    values: id → number, None exactly where `status[id]` is a null status. nulls: id → what an
    isotropic update of the same shape and size gives. raw: the number behind a BELOW_RESOLUTION.
    verdict: {"code": str, "k": int, "clause": str}. method: factor → {"how", "bound", "fallback"}.
    curves: id → points for figures. tuned: number of the tuned model when there are several, as in
    `provenance.refs`. series: id → one number a step, and gram, the H of docs/methods.md#increments
    (T, T): of trajectories.
    """

    name: str
    layer: int | None
    module: str
    shape: tuple[int, ...]
    values: Values
    nulls: Mapping[str, float] = field(default_factory=dict[str, float])
    status: Mapping[str, Status] = field(default_factory=dict[str, Status])
    raw: Mapping[str, float] = field(default_factory=dict[str, float])
    verdict: Mapping[str, Any] | None = None
    method: Mapping[str, Mapping[str, Any]] = field(default_factory=dict[str, Mapping[str, Any]])
    curves: Mapping[str, Curve] = field(default_factory=dict[str, Curve])
    notes: tuple[str, ...] = ()
    tuned: int | None = None
    series: Mapping[str, Steps] = field(default_factory=dict[str, Steps])
    gram: tuple[tuple[float, ...], ...] = ()

    def status_of(self, key: str) -> Status:
        return self.status.get(key, Status.OK)

    def to_json(self) -> Json:
        data: Json = {
            "name": self.name,
            "layer": self.layer,
            "module": self.module,
            "shape": list(self.shape),
            "values": _with_series(self.values, self.series),
            "nulls": dict(self.nulls),
            "status": {key: value.value for key, value in self.status.items()},
            "raw": dict(self.raw),
            "method": {key: dict(value) for key, value in self.method.items()},
        }
        if self.verdict is not None:
            data["verdict"] = dict(self.verdict)
        if self.curves:
            data["curves"] = {key: [list(p) for p in curve] for key, curve in self.curves.items()}
        if self.notes:
            data["notes"] = list(self.notes)
        if self.tuned is not None:
            data["tuned"] = self.tuned
        if self.gram:
            data["gram"] = [list(row) for row in self.gram]
        return data

    @classmethod
    def from_json(cls, data: Json) -> LayerRecord:
        values, series = _without_series(data["values"])
        return cls(
            name=data["name"],
            layer=data["layer"],
            module=data["module"],
            shape=tuple(data["shape"]),
            values=values,
            nulls=data["nulls"],
            status={key: Status(value) for key, value in data["status"].items()},
            raw=data["raw"],
            verdict=data.get("verdict"),
            method=data["method"],
            curves={
                key: tuple((x, y) for x, y in curve)
                for key, curve in data.get("curves", {}).items()
            },
            notes=tuple(data.get("notes", ())),
            tuned=data.get("tuned"),
            series=series,
            gram=tuple(tuple(row) for row in data.get("gram", ())),
        )


def _with_series(values: Values, series: Mapping[str, Steps]) -> Json:
    """In JSON a step-wise id stands among the others, with a list."""
    return {**values, **{key: list(steps) for key, steps in series.items()}}


def _without_series(found: Json) -> tuple[Values, dict[str, Steps]]:
    lists = {key: cast(list[Any], one) for key, one in found.items() if isinstance(one, list)}
    values = {key: value for key, value in found.items() if key not in lists}
    return values, {key: tuple(one) for key, one in lists.items()}


@dataclass(frozen=True)
class Verdict:
    """The verdict on a model: the code that holds at least half of the update's energy.

    shares: code → share of Σ‖ΔW‖². flagged: names of the matrices whose code asks for attention,
    worst first. counts: code → number of matrices. thresholds: the limits in force. explain: one
    entry per condition of the rules, {"code", "condition", "threshold", "standing", "holds" (number
    of matrices), "of", "least", "largest"} (the range of the values it met). apart: matrices that
    are far from the base in a model that is not; `share` is of the energy of the others.
    """

    code: str
    share: float | None
    shares: Mapping[str, float]
    flagged: tuple[str, ...]
    counts: Mapping[str, int]
    text: str
    thresholds: Mapping[str, float]
    explain: tuple[Mapping[str, Any], ...] = ()
    apart: tuple[str, ...] = ()

    def to_json(self) -> Json:
        data: Json = {
            "code": self.code,
            "share": self.share,
            "shares": dict(self.shares),
            "flagged": list(self.flagged),
            "counts": dict(self.counts),
            "text": self.text,
            "thresholds": dict(self.thresholds),
            "explain": [dict(entry) for entry in self.explain],
        }
        if self.apart:
            data["apart"] = list(self.apart)
        return data

    @classmethod
    def from_json(cls, data: Json) -> Verdict:
        return cls(
            code=data["code"],
            share=data["share"],
            shares=data["shares"],
            flagged=tuple(data["flagged"]),
            counts=data["counts"],
            text=data["text"],
            thresholds=data["thresholds"],
            explain=tuple(data.get("explain", ())),
            apart=tuple(data.get("apart", ())),
        )


@dataclass(frozen=True)
class Run:
    """Summary of one tuned model where there are several."""

    tuned: int
    model: Values
    nulls: Mapping[str, float]
    modules: Mapping[str, Values]
    module_nulls: Mapping[str, Mapping[str, float]]
    verdict: Verdict | None
    distance: Mapping[str, Any] | None = None

    def to_json(self) -> Json:
        data: Json = {
            "tuned": self.tuned,
            "model": dict(self.model),
            "nulls": dict(self.nulls),
            "modules": {key: dict(value) for key, value in self.modules.items()},
            "module_nulls": {key: dict(value) for key, value in self.module_nulls.items()},
            "verdict": None if self.verdict is None else self.verdict.to_json(),
        }
        if self.distance is not None:
            data["distance"] = dict(self.distance)
        return data

    @classmethod
    def from_json(cls, data: Json) -> Run:
        verdict = data["verdict"]
        return cls(
            tuned=data["tuned"],
            model=data["model"],
            nulls=data["nulls"],
            modules=data["modules"],
            module_nulls=data["module_nulls"],
            verdict=None if verdict is None else Verdict.from_json(verdict),
            distance=data.get("distance"),
        )


@dataclass(frozen=True)
class Summary:
    """Aggregates over the model and over each module kind, with their nulls.

    See docs/methods.md#aggregation. `anchor`, with `--anchor`: {"ref": as in `provenance.refs`,
    "ratios": {id: ratio}, "spectrum_preserving": bool|None}. `distance`, where matrices are far
    from the base: {"code": of the whole model where most are, else None, "matrices": their names,
    "text"}. steps, of a trajectory: that of the base, then of each checkpoint; series: id → one
    number a step.
    """

    model: Values
    nulls: Mapping[str, float]
    modules: Mapping[str, Values]
    module_nulls: Mapping[str, Mapping[str, float]]
    verdict: Verdict | None = None
    runs: tuple[Run, ...] = ()
    anchor: Mapping[str, Any] | None = None
    distance: Mapping[str, Any] | None = None
    steps: tuple[int, ...] = ()
    series: Mapping[str, Steps] = field(default_factory=dict[str, Steps])

    def to_json(self) -> Json:
        data: Json = {
            "model": _with_series(self.model, self.series),
            "nulls": dict(self.nulls),
            "modules": {key: dict(value) for key, value in self.modules.items()},
            "module_nulls": {key: dict(value) for key, value in self.module_nulls.items()},
        }
        if self.steps:
            data["steps"] = list(self.steps)
        if self.verdict is not None:
            data["verdict"] = self.verdict.to_json()
        if self.runs:
            data["runs"] = [run.to_json() for run in self.runs]
        if self.anchor is not None:
            data["anchor"] = dict(self.anchor)
        if self.distance is not None:
            data["distance"] = dict(self.distance)
        return data

    @classmethod
    def from_json(cls, data: Json) -> Summary:
        model, series = _without_series(data["model"])
        return cls(
            model=model,
            nulls=data["nulls"],
            modules=data["modules"],
            module_nulls=data["module_nulls"],
            verdict=Verdict.from_json(data["verdict"]) if "verdict" in data else None,
            runs=tuple(Run.from_json(run) for run in data.get("runs", ())),
            anchor=data.get("anchor"),
            distance=data.get("distance"),
            steps=tuple(data.get("steps", ())),
            series=series,
        )


@dataclass(frozen=True)
class Overlap:
    """How the updates of two tuned models relate on one matrix.

    See docs/methods.md#two-tuned-models.
    """

    name: str
    a: int
    b: int
    values: Values
    nulls: Mapping[str, float]

    def to_json(self) -> Json:
        return {
            "name": self.name,
            "a": self.a,
            "b": self.b,
            "values": dict(self.values),
            "nulls": dict(self.nulls),
        }

    @classmethod
    def from_json(cls, data: Json) -> Overlap:
        return cls(data["name"], data["a"], data["b"], data["values"], data["nulls"])


@dataclass(frozen=True, repr=False)
class Report:
    """Everything a command found. `to_json` and `from_json` are inverse to each other."""

    kind: str
    provenance: Provenance
    coverage: Coverage
    layers: tuple[LayerRecord, ...]
    summary: Summary
    vectors: tuple[LayerRecord, ...] = ()
    overlaps: tuple[Overlap, ...] = ()

    def __repr__(self) -> str:
        models = " → ".join(ref.given for ref in self.provenance.refs)
        verdict = None if self.summary.verdict is None else self.summary.verdict.code
        count = f"{len(self.layers)} matrices, {len(self.coverage.missing)} missing"
        return f"<geoscope.Report {self.kind}: {models}; {count}; verdict {verdict}>"

    def to_json(self) -> Json:
        data: Json = {
            "schema": SCHEMA,
            "kind": self.kind,
            "provenance": self.provenance.to_json(),
            "coverage": self.coverage.to_json(),
            "layers": [layer.to_json() for layer in self.layers],
            "summary": self.summary.to_json(),
        }
        if self.vectors:
            data["vectors"] = [vector.to_json() for vector in self.vectors]
        if self.overlaps:
            data["overlaps"] = [overlap.to_json() for overlap in self.overlaps]
        return data

    @classmethod
    def from_json(cls, data: Json) -> Report:
        """The report of a parsed JSON document. Raises ReportError on anything else."""
        schema = data.get("schema")
        if schema != SCHEMA:
            raise ReportError(f"schema is {schema!r}; this version reads {SCHEMA!r}")
        try:
            return cls(
                kind=data["kind"],
                provenance=Provenance.from_json(data["provenance"]),
                coverage=Coverage.from_json(data["coverage"]),
                layers=tuple(LayerRecord.from_json(layer) for layer in data["layers"]),
                summary=Summary.from_json(data["summary"]),
                vectors=tuple(LayerRecord.from_json(item) for item in data.get("vectors", ())),
                overlaps=tuple(Overlap.from_json(item) for item in data.get("overlaps", ())),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ReportError(
                f"not a complete {SCHEMA} document ({type(error).__name__}: {error}); "
                "write it again with -o report.json"
            ) from None

    def dumps(self) -> str:
        """Strict JSON: keys sorted, floats in full precision. Raises ReportError for a NaN."""
        try:
            return json.dumps(self.to_json(), sort_keys=True, allow_nan=False, ensure_ascii=False)
        except ValueError as error:
            raise ReportError(f"the report is no strict JSON: {error}") from None

    @classmethod
    def loads(cls, text: str) -> Report:
        """Read back what `dumps` wrote. Raises ReportError."""
        try:
            data: Any = json.loads(text, parse_constant=_refuse_constant)
        except ValueError as error:
            raise ReportError(f"not JSON: {error}") from None
        if not isinstance(data, dict):
            raise ReportError("not a report: the document is no JSON object")
        return cls.from_json(cast(Json, data))


def _refuse_constant(text: str) -> float:
    raise ValueError(f"{text} is not strict JSON")
