"""Files: checked before the work, complete or absent, and read back equal."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from geoscope.errors import GeoscopeError, OptionError, ReportError
from geoscope.records import Curve, LayerRecord, Report, Status
from geoscope.report import SUFFIXES, check_output, read, write
from tests.helpers.examples import all_null, example

KINDS = ("collapse", "anisotropy", "alignment", "compare")


def is_png(content: bytes) -> bool:
    return content.startswith(b"\x89PNG\r\n\x1a\n") and content.rstrip().endswith(b"IEND\xaeB`\x82")


def is_svg(content: bytes) -> bool:
    return ElementTree.fromstring(content).tag.endswith("svg")


def is_pdf(content: bytes) -> bool:
    return content.startswith(b"%PDF-") and content.rstrip().endswith(b"%%EOF")


def is_page(content: bytes) -> bool:
    text = content.decode()
    return text.lstrip().startswith("<!doctype html>") and text.endswith("</html>\n")


def is_text(content: bytes) -> bool:
    return content.decode().endswith("\n") and b"\r" not in content


def is_json(content: bytes) -> bool:
    return is_text(content) and json.loads(content)["schema"] == "geoscope.report/2"


VALID: dict[str, Callable[[bytes], bool]] = {
    ".json": is_json,
    ".html": is_page,
    ".csv": is_text,
    ".md": is_text,
    ".png": is_png,
    ".svg": is_svg,
    ".pdf": is_pdf,
}


def unfinished(folder: Path) -> list[str]:
    """Everything in a folder but the reports that were asked for."""
    return [path.name for path in folder.iterdir() if path.name.startswith(".")]


def assert_one_line(error: pytest.ExceptionInfo[GeoscopeError], *words: str) -> None:
    text = str(error.value)
    assert "\n" not in text
    for word in words:
        assert word in text


def test_every_suffix_is_tested() -> None:
    assert set(VALID) == set(SUFFIXES)


@pytest.mark.parametrize(
    ("kind", "suffix"),
    [
        *((kind, suffix) for kind in KINDS for suffix in (".json", ".csv", ".md", ".svg")),
        ("compare", ".png"),
        ("compare", ".pdf"),
    ],
)
def test_every_kind_writes_every_suffix(tmp_path: Path, kind: str, suffix: str) -> None:
    path = tmp_path / f"report{suffix}"
    write(example(kind, layers=2, partial=True), path)
    assert VALID[suffix](path.read_bytes())
    assert unfinished(tmp_path) == []


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_equal_reports_give_equal_bytes(tmp_path: Path, suffix: str) -> None:
    """Also when the other comes from JSON, whose keys are sorted."""
    report = example(layers=1, runs=2, modules=("q_proj", "up_proj"))
    again = Report.loads(report.dumps())
    assert again == report
    paths = [tmp_path / f"{name}{suffix}" for name in ("a", "b")]
    for path, each in zip(paths, (report, again), strict=True):
        write(each, path)
    first, second = (path.read_bytes() for path in paths)
    assert first == second


@pytest.mark.parametrize("runs", [1, 2])
def test_json_reads_back_equal(tmp_path: Path, runs: int) -> None:
    path = tmp_path / "report.json"
    report = example(layers=2, partial=True, runs=runs)
    write(report, path)
    assert read(path) == report


def test_json_of_a_report_without_numbers_reads_back_equal(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    report = all_null(example(layers=1))
    write(report, path)
    assert read(path) == report
    assert "NaN" not in path.read_text()


finite = st.floats(allow_nan=False, allow_infinity=False)
ids = st.text(min_size=1, max_size=12)


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    name=st.text(max_size=20),
    values=st.dictionaries(ids, st.none() | finite | st.integers(), max_size=4),
    nulls=st.dictionaries(ids, finite, max_size=4),
    status=st.dictionaries(ids, st.sampled_from(Status), max_size=4),
    curve=st.lists(st.tuples(finite, finite), max_size=4),
)
def test_any_layer_reads_back_equal(
    tmp_path: Path,
    name: str,
    values: dict[str, float | int | None],
    nulls: dict[str, float],
    status: dict[str, Status],
    curve: list[tuple[float, float]],
) -> None:
    layer = LayerRecord(
        *(name, None, "q_proj", (3, 4)),
        values=values,
        nulls=nulls,
        status=status,
        curves={"update.S": Curve.through(curve)},
    )
    report = replace(example(layers=1), layers=(layer,))
    path = tmp_path / "report.json"
    write(report, path)
    assert read(path) == report


def test_path_that_is_no_utf8_survives_json(tmp_path: Path) -> None:
    report = example(layers=1)
    provenance = replace(report.provenance, argv=(os.fsdecode(b"caf\xe9"),))
    report = replace(report, provenance=provenance)
    write(report, tmp_path / "report.json")
    assert read(tmp_path / "report.json") == report


@pytest.mark.parametrize("name", ["report", "report.txt", "report.json.gz"])
def test_unknown_suffix_is_refused_before_the_work(tmp_path: Path, name: str) -> None:
    with pytest.raises(OptionError) as error:
        check_output(tmp_path / name, force=False)
    assert_one_line(error, ".json", ".pdf")
    with pytest.raises(OptionError):
        write(example(layers=1), tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_suffix_may_be_in_capitals(tmp_path: Path) -> None:
    path = tmp_path / "REPORT.JSON"
    check_output(path, force=False)
    write(example(layers=1), path)
    assert is_json(path.read_bytes())


def test_existing_file_is_kept_without_force(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    path.write_text("mine")
    with pytest.raises(OptionError) as error:
        check_output(path, force=False)
    assert_one_line(error, str(path), "`force`")
    check_output(path, force=True)
    assert path.read_text() == "mine"


def test_missing_folder_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "nowhere" / "report.json"
    with pytest.raises(ReportError) as error:
        check_output(path, force=True)
    assert_one_line(error, "nowhere", "does not exist")
    assert not path.parent.exists()


def test_folder_as_output_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    path.mkdir()
    with pytest.raises(OptionError) as error:
        check_output(path, force=True)
    assert_one_line(error, "is a folder")


def test_folder_that_is_not_writable_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)  # the superuser may write everywhere
    with pytest.raises(ReportError) as error:
        check_output(tmp_path / "report.json", force=False)
    assert_one_line(error, "not writable")


@pytest.mark.parametrize("failure", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_failure_while_writing_leaves_the_old_file_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: BaseException
) -> None:
    path = tmp_path / "report.json"
    path.write_text("old")

    def fail(descriptor: int) -> None:
        raise failure

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises((ReportError, KeyboardInterrupt)) as error:
        write(example(layers=1), path)
    assert "\n" not in str(error.value)
    assert path.read_text() == "old"
    assert unfinished(tmp_path) == []


def test_report_with_nan_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    report = example(layers=1)
    layer = replace(report.layers[0], values={"nss": float("nan")})
    with pytest.raises(ReportError) as error:
        write(replace(report, layers=(layer,)), tmp_path / "report.json")
    assert_one_line(error, "strict JSON")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("suffix", [".md", ".png"])
def test_kind_without_a_table_is_refused_and_leaves_nothing(tmp_path: Path, suffix: str) -> None:
    report = replace(example(layers=1), kind="unheard")
    with pytest.raises(ReportError) as error:
        write(report, tmp_path / f"report{suffix}")
    assert_one_line(error, "unheard", ".json")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("suffix", [".json", ".csv"])
def test_kind_without_a_table_is_written_as_data(tmp_path: Path, suffix: str) -> None:
    write(replace(example(layers=1), kind="unheard"), tmp_path / f"report{suffix}")
    assert VALID[suffix]((tmp_path / f"report{suffix}").read_bytes())


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "cannot be read"),
        (b"", "not JSON"),
        (b"[1]", "not a report"),
        (b'{"schema": "other/1"}', "schema"),
        (b'{"schema": "geoscope.report/2"}', "complete"),
        (b'{"schema": "geoscope.report/2", "kind": NaN}', "not JSON"),
        (b"\x89PNG\xff", "not text"),
    ],
)
def test_what_is_no_report_is_refused(tmp_path: Path, content: bytes | None, words: str) -> None:
    path = tmp_path / "report.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ReportError) as error:
        read(path)
    assert_one_line(error, str(path), words)
