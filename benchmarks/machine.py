"""What a figure hangs on: the machine, the versions, what else was running; and timed processes."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import geoscope
from geoscope.__main__ import ENVIRONMENT

__all__ = [
    "Run",
    "child",
    "cores",
    "facts",
    "geoscope_environment",
    "set_aside_variables",
    "without_paths",
]

_PACKAGES = ("torch", "numpy", "scipy", "safetensors")
_FLAGS = ("avx2", "avx512f", "amx_tile")
# Variables that steer BLAS and its threads.
_STEERING = ("OMP_", "THP_", "OPENBLAS_", "MKL_", "GOTO_", "BLIS_")
# A path of two folders or more; what is written out holds none.
_PATH = re.compile(r"(?<![\w.])(?:/[\w.+@-]+){2,}/?")


def geoscope_environment() -> dict[str, str]:
    """The variables that the command line sets for itself before BLAS is loaded."""
    return {name: value for name, value in ENVIRONMENT.items() if name not in os.environ}


def set_aside_variables() -> dict[str, str]:
    """Takes the variables that steer BLAS out of this process and its children; what they were.

    A machine that comes with OPENBLAS_CORETYPE or OMP_NUM_THREADS set measures that setting, not
    what the packages do by themselves.
    """
    return {name: os.environ.pop(name) for name in sorted(os.environ) if name.startswith(_STEERING)}


def _environment(*, ours: bool) -> dict[str, str]:
    """Of a child process: as it is here, with `ours` what geoscope's command line adds."""
    return {**os.environ, **(geoscope_environment() if ours else {})}


def facts() -> dict[str, Any]:
    """Date, versions, processor. No names, no places."""
    text = _read("/proc/cpuinfo")
    model = re.search(r"^model name\s*: (.*)$", text, re.MULTILINE)
    flags = set(next(iter(re.findall(r"^flags\s*: (.*)$", text, re.MULTILINE)), "").split())
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "python": platform.python_version(),
        "geoscope": geoscope.__version__,
        "code": _code(),
        **{name: importlib.metadata.version(name) for name in _PACKAGES},
        "system": platform.system(),
        "cpu": model[1].strip() if model else platform.machine(),
        "cores": cores(),
        "flags": {flag: flag in flags for flag in _FLAGS} if flags else {},
        "variables": {
            "found": {
                name: value
                for name, value in sorted(os.environ.items())
                if name.startswith(_STEERING)
            },
            "set by geoscope for itself": geoscope_environment(),
        },
    }


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _code() -> str:
    """The first digits of the sha256 of geoscope's source."""
    digest = hashlib.sha256()
    folder = Path(geoscope.__file__).parent
    for path in sorted(folder.rglob("*.py")):
        digest.update(path.relative_to(folder).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def without_paths(text: str) -> str:
    """The text with paths as …"""
    return _PATH.sub("…", text)


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError:
        return ""


@dataclass(frozen=True)
class Run:
    """One child process.

    seconds: wall clock of the process. cpu: seconds of all its threads. memory: largest resident
    set, bytes. others: cores that were busy with other work meanwhile (None where unknown).
    answer: its last line of standard output when that is a JSON object. failure: why it failed.
    """

    seconds: float
    cpu: float
    memory: int
    others: float | None
    answer: dict[str, Any] | None = None
    failure: str | None = None


def child(
    command: list[str], *, ours: bool, folder: Path | None = None, limit: float = 3600.0
) -> Run:
    """Runs a command to its end; killed after `limit` seconds. ours: geoscope's environment."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        busy, started = _busy(), time.perf_counter()
        process = subprocess.Popen(
            command, stdout=out, stderr=err, cwd=folder, env=_environment(ours=ours)
        )
        timer = threading.Timer(limit, process.kill)
        timer.start()
        _, status, usage = os.wait4(process.pid, 0)
        timer.cancel()
        process.returncode = os.waitstatus_to_exitcode(status)
        seconds, cpu = time.perf_counter() - started, usage.ru_utime + usage.ru_stime
        after = _busy()
        others = None if busy is None or after is None else max(after - busy - cpu, 0.0) / seconds
        unit = 1 if sys.platform == "darwin" else 1024
        failure = None
        if process.returncode:
            failure = _failure(_text(err), process.returncode, killed=seconds >= limit)
        return Run(seconds, cpu, usage.ru_maxrss * unit, others, _answer(_text(out)), failure)


def _text(file: Any) -> str:
    file.seek(0)
    return file.read().decode(errors="replace")


def _answer(text: str) -> dict[str, Any] | None:
    lines = text.strip().splitlines()
    try:
        found = json.loads(lines[-1]) if lines else None
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def _failure(text: str, code: int, *, killed: bool) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    reason = "took too long" if killed else without_paths(lines[-1] if lines else "")
    return f"exit code {code}: {reason}"


def _busy() -> float | None:
    """CPU seconds that all cores have worked since the machine started; Linux only."""
    first = _read("/proc/stat").split("\n", 1)[0].split()
    if not first:
        return None
    user, nice, system, _idle, _wait, irq, soft, steal = map(int, first[1:9])
    return (user + nice + system + irq + soft + steal) / os.sysconf("SC_CLK_TCK")
