"""Standard output that cannot be written, is closed, or whose reader went away: every command."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.forked import GEOSCOPE, run_forked
from tests.helpers.running import write_pair

FULL = Path("/dev/full")
needs_full = pytest.mark.skipif(not FULL.exists(), reason="needs /dev/full")
LIGHT = [("--help",), ("--version",), ("metrics", "--json")]
HEAVY = [
    ("collapse", "base", "tuned", "--json"),
    ("init-adapter", "base", "-r", "2", "-o", "out", "--force"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    write_pair(root)
    return root


def forked(folder: Path, command: tuple[str, ...], **streams: str | None) -> tuple[int, str, str]:
    """The command with `out` or `err` elsewhere, or closed; see `run_forked`."""
    argv, environment = ["geoscope", *command], {**os.environ}
    done = run_forked(GEOSCOPE, argv, env=environment, cwd=folder, streams=streams)
    return done.returncode, done.stdout, done.stderr


def shell(folder: Path, command: tuple[str, ...], redirection: str) -> tuple[int, str, str]:
    words = " ".join(command)
    done = subprocess.run(
        ["bash", "-c", f"{sys.executable} -m geoscope {words} {redirection}"],
        cwd=folder,
        capture_output=True,
        encoding="utf-8",
        env={**os.environ},
        check=False,
    )
    return done.returncode, done.stdout, done.stderr


@needs_full
@pytest.mark.parametrize("command", [*LIGHT, *HEAVY], ids=" ".join)
def test_a_full_disk_behind_standard_output_is_one_line(
    folder: Path, command: tuple[str, ...]
) -> None:
    code, _, said = forked(folder, command, out=str(FULL))
    assert code == 1
    assert said.splitlines()[-1] == (
        "geoscope: standard output cannot be written: No space left on device; make room, or send "
        "it elsewhere"
    )
    assert "Traceback" not in said and "Exception ignored" not in said


def test_closed_standard_output_is_told_before_the_work(folder: Path) -> None:
    command = ("collapse", "base", "tuned", "-o", "never.json")
    code, _, said = forked(folder, command, out=None)
    assert (code, said) == (
        1,
        "geoscope: standard output is closed; open it, or send it to /dev/null and give -o FILE\n",
    )
    assert not (folder / "never.json").exists()


@pytest.mark.parametrize("command", LIGHT, ids=" ".join)
def test_a_reader_that_ends_is_quiet(folder: Path, command: tuple[str, ...]) -> None:
    code, _, said = shell(folder, command, "| true; exit ${PIPESTATUS[0]}")
    assert (code, said) == (0, "")


@needs_full
def test_files_are_written_though_standard_output_is_full(folder: Path) -> None:
    command = ("collapse", "base", "tuned", "-o", "kept.json", "--force", "-q")
    code, _, said = forked(folder, command, out=str(FULL))
    assert code == 1 and said.startswith("geoscope: standard output cannot be written")
    assert '"geoscope.report/2"' in (folder / "kept.json").read_text()


@pytest.mark.parametrize("err", [None, pytest.param(str(FULL), marks=needs_full)])
def test_talk_that_nobody_takes_costs_no_data(folder: Path, err: str | None) -> None:
    code, out, _ = forked(folder, HEAVY[0], err=err)
    assert code == 0 and '"geoscope.report/2"' in out


@needs_full
@pytest.mark.parametrize("redirection", [">&-", "2>&-", f"> {FULL}", f"2> {FULL}"])
def test_a_fork_ends_as_a_process_of_the_shell(folder: Path, redirection: str) -> None:
    """The streams of the tests above are those that a shell gives."""
    name, _, path = redirection.replace("2>", "err ").replace(">", "out ").partition(" ")
    streams = {name: None if path == "&-" else path.strip()}
    assert forked(folder, LIGHT[1], **streams) == shell(folder, LIGHT[1], redirection)
