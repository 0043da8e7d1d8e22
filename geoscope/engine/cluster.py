"""The same work on the machines of a Ray cluster: a function, a job, and a call for each task.

Paths travel, never tensors: a task names what it reads, and reads it where it runs. A node that
dies costs its task, which is tried again elsewhere. Ray is imported when it is used.
"""

from __future__ import annotations

import importlib
import logging
import os
import pickle
import queue
import signal
import socket
import threading
import warnings
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, TypeVar

from geoscope import errors
from geoscope._version import __version__
from geoscope.engine.cache import code_version
from geoscope.errors import GeoscopeError, OptionError

__all__ = ["CORES", "Cluster", "Need", "Task", "called", "cluster", "raised"]

T = TypeVar("T")

# What a task gave, or that it was lost; with its number.
_Answer = tuple[int, dict[str, Any] | BaseException]
# Seconds between two looks at whether to stop.
_LOOK = 0.2
# Seconds that a cluster may take to answer.
_KNOCK = 10.0
# How often a task is started again whose node or process died.
_RETRIES = 10
# Bytes that a worker of Ray takes beside what the process would without Ray, and what its allocator
# keeps from one task to the next: 543 MB were seen where 525 were planned.
_WORKER = 150 * 10**6
# Most cores of a task: beyond, tasks beside each other keep a node busier than one does.
CORES = 4


@dataclass(frozen=True)
class Need:
    """What a task asks of its node.

    memory: bytes that the work is planned with.
    """

    cores: int
    memory: int
    gpus: int = 0

    @property
    def declared(self) -> int:
        """Bytes that Ray is asked for: those of its own worker, too."""
        return self.memory + _WORKER

    @property
    def words(self) -> str:
        gpus = f", {self.gpus} GPU" if self.gpus else ""
        return f"{self.cores} cores and {self.declared / 1e9:.2g} GB{gpus}"


@dataclass(frozen=True)
class Task:
    """One call of the function on a node.

    argument: makes its second argument, when it is sent; the job is the first.
    """

    argument: Callable[[], Any]
    need: Need


@dataclass(frozen=True)
class _Node:
    cores: int
    memory: int
    gpus: int

    def holds(self, need: Need) -> bool:
        return self.cores >= need.cores and self.memory >= need.declared and self.gpus >= need.gpus


class Cluster:
    """A Ray cluster that is connected to."""

    def __init__(self, ray: Any, address: str) -> None:
        self._ray, self._address = ray, address

    def cores(self, *, gpus: int = 0) -> int:
        """Cores of a task such that every node that computes can take one."""
        cores = [node.cores for node in self._nodes() if node.cores and node.gpus >= gpus]
        return min([*cores, CORES]) if cores else 1

    def results(
        self, function: Callable[[Any, Any], T], job: Any, tasks: Sequence[Task]
    ) -> Generator[tuple[int, T], None, None]:
        """Number and result of every task, as they finish; what is left when it is closed is
        cancelled.

        function: of a module of geoscope's. Raises what a task raised, with the node's name, and
        OptionError for a task that no node can take.
        """
        for task in tasks:
            self._check(task.need)
        where = (function.__module__, function.__qualname__)
        done: queue.SimpleQueue[_Answer] = queue.SimpleQueue()
        stop = threading.Event()
        # A signal that is raised inside of Ray's calls is lost there; here it is raised in `get`.
        thread = threading.Thread(
            target=self._run, args=(where, pickle.dumps(job), tasks, done, stop), daemon=True
        )
        thread.start()
        try:
            for _ in tasks:
                number, answer = done.get()
                yield number, _received(answer)
        finally:
            stop.set()
            thread.join()

    def _run(
        self,
        where: tuple[str, str],
        job: bytes,
        tasks: Sequence[Task],
        done: queue.SimpleQueue[_Answer],
        stop: threading.Event,
    ) -> None:
        """Starts all tasks and puts what they give; cancels what is left when it has to stop."""
        ray = self._ray
        remote = ray.remote(max_retries=_RETRIES)(_visit())
        shared, mine = ray.put(job), (__version__, code_version())
        waiting = {
            remote.options(
                num_cpus=task.need.cores, num_gpus=task.need.gpus, memory=task.need.declared
            ).remote(where, mine, shared, pickle.dumps(task.argument())): number
            for number, task in enumerate(tasks)
        }
        while waiting and not stop.is_set():
            ready, _ = ray.wait(list(waiting), num_returns=1, timeout=_LOOK)
            for reference in ready:
                done.put((waiting.pop(reference), self._answer(reference)))
        for reference in waiting:
            with suppress(Exception):  # it may have ended, or its node may be gone
                ray.cancel(reference, force=True)

    def _answer(self, reference: Any) -> dict[str, Any] | BaseException:
        try:
            return self._ray.get(reference)
        except self._ray.exceptions.RayError as error:
            reason = str(error).strip().splitlines()[-1:] or [type(error).__name__]
            return GeoscopeError(
                f"a task of the Ray cluster was lost {_RETRIES + 1} times, or failed: {reason[0]}; "
                "what was computed is kept, give the command again"
            )

    def _check(self, need: Need) -> None:
        nodes = self._nodes()
        if any(node.holds(need) for node in nodes):
            return
        largest = ", ".join(
            f"{node.cores} cores and {node.memory / 1e9:.2g} GB"
            + (f", {node.gpus} GPU" if node.gpus else "")
            for node in sorted(nodes, key=lambda node: -node.memory)[:1]
        )
        raise OptionError(
            f"`ray` {self._address!r}: a task needs {need.words}, and no node has them (the "
            f"largest: {largest or 'none'}); give `max_memory` or `jobs`, or a larger node"
        )

    def _nodes(self) -> list[_Node]:
        alive = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
        return [
            _Node(int(has.get("CPU", 0)), int(has.get("memory", 0)), int(has.get("GPU", 0)))
            for has in alive
        ]


