"""Processes of this machine give what the function gives, whatever happens to one of them."""

from __future__ import annotations

import os
import time
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from geoscope.engine.cluster import Need, Task
from geoscope.engine.processes import Processes, can_start
from geoscope.errors import GeoscopeError, OptionError
from tests.helpers import tasks

NEED = Need(1, 10**8)

pytestmark = pytest.mark.skipif(not can_start(), reason="Python cannot be started again")


def task(argument: Any) -> Task:
    return Task(partial(int, argument), NEED)


def found(function: Any, job: Any, count: int = 3, processes: int = 2) -> dict[int, Any]:
    return dict(Processes(processes).results(function, job, [task(i) for i in range(count)]))


def test_results_come_by_their_numbers_whatever_is_printed() -> None:
    assert found(tasks.prints, "job") == {i: ("job", i) for i in range(3)}


@pytest.mark.slow
def test_an_error_is_raised_as_it_was() -> None:
    with pytest.raises(OptionError, match="`rank` 0: no"):
        found(tasks.refuses, "rank", count=1)


@pytest.mark.slow
def test_a_process_that_dies_is_replaced(tmp_path: Path) -> None:
    assert found(tasks.dies_once, str(tmp_path)) == {i: i for i in range(3)}


@pytest.mark.slow
def test_one_that_dies_again_is_an_error_that_says_how() -> None:
    with pytest.raises(GeoscopeError, match=r"was ended by SIGKILL twice on the same ones"):
        found(tasks.dies, "", count=1)


@pytest.mark.slow
def test_what_is_left_stops_when_its_results_are_no_longer_read(tmp_path: Path) -> None:
    pool = Processes(2).results(tasks.pid_and_wait, str(tmp_path), [task(i) for i in range(2)])
    with closing(pool) as results:
        assert next(results) == (1, 1)
    pid, end = int((tmp_path / "pid").read_text()), time.monotonic() + 30
    while time.monotonic() < end:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.01)
    pytest.fail("the process still runs")
