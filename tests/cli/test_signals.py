"""Ctrl-C and SIGTERM: a partial report, the right exit code, and never half a file."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from tests.helpers.matrices import gaussian, save_model
from tests.helpers.running import by_rows

MATRICES = 60


@pytest.fixture(scope="module")
def long_pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Enough matrices that a signal after the first ones comes long before the last."""
    root = tmp_path_factory.mktemp("long")
    base = gaussian(384, 384, seed=1).float()
    noise = 0.01 * gaussian(384, 384, seed=2).float()
    names = [f"model.layers.{i}.mlp.up_proj.weight" for i in range(MATRICES)]
    scales = torch.linspace(1, 2, MATRICES)
    pairs = {name: (base * s, base * s + noise) for name, s in zip(names, scales, strict=True)}
    return (
        save_model(root / "base", {name: pair[0] for name, pair in pairs.items()}),
        save_model(root / "tuned", {name: pair[1] for name, pair in pairs.items()}),
    )


@pytest.fixture
def started() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts processes; whatever still runs at the end is killed."""
    running: list[subprocess.Popen[str]] = []

    def start(*command: str | Path) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, *map(str, command)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            encoding="utf-8",
            env={**os.environ},
        )
        running.append(process)
        return process

    yield start
    for process in running:
        if process.poll() is None:
            process.kill()
        process.communicate()


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    """Until the condition holds; the process must not end before, nor take a minute."""
    deadline = time.monotonic() + 60
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)


def kept_results() -> int:
    """Finished matrices: each is put into the cache, which conftest.py gives to every test."""
    return len(list(Path(os.environ["GEOSCOPE_CACHE"]).rglob("*.json")))


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGINT, 130), pytest.param(signal.SIGTERM, 143, marks=pytest.mark.slow)],
)
def test_a_signal_gives_the_finished_part_and_its_exit_code(
    number: signal.Signals,
    code: int,
    long_pair: tuple[Path, Path],
    started: Callable[..., subprocess.Popen[str]],
    tmp_path: Path,
) -> None:
    out = tmp_path / "report.json"
    arguments = ["collapse", *long_pair, "--json", "-o", out, "-j", "1"]
    process = started("-m", "geoscope", *arguments)
    wait_for(lambda: kept_results() >= 2, process)
    process.send_signal(number)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == code
    assert "Traceback" not in stderr
    assert "the report is partial" in stderr

    report = by_rows(json.loads(stdout))
    assert report["coverage"]["status"] == "PARTIAL"
    done = {one["name"] for one in report["layers"]}
    assert 1 <= len(done) < MATRICES
    assert len(done) + len(report["coverage"]["missing"]) == MATRICES
    assert not done & set(report["coverage"]["missing"])
    reasons = {one["reason"] for one in report["coverage"]["skipped"]}
    assert reasons == {"interrupted before it was computed"}
    assert all(one["values"]["relative_update"] > 0 for one in report["layers"])
    assert report["summary"]["verdict"]["code"]
    assert by_rows(json.loads(out.read_text())) == report
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["report.json"]


@pytest.mark.slow
def test_a_rerun_continues_where_it_was_stopped(
    long_pair: tuple[Path, Path], started: Callable[..., subprocess.Popen[str]]
) -> None:
    few = ["collapse", *long_pair, "--json", "-j", "1", "--layers", "0-9"]
    process = started("-m", "geoscope", *few)
    wait_for(lambda: kept_results() >= 2, process)
    process.send_signal(signal.SIGINT)
    stopped, _ = process.communicate(timeout=60)
    finished = len(by_rows(json.loads(stopped))["layers"])
    again = started("-m", "geoscope", *few)
    stdout, stderr = again.communicate(timeout=60)
    assert again.returncode == 0
    assert json.loads(stdout)["coverage"]["status"] == "COMPLETE"
    recalled = int(stderr.split(" of 10 results from the cache")[0].split()[-1])
    assert finished <= recalled <= 10


def test_a_signal_before_anything_is_finished(
    long_pair: tuple[Path, Path], started: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    """During the imports: no report, no traceback, and the same exit code."""
    process = started("-m", "geoscope", "collapse", *long_pair, "-o", tmp_path / "report.json")
    wait_for(lambda: _handles(process.pid, signal.SIGTERM), process)
    process.send_signal(signal.SIGTERM)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 143
    assert "Traceback" not in stderr
    assert "interrupted" in stderr
    assert stdout == ""
    assert not (tmp_path / "report.json").exists()


def _handles(pid: int, number: signal.Signals) -> bool:
    """Whether the process has a handler of its own for the signal."""
    status = Path(f"/proc/{pid}/status")
    if not status.exists():
        pytest.skip("needs /proc to see that the handler stands")
    (caught,) = [line for line in status.read_text().splitlines() if line.startswith("SigCgt")]
    return bool(int(caught.split()[1], 16) >> (number - 1) & 1)


# Runs the rest of `sys.argv` with Ctrl-C ignored, as it is in a script's `command &`.
IGNORING = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.SIG_IGN)
os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
"""


