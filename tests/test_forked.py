"""Is a forked program as good as a process of its own?"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.helpers.forked import run_forked

PROGRAM = """
import json, os, sys
here = sorted({"huggingface_hub", "geoscope", "torch"} & set(sys.modules))
print(json.dumps([dict(os.environ), os.getcwd(), sys.argv, here]))
os.environ["LEFT"] = "behind"
import huggingface_hub
"""


@pytest.mark.parametrize(("torch", "geoscope"), [(True, False), (False, False), (False, True)])
@pytest.mark.parametrize("mark", ["1", "2"])
def test_it_has_its_environment_alone_and_nothing_of_the_one_before(
    tmp_path: Path, mark: str, torch: bool, geoscope: bool
) -> None:
    for _ in range(2):
        done = run_forked(
            PROGRAM, ["-c", mark], env={"MARK": mark}, cwd=tmp_path, torch=torch, geoscope=geoscope
        )
        assert (done.returncode, done.stderr) == (0, "")
        whole = {"torch": torch, "geoscope": geoscope}
        here = json.dumps(sorted(name for name, is_there in whole.items() if is_there))
        told = f'[{{"MARK": "{mark}"}}, "{tmp_path}", ["-c", "{mark}"], {here}]\n'
        assert done.stdout == told


@pytest.mark.parametrize(
    ("program", "code", "told"),
    [
        ("import sys; sys.exit(3)", 3, ""),
        ("import sys; sys.exit('no')", 1, "no\n"),
        ("1 / 0", 1, "ZeroDivisionError: division by zero\n"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", -9, ""),
    ],
)
def test_how_it_ends_is_told(tmp_path: Path, program: str, code: int, told: str) -> None:
    done = run_forked(program, ["-c"], env={}, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (code, "")
    assert done.stderr.endswith(told) and bool(done.stderr) == bool(told)
