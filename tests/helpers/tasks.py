"""What processes of the tests are asked to do: each a function of a job and an argument."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from geoscope.errors import OptionError

__all__ = ["dies", "dies_once", "pid_and_wait", "prints", "refuses"]


def prints(job: Any, argument: Any) -> Any:
    """Both, and noise on standard output of Python and of the process."""
    print("noise")
    sys.stdout.flush()
    os.write(1, b"noise below Python\n")
    return job, argument


def refuses(job: Any, argument: Any) -> None:
    raise OptionError(f"`{job}` {argument}: no")


def dies_once(job: str, argument: Any) -> Any:
    """Killed at its first try, as by a machine without memory."""
    mark = Path(job) / str(argument)
    if not mark.exists():
        mark.touch()
        dies(job, argument)
    return argument


def dies(job: str, argument: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def pid_and_wait(job: str, argument: Any) -> int:
    """0 waits for long, after it has said who it is; others come at once."""
    if argument == 0:
        (Path(job) / "pid").write_text(str(os.getpid()))
        time.sleep(600)
    while not (Path(job) / "pid").exists():
        time.sleep(0.01)
    return argument
