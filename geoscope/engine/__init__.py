"""How the work is done: device, plan, stream. Knows nothing of metrics or files."""

from geoscope.engine.boundary import matrix_boundary, told_failure
from geoscope.engine.device import available_memory, free_memory, resolve_devices, resolve_dtype
from geoscope.engine.plan import (
    BASELINE,
    Batch,
    default_memory,
    device_memory,
    estimate_seconds,
    least_memory,
    parse_memory,
    plan,
    room_for_batches,
)
from geoscope.engine.stream import Gate, Outcome, one_blas_thread, stream

__all__ = [
    "BASELINE",
    "Batch",
    "Gate",
    "Outcome",
    "available_memory",
    "default_memory",
    "device_memory",
    "estimate_seconds",
    "free_memory",
    "least_memory",
    "matrix_boundary",
    "one_blas_thread",
    "parse_memory",
    "plan",
    "resolve_devices",
    "resolve_dtype",
    "room_for_batches",
    "stream",
    "told_failure",
]