@contextmanager
def cluster(address: str) -> Iterator[Cluster]:
    """The Ray cluster at an address, `auto` for the one that runs here or $RAY_ADDRESS names, or
    `local` for one that is started on this machine. Raises OptionError."""
    try:
        ray = importlib.import_module("ray")
    except ImportError:
        raise OptionError(
            "`ray`: Ray is not installed; install geoscope[ray], here and on all nodes"
        ) from None
    if ray.is_initialized():  # by the caller, who also ends it
        yield Cluster(ray, address)
        return
    with _output_kept():
        with _handlers_kept():
            _connect(ray, address)
        try:
            yield Cluster(ray, address)
        finally:
            ray.shutdown()


def _connect(ray: Any, address: str) -> None:
    _knock(address)
    own = {"include_dashboard": False} if address == "local" else {}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of changes in Ray to come
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, **own)
    except (ConnectionError, RuntimeError, ValueError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise _no_answer(address, reason) from None


def _knock(address: str) -> None:
    """Raises OptionError where nobody listens: Ray would try for minutes."""
    place = os.environ.get("RAY_ADDRESS", address) if address == "auto" else address
    host, _, port = place.rpartition("://")[-1].rpartition(":")
    if not (host and port.isdecimal()):
        return
    try:
        socket.create_connection((host, int(port)), timeout=_KNOCK).close()
    except (OSError, OverflowError) as error:
        raise _no_answer(place, str(error)) from None


def _no_answer(address: str, reason: str) -> OptionError:
    return OptionError(
        f"`ray` {address!r}: no Ray cluster answers there ({reason}); start one with ray start "
        "--head, or write local"
    )


@contextmanager
def _output_kept() -> Iterator[None]:
    """Standard output without what Ray writes there of nodes that die, whatever it was asked for:
    it is the report's. Ray has no option for that."""
    worker: Any = importlib.import_module("ray._private.worker")
    known = getattr(worker, "print_to_stdstream", None)
    if known is not None:
        worker.print_to_stdstream = lambda *_, **__: None
    try:
        yield
    finally:
        if known is not None:
            worker.print_to_stdstream = known


@contextmanager
def _handlers_kept() -> Iterator[None]:
    """The handlers of signals as they were before: Ray sets its own."""
    is_main = threading.current_thread() is threading.main_thread()
    handlers = {each: signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in handlers.items() if is_main else ():
            signal.signal(number, handler)


# --- on a node --------------------------------------------------------------------------------


def _visit() -> Callable[..., dict[str, Any]]:
    """What Ray runs on a node. It travels by value: geoscope may be another one there, or none."""

    def visit(
        where: tuple[str, str], mine: tuple[str, str], job: bytes, argument: bytes
    ) -> dict[str, Any]:
        import importlib
        import socket

        node = socket.gethostname()
        try:
            there = importlib.import_module("geoscope._version").__version__
        except ImportError:
            return {"node": node, "differs": "no geoscope"}
        if there != mine[0]:
            return {"node": node, "differs": f"geoscope {there}"}
        importlib.import_module("geoscope.__main__").steer_process()
        here = importlib.import_module("geoscope.engine.cluster")
        return {"node": node, **here._attempted(where, mine, job, argument)}

    return visit


def _attempted(
    where: tuple[str, str], mine: tuple[str, str], job: bytes, argument: bytes
) -> dict[str, Any]:
    """What the function gave, or how it failed."""
    if code_version() != mine[1]:
        return {"differs": f"geoscope {mine[0]} with other code, or another torch"}
    function = getattr(importlib.import_module(where[0]), where[1])
    return called(function, pickle.loads(job), pickle.loads(argument))


def called(function: Callable[[Any, Any], Any], job: Any, argument: Any) -> dict[str, Any]:
    """What a function gave, or the error that it raised, as it is sent back."""
    try:
        return {"result": function(job, argument)}
    except GeoscopeError as error:
        return {"error": type(error).__name__, "text": str(error)}


def raised(answer: dict[str, Any]) -> type[GeoscopeError]:
    """The kind of the error in an answer of `called`."""
    return getattr(errors, answer["error"], GeoscopeError)


def _received(answer: dict[str, Any] | BaseException) -> Any:
    """The result of a task. Raises what it raised, with the node's name."""
    if isinstance(answer, BaseException):
        raise answer
    node = answer["node"]
    if "differs" in answer:
        raise OptionError(
            f"`ray`: node {node} has {answer['differs']}, and this is geoscope {__version__}; "
            "install the same on all nodes"
        )
    if "error" in answer:
        kind = raised(answer)
        hint = ""
        if issubclass(kind, errors.CheckpointError):
            hint = "; every node has to see the models under the same path, or give Hub ids"
        raise kind(f"on node {node}: {answer['text']}{hint}")
    return answer["result"]
