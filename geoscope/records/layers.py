"""What was measured, and what it comes to: of one matrix, of a model, of two models."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, SupportsIndex, overload

from geoscope.records.codec import added, omitted_if_default, within
from geoscope.records.numbers import Curve, Numbers, Steps, Values

__all__ = ["LayerRecord", "Layers", "Overlap", "Run", "Summary", "Verdict"]


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
    verdict: Mapping[str, Any] | None = omitted_if_default(None)
    method: Mapping[str, Mapping[str, Any]] = field(default_factory=dict[str, Mapping[str, Any]])
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
    explain: tuple[Mapping[str, Any], ...] = added(())
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
    distance: Mapping[str, Any] | None = omitted_if_default(None)


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
    anchor: Mapping[str, Any] | None = omitted_if_default(None)
    distance: Mapping[str, Any] | None = omitted_if_default(None)
    lineage: Mapping[str, Any] | None = omitted_if_default(None)
    merging: Mapping[str, Any] | None = omitted_if_default(None)
    steps: tuple[int, ...] = omitted_if_default(())
    series: Mapping[str, Steps] = within("model")


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
