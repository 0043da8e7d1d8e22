"""The front door: `geoscope` and `python -m geoscope`. One error boundary, one exit code table."""

from __future__ import annotations

import contextlib
import ctypes
import io
import os
import signal
import sys
import traceback
from types import FrameType

from geoscope.errors import GeoscopeError, OptionError, Stopped

__all__ = ["main"]


_M_MMAP_THRESHOLD = -3  # of glibc's malloc.h


def main() -> None:
    """Runs the command line; the process ends with 0, 1, 2, 3, 130 or 143."""
    # Before any BLAS is loaded: threads that wait must not spin beside workers.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    # Before torch allocates: large tensors in huge pages, for a page fault costs more than a cast.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    _give_memory_back()
    from geoscope.cli import app

    if isinstance(sys.stdout, io.TextIOWrapper):
        # A locale that cannot show a letter is no reason to lose the report.
        sys.stdout.reconfigure(errors="backslashreplace")
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, _stop)
    try:
        app()
    except Stopped as stop:
        sys.stderr.write("geoscope: interrupted\n")
        sys.exit(stop.exit_code)
    except GeoscopeError as error:
        if "--debug" in sys.argv or os.environ.get("GEOSCOPE_DEBUG") == "1":
            traceback.print_exc()
        sys.stderr.write(f"geoscope: {error}\n")
        sys.exit(2 if isinstance(error, OptionError) else 1)


def _give_memory_back() -> None:
    """Large blocks go back to the system when they are freed (glibc keeps those below 32 MB)."""
    with contextlib.suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 1 << 20)


def _stop(signum: int, _frame: FrameType | None) -> None:
    raise Stopped(signum)


if __name__ == "__main__":
    main()
