"""`Report` is the only currency between computing and rendering.

Its JSON form (schema `geoscope.report/2`) is canonical and reads back equal; schema 1 is read.
"""

from __future__ import annotations

import gc
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, TypedDict, cast

from geoscope.errors import ReportError
from geoscope.foreign import parsed, shown
from geoscope.records.codec import decode, encode, omitted_if_default, schema_of, tabled
from geoscope.records.earlier import FIRST, upgraded
from geoscope.records.layers import Layers, Overlap, Summary
from geoscope.records.numbers import Reading, reading
from geoscope.records.tensors import ModelRef, Rename, ShapeMismatch, Skipped

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame

__all__ = ["SCHEMA", "Coverage", "Provenance", "Report", "report_schema"]

SCHEMA = "geoscope.report/2"


class _Parameters(TypedDict, total=False):
    limits: Mapping[str, float] | None


@dataclass(frozen=True)
class Provenance:
    """How a report came about; with it the run can be repeated.

    argv: the command line.
    refs: the base, then each tuned model.
    parameters: the options that decide the numbers.
    seconds: time taken.
    """

    tool_version: str
    argv: tuple[str, ...]
    refs: tuple[ModelRef, ...]
    device: str
    compute_dtype: str
    seed: int
    parameters: Annotated[Mapping[str, Any], _Parameters]
    seconds: float


@dataclass(frozen=True)
class Coverage:
    """What was compared and what was not. `status` is COMPLETE, SAMPLE or PARTIAL.

    matched: matrices that were compared.
    base_only: tensors of the base alone.
    tuned_only: tensors of the tuned model alone.
    missing: matrices in scope without a comparison, one-sided, reshaped, non-finite, not converged
    or unsupported. PARTIAL means that there is one.
    unread: matrices that a sample left unread; the status is SAMPLE where nothing is missing.
    """

    matched: tuple[str, ...]
    base_only: tuple[str, ...] = ()
    tuned_only: tuple[str, ...] = ()
    shape_mismatch: tuple[ShapeMismatch, ...] = ()
    skipped: tuple[Skipped, ...] = ()
    renamed: tuple[Rename, ...] = ()
    missing: tuple[str, ...] = ()
    unread: tuple[str, ...] = omitted_if_default(())

    WRITTEN: ClassVar = ("status",)

    @property
    def status(self) -> str:
        if self.missing:
            return "PARTIAL"
        return "SAMPLE" if self.unread else "COMPLETE"

    def decoded(self) -> Coverage:
        """With what was skipped told apart, as `missing` does in JSON."""
        skipped = (replace(item, missing=item.name in self.missing) for item in self.skipped)
        return replace(self, skipped=tuple(skipped))


