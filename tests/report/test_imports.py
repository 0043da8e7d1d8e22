"""Importing the report package is light: no torch, and drawing libraries only when used."""

from __future__ import annotations

import subprocess
import sys

import pytest

LOADED = "import sys; print(*sorted({name.split('.')[0] for name in sys.modules}))"
DRAWN = """
import pathlib, sys, tempfile
from geoscope.records import Coverage, Provenance, Report, Summary
from geoscope.report import render_text, write
provenance = Provenance("0", (), (), "cpu", "float64", 0, {}, 0.0)
report = Report("compare", provenance, Coverage(()), (), Summary({}, {}, {}, {}))
render_text(report, width=80, colour=True)
with tempfile.TemporaryDirectory() as folder:
    for suffix in (".png", ".svg", ".pdf", ".md", ".csv", ".json"):
        write(report, pathlib.Path(folder) / f"report{suffix}")
print(*sys.modules)
"""


def modules_after(code: str) -> set[str]:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


@pytest.mark.parametrize("name", ["torch", "matplotlib", "rich", "numpy"])
def test_import_is_light(name: str) -> None:
    assert name not in modules_after(f"import geoscope.report; {LOADED}")


def test_rendering_needs_no_torch_and_no_pyplot() -> None:
    loaded = modules_after(DRAWN)
    assert {"rich", "matplotlib"} <= loaded
    assert not {"torch", "matplotlib.pyplot", "geoscope.metrics", "geoscope.sources"} & loaded
