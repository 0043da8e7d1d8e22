"""The front door: `geoscope` and `python -m geoscope`. One error boundary, one exit code table."""

from __future__ import annotations

import os
import signal
import sys
import traceback
from types import FrameType

from geoscope.errors import GeoscopeError, OptionError, Stopped

__all__ = ["main"]


def main() -> None:
    """Runs the command line; the process ends with 0, 1, 2, 3, 130 or 143."""
    from geoscope.cli import app

    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, _stop)
    try:
        app()
    except Stopped as stop:
        sys.stderr.write("geoscope: interrupted\n")
        sys.exit(stop.exit_code)
    except BrokenPipeError:
        # The reader went away (`| head`): nothing is wrong, and nothing can be said.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except GeoscopeError as error:
        if "--debug" in sys.argv or os.environ.get("GEOSCOPE_DEBUG") == "1":
            traceback.print_exc()
        sys.stderr.write(f"geoscope: {error}\n")
        sys.exit(2 if isinstance(error, OptionError) else 1)


def _stop(signum: int, _frame: FrameType | None) -> None:
    raise Stopped(signum)


if __name__ == "__main__":
    main()
