"""Regular expressions of users and of foreign files, under a limit of time.

`re` tries every way to match: `(a+)+b` on forty letters a takes hours, and nothing in the process
can stop it. So an expression that may take long is matched in a small process beside this one
(pattern_server.py), which is ended when it does. What cannot take long, nearly every expression, is
matched here: few quantifiers, none of them behind a bracket, on a name of ordinary length.
"""

from __future__ import annotations

import atexit
import json
import math
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

from geoscope.errors import GeoscopeError

__all__ = ["PatternError", "check_pattern", "fullmatches", "matches", "searches", "substituted"]

SECONDS = 4.0  # that one expression may take in all
_LETTERS = 20_000  # of an expression
_SHORT = 200  # letters of a name that an expression of the plain kind is tried on here
_QUANTIFIER = re.compile(r"[*+{]")
_QUANTIFIED_GROUP = re.compile(r"\)[*+{]")
_BACKREFERENCE = re.compile(r"\\[1-9]|\(\?P=|\(\?\(")
_MOST_QUANTIFIERS = 3

_What = str | Sequence[str]


class PatternError(GeoscopeError):
    """An expression cannot be used; the text says why, and who catches it where it came from."""


def check_pattern(pattern: str) -> None:
    """Raises PatternError for what is not a regular expression, or one that is too large."""
    if len(pattern) > _LETTERS:
        raise PatternError(f"it has {len(pattern)} letters, {_LETTERS} are allowed")
    try:
        re.compile(pattern)
    except (re.error, OverflowError) as error:
        raise PatternError(str(error)) from None
    except RecursionError:
        raise PatternError("it is nested too deep") from None


def searches(pattern: str, name: str) -> bool:
    """Whether `re.search` finds it. Raises PatternError: no expression, or it takes too long."""
    return bool(_answer(pattern, name, "search"))


def matches(pattern: str, name: str) -> bool:
    """Whether `re.match` does, likewise."""
    return bool(_answer(pattern, name, "match"))


def fullmatches(pattern: str, name: str) -> bool:
    """Whether `re.fullmatch` does, likewise."""
    return bool(_answer(pattern, name, "fullmatch"))


def substituted(pattern: str, replacement: str, name: str) -> str:
    """`re.sub`, likewise."""
    return str(_answer(pattern, name, ("sub", replacement)))


def _answer(pattern: str, name: str, what: _What) -> bool | str:
    plain = _plain(pattern)
    if plain is None or len(name) > _SHORT:
        return _SERVER.answer(pattern, name, what)
    start = time.perf_counter()
    if isinstance(what, str):
        answer = getattr(plain, what)(name) is not None
    else:
        answer = plain.sub(what[1], name)
    _SERVER.charge(pattern, time.perf_counter() - start)
    return answer


@lru_cache(maxsize=4096)
def _plain(pattern: str) -> re.Pattern[str] | None:
    """Compiled, where matching takes a low power of the name's length at the most; else None."""
    check_pattern(pattern)
    is_plain = (
        len(_QUANTIFIER.findall(pattern)) <= _MOST_QUANTIFIERS
        and _QUANTIFIED_GROUP.search(pattern) is None
        and _BACKREFERENCE.search(pattern) is None
    )
    return re.compile(pattern) if is_plain else None


class _Server:
    """The process beside this one: started when it is first needed, ended when it takes too long.

    spent: seconds that each expression took so far.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None
        self._owner = os.getpid()
        self._spent: dict[str, float] = {}
        self._answers = lru_cache(maxsize=65536)(self._asked)
        atexit.register(self.end)

    def answer(self, pattern: str, name: str, what: _What) -> bool | str:
        with self._lock:
            self.charge(pattern, 0.0)
            return self._answers(pattern, name, what)

    def charge(self, pattern: str, seconds: float) -> None:
        """Counts them. Raises PatternError where they are too many in all."""
        spent = self._spent[pattern] = self._spent.get(pattern, 0.0) + seconds
        if spent > SECONDS:
            raise PatternError(f"it takes more than {SECONDS:g} s to match; write it without (…+)+")

    def _asked(self, pattern: str, name: str, what: _What) -> bool | str:
        if self._owner != os.getpid():  # of the process that this one is a fork of
            self._process, self._owner = None, os.getpid()
        process = self._process = self._process or _started()
        assert process.stdin is not None and process.stdout is not None
        timer = threading.Timer(SECONDS, process.kill)
        timer.start()
        try:
            process.stdin.write(json.dumps([pattern, name, what]) + "\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except OSError:  # it was ended
            line = ""
        finally:
            timer.cancel()
        if not line:
            self.end()
        answer, seconds = json.loads(line) if line else (False, math.inf)
        self.charge(pattern, seconds)
        return answer

    def end(self) -> None:
        """Ends the process; the next question starts another."""
        process, self._process = self._process, None
        if process is not None and self._owner == os.getpid():
            process.kill()
            process.communicate()


def _started() -> subprocess.Popen[str]:
    script = Path(__file__).with_name("pattern_server.py")
    return subprocess.Popen(
        [sys.executable, "-I", "-S", str(script)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        encoding="utf-8",
    )


_SERVER = _Server()
