"""Every input of the corpus ends in its line: the one that stands in expected.tsv.

GEOSCOPE_WRITE_GOLDEN=1 writes the lines again; read them as a user would.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from geoscope.verbs.pairs import prepare
from tests.bad.corpus import COMMANDS, Case, cases, line_of, restored
from tests.bad.doors import DOORS, faults, limit
from tests.helpers.forked import run_forked
from tests.helpers.running import Done, run

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
TABLE = Path(__file__).with_name("expected.tsv")
WRITES = bool(os.environ.get("GEOSCOPE_WRITE_GOLDEN"))
# Runs the console script's `main` in each folder with its words, in a fork for each.
SCRIPTS = """
import json, os, sys, tempfile
import geoscope.report.text, geoscope.verbs.adapters.verify, geoscope.verbs.pairs.prepare
import geoscope.verbs.pairs.compare, geoscope.verbs.series.follow, pydantic.type_adapter
from geoscope.__main__ import main
from geoscope.cli import command_line
command_line()

def child(folder, words, streams):
    os.chdir(folder)
    sys.argv = words
    for number, stream in enumerate(streams, 1):
        os.dup2(stream.fileno(), number)
    try:
        main()
        code = 0
    except SystemExit as end:
        code = end.code
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)

told = []
for folder, words in json.loads(sys.argv[1]):
    streams = tempfile.TemporaryFile("w+"), tempfile.TemporaryFile("w+")
    pid = os.fork()
    if pid == 0:
        child(folder, words, streams)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    for stream in streams:
        stream.seek(0)
    told.append([folder, code, *(stream.read() for stream in streams)])
print(json.dumps(told))
"""
Told = dict[str, tuple[str, str]]  # name → exit code, line


def expected(door: str) -> Told:
    rows = (row.split("\t") for row in TABLE.read_text("utf-8").splitlines())
    return {name: (code, line) for of, name, code, line in rows if of == door}


def write(door: str, told: Told) -> None:
    others = {of: expected(of) for of in DOORS if of != door} if TABLE.exists() else {}
    rows = {of: (others | {door: told}).get(of, {}) for of in DOORS}
    lines = ("\t".join((of, name, *row)) for of in DOORS for name, row in rows[of].items())
    TABLE.write_text("\n".join(lines) + "\n", "utf-8")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the inputs, in which commands run; without the measurement of the machine."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(prepare, "slowness", lambda _workers: 1.0)
    return tmp_path


def outcomes(
    chosen: dict[str, Case], target: Path, command: Callable[..., Done]
) -> Iterator[tuple[str, Done]]:
    valid = target.read_bytes()
    for name, case in chosen.items():
        words, *last = case.command.split("\0")
        case.edit(target)
        with limit():
            done = command(*words.split(), *last)
        restored(target, valid)
        yield name, done


@pytest.mark.each_case
@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize(
    "part", [pytest.param(slice(None), id="all", marks=pytest.mark.slow), slice(None, None, 4)]
)
def test_each_input_ends_in_its_line(door: str, part: slice, here: Path) -> None:
    target = DOORS[door].make(Path())
    every = cases(door, target)
    chosen = {name: every[name] for name in [*every][part]}
    done = dict(outcomes(chosen, target, run))
    assert {name: list(faults(end)) for name, end in done.items() if list(faults(end))} == {}
    told = {name: (str(end.code), line_of(end, here)) for name, end in done.items()}
    if WRITES and len(told) == len(every):
        write(door, told)
    known = expected(door)
    assert told == {name: known.get(name) for name in told}
    assert known.keys() == every.keys()


def test_the_console_script_says_the_same(here: Path) -> None:
    """Two inputs of each door that end a command, each in a process, forked from one."""
    runs: list[tuple[str, list[str]]] = []
    known: dict[str, tuple[str, str]] = {}
    for door in DOORS:
        told = expected(door)
        ended = sorted(name for name, (code, _) in told.items() if code == "1")
        for name in random.Random(door).sample(ended, 2):
            folder = here / str(len(runs))
            folder.mkdir()
            os.chdir(folder)  # `here` leads back
            target = DOORS[door].make(Path())
            case = cases(door, target)[name]
            case.edit(target)
            words, *last = case.command.split("\0")
            runs.append((str(folder), ["geoscope", *words.split(), *last]))
            known[str(folder)] = told[name]
    done = run_forked(SCRIPTS, ["-", json.dumps(runs)], env=dict(os.environ), cwd=here)
    assert done.returncode == 0, done.stderr
    for row in json.loads(done.stdout):
        end = Done(*row[1:])
        assert list(faults(end)) == []
        assert (str(end.code), line_of(end, Path(row[0]))) == known[row[0]], row


def test_the_corpus_is_large_and_tells_every_input_apart() -> None:
    rows = TABLE.read_text("utf-8").splitlines()
    assert len(rows) >= 400
    assert {row.partition("\t")[0] for row in rows} == set(DOORS) == set(COMMANDS)
