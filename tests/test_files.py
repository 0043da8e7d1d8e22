"""A file is there complete, or not at all; records are spelled the same everywhere."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from geoscope.files import TEMPORARY, encoded, keep, record_bytes, record_size, replacing


@pytest.mark.parametrize("durable", [True, False])
def test_a_file_has_its_name_only_when_it_is_complete(tmp_path: Path, durable: bool) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"old")
    with replacing(path, durable=durable) as file:
        file.write(b"new")
        file.flush()
        (other,) = set(tmp_path.iterdir()) - {path}
        assert other.name.startswith(".x.") and other.suffix == TEMPORARY
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("kind", [OSError, ValueError, KeyboardInterrupt])
def test_a_failure_leaves_what_was_there(tmp_path: Path, kind: type[BaseException]) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"old")
    with pytest.raises(kind), replacing(path) as file:
        file.write(b"half")
        raise kind
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_two_that_write_the_same_file_do_not_meet(tmp_path: Path) -> None:
    path = tmp_path / "x"
    with replacing(path) as first, replacing(path) as second:
        first.write(b"first")
        second.write(b"second")
    assert path.read_bytes() == b"first"  # whose name came last
    assert list(tmp_path.iterdir()) == [path]


def test_a_cache_that_takes_no_file_is_passed_over(tmp_path: Path) -> None:
    keep(tmp_path / "a" / "b", b"kept")
    assert (tmp_path / "a" / "b").read_bytes() == b"kept"
    keep(tmp_path / "a" / "b" / "c", b"below a file")
    with pytest.raises(OSError), replacing(tmp_path / "a" / "b" / "c"):
        pass


def test_a_record_is_valid_json_within_its_bound() -> None:
    record = {"b": 1, "a": ["ν"]}
    assert record_bytes(record) == '{\n "a": [\n  "ν"\n ],\n "b": 1\n}\n'.encode()
    assert len(record_bytes(record)) < record_size(0) < record_size(1)
    with pytest.raises(ValueError, match="JSON"):
        record_bytes({"a": float("nan")})


def test_half_a_letter_is_written_as_its_escape() -> None:
    text = '{"revision": "é\ud800"}'
    assert json.loads(encoded(text)) == json.loads(text)
    assert encoded("é") == "é".encode()
    assert record_bytes({"a": "\ud800"}) == b'{\n "a": "\\ud800"\n}\n'
