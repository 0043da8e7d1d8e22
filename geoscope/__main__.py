"""The front door: `geoscope` and `python -m geoscope`. One error boundary, one exit code table."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from pathlib import Path
from types import FrameType

from geoscope.errors import GeoscopeError, OptionError, Stopped

__all__ = ["ENVIRONMENT", "main", "steer_process"]

# Variables of the command line's own process, where the user has not set them, before any BLAS is
# loaded: threads that wait do not spin beside workers, and large tensors come in huge pages, for
# ordinary page faults cost more than the casts into them.
ENVIRONMENT = {"OMP_WAIT_POLICY": "passive", "THP_MEM_ALLOC_ENABLE": "1"}

_SIGNALS = (signal.SIGINT, signal.SIGTERM)

# Of glibc's malloc.h.
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3


def main() -> None:
    """Runs the command line; the process ends with 0, 1, 2, 3, 130 or 143."""
    try:
        # First of all, and also where a script's `geoscope … &` had SIGINT ignored: `kill -INT`
        # gives the partial report.
        for signum in _SIGNALS:
            signal.signal(signum, _stop)
        steer_process()
        _run()
    except Stopped as stop:
        if sys.stderr is not None:  # pyright: ignore[reportUnnecessaryComparison]
            sys.stderr.write("geoscope: interrupted\n")
        sys.exit(stop.exit_code)


def _run() -> None:
    """The command line, with a line and an exit code for whatever goes wrong in it."""
    from geoscope.cli import command_line, told
    from geoscope.cli.output import take_streams, write_error

    try:
        take_streams()
        _check_working_folder()
        command_line()(prog_name="geoscope")
    except GeoscopeError as error:
        _tell_whole()
        write_error(told(error))
        sys.exit(2 if isinstance(error, OptionError) else 1)
    except OSError as error:  # of a path that was named, mostly: its name is part of the error
        _tell_whole()
        what = "" if error.filename is None else f"{error.filename}: "
        write_error(f"{what}{error.strerror or error}")
        sys.exit(1)
    except Exception as error:  # no traceback for a user; --debug has it
        _tell_whole()
        write_error(
            f"this is a fault of geoscope: {type(error).__name__}: {error}; report it, with "
            "what --debug shows"
        )
        sys.exit(1)


def _check_working_folder() -> None:
    """Raises OptionError where it is gone: a BLAS would end the process over it."""
    try:
        Path.cwd()
    except OSError:
        raise OptionError("the working folder is gone; change to one that is there") from None


def _tell_whole() -> None:
    """The traceback, where it was asked for."""
    if "--debug" in sys.argv or os.environ.get("GEOSCOPE_DEBUG") == "1":
        import traceback

        traceback.print_exc()


def steer_process() -> None:
    """Settings of a process that is geoscope's own, before torch is imported."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    import ctypes

    with contextlib.suppress(OSError, AttributeError, TypeError):
        # glibc: matrices go back to the system when they are freed (it would keep those below
        # 32 MB), while the buffers of one step are kept, for fresh pages cost more than the step.
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_THRESHOLD, 4 << 20)
        libc.mallopt(_M_TRIM_THRESHOLD, 64 << 20)


def _stop(signum: int, _frame: FrameType | None) -> None:
    for each in _SIGNALS:  # a second one ends the process at once
        signal.signal(each, signal.SIG_DFL)
    raise Stopped(signum)


if __name__ == "__main__":
    main()
