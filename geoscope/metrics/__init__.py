"""What is measured: METRICS, their nulls, precision floors, aggregation and the verdict."""

from geoscope.metrics.aggregate import aggregate
from geoscope.metrics.capacity_verdict import (
    CAPACITY_CODES,
    judge_capacity,
    judge_capacity_model,
)
from geoscope.metrics.distance import Distance, distance, far_code, judge_distance
from geoscope.metrics.factors import (
    PairFactors,
    Recall,
    Rounding,
    Settings,
    pair_factors,
    update_factors,
)
from geoscope.metrics.judging import MatrixVerdict
from geoscope.metrics.measure import Measured, measure, measure_nothing, verdict_dimension
from geoscope.metrics.metric import Instance, Metric, Null, instances, takes_of
from geoscope.metrics.rules import RULES, Rules
from geoscope.metrics.table import FAMILIES, METRICS
from geoscope.metrics.verdict import CODES, VERDICT_IDS, judge, judge_model
from geoscope.thresholds import THRESHOLDS, limits_in_force

__all__ = [
    "CAPACITY_CODES",
    "CODES",
    "FAMILIES",
    "METRICS",
    "RULES",
    "THRESHOLDS",
    "VERDICT_IDS",
    "Distance",
    "Instance",
    "MatrixVerdict",
    "Measured",
    "Metric",
    "Null",
    "PairFactors",
    "Recall",
    "Rounding",
    "Rules",
    "Settings",
    "aggregate",
    "distance",
    "far_code",
    "instances",
    "judge",
    "judge_capacity",
    "judge_capacity_model",
    "judge_distance",
    "judge_model",
    "limits_in_force",
    "measure",
    "measure_nothing",
    "pair_factors",
    "takes_of",
    "update_factors",
    "verdict_dimension",
]
