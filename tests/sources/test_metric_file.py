"""Are the curves of a run read from each kind of file, and damaged ones refused in one line?"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from geoscope.errors import CheckpointError, CheckpointNotFound, GeoscopeError, OptionError
from geoscope.sources.metric_file import read_metrics, trainer_state_of
from geoscope.sources.series import open_series
from tests.helpers.files import llama, write_model


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def state(folder: Path, *history: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"global_step": 20, "log_history": list(history)})
    return write(folder / "trainer_state.json", text)


def fails(kind: type[GeoscopeError], path: Path) -> str:
    with pytest.raises(kind) as caught:
        read_metrics(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)
    return str(caught.value)


def test_the_log_of_transformers(tmp_path: Path) -> None:
    path = state(
        tmp_path,
        {"step": 20, "reward": 0.5, "loss": 1, "epoch": 0.2},
        {"step": 10, "reward": 0.25, "loss": float("nan"), "epoch": 0.1},
        {"step": 20, "eval_reward": 0.75, "ok": True, "name": "x", "none": None},
    )
    expected = {
        "epoch": {10: 0.1, 20: 0.2},
        "eval_reward": {20: 0.75},
        "loss": {20: 1.0},
        "reward": {10: 0.25, 20: 0.5},
    }
    assert read_metrics(path) == read_metrics(tmp_path) == expected
    assert list(read_metrics(path)["reward"]) == [10, 20]


def test_the_later_entry_of_a_step_counts(tmp_path: Path) -> None:
    assert read_metrics(state(tmp_path, {"step": 1, "a": 1}, {"step": 1, "a": 2})) == {"a": {1: 2}}


def test_the_state_of_the_last_checkpoint_is_found(tmp_path: Path) -> None:
    for step in (20, 100):
        folder = write_model(tmp_path / f"checkpoint-{step}", llama())
        state(folder, {"step": step, "reward": 1.0})
    series = open_series([str(tmp_path)])
    assert trainer_state_of(series) == tmp_path / "checkpoint-100" / "trainer_state.json"
    (tmp_path / "checkpoint-100" / "trainer_state.json").unlink()
    assert trainer_state_of(series) is None


def test_csv(tmp_path: Path) -> None:
    text = "\ufeffname,Step,reward,empty\nrun,20,0.5,\nrun,10.0,1e-1,\nrun,30,,\nrun,40,nan,n/a\n"
    assert read_metrics(write(tmp_path / "a b.csv", text)) == {"reward": {10: 0.1, 20: 0.5}}


def test_jsonl_with_objects_inside(tmp_path: Path) -> None:
    text = (
        '{"step": 2, "data": {"critic/reward": 0.5, "n": 3}}\n\n'
        '{"step": 1, "data": {"critic/reward": 0.25, "big": 1' + "0" * 400 + "}}\n"
    )
    found = read_metrics(write(tmp_path / "log.jsonl", text))
    assert found == {"data/critic/reward": {1: 0.25, 2: 0.5}, "data/n": {2: 3.0}}


@given(st.dictionaries(st.integers(0, 10**6), st.floats(allow_nan=False, allow_infinity=False)))
def test_csv_and_jsonl_say_the_same(
    tmp_path_factory: pytest.TempPathFactory, curve: dict[int, float]
) -> None:
    folder = tmp_path_factory.mktemp("curves")
    rows = [{"step": 1, "other": 0.0}, *({"step": s, "reward": v} for s, v in curve.items())]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    cells = "".join(f"{s},{v!r},\n" for s, v in curve.items())
    jsonl = read_metrics(write(folder / "a.jsonl", lines))
    assert jsonl == read_metrics(write(folder / "a.csv", f"step,reward,other\n{cells}1,,0\n"))
    assert jsonl.get("reward", {}) == curve


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.csv", "", "no numbers beside the step (it is empty)"),
        ("a.csv", "step,name\n1,x\n2,y\n", "no numbers beside the step (2 rows)"),
        ("a.csv", "epoch,reward\n1,2\n", "no step column in line 2"),
        ("a.csv", "step,reward\n1.5,2\n", "line 2: step is 1.5, and must be a whole number"),
        ("a.csv", "step,reward\nten,2\n", 'line 2: step is "ten", and must'),
        ("a.csv", "step,reward\n-1,2\n", "line 2: step is -1.0, and must"),
        ("a.csv", "step,r,r\n1,2,3\n", "column 'r' is there twice"),
        ("a.csv", "step,r\n1,2\n1,3\n", "r has two values at step 1, 2 and 3 (line 3); keep one"),
        ("a.jsonl", '{"step": 1, "r": 2}\n{"r": 1}\n', "no step column in line 2"),
        ("a.jsonl", '{"step": 1, "r": 2}\n{"st', "line 2: no valid JSON"),
        ("a.jsonl", "[1]\n", "line 1: the JSON is not an object"),
        ("a.jsonl", '{"step": null, "r": 2}\n', "line 1: step is null"),
        ("a.jsonl", '{"step": true, "r": 2}\n', "line 1: step is true"),
        ("trainer_state.json", "{}", "has no log_history"),
        ("trainer_state.json", '{"log_history": []}', "no numbers beside the step (it is empty)"),
        ("trainer_state.json", "{", "no valid JSON"),
    ],
)
def test_damaged_files_in_one_line(tmp_path: Path, name: str, text: str, message: str) -> None:
    assert message in fails(CheckpointError, write(tmp_path / name, text))


def test_other_files_are_no_metrics(tmp_path: Path) -> None:
    assert "needs trainer_state.json, a .csv or a .jsonl" in fails(
        OptionError, write(tmp_path / "log.txt", "")
    )
    fails(CheckpointNotFound, tmp_path / "log.csv")
    assert "cannot be read" in fails(CheckpointError, _bytes(tmp_path / "b.csv"))


def _bytes(path: Path) -> Path:
    path.write_bytes(b"step,r\n\xff\xfe,1\n")
    return path
