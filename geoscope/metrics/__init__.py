"""What is measured: METRICS, their nulls, precision floors, aggregation and the verdict."""

from geoscope.metrics.aggregate import aggregate
from geoscope.metrics.factors import PairFactors, Rounding, Settings, pair_factors
from geoscope.metrics.measure import Measured, measure, measure_nothing, verdict_dimension
from geoscope.metrics.metric import Instance, Metric, Null, instances
from geoscope.metrics.table import FAMILIES, METRICS
from geoscope.metrics.verdict import (
    CODES,
    THRESHOLDS,
    VERDICT_IDS,
    Judged,
    judge,
    judge_model,
)

__all__ = [
    "CODES",
    "FAMILIES",
    "METRICS",
    "THRESHOLDS",
    "VERDICT_IDS",
    "Instance",
    "Judged",
    "Measured",
    "Metric",
    "Null",
    "PairFactors",
    "Rounding",
    "Settings",
    "aggregate",
    "instances",
    "judge",
    "judge_model",
    "measure",
    "measure_nothing",
    "pair_factors",
    "verdict_dimension",
]
