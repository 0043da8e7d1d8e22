"""Where the wings meet: checkpoints are paired, streamed, measured and judged; a Report comes out.

    compare("base/", "tuned/")                       everything, as `geoscope compare` does
    compare("base/", "tuned/", kind="collapse")      the families of one command

What is computed follows from the kind: its families of METRICS, the factors they take, and for the
kinds with a verdict the numbers behind it.
"""

from __future__ import annotations

from geoscope.analysis.alone import measure_adapter, prepare_alone
from geoscope.analysis.compare import compare
from geoscope.analysis.options import Interrupted, Options, Progress
from geoscope.analysis.prepare import Prepared, prepare, survey
from geoscope.analysis.selection import KINDS, VERDICT_KINDS, ids_of

__all__ = [
    "KINDS",
    "VERDICT_KINDS",
    "Interrupted",
    "Options",
    "Prepared",
    "Progress",
    "compare",
    "ids_of",
    "measure_adapter",
    "prepare",
    "prepare_alone",
    "survey",
]