@dataclass(frozen=True, repr=False)
class Report:
    """Everything a command found. `to_json` and `from_json` are inverse to each other.

    report["nss"] is a number of the model beside its null; report.layers["…q_proj.weight"]["nss"]
    the same of one matrix, with its status.

    kind: of the command.
    layers: the matrices.
    summary: what they come to.
    vectors: norms and biases.
    overlaps: of two tuned models each, on each matrix.
    """

    kind: str
    provenance: Provenance
    coverage: Coverage
    layers: Layers = tabled()
    summary: Summary  # pyright: ignore[reportGeneralTypeIssues]
    vectors: Layers = tabled(Layers())
    overlaps: tuple[Overlap, ...] = tabled(())

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", Layers(self.layers))
        object.__setattr__(self, "vectors", Layers(self.vectors))

    def decoded(self) -> Report:
        """The same. Raises ValueError for a row that is not of a matrix."""
        for layer in self.layers:
            if len(layer.shape) != 2 or min(layer.shape) < 0:
                sizes = f"found {shown(list(layer.shape))}, expected two sizes"
                raise ValueError(f"layers: shape of {shown(layer.name)}: {sizes}")
        return self

    def __repr__(self) -> str:
        models = " → ".join(ref.given for ref in self.provenance.refs)
        verdict = None if self.summary.verdict is None else self.summary.verdict.code
        count = f"{len(self.layers)} matrices, {len(self.coverage.missing)} missing"
        return f"<geoscope.Report {self.kind}: {models}; {count}; verdict {verdict}>"

    def __getitem__(self, key: str) -> Reading:
        """A number of the model beside its null: `report["nss"].value`. Raises KeyError."""
        return reading(key, self.summary.model, self.summary.nulls)

    def _repr_html_(self) -> str:
        """What a notebook shows: the headline, its facts, all tables."""
        from geoscope.report.html.document import render_notebook

        return render_notebook(self)

    def to_frame(self, part: str = "values") -> DataFrame:
        """One row a matrix, ids as columns. Raises OptionError, or ReportError without pandas.

        part: values, nulls, statuses or raw (the numbers behind BELOW_RESOLUTION); frames of all
        four have the same rows.
        """
        from geoscope.report.frames import to_frame

        return to_frame(self, part)

    def figure(self, name: str | None = None, *, style: str = "screen") -> Figure:
        """The figure of the report, or one panel of it by name, as a matplotlib Figure.

        style: screen, or paper (as wide as a page of text, without the title).
        Raises OptionError with the names that there are.
        """
        from geoscope.report.figures import figure

        return figure(self, name, style=style)

    def save(self, path: str | os.PathLike[str], *, style: str = "screen") -> None:
        """Writes .json (which `geoscope.read_report` opens), .html, .csv, .md, .png, .svg or .pdf.

        A file that is there is replaced. style: of figures. Raises OptionError or ReportError.
        """
        from geoscope.report import write

        write(self, path, style=style)

    def to_json(self) -> dict[str, Any]:
        return {"schema": SCHEMA, **encode(self)}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Report:
        """The report of a parsed JSON document. Raises ReportError on anything else."""
        schema = data.get("schema")
        if schema not in (SCHEMA, FIRST):
            raise ReportError(f"schema is {shown(schema)}; this version reads {SCHEMA!r}")
        try:
            return decode(cls, data if schema == SCHEMA else upgraded(data))
        except (KeyError, TypeError, ValueError) as error:
            what = f"{error} is missing" if isinstance(error, KeyError) else str(error)
            raise ReportError(
                f"not a complete {schema} document ({what}); write it again with -o report.json"
            ) from None

    def dumps(self) -> str:
        """Strict JSON: keys sorted, floats as they are. Raises ReportError for a NaN."""
        form: dict[str, Any] = {"sort_keys": True, "allow_nan": False, "ensure_ascii": False}
        try:
            return json.dumps(self.to_json(), separators=(",", ":"), **form)
        except ValueError as error:
            raise ReportError(f"the report is not strict JSON: {error}") from None

    @classmethod
    def loads(cls, text: str) -> Report:
        """Read back what `dumps` wrote. Raises ReportError."""
        with _without_collector():
            try:
                data: Any = parsed(text, parse_constant=_refuse_constant)
            except ValueError as error:
                raise ReportError(f"not JSON: {error}") from None
            if not isinstance(data, dict):
                raise ReportError("not a report: the document is not a JSON object")
            return cls.from_json(cast(dict[str, Any], data))


@contextmanager
def _without_collector() -> Iterator[None]:
    """What is parsed holds no cycles, and millions of objects would be searched for them."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _refuse_constant(text: str) -> float:
    raise ValueError(f"{text} is not strict JSON")


def report_schema() -> dict[str, Any]:
    """The JSON Schema (draft 2020-12) of what `Report.to_json` gives, from the fields of Report."""
    nouns: dict[str, dict[str, Any]] = {}
    whole = schema_of(Report, nouns)
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": f"urn:{SCHEMA.replace('.', ':').replace('/', ':')}",
        "title": SCHEMA,
        **whole,
        "properties": {"schema": {"const": SCHEMA}, **whole["properties"]},
        "required": ["schema", *whole["required"]],
        "$defs": nouns,
    }
