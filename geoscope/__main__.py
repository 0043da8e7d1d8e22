"""The front door: `geoscope` and `python -m geoscope`. One error boundary, one exit code table."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import traceback
from types import FrameType

from geoscope.errors import GeoscopeError, OptionError, Stopped

__all__ = ["ENVIRONMENT", "main", "steer_process"]

# Variables of the command line's own process, where the user has not set them, before any BLAS is
# loaded: threads that wait do not spin beside workers, and large tensors come in huge pages, for
# ordinary page faults cost more than the casts into them.
ENVIRONMENT = {"OMP_WAIT_POLICY": "passive", "THP_MEM_ALLOC_ENABLE": "1"}

# Of glibc's malloc.h.
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3


def main() -> None:
    """Runs the command line; the process ends with 0, 1, 2, 3, 130 or 143."""
    steer_process()
    from geoscope.cli import app, told
    from geoscope.cli.output import take_streams

    # Also where a script's `geoscope … &` had SIGINT ignored: `kill -INT` gives the partial report.
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, _stop)
    try:
        take_streams()
        app()
    except Stopped as stop:
        sys.stderr.write("geoscope: interrupted\n")
        sys.exit(stop.exit_code)
    except GeoscopeError as error:
        if "--debug" in sys.argv or os.environ.get("GEOSCOPE_DEBUG") == "1":
            traceback.print_exc()
        sys.stderr.write(f"geoscope: {told(error)}\n")
        sys.exit(2 if isinstance(error, OptionError) else 1)


def steer_process() -> None:
    """Settings of a process that is geoscope's own, before torch is imported."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    with contextlib.suppress(OSError, AttributeError, TypeError):
        # glibc: matrices go back to the system when they are freed (it would keep those below
        # 32 MB), while the buffers of one step are kept, for fresh pages cost more than the step.
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_THRESHOLD, 4 << 20)
        libc.mallopt(_M_TRIM_THRESHOLD, 64 << 20)


def _stop(signum: int, _frame: FrameType | None) -> None:
    raise Stopped(signum)


if __name__ == "__main__":
    main()
