"""The same work in processes of this machine: a function, a job, and a call for each task.

Threads share Python's lock, and a small matrix is more calls than arithmetic: there two threads do
little more than one. Paths travel, never tensors. What a process computes is sent back whole; one
that dies costs its task, which is tried again once.
"""

from __future__ import annotations

import importlib
import os
import pickle
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, TypeVar

from geoscope.engine.cluster import Task, called, raised
from geoscope.errors import GeoscopeError

__all__ = ["Processes", "can_start", "processes", "serve"]

T = TypeVar("T")

# How often a task is tried whose process dies.
_TRIES = 2
# Bytes of the number that says how long a message is.
_LENGTH = 8
# The package as it is here, wherever the script that imported it lies.
_ROOT = Path(__file__).resolve().parents[2]
_PROGRAM = (
    f"import sys; sys.path.insert(0, {str(_ROOT)!r}); "
    "from geoscope.engine.processes import serve; serve()"
)


def can_start() -> bool:
    """Whether this Python can be started again."""
    return bool(sys.executable) and os.name == "posix"


class Processes:
    """So many processes of this machine, one core each."""

    def __init__(self, count: int) -> None:
        self._count = count

    def cores(self, *, gpus: int = 0) -> int:
        return 1

    def results(
        self, function: Callable[[Any, Any], T], job: Any, tasks: Sequence[Task]
    ) -> Generator[tuple[int, T], None, None]:
        """Number and result of every task, as they finish; what is left when it is closed is
        stopped.

        function: of a module of geoscope's. Raises what a task raised.
        """
        head = pickle.dumps(((function.__module__, function.__qualname__), pickle.dumps(job)))
        waiting: queue.SimpleQueue[int] = queue.SimpleQueue()
        done: queue.SimpleQueue[tuple[int, Any]] = queue.SimpleQueue()
        for number in range(len(tasks)):
            waiting.put(number)
        places = [_Place(head, tasks, waiting, done) for _ in range(min(self._count, len(tasks)))]
        try:
            for _ in tasks:
                number, answer = done.get()
                if isinstance(answer, BaseException):
                    raise answer
                yield number, answer
        finally:
            for place in places:
                place.stop()


@contextmanager
def processes(count: int) -> Iterator[Processes]:
    """So many processes, for as long as their results are read."""
    yield Processes(count)


class _Place:
    """One process after the other, mostly one: takes tasks until none is left."""

    def __init__(
        self,
        head: bytes,
        tasks: Sequence[Task],
        waiting: queue.SimpleQueue[int],
        done: queue.SimpleQueue[tuple[int, Any]],
    ) -> None:
        self._head, self._tasks, self._waiting, self._done = head, tasks, waiting, done
        self._stopped, self._lock = False, threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            while not self._stopped:
                try:
                    number = self._waiting.get_nowait()
                except queue.Empty:
                    break
                self._done.put((number, self._answer(self._tasks[number])))
        except BaseException as error:  # whoever waits for this place hears of it
            self._done.put((-1, error))
        finally:
            self.stop()

    def _answer(self, task: Task) -> Any:
        argument, code = pickle.dumps(task.argument()), 0
        for _ in range(_TRIES):
            try:
                process = self._running()
                if process is None:
                    return GeoscopeError("stopped")
                assert process.stdin is not None and process.stdout is not None
                _send(process.stdin, argument)
                return _told(pickle.loads(_receive(process.stdout)))
            except (OSError, EOFError):
                code = self._ended()
        return GeoscopeError(
            f"a process that measured matrices {_how(code)} twice on the same ones; what was "
            "computed is kept: give the command again with a smaller `jobs` or `max_memory`"
        )

    def _running(self) -> subprocess.Popen[bytes] | None:
        with self._lock:
            if self._stopped:
                return None
            if self._process is None:
                command = [sys.executable, "-c", _PROGRAM]
                self._process = subprocess.Popen(
                    command, stdin=subprocess.PIPE, stdout=subprocess.PIPE
                )
                assert self._process.stdin is not None
                _send(self._process.stdin, self._head)
            return self._process

    def _ended(self) -> int:
        """Exit code of a process that no longer answers."""
        with self._lock:
            process, self._process = self._process, None
        return 0 if process is None else _closed(process)

    def stop(self) -> None:
        with self._lock:
            self._stopped = True
            process, self._process = self._process, None
        if process is not None:
            _closed(process)


def _closed(process: subprocess.Popen[bytes]) -> int:
    """Its exit code, once it is gone and nobody can wait for it any more."""
    process.terminate()
    code = process.wait()
    for stream in (process.stdin, process.stdout):
        with suppress(OSError):  # what could not be sent
            assert stream is not None
            stream.close()
    return code


def _how(code: int) -> str:
    if code >= 0:
        return f"ended with exit code {code}"
    with suppress(ValueError):
        return f"was ended by {signal.Signals(-code).name}"
    return f"was ended by signal {-code}"


def _told(answer: dict[str, Any]) -> Any:
    """The result. Raises what was raised there."""
    if "error" not in answer:
        return answer["result"]
    raise raised(answer)(answer["text"])


def _send(stream: IO[bytes], message: bytes) -> None:
    stream.write(len(message).to_bytes(_LENGTH, "big") + message)
    stream.flush()


def _receive(stream: IO[bytes]) -> bytes:
    """Raises EOFError where the other side is gone."""
    length = int.from_bytes(_whole(stream, _LENGTH), "big")
    return _whole(stream, length)


def _whole(stream: IO[bytes], length: int) -> bytes:
    found = stream.read(length)
    if len(found) < length:
        raise EOFError
    return found


# --- in a process -------------------------------------------------------------------------------


def serve() -> None:
    """Takes a function and a job, then arguments, until the other side is gone."""
    # A Ctrl-C goes to the whole group; the process that was started says when to stop.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    importlib.import_module("geoscope.__main__").steer_process()
    questions, answers = os.fdopen(0, "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints is no answer
    with suppress(EOFError, OSError):
        (module, name), job = pickle.loads(_receive(questions))
        function = getattr(importlib.import_module(module), name)
        known = pickle.loads(job)
        while True:
            answer = called(function, known, pickle.loads(_receive(questions)))
            _send(answers, pickle.dumps(answer))
