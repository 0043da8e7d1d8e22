"""The page in a real browser: quiet, closed, sortable, readable by everyone."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from geoscope.records import Report
from geoscope.report import write
from geoscope.report.answer import headlines
from tests.helpers.browser import browser
from tests.helpers.examples import example

REPORTS = {
    "two models": example("compare", layers=2, modules=("q_proj", "up_proj"), runs=2),
    "series": example("trajectory", layers=1, modules=("q_proj", "up_proj")),
    "adapter": example("init-adapter", layers=1, modules=("q_proj", "up_proj")),
}
NAMES = "[...document.querySelectorAll('#table tbody tr')].map((row) => row.cells[0].textContent)"


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    with browser() as opened:
        yield opened


class Files:
    """The pages, each written when it is first asked for."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __getitem__(self, name: str) -> Path:
        path = self._folder / f"{name}.html"
        if not path.exists():
            write(REPORTS[name], path)
        return path


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return Files(tmp_path_factory.mktemp("pages"))


class Shown:
    """A page that is open, what it said and what it asked for."""

    def __init__(self, chromium: Any, path: Path, **options: Any) -> None:
        self.page = chromium.new_page(**options)
        self.said: list[str] = []
        self.asked: list[str] = []
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.goto(path.as_uri())

    def text(self, place: str) -> str:
        return self.page.inner_text(place)


@pytest.mark.parametrize(
    ("name", "scheme"),
    [
        ("two models", "light"),
        *(
            pytest.param(name, scheme, marks=pytest.mark.slow)
            for name, scheme in (
                ("two models", "dark"),
                ("series", "light"),
                ("series", "dark"),
                ("adapter", "light"),
            )
        ),
    ],
)
def test_a_page_is_quiet_closed_and_accessible(
    chromium: Any, files: Files, name: str, scheme: str
) -> None:
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    phone = {"width": 390, "height": 844}
    shown = Shown(chromium, files[name], viewport=phone, color_scheme=scheme)
    assert shown.said == []
    assert [url for url in shown.asked if not url.startswith("data:")] == [files[name].as_uri()]
    assert shown.text("h1") == " ".join(headlines(REPORTS[name])[0].split())
    found = axe.run(shown.page).response["violations"]
    assert [(each["id"], each["nodes"][0]["html"]) for each in found] == []
    assert shown.page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def values(report: Report, key: str) -> list[float]:
    return [float(layer.values[key] or 0) for layer in report.layers]


def test_the_table_sorts_filters_and_copies(chromium: Any, files: Files) -> None:
    report = REPORTS["two models"]
    shown = Shown(chromium, files["two models"])
    page = shown.page
    by_size = sorted(report.layers, key=lambda layer: layer.values["relative_update"] or 0)
    head = page.locator("#table thead th", has_text="ρ").first
    head.get_by_role("button").click()
    assert page.evaluate(NAMES) == [layer.name for layer in by_size]
    assert head.get_attribute("aria-sort") == "ascending"
    head.get_by_role("button").focus()
    page.keyboard.press("Enter")  # by keyboard, and the other way
    assert page.evaluate(NAMES) == [layer.name for layer in by_size[::-1]]
    page.fill("#words", "layers.1 Q_PROJ")
    kept = [layer for layer in by_size[::-1] if "layers.1.self_attn.q_proj" in layer.name]
    assert page.evaluate(NAMES) == [layer.name for layer in kept]
    assert shown.text("#count") == f"{len(kept)} of {len(report.layers)} matrices"
    page.evaluate("navigator.clipboard.writeText = async (text) => { window.copied = text; }")
    page.click("#copy")
    rows = list(csv.DictReader(io.StringIO(page.evaluate("window.copied"))))
    assert [row["matrix"] for row in rows] == [layer.name for layer in kept]
    for row, layer in zip(rows, kept, strict=True):
        expected = layer.values["relative_update"]
        assert expected is not None
        assert float(row["relative_update"]) == pytest.approx(expected, rel=1e-5)
        assert float(row["nulls.spectral_share"]) == pytest.approx(
            layer.nulls["spectral_share"], rel=1e-5
        )


def test_the_metric_of_the_map_is_chosen_by_keyboard(chromium: Any, files: Files) -> None:
    page = Shown(chromium, files["two models"]).page
    assert page.is_visible("#map0") and not page.is_visible("#map1")
    page.focus("#m0")
    page.keyboard.press("ArrowRight")
    assert page.is_visible("#map1") and not page.is_visible("#map0")


def test_without_its_script_all_is_there_to_read(chromium: Any, files: Files) -> None:
    context = chromium.new_context(java_script_enabled=False)
    page = Shown(context, files["two models"]).page
    report = REPORTS["two models"]
    assert page.inner_text("h1") == headlines(report)[0]
    assert page.locator("#table tbody tr").count() == len(report.layers)
    assert not page.is_visible("#filter")
    page.check("#m1", force=True)
    assert page.is_visible("#map1") and not page.is_visible("#map0")
    context.close()


@pytest.mark.slow
def test_a_print_leaves_nothing_out(chromium: Any, files: Files) -> None:
    page = Shown(chromium, files["two models"], viewport={"width": 700, "height": 990}).page
    page.emulate_media(media="print")
    assert not page.is_visible("nav") and not page.is_visible("#filter")
    assert page.is_visible("#map0")
    clipped = """[...document.querySelectorAll('.tall, .side, .picture')]
        .filter((each) => getComputedStyle(each).overflowX !== 'visible').length"""
    assert page.evaluate(clipped) == 0
