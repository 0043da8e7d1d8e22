"""Small files, JSON and paths that others wrote: a value, or an error that says why not."""

from __future__ import annotations

import json
import os
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from geoscope.errors import CheckpointError, GeoscopeError
from geoscope.foreign import (
    COUNTS,
    FLAG,
    NUMBER,
    TABLE,
    TEXT,
    TEXTS,
    check_fields,
    either,
    exists,
    is_folder,
    local_path,
    parsed,
    resolved,
    shown,
    small_bytes,
    small_text,
)
from geoscope.formats.pickle_file import load_tensors
from geoscope.formats.safetensors_file import parse_header
from geoscope.peft.adapter import read_adapter
from geoscope.peft.folder import adapter_folder
from geoscope.report import read
from geoscope.sources.metric_file import read_metrics


def make_pipe(path: Path) -> None:
    os.mkfifo(path)


def link_to(target: str) -> Callable[[Path], None]:
    return lambda path: path.symlink_to(target)


NO_FILES = {
    "a pipe": make_pipe,
    "a device that never ends": link_to("/dev/zero"),
    "a device that is empty": link_to("/dev/null"),
    "a folder": Path.mkdir,
    "a link to itself": lambda path: path.symlink_to(path),
    "a hole of 8 GB": lambda path: (path.touch(), os.truncate(path, 8 << 30)),
    "nothing": lambda path: None,
}


@pytest.mark.parametrize("make", NO_FILES.values(), ids=NO_FILES)
@pytest.mark.filterwarnings("error")
def test_what_is_no_small_file_is_told_at_once(make: Callable[[Path], Any], tmp_path: Path) -> None:
    path = tmp_path / "adapter_config.json"
    make(path)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(OSError):
        small_text(path, 1 << 20)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10
    doors: list[Callable[[], object]] = [
        lambda: read_adapter(tmp_path),
        lambda: read(path),
        lambda: read_metrics(path),
    ]
    for door in doors:
        with pytest.raises(GeoscopeError) as caught:
            door()
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["adapter_config.json", "geoscope.json"])
def test_a_pipe_beside_an_adapter_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / name).unlink(missing_ok=True)
    make_pipe(tmp_path / name)
    with pytest.raises(CheckpointError, match="a pipe or a device, and a regular file is needed"):
        if name == "geoscope.json":
            adapter_folder(tmp_path)
        else:
            read_adapter(tmp_path)


def test_a_file_as_large_as_allowed_is_read_and_one_byte_more_is_not(tmp_path: Path) -> None:
    path = tmp_path / "small"
    path.write_bytes(b"x" * 10)
    assert small_bytes(path, 10) == b"x" * 10
    with pytest.raises(OSError, match="more than 9 bytes"):
        small_bytes(path, 9)
    path.write_bytes(b"\xff")
    with pytest.raises(OSError, match="it is not text"):
        small_text(path)


ODD_NAMES = ["a" * 300, "~nosuchuser/model", "a\0b", "\ud800", "x/" * 3000, ""]


@pytest.mark.parametrize("name", ODD_NAMES)
def test_every_text_can_be_asked_for_as_a_path(name: str, tmp_path: Path) -> None:
    path = tmp_path / local_path(name or "none")
    assert not is_folder(path) and not exists(path)
    assert resolved(path).is_absolute()
    with pytest.raises(OSError):
        small_text(path) if "\ud800" not in name else small_text(tmp_path / "none")


def test_links_in_a_circle_lead_nowhere(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    assert resolved(tmp_path / "a") == tmp_path / "a"


# --- JSON ---------------------------------------------------------------------------------------

NO_JSON = ["", "{", "[" * 100_000, '{"a":' * 20_000, "nul", "\0", '{"a" 1}', "1" * 10 + "x"]


@pytest.mark.parametrize("text", NO_JSON)
def test_what_is_no_json_is_a_value_error(text: str) -> None:
    with pytest.raises(ValueError) as caught:
        parsed(text)
    assert "\n" not in str(caught.value)


@given(st.integers(), st.floats(allow_nan=False, allow_infinity=False), st.text())
def test_json_is_what_it_was(whole: int, number: float, text: str) -> None:
    value = {"whole": whole, "number": number, "text": text, "more": [None, True]}
    assert parsed(json.dumps(value)) == value


def test_every_number_is_a_float_too() -> None:
    values = parsed(f"[{'9' * 300}, {'9' * 400}, -{'1' * 5000}, 1e999]")
    assert [float(value) for value in values][1:] == [float("inf"), float("-inf"), float("inf")]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=6,
)


@given(JSON)
def test_a_field_passes_by_its_form_or_is_named(value: Any) -> None:
    forms = {"text": TEXT, "texts": TEXTS, "flag": FLAG, "number": NUMBER, "table": TABLE}
    forms |= {"counts": COUNTS, "either": either(TEXT, TEXTS)}
    for field, form in forms.items():
        if value is None or form.holds(value):
            check_fields({field: value}, forms, "config.json")
            continue
        with pytest.raises(CheckpointError) as caught:
            check_fields({field: value}, forms, "config.json")
        said = str(caught.value)
        assert said.startswith(f"config.json: {field} is ") and form.words in said
        assert "\n" not in said and len(said) < 600


def test_a_long_or_deep_value_is_cut() -> None:
    deep: list[Any] = []
    for _ in range(5000):
        deep = [deep]
    for value in (deep, "x" * 10**6, 10**300, {"a": deep}, list(range(10**5))):
        assert len(shown(value)) < 400


# --- tables that hold themselves, and many names -------------------------------------------------


def itself() -> dict[str, Any]:
    table: dict[str, Any] = {"w": torch.ones(2, 2)}
    table["model"] = table
    return table


def each_other() -> dict[str, Any]:
    table: dict[str, Any] = {}
    table["model"] = {"state_dict": {"model": table, "w": torch.ones(2, 2)}}
    return table


def empty() -> dict[str, Any]:
    table: dict[str, Any] = {}
    table["model"] = table
    return table


@pytest.mark.parametrize("make", [itself, each_other, empty])
def test_a_pickle_that_holds_itself_comes_to_an_end(
    make: Callable[[], dict[str, Any]], tmp_path: Path
) -> None:
    path = tmp_path / "model.bin"
    torch.save(make(), path)
    if make is empty:
        with pytest.raises(CheckpointError, match="holds no tensors"):
            load_tensors(path, "model.bin")
    else:
        assert set(load_tensors(path, "model.bin")[0]) == {"w"}


def test_a_name_that_stands_twice_among_sixty_thousand_is_found_at_once() -> None:
    entry = '{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    names = [*(f"layers.{i}.weight" for i in range(60_000)), "layers.59999.weight"]
    text = "{" + ",".join(f'"{name}":{entry}' for name in names) + "}"
    with pytest.raises(CheckpointError, match=r"'layers.59999.weight' occurs twice"):
        parse_header(text.encode(), 8 + len(text), "model.safetensors")


def test_a_name_of_a_tensor_as_long_as_a_book_is_refused(tmp_path: Path) -> None:
    torch.save({"layers." + "9" * 5000 + ".weight": torch.ones(2, 2)}, tmp_path / "model.bin")
    from geoscope.formats.readers import open_container

    with pytest.raises(CheckpointError, match=r"a tensor has a name of 5014 letters"):
        open_container(tmp_path / "model.bin", "model.bin")
