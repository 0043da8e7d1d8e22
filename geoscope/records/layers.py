"""What was measured, and what it comes to: of one matrix, of a model, of two models."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, NotRequired, SupportsIndex, TypedDict, overload

from geoscope.records.codec import added, omitted_if_default, within
from geoscope.records.numbers import Curve, Numbers, Steps, Values

__all__ = ["LayerRecord", "Layers", "Overlap", "Run", "Summary", "Verdict"]


# --- tables that stay mappings, by their keys ----------------------------------------------------


class _MatrixVerdict(TypedDict):
    code: str
    k: NotRequired[int | None]
    clause: NotRequired[str]
    words: NotRequired[str]


class _Method(TypedDict):
    how: NotRequired[str]
    bound: NotRequired[float | None]
    subspace_bound: NotRequired[float | None]
    fallback: NotRequired[str | None]


class _Condition(TypedDict):
    code: str
    condition: str
    threshold: float
    standing: str
    holds: int
    of: int
    least: float | None
    largest: float | None


class _Distance(TypedDict):
    code: str | None
    matrices: NotRequired[list[str]]
    text: str


class _Named(TypedDict):
    given: str
    resolved: NotRequired[str]
    commit: NotRequired[str | None]
    storage_dtype: NotRequired[str]


class _Anchor(TypedDict):
    ref: Annotated[Mapping[str, Any], _Named]
    ratios: Values
    spectrum_preserving: bool | None


class _Lineage(TypedDict):
    parents: list[int | None]
    beside: list[int | None]
    weights: NotRequired[Mapping[str, float]]
    clear: NotRequired[bool]


class _Merging(TypedDict):
    models: NotRequired[int]
    matrices: NotRequired[int]
    values: Mapping[str, float]
    nulls: Mapping[str, float]
    words: str


# --- nouns ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LayerRecord(Numbers):
    """All that was measured on one matrix, or on one norm or bias.

    name: in full, as the base has it.
    layer: index of its block.
    module: its kind, such as q_proj.
    shape: (out, in).
    values: id → number, null exactly where `status[id]` is a null status.
    nulls: id → what an isotropic update of the same shape and size gives.
    status: id → why it is marked or missing; OK is not listed.
    raw: id → the number behind a BELOW_RESOLUTION.
    verdict: "code", "k" and "clause", what decided; of a norm or bias none.
    method: factor → "how", "bound", "subspace_bound" and "fallback".
    curves: id → points for figures.
    notes: remarks on it.
    tuned: number of the tuned model where there are several, as in `provenance.refs`.
    series: id → one number a step; of trajectories.
    gram: inner products of the increments, (T, T); of trajectories (docs/methods.md#increments).
    """

    name: str
    layer: int | None
    module: str
    shape: tuple[int, ...]
    verdict: Annotated[Mapping[str, Any], _MatrixVerdict] | None = omitted_if_default(None)
    method: Mapping[str, Annotated[Mapping[str, Any], _Method]] = field(
        default_factory=dict[str, Mapping[str, Any]]
    )
    curves: Mapping[str, Curve] = omitted_if_default({})
    notes: tuple[str, ...] = omitted_if_default(())
    tuned: int | None = omitted_if_default(None)
    series: Mapping[str, Steps] = within("values")
    gram: tuple[tuple[float, ...], ...] = omitted_if_default(())


class Layers(tuple[LayerRecord, ...]):
    """Records in their order; `layers["model.layers.0.mlp.down_proj.weight"]` by name."""

    @overload
    def __getitem__(self, key: SupportsIndex | str) -> LayerRecord: ...

    @overload
    def __getitem__(self, key: slice) -> tuple[LayerRecord, ...]: ...

    def __getitem__(
        self, key: SupportsIndex | slice | str
    ) -> LayerRecord | tuple[LayerRecord, ...]:
        """Of a name the one record; raises KeyError for none, or one of each tuned model."""
        if not isinstance(key, str):
            return super().__getitem__(key)
        same = [one for one in self if key in (one.name, one.name.removesuffix(".weight"))]
        if len(same) == 1:
            return same[0]
        if same:
            raise KeyError(
                f"{key!r} is there for {len(same)} tuned models; choose one by its number, tuned"
            )
        near = [one.name for one in self if key in one.name]
        raise KeyError(f"no matrix {key!r}" + (f"; near: {', '.join(near[:4])}" if near else ""))


@dataclass(frozen=True)
class Verdict:
    """The verdict on a model: the code that holds at least half of the update's energy.

    share: of that code.
    shares: code → share of Σ‖ΔW‖².
    flagged: names of the matrices whose code asks for attention, worst first.
    counts: code → number of matrices.
    text: one sentence.
    thresholds: the limits in force.
    explain: each condition of the rules, "code", "condition", "threshold", "standing", "holds" and
    "of" (numbers of matrices), "least" and "largest" of the values it met.
    apart: matrices that are far from the base in a model that is not; `share` is of the energy of
    the others.
    """

    code: str
    share: float | None
    shares: Mapping[str, float]
    flagged: tuple[str, ...]
    counts: Mapping[str, int]
    text: str
    thresholds: Mapping[str, float]
    explain: tuple[Annotated[Mapping[str, Any], _Condition], ...] = added(())
    apart: tuple[str, ...] = omitted_if_default(())


@dataclass(frozen=True)
class Run:
    """Summary of one tuned model where there are several.

    tuned: its number, as in `provenance.refs`.
    """

    tuned: int
    model: Values
    nulls: Mapping[str, float]
    modules: Mapping[str, Values]
    module_nulls: Mapping[str, Mapping[str, float]]
    verdict: Verdict | None
    distance: Annotated[Mapping[str, Any], _Distance] | None = omitted_if_default(None)


@dataclass(frozen=True)
class Summary:
    """Aggregates over the model and over each module kind, with their nulls.

    See docs/methods.md#aggregation.

    model: id → number over all matrices that have one.
    nulls: the same of their nulls.
    modules: the same of each module kind.
    module_nulls: the same of the nulls of each module kind.
    verdict: on the first tuned model.
    runs: of each tuned model where there are several.
    anchor: with an anchor, "ref" as in `provenance.refs`, "ratios" (id → ratio) and
    "spectrum_preserving".
    distance: where matrices are far from the base, "code" of the whole model where most are,
    "matrices", their names, and "text".
    lineage: "parents", "beside", "weights", "clear", see docs/report.md#lineage.
    merging: of several tuned models, as `metrics.merging` has it.
    steps: of a trajectory, that of the base, then of each checkpoint.
    series: id → one number a step.
    """

    model: Values
    nulls: Mapping[str, float]
    modules: Mapping[str, Values]
    module_nulls: Mapping[str, Mapping[str, float]]
    verdict: Verdict | None = omitted_if_default(None)
    runs: tuple[Run, ...] = omitted_if_default(())
    anchor: Annotated[Mapping[str, Any], _Anchor] | None = omitted_if_default(None)
    distance: Annotated[Mapping[str, Any], _Distance] | None = omitted_if_default(None)
    lineage: Annotated[Mapping[str, Any], _Lineage] | None = omitted_if_default(None)
    merging: Annotated[Mapping[str, Any], _Merging] | None = omitted_if_default(None)
    steps: tuple[int, ...] = omitted_if_default(())
    series: Mapping[str, Steps] = within("model")

    def decoded(self) -> Summary:
        """The same. Raises ValueError for a lineage that names a model it does not list."""
        if self.lineage is not None:
            parents, beside = self.lineage["parents"], self.lineage["beside"]
            known = {None, *range(len(parents))}
            if len(beside) != len(parents) or not known.issuperset((*parents, *beside)):
                raise ValueError("lineage: parents and beside are not of the same models")
        return self


@dataclass(frozen=True)
class Overlap:
    """How the updates of two tuned models relate on one matrix.

    See docs/methods.md#two-tuned-models.

    name: of the matrix.
    a: number of the one tuned model, as in `provenance.refs`.
    b: number of the other.
    """

    name: str
    a: int
    b: int
    values: Values
    nulls: Mapping[str, float]
