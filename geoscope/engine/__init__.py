"""How the work is done: device, plan, stream. Knows nothing of metrics or files."""

from geoscope.engine.device import resolve_device, resolve_dtype
from geoscope.engine.plan import (
    Batch,
    default_memory,
    estimate_seconds,
    parse_memory,
    plan,
)
from geoscope.engine.stream import Outcome, one_blas_thread, stream

__all__ = [
    "Batch",
    "Outcome",
    "default_memory",
    "estimate_seconds",
    "one_blas_thread",
    "parse_memory",
    "plan",
    "resolve_device",
    "resolve_dtype",
    "stream",
]
