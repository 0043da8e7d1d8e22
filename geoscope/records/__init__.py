"""The nouns: what is passed between reading, computing and showing. Frozen, and without torch.

Numbers that are undefined are None and carry a `Status`; nothing is ever replaced by 0, 1 or -1.
"""

from geoscope.records.codec import decode, encode
from geoscope.records.layers import LayerRecord, Layers, Overlap, Run, Summary, Verdict
from geoscope.records.numbers import Collected, Curve, Numbers, Reading, Status, Steps, Values
from geoscope.records.report import SCHEMA, Coverage, Provenance, Report, report_schema
from geoscope.records.survey import Survey
from geoscope.records.tensors import (
    CODES,
    IN_MEMORY,
    NOT_READ,
    ModelRef,
    Pairing,
    Quantisation,
    Rename,
    ShapeMismatch,
    Skipped,
    TensorInfo,
    WeightPair,
)

__all__ = [
    "CODES",
    "IN_MEMORY",
    "NOT_READ",
    "SCHEMA",
    "Collected",
    "Coverage",
    "Curve",
    "LayerRecord",
    "Layers",
    "ModelRef",
    "Numbers",
    "Overlap",
    "Pairing",
    "Provenance",
    "Quantisation",
    "Reading",
    "Rename",
    "Report",
    "Run",
    "ShapeMismatch",
    "Skipped",
    "Status",
    "Steps",
    "Summary",
    "Survey",
    "TensorInfo",
    "Values",
    "Verdict",
    "WeightPair",
    "decode",
    "encode",
    "report_schema",
]
