"""What is told of a matrix: in the report, and from one machine to another."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from geoscope.kinds import KINDS
from geoscope.metrics import RULES, MatrixVerdict, Measured
from geoscope.records import LayerRecord, WeightPair
from geoscope.verbs.options import Options
from geoscope.verbs.pairs.matrices import Matrix, two_sides
from geoscope.verbs.pairs.selection import verdict_k

__all__ = ["PartMatrix", "matrix_of", "part_of", "record_of"]


def record_of(one: Matrix, tuned: int | None) -> LayerRecord:
    """What the report holds of a matrix."""
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


@dataclass(frozen=True)
class PartMatrix:
    """One matrix of a part.

    record: as in the report.
    weights, floors: with which it enters the numbers of the model (`Measured`).
    failure: why it has no numbers.
    spectrum: with a budget the singular values of the update above its noise edge.
    """

    record: LayerRecord
    weights: Mapping[str, float]
    floors: Mapping[str, float]
    failure: str | None
    spectrum: tuple[float, ...] = ()


def part_of(matrix: Matrix) -> PartMatrix:
    """The matrix as another machine takes it."""
    row = matrix.row
    record = record_of(matrix, None)
    return PartMatrix(record, row.weights, row.floors, matrix.failure, matrix.spectrum)


def matrix_of(pair: WeightPair, part: PartMatrix, kind: str, options: Options) -> Matrix:
    """The matrix as it was before it became a record."""
    record = part.record
    row = Measured(
        values=dict(record.values),
        nulls=dict(record.nulls),
        status=dict(record.status),
        raw=dict(record.raw),
        floors=dict(part.floors),
        weights=dict(part.weights),
    )
    judge = KINDS[kind].judge
    judged: MatrixVerdict | None = None
    if judge is not None:
        k = verdict_k(options, two_sides(pair.shape))
        judged = RULES[judge].matrix(row, k, options.limits)
    return Matrix(
        pair=pair,
        row=row,
        judged=judged,
        method=record.method,
        curves=record.curves,
        notes=record.notes,
        failure=part.failure,
        spectrum=part.spectrum,
    )
