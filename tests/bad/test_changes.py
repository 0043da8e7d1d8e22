"""Changed inputs of every kind, through the commands: a number or one line, and nothing else.

The short run takes a few seeds of each door; `slow` takes some hundred more.
"""

from __future__ import annotations

import random
import zlib
from pathlib import Path

import pytest

from tests.bad.doors import DOORS, ODD, changed_bytes, changed_json, faults, trial
from tests.helpers.running import Done

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def said(name: str, root: Path, seeds: range) -> list[str]:
    root.mkdir()
    target = DOORS[name].make(root)
    first = zlib.crc32(name.encode())
    trials = (trial(DOORS[name], root, target, first + seed) for seed in seeds)
    return [fault for fault in trials if fault is not None]


@pytest.mark.parametrize("name", DOORS)
def test_a_changed_input_is_told_in_one_line(name: str, tmp_path: Path) -> None:
    assert said(name, tmp_path / "in", range(4)) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", DOORS)
def test_many_changed_inputs_are(name: str, tmp_path: Path) -> None:
    assert said(name, tmp_path / "in", range(4, 400)) == []


def test_changes_are_seeded_and_reach_every_odd_value() -> None:
    value = {"a": [1, {"b": "c"}], "d": None}
    made = [changed_json(value, random.Random(seed)) for seed in range(3000)]
    assert made == [changed_json(value, random.Random(seed)) for seed in range(3000)]
    assert len(set(made)) > 500
    text = b"\n".join(made).decode(errors="replace")
    assert [odd for odd in ODD if odd not in text] == []
    lengths = {len(changed_bytes(b"abcdef", random.Random(seed))) for seed in range(50)}
    assert min(lengths) == 0 and 6 in lengths and max(lengths) > 6


def test_the_probe_sees_a_traceback_a_hang_and_raw_letters() -> None:
    for done in (
        Done(1, "", "Traceback (most recent call last):\n"),
        Done(1, "", "geoscope: this is a fault of geoscope: KeyError\n"),
        Done(1, "", "geoscope: \x1b[31m\n"),
        Done(1, "", ""),
        Done(139, "", "geoscope: x\n"),
    ):
        assert list(faults(done))
    assert not list(faults(Done(1, "", "geoscope: no such file\n")))
    assert not list(faults(Done(0, "report", "note: x\n")))
