"""Shared by all tests: one thread for BLAS and torch, no colour, a cache of their own."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import pytest
from filelock import FileLock

from tests.helpers.sampled import sample_once

# Before numpy and torch are imported: threads spin while they wait for each other. Beside a busy
# process two of them make the oracle's dense SVDs ten times slower, and to train tiny models they
# take three times the CPU seconds of one. Tests of workers ask for as many as they need.
for variable in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS"):
    os.environ.setdefault(variable, "1")


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """Modules and tests live to the end: the collector of garbage need not look at them again."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


# Of a test with more cases these are run each time, spread over all; the others count as slow. A
# test that is marked `each_case` is run on every one.
_CASES_EACH_TIME = 3


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    cases: dict[str, list[pytest.Item]] = {}
    for item in items:
        if item.get_closest_marker("slow") is None and item.get_closest_marker("each_case") is None:
            cases.setdefault(item.nodeid.partition("[")[0], []).append(item)
    for members in cases.values():
        last, steps = len(members) - 1, _CASES_EACH_TIME - 1
        if last > steps:
            kept = {round(i * last / steps) for i in range(_CASES_EACH_TIME)}
            for i, item in enumerate(members):
                if i not in kept:
                    item.add_marker(pytest.mark.slow)


@pytest.fixture(autouse=True)
def _own_environment(
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """The cache lies in the test's own folder, or in none that exists until it is written to."""
    if "tmp_path" in request.fixturenames:
        folder: Path = request.getfixturevalue("tmp_path")
    else:
        folder = tmp_path_factory.getbasetemp() / f"own-{uuid4().hex}"
    monkeypatch.setenv("GEOSCOPE_CACHE", str(folder / "geoscope-cache"))
    if request.node.get_closest_marker("gpu") is None:  # texts and bits are those of the CPU
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
        monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.delenv("FORCE_COLOR", raising=False)


def _common(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that all workers share."""
    folder = tmp_path_factory.getbasetemp()
    return folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder


@pytest.fixture(scope="session")
def sampled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where workers leave for one another what they sampled."""
    folder = _common(tmp_path_factory) / "sampled"
    folder.mkdir(exist_ok=True)
    return folder


# Where commands run on models that come again; see tests/helpers/sampled.py.
_OF_COMMANDS = (
    "cli", "integrations", "report", "sources", "verbs", "test_docs.py", "test_python_api.py",
)  # fmt: skip


@pytest.fixture(autouse=True)
def _sampled_once(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, sampled: Path
) -> None:
    """Numbers that nulls sample are sampled once in tests of commands."""
    if request.path.relative_to(Path(__file__).parent).parts[0] in _OF_COMMANDS:
        sample_once(monkeypatch, sampled)


# What the starting process may have had ignored, as a script's `command &` has SIGINT.
_OFTEN_IGNORED = {
    signal.SIGINT: signal.default_int_handler,
    signal.SIGTERM: signal.SIG_DFL,
    signal.SIGALRM: signal.SIG_DFL,
}


@pytest.fixture(autouse=True)
def _own_signals() -> Iterator[None]:
    """Signals reach a test and its children, whatever the process that started pytest ignores."""
    ignored = [one for one in _OFTEN_IGNORED if signal.getsignal(one) == signal.SIG_IGN]
    for number in ignored:
        signal.signal(number, _OFTEN_IGNORED[number])
    yield
    for number in ignored:
        signal.signal(number, signal.SIG_IGN)


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards as trainers write them, made once by four processes; not to be written to."""
    writer = Path(__file__).with_name("helpers") / "write_shards.py"
    parent = _common(tmp_path_factory)
    folder = parent / "shards"
    with FileLock(parent / "shards.lock"):
        if not folder.exists():
            unfinished = tmp_path_factory.mktemp("shards")
            done = subprocess.run(
                [sys.executable, str(writer), str(unfinished)],
                capture_output=True, text=True, check=False,
            )  # fmt: skip
            assert done.returncode == 0, done.stderr
            unfinished.rename(folder)
    return folder