def test_a_command_in_the_background_can_be_interrupted(
    started: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    """A script's `geoscope … &` inherits an ignored SIGINT; `kill -INT` stops it all the same."""
    process = started("-c", IGNORING, "-m", "geoscope", "collapse", tmp_path, tmp_path)
    wait_for(lambda: _handles(process.pid, signal.SIGTERM), process)  # both stand then
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 130


@pytest.mark.slow
def test_the_suite_in_the_background_tests_ctrl_c(
    started: Callable[..., subprocess.Popen[str]],
) -> None:
    """As `nohup python -m pytest &` in a script: a test of Ctrl-C finds it at work."""
    tests = Path(__file__).parents[1]
    test = "engine/test_stream.py::test_ctrl_c_while_waiting_for_a_result_ends_the_pipeline"
    words = ["-m", "pytest", "-n", "0", "-q", "-p", "no:cacheprovider", tests / test]
    process = started("-c", IGNORING, *words)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 0, said


# Stops for good where the file is written but not yet renamed into place.
STUCK = """
import os, sys, time
reached = sys.argv.pop()
def fsync(handle):
    open(reached, "w").close()
    while True:
        time.sleep(0.01)
os.fsync = fsync
from geoscope.__main__ import main
sys.argv[0] = "geoscope"
main()
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
@pytest.mark.parametrize("old", [None, "the old report"])
def test_a_signal_during_the_write_leaves_no_half_file(
    number: signal.Signals,
    old: str | None,
    saved: Path,
    started: Callable[..., subprocess.Popen[str]],
    tmp_path: Path,
) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    out = folder / "report.json"
    if old is not None:
        out.write_text(old)
    reached = tmp_path / "reached"
    process = started("-c", STUCK, "show", saved, "-o", out, "--force", reached)
    wait_for(reached.exists, process)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=60)
    assert "Traceback" not in stderr
    assert (out.read_text() if out.exists() else None) == old
    if number is signal.SIGKILL:  # nobody can tidy up; the rest is hidden and marked
        rest = [path for path in folder.iterdir() if path != out]
        assert all(path.name.startswith(".") and path.suffix == ".geoscope-part" for path in rest)
    else:
        assert process.returncode == 128 + number
        assert [path.name for path in folder.iterdir()] == ([out.name] if old else [])


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report without matrices: `show` renders it without importing torch."""
    from geoscope.records import Coverage, Layers, Provenance, Report, Summary

    provenance = Provenance("0", (), (), "cpu", "float64", 0, {}, 0.0)
    report = Report("anisotropy", provenance, Coverage(()), Layers(), Summary({}, {}, {}, {}))
    path = tmp_path_factory.mktemp("saved") / "report.json"
    path.write_text(report.dumps())
    return path


def test_a_reader_that_goes_away_is_no_error(
    saved: Path, started: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    """As `geoscope show … | head -0`: files are written all the same."""
    out = tmp_path / "again.json"
    process = started("-m", "geoscope", "show", saved, "-o", out, "--quiet")
    assert process.stdout is not None
    process.stdout.close()
    assert process.stderr is not None
    said = process.stderr.read()
    assert (process.wait(timeout=60), said) == (0, "")
    assert out.read_text().strip() == saved.read_text()
