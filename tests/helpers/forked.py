"""Programs that need torch and an environment of their own, without the seconds that imports take.

huggingface_hub reads its environment when it is imported, so a test of the Hub needs a process.
One that has imported what is slow, with torch or without, but not huggingface_hub, forks for each
of them.
"""

from __future__ import annotations

import atexit
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

__all__ = ["GEOSCOPE", "run_forked"]

# What a program finds imported, or what those import.
_LIGHT = ("huggingface_hub.hf_api", "geoscope.sources.hub.ranges", "geoscope.sources.open")
_HEAVY = (*_LIGHT, "rich.table", "scipy.linalg", "scipy.special", "torch", "typer")

GEOSCOPE = "from geoscope.__main__ import main; main()"
SECONDS = 120  # then a program is killed


SERVER = """
import gc, importlib, json, os, signal, sys, traceback

for name in sys.argv[1:]:
    importlib.import_module(name)

def drop(package):  # what it imports stays; it itself is imported anew
    for name in list(sys.modules):
        if name.partition(".")[0] == package:
            del sys.modules[name]

drop("huggingface_hub")
gc.collect()
gc.freeze()
STREAMS = (sys.stdout, sys.stderr)  # kept: what is closed is not closed again

def take(asked, number, name, path):
    if path is None:  # as after `>&-`
        os.close(number)
        setattr(sys, name, None)
        setattr(sys, f"__{name}__", None)
    else:
        os.dup2(os.open(path, os.O_WRONLY), number)
        encoding = asked["env"].get("PYTHONIOENCODING", "utf-8")
        getattr(sys, name).reconfigure(encoding=encoding)

def child(asked):
    signal.alarm(asked["seconds"])
    code = 0
    if not asked["geoscope"]:
        drop("geoscope")
    take(asked, 1, "stdout", asked["out"])
    take(asked, 2, "stderr", asked["err"])
    try:
        os.environ.clear()
        os.environ.update(asked["env"])
        os.chdir(asked["cwd"])
        sys.argv = asked["argv"]
        exec(compile(asked["program"], "<program>", "exec"), {"__name__": "__main__"})
    except SystemExit as end:
        code = end.code or 0
        if isinstance(code, str):
            print(code, file=sys.stderr)
            code = 1
    except BaseException:
        traceback.print_exc()
        code = 1
    if asked["ends"]:  # as an interpreter ends: it flushes what is left, and tells if it cannot
        sys.exit(code)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)

for line in iter(sys.stdin.readline, ""):
    pid = os.fork()
    if pid == 0:
        child(json.loads(line))
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


@cache
def _server(modules: Sequence[str]) -> subprocess.Popen[str]:
    server = subprocess.Popen(
        [sys.executable, "-c", SERVER, *modules],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    atexit.register(server.communicate)  # closes its input, which ends it
    return server


def run_forked(
    program: str,
    argv: Sequence[str],
    *,
    env: Mapping[str, str],
    cwd: Path,
    streams: Mapping[str, str | None] | None = None,
    torch: bool = True,
    geoscope: bool = False,
) -> subprocess.CompletedProcess[str]:
    """The program, as a text, with this `sys.argv` and this environment alone.

    streams: where `out` or `err` goes in place of the result: a path, or None for a closed stream.
    The program then ends as an interpreter does.
    torch, geoscope: whether it finds them imported.
    """
    server = _server(_HEAVY if torch else _LIGHT)
    assert server.stdin is not None and server.stdout is not None
    encoding = env.get("PYTHONIOENCODING", "utf-8")
    with (
        tempfile.NamedTemporaryFile("r", encoding=encoding) as out,
        tempfile.NamedTemporaryFile("r", encoding=encoding) as err,
    ):
        asked = {"program": program, "argv": list(argv), "env": dict(env), "cwd": str(cwd),
                 "out": out.name, "err": err.name, "seconds": SECONDS, "geoscope": geoscope,
                 "ends": streams is not None, **(streams or {})}  # fmt: skip
        print(json.dumps(asked), file=server.stdin, flush=True)
        code = int(server.stdout.readline())
        return subprocess.CompletedProcess(list(argv), code, out.read(), err.read())
