"""Shared by all tests: one BLAS thread, no colour, a cache of their own."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

# Before numpy is imported: the oracle's dense SVDs beside a busy process are ten times slower with
# two threads, which spin while they wait.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("GEOSCOPE_CACHE", str(tmp_path / "geoscope-cache"))
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.delenv("FORCE_COLOR", raising=False)
