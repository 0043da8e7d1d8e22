"""A report in a notebook: numbers by name, data frames, tables, figures."""

from __future__ import annotations

import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

import geoscope
from geoscope.errors import OptionError, ReportError
from geoscope.kinds import KINDS
from geoscope.records import Report
from geoscope.report import render_text
from geoscope.report.answer import headlines
from tests.helpers.examples import example

VOID = {"br", "hr"}


class Tables(HTMLParser):
    """Texts of the cells; fails where tags do not close in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.texts: list[str] = []

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def parsed(report: Report) -> Tables:
    tables = Tables()
    tables.feed(report._repr_html_())
    assert tables.open == []
    return tables


@pytest.mark.parametrize("kind", ["compare", "collapse", "anisotropy", "alignment"])
def test_the_tables_hold_what_the_text_says(kind: str) -> None:
    report = example(kind=kind)
    said = " ".join(parsed(report).texts)
    text = render_text(report, width=400, colour=False, details=True)
    for headline in headlines(report):  # which the page does not repeat
        text = text.replace(headline, "")
    words = set(re.findall(r"[\w.]+", text))
    assert words and words <= set(re.findall(r"[\w.]+", said))


def test_names_are_no_tags() -> None:
    from dataclasses import replace

    report = example()
    first = replace(report.provenance.refs[0], given="<script>alert(1)</script>")
    made = replace(report.provenance, refs=(first, *report.provenance.refs[1:]))
    html = replace(report, provenance=made)._repr_html_()
    assert "<script" not in html and "&lt;script&gt;" in html


# --- numbers by name ----------------------------------------------------------------------------


def test_a_number_stands_beside_its_null() -> None:
    report = example()
    key = next(iter(report.summary.nulls))
    assert report[key] == (report.summary.model[key], report.summary.nulls[key], None)
    layer = report.layers[0]
    assert report.layers[layer.name] is layer
    assert report.layers[layer.name.removesuffix(".weight")] is layer
    for one in layer.values:
        assert layer[one] == (layer.values[one], layer.nulls.get(one), layer.status_of(one))
    assert (
        report.layers[:1] == (layer,) and report.layers[-1] is report.layers[len(report.layers) - 1]
    )


def test_an_unknown_name_is_told_with_near_ones() -> None:
    report = example()
    for ask in (lambda: report["nonsense"], lambda: report.layers[0]["nonsense"]):
        with pytest.raises(KeyError, match="no number 'nonsense' here; near: "):
            ask()
    with pytest.raises(KeyError, match="no matrix 'q_proj'; near: model"):
        report.layers["q_proj"]


def test_a_metric_by_its_id() -> None:
    metrics = geoscope.METRICS
    assert metrics["effective_rank"].id == "effective_rank"
    assert metrics["update.effective_rank"] is metrics["effective_rank"]
    assert [metrics[one.id] for one in metrics] == list(metrics)
    assert metrics[0] is next(iter(metrics)) and metrics[:2] == tuple(metrics)[:2]
    with pytest.raises(KeyError, match=r"near: .*effective_rank"):
        metrics["effective"]


# --- frames -------------------------------------------------------------------------------------


@pytest.mark.parametrize("runs", [1, 2])
def test_frames_hold_every_number(runs: int) -> None:
    pandas = pytest.importorskip("pandas")
    report = example(runs=runs)
    values, nulls, statuses, raw = map(report.to_frame, ("values", "nulls", "statuses", "raw"))
    for frame in (values, nulls, statuses, raw):
        assert list(frame.index) == [layer.name for layer in report.layers]
        assert ("tuned" in frame.columns) == (runs > 1)
    for i, layer in enumerate(report.layers):
        for key, value in layer.values.items():
            shown = values.iloc[i][key]
            assert pandas.isna(shown) if value is None else shown == value
            assert statuses.iloc[i][key] == layer.status_of(key).value
        for frame, numbers in ((nulls, layer.nulls), (raw, layer.raw)):
            row = frame.iloc[i]
            assert {key: row[key] for key in numbers if key in frame} == {
                key: number for key, number in numbers.items() if key in frame
            }
        assert (values.iloc[i]["rows"], values.iloc[i]["columns"]) == layer.shape
    numbers = values.drop(columns=["module", "verdict"])
    assert all(kind.kind in "iuf" for kind in numbers.dtypes)


def test_a_report_without_matrices_is_an_empty_frame() -> None:
    pytest.importorskip("pandas")
    assert len(example(layers=0).to_frame()) == 0


def test_an_unknown_part_is_refused() -> None:
    with pytest.raises(OptionError, match="part 'value' is not one of values, nulls, statuses"):
        example().to_frame("value")


def test_without_pandas_the_way_to_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ReportError, match=r"pip install 'geoscope\[notebook\]'"):
        example().to_frame()


def test_pandas_is_loaded_for_frames_alone() -> None:
    code = (
        "import sys; from tests.helpers.examples import example; r = example(); r._repr_html_();"
        "repr(r); sys.exit('pandas' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# --- figures and files --------------------------------------------------------------------------


def test_a_figure_by_name(tmp_path: Path) -> None:
    from matplotlib.figure import Figure

    report = example(layers=1)
    whole = report.figure()
    assert isinstance(whole, Figure)
    report.save(tmp_path / "whole.png")
    assert whole._repr_png_() == (tmp_path / "whole.png").read_bytes()  # type: ignore[attr-defined]
    for row in KINDS[report.kind].panels:
        for name in row:
            part = report.figure(name)
            assert 0 < len(part.axes) < len(whole.axes)
    with pytest.raises(OptionError, match=r"name 'nonsense' is not one of .*lift_map"):
        report.figure("nonsense")


def test_what_is_saved_is_read_again(tmp_path: Path) -> None:
    report = example(runs=2)
    report.save(tmp_path / "r.json")
    found = geoscope.read_report(tmp_path / "r.json")
    assert found == report and found.layers[0] == report.layers[0]
    with pytest.raises(OptionError, match="suffix"):
        report.save(tmp_path / "r.xyz")
