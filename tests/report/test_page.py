"""The page of HTML: complete, of the report's own numbers, closed to the network and to tags."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from geoscope.kinds import KINDS
from geoscope.records import LayerRecord, Report
from geoscope.report.answer import answer, headlines
from geoscope.report.cells import tiles
from geoscope.report.grids import value_text
from geoscope.report.html.document import render_html, render_notebook
from geoscope.report.html.maps import maps
from geoscope.report.html.templates import script_hash, static
from geoscope.report.sections import dimension, sections, with_dimension
from geoscope.report.tables import QUANTITIES
from tests.helpers.examples import all_null, example

FEW = ("q_proj", "up_proj")
BAD = "<script>alert(1)</script>"
VOID = {"meta", "link", "input", "br"}


class Page(HTMLParser):
    """Tags with their attributes, and the texts of h1, of the script of data, of the cells."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.scripts: list[str] = []
        self.heads: list[str] = []
        self.rows: list[list[str]] = []
        self._inside = ""
        self._is_table = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._inside = tag
        if tag == "table":
            self._is_table = dict(attrs).get("id") == "table"
        if self._is_table and tag == "tr":
            self.rows.append([])
        if self._is_table and tag in ("th", "td") and self.rows:
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        self._is_table &= tag != "table"
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside == "script":
            self.scripts.append(data)
        elif self._is_table and self.rows and self.rows[-1]:
            self.rows[-1][-1] += data.strip()
        else:
            self.texts.append(data.strip())
        if self._inside == "h1":
            self.heads.append(data)

    @property
    def data(self) -> dict[str, list[dict[str, list[float | None]]]]:
        (text,) = [each for each in self.scripts if each.startswith("{")]
        return json.loads(text)


def column(data: dict[str, list[float | None]]) -> list[float | None]:
    """The numbers of each row."""
    kinds = data["kinds"]
    return [kinds[int(at or 0)] for at in data["at"]] if "at" in data else kinds


def digits(value: float | int | None) -> float | int | None:
    return float(f"{value:.6g}") if isinstance(value, float) else value


