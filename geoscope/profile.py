"""Where does the time go? Stages of work, counted per thread and exclusive of one another.

`with stage("gram"):` costs two clock readings, and nothing where no profile is taken. A profile is
carried by the context, so that library users see none of it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

__all__ = ["Profile", "profiling", "stage"]


class Profile:
    """Seconds by stage, over all threads. A stage inside another one pauses it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._seconds: dict[str, float] = {}
        self._local = threading.local()

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds of each stage, longest first."""
        with self._lock:
            return dict(sorted(self._seconds.items(), key=lambda item: -item[1]))

    def enter(self, name: str) -> None:
        stack = self._stack()
        now = time.perf_counter()
        if stack:
            self._add(stack[-1][0], now - stack[-1][1])
        stack.append((name, now))

    def leave(self) -> None:
        stack = self._stack()
        now = time.perf_counter()
        name, since = stack.pop()
        self._add(name, now - since)
        if stack:
            stack[-1] = (stack[-1][0], now)

    def _stack(self) -> list[tuple[str, float]]:
        if not hasattr(self._local, "stack"):
            self._local.stack = []
        return self._local.stack

    def _add(self, name: str, seconds: float) -> None:
        with self._lock:
            self._seconds[name] = self._seconds.get(name, 0.0) + seconds


_current: ContextVar[Profile | None] = ContextVar("geoscope_profile", default=None)


@contextmanager
def profiling(profile: Profile) -> Iterator[Profile]:
    """Stages of this context, and of threads that copy it, are counted in `profile`."""
    token = _current.set(profile)
    try:
        yield profile
    finally:
        _current.reset(token)


@contextmanager
def stage(name: str) -> Iterator[None]:
    """Counts the time of the block as `name`."""
    profile = _current.get()
    if profile is None:
        yield
        return
    profile.enter(name)
    try:
        yield
    finally:
        profile.leave()
