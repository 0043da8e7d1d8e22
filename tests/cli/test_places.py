"""Where a command runs: a working folder that is gone, no home folder, names that are too long."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from geoscope.errors import OptionError
from geoscope.folders import cache_folder
from tests.helpers.running import run


def test_a_working_folder_that_is_gone_is_told(tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    words = f"rmdir {gone} && exec {sys.executable} -m geoscope metrics"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(
        ["bash", "-c", words],
        cwd=gone,
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    said = "geoscope: the working folder is gone; change to one that is there\n"
    assert (done.returncode, done.stderr) == (2, said)


@pytest.mark.parametrize("home", ["~", "relative"])
def test_without_a_home_folder_a_place_for_results_is_asked_for(
    home: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("GEOSCOPE_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", home)
    with pytest.raises(OptionError, match=r"no home folder is known .* set GEOSCOPE_CACHE"):
        cache_folder()
    monkeypatch.setenv("GEOSCOPE_CACHE", str(tmp_path))
    assert cache_folder() == tmp_path


@pytest.mark.parametrize("words", [("show", "{}"), ("inspect", "{}"), ("show", "x", "-o", "{}.md")])
def test_a_name_of_three_hundred_letters_is_one_line(words: tuple[str, ...]) -> None:
    done = run(*(word.format("x" * 300) for word in words))
    assert done.code in (1, 2)
    (line,) = done.err.splitlines()
    assert line.startswith("geoscope: ") and "fault of geoscope" not in line and len(line) < 2000
