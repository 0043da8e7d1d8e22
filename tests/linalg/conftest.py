"""One thread for every test here, as in a worker of the engine."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from geoscope.engine import one_blas_thread


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with one_blas_thread():
        yield