@pytest.fixture
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which take most of the time, and are looked at in test_panels."""
    monkeypatch.setattr("geoscope.report.html.document.pictures", lambda *_: [])


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize("kind", sorted(KINDS))
def test_every_kind_has_a_page_with_its_answer_and_every_number(kind: str) -> None:
    report = example(kind, layers=1, modules=FEW)
    page = Page(render_html(report))
    assert page.heads == [headlines(report)[0]]
    said = set(page.texts)
    grid = answer(report)[1].grid
    assert grid is not None
    for row in grid.rows:
        for cell in row:
            assert " ".join(filter(None, (cell.text, cell.null))) in said | {""}
    data = page.data
    assert [row[0] for row in page.rows[1:]] == [layer.name for layer in report.layers]
    assert data["ids"]
    for at, pattern in enumerate(data["ids"]):
        values, nulls = (column(data[part][at]) for part in ("values", "nulls"))
        for row, layer in enumerate(report.layers):
            key = with_dimension(str(pattern), dimension(layer))
            assert values[row] == digits(layer.values.get(key))
            assert nulls[row] == digits(layer.nulls.get(key))
            shown = page.rows[1 + row][int(data["first"]) + at]  # pyright: ignore
            assert shown.partition(" (")[0].rstrip("~") == text_of(layer, str(pattern), key)


def text_of(layer: LayerRecord, pattern: str, key: str) -> str:
    """As the tables of the text have it."""
    if key not in layer.values:
        return ""
    return value_text(QUANTITIES[pattern], layer.values[key])


@pytest.mark.parametrize(
    "report",
    [
        example(layers=0),
        example("collapse", layers=1, modules=("q_proj",), partial=True),
        all_null(example("alignment", layers=1, modules=FEW)),
        all_null(example("trajectory", layers=1, modules=FEW)),
        example("capacity", layers=1, modules=FEW, rho=0.001),
    ],
    ids=["empty", "one matrix", "all null", "no series", "unresolved"],
)
def test_a_page_is_made_whatever_is_missing(report: Report) -> None:
    page = Page(render_html(report))
    assert page.heads == [headlines(report)[0]]
    assert set(report.coverage.missing) <= set(page.texts)


@pytest.fixture(scope="module")
def two_models() -> str:
    report = example("compare", layers=2, modules=FEW, runs=2)
    refs = tuple(replace(ref, given=f"{ref.given}{BAD}") for ref in report.provenance.refs)
    layers = tuple(replace(layer, name=f"{BAD}{layer.name}") for layer in report.layers)
    made = replace(report.provenance, refs=refs, argv=("/home/someone/geoscope", "compare", BAD))
    return render_html(replace(report, layers=layers, provenance=made))


def test_nothing_is_asked_of_the_network_and_one_script_runs(two_models: str) -> None:
    page = Page(two_models)
    for tag, given in page.tags:
        assert tag not in ("iframe", "object", "embed", "base", "img")
        for name in ("src", "href", "xlink:href", "action"):
            target = given.get(name) or "#"
            assert target.startswith(("#", "data:")), (tag, name, target)
    assert not re.findall(r"@import|url\((?!#)", two_models)
    policies = [each["content"] for tag, each in page.tags if each.get("http-equiv")]
    (script,) = [each for each in page.scripts if not each.startswith("{")]
    assert script == static("page.js")
    assert policies == [
        "default-src 'none'; style-src 'unsafe-inline'; "
        f"script-src '{script_hash(script)}'; img-src data:"
    ]


def test_names_of_others_are_no_tags(two_models: str) -> None:
    assert "<script>alert" not in two_models
    assert "&lt;script&gt;alert(1)" in two_models  # as text
    assert "\\u003cscript\\u003ealert" not in two_models  # names are not in the data


def test_the_command_stands_there_without_the_place_of_the_program(two_models: str) -> None:
    assert "geoscope compare &#39;&lt;script&gt;" in two_models
    assert "/home/someone" not in two_models


def test_ids_of_the_page_are_its_own(two_models: str) -> None:
    ids = [given["id"] for _, given in Page(two_models).tags if "id" in given]
    assert len(ids) == len(set(ids))


def test_tags_close_in_order() -> None:
    """Of the part that a notebook shows; HTML lets the rows of the large table stay open."""
    open_tags: list[str] = []

    class Tags(HTMLParser):
        def handle_starttag(self, tag: str, attrs: object) -> None:
            open_tags.append(tag)

        def handle_endtag(self, tag: str) -> None:
            assert open_tags.pop() == tag

    Tags().feed(render_notebook(example(layers=1, runs=2)))
    assert open_tags == []


def test_a_notebook_begins_with_the_headline() -> None:
    report = example(layers=1, modules=FEW)
    assert render_notebook(report).lstrip().startswith(f"<h4>{headlines(report)[0][:12]}")


# --- maps -----------------------------------------------------------------------------------------


def matrix(layer: int, value: float | None, null: float | None = None) -> LayerRecord:
    nulls = {} if null is None else {"spectral_lift": null}
    return LayerRecord(
        f"m.{layer}", layer, "q_proj", (8, 8), values={"spectral_lift": value}, nulls=nulls
    )


def shades(*records: LayerRecord) -> dict[str, tuple[str, str]]:
    report = replace(example("collapse", layers=0), layers=records)
    (made, *_) = maps(KINDS["collapse"], sections(report))
    ((_, rows),) = made.models
    return {layer: (cells[0].text, cells[0].colour) for layer, cells in rows}


def test_colours_are_centred_on_the_null() -> None:
    found = shades(matrix(0, 3, 3), matrix(1, 15, 3), matrix(2, 0.6, 3), matrix(3, None, 3))
    assert found == {"0": ("3.00", "o"), "1": ("15.0", "a6"), "2": (".600", "b6"), "3": ("–", "x")}


def test_colours_of_a_null_of_zero_are_centred_there() -> None:
    found = shades(matrix(0, 0.5, 0.0), matrix(1, -0.5, 0.0), matrix(2, 0.0, 0.0))
    assert [colour for _, colour in found.values()] == ["a6", "b6", "o"]


def test_without_a_null_colours_go_from_the_smallest_to_the_largest() -> None:
    assert [colour for _, colour in shades(matrix(0, 1), matrix(1, 2)).values()] == ["s0", "s7"]
    assert [colour for _, colour in shades(matrix(0, 2.0)).values()] == ["s0"]


def test_a_cell_of_several_matrices_has_their_mean_and_that_of_their_nulls() -> None:
    records = [matrix(0, 1.0, 2.0), matrix(0, 4.0, 6.0), matrix(0, None, 9.0)]
    tile = tiles(records, "spectral_lift")[0, "q_proj"]
    assert (tile.value, tile.null, tile.held, tile.numbered) == (2.5, 4.0, 3, 2)


def test_maps_of_a_report_hold_its_numbers() -> None:
    report = example("compare", layers=2, modules=FEW, runs=2)
    for made in maps(KINDS["compare"], sections(report)):
        for part, (_, rows) in zip(sections(report), made.models, strict=True):
            for layer, cells in rows:
                for module, shade in zip(made.modules, cells, strict=True):
                    (record,) = [
                        each
                        for each in part.layers
                        if (str(each.layer), each.module) == (layer, module)
                    ]
                    assert shade.text in texts_of(record)


def texts_of(record: LayerRecord) -> set[str]:
    keys = {key: record.values[key] for key in record.values}
    plain = {value_text(QUANTITIES["nss"], value) for value in keys.values()}
    return plain | {value_text(QUANTITIES["angle_left_mean@k"], value) for value in keys.values()}


# --- sizes ----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_hundred_matrices_take_less_than_three_megabytes() -> None:
    report = example("compare", layers=29)
    assert len(report.layers) > 200
    assert len(render_html(report).encode()) < 3e6


@pytest.mark.slow
def test_twenty_thousand_matrices_take_less_than_ten_megabytes() -> None:
    report = example("compare", layers=20, modules=("q_proj", "experts.up_proj"))
    layers = tuple(
        replace(
            layer,
            name=layer.name.replace(layer.module, f"experts.{number}.{layer.module}"),
            values={k: v and v * (1 + number / 1e3) for k, v in layer.values.items()},
        )
        for number in range(500)
        for layer in report.layers
    )
    assert len(layers) == 20_000
    assert len(render_html(replace(report, layers=layers)).encode()) < 10e6


@pytest.mark.usefixtures("no_pictures")
def test_angles_are_degrees_in_the_table_and_radians_in_its_data() -> None:
    report = example("compare", layers=1, modules=("q_proj",))
    data = Page(render_html(report)).data
    at = data["ids"].index("angle_left_mean@k")  # pyright: ignore
    value = column(data["values"][at])[0]
    assert value is not None and 0 < value < math.pi / 2
