"""How the work is done: device, plan, stream. Knows nothing of metrics or files."""

from geoscope.engine.boundary import matrix_boundary, told_failure
from geoscope.engine.device import (
    available_memory,
    cores,
    free_memory,
    resolve_devices,
    resolve_dtype,
)
from geoscope.engine.plan import (
    BASELINE,
    Batch,
    asked_memory,
    default_memory,
    device_memory,
    estimate_seconds,
    is_small,
    needed_memory,
    plan,
    room_for_batches,
)
from geoscope.engine.speed import slowness
from geoscope.engine.stream import Gate, Outcome, one_blas_thread, stream

__all__ = [
    "BASELINE",
    "Batch",
    "Gate",
    "Outcome",
    "asked_memory",
    "available_memory",
    "cores",
    "default_memory",
    "device_memory",
    "estimate_seconds",
    "free_memory",
    "is_small",
    "matrix_boundary",
    "needed_memory",
    "one_blas_thread",
    "plan",
    "resolve_devices",
    "resolve_dtype",
    "room_for_batches",
    "slowness",
    "stream",
    "told_failure",
]
