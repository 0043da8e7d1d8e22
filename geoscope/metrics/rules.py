"""RULES: who judges, by the name that `KINDS` gives; one matrix, and the model over them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from geoscope.kinds import CAPACITY, UPDATE, Judge
from geoscope.metrics.capacity_verdict import judge_capacity, judge_capacity_model
from geoscope.metrics.judging import MatrixVerdict
from geoscope.metrics.measure import Measured
from geoscope.metrics.verdict import VERDICT_IDS, judge, judge_model
from geoscope.records import Verdict

__all__ = ["RULES", "Rules"]

Limits = Mapping[str, float] | None


@dataclass(frozen=True)
class Rules:
    """The rules of a verdict.

    matrix: row, k_v, limits → the verdict on one matrix.
    model: names, modules, rows, verdicts on the matrices, limits → the verdict on the model.
    ids: what they take beside the families of the kind.
    """

    matrix: Callable[[Measured, int, Limits], MatrixVerdict]
    model: Callable[
        [Sequence[str], Sequence[str], Sequence[Measured], Sequence[MatrixVerdict], Limits], Verdict
    ]
    ids: tuple[str, ...] = ()


RULES: Mapping[Judge, Rules] = {
    # The shares of a verdict are of the update's energy.
    UPDATE: Rules(judge, judge_model, (*VERDICT_IDS, "update.frobenius_norm")),
    CAPACITY: Rules(
        lambda row, _k, limits: judge_capacity(row, limits),
        lambda names, _modules, rows, judged, limits: judge_capacity_model(
            names, rows, judged, limits
        ),
    ),
}
