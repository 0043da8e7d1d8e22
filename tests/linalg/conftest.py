"""One thread for every test here, as in a worker of the engine; both routes of small matrices."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from geoscope.engine import one_blas_thread
from geoscope.linalg import operand


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with one_blas_thread():
        yield


@pytest.fixture
def one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small matrices on the CPU go as large ones do."""
    monkeypatch.setattr(operand, "_SMALL_SIDE", 0)


@pytest.fixture(params=["in stacks", "one by one"])
def every_route(request: pytest.FixtureRequest) -> None:
    if request.param == "one by one":
        request.getfixturevalue("one_by_one")
