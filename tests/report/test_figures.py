"""Figures: every kind, small and large, whatever is missing; nothing global is touched."""

from __future__ import annotations

import io
from dataclasses import replace
from xml.etree import ElementTree

import matplotlib as mpl
import pytest
from matplotlib.image import imread

from geoscope.kinds import KINDS
from geoscope.records import Curve, LayerRecord, Report
from geoscope.report.figures import panel_names, render_figure
from geoscope.report.numbers import number
from geoscope.report.panels import PANELS
from geoscope.report.panels.curves import middle_of, points
from tests.helpers.examples import all_null, example

FEW = ("q_proj", "k_proj", "up_proj")


def words_of(report: Report) -> str:
    """All words of a figure, which an SVG keeps as comments beside its glyphs."""
    parser = ElementTree.XMLParser(target=ElementTree.TreeBuilder(insert_comments=True))
    root = ElementTree.fromstring(render_figure(report, ".svg"), parser)
    comments = [node.text or "" for node in root.iter() if node.tag is ElementTree.Comment]
    return "\n".join(comment.strip() for comment in comments)


def prose_of(report: Report) -> str:
    """The words without the ends of their lines, which depend on the width of a panel."""
    return " ".join(words_of(report).split())


def without_curves(report: Report, *gone: str) -> Report:
    """The report without the curves whose id begins with one of `gone`."""
    return replace(report, layers=tuple(_without(layer, gone) for layer in report.layers))


def _without(layer: LayerRecord, gone: tuple[str, ...]) -> LayerRecord:
    kept = {key: curve for key, curve in layer.curves.items() if not key.startswith(gone)}
    return replace(layer, curves=kept)


@pytest.mark.slow
@pytest.mark.parametrize("kind", sorted(KINDS))
@pytest.mark.parametrize(
    "report",
    [
        example(layers=0),
        example(layers=1, modules=("q_proj",)),
        example(layers=2, rho=0.001, modules=FEW),
        all_null(example(layers=2, modules=FEW)),
        without_curves(example(layers=2, modules=FEW), ""),
        example(layers=1, modules=tuple(f"experts.{index}_proj" for index in range(15))),
    ],
    ids=["empty", "one matrix", "unresolved", "all null", "no curves", "fifteen kinds"],
)
def test_figure_is_drawn_whatever_is_missing(kind: str, report: Report) -> None:
    image = imread(io.BytesIO(render_figure(replace(report, kind=kind), ".png")))
    assert image.shape[1] == 1800
    assert image.min() < image.max()


@pytest.mark.slow
def test_large_model_is_drawn() -> None:
    words = words_of(example("compare", layers=36, hidden=512))
    assert "hatched" not in words
    assert "34" in words.splitlines()


def test_title_names_models_verdict_and_what_is_missing() -> None:
    words = words_of(example("collapse", partial=True))
    assert "Spectral collapse: tiny/base → grpo/checkpoint-240" in words
    assert "OFF_PRINCIPAL" in words
    assert "PARTIAL 1 of 28 matrices not compared: model.layers.3.mlp.down_proj.weight" in words
    assert "hatched: no number" in words


def test_missing_curves_are_said() -> None:
    report = example("collapse", layers=1)
    assert "not in this report: energy_base" in prose_of(without_curves(report, "energy_base"))
    assert "no energy curves in this report" in prose_of(without_curves(report, "energy"))


@pytest.mark.parametrize(
    ("kind", "gone", "words"),
    [
        ("anisotropy", "update.S_null", "not in this report: isotropic spectrum"),
        ("anisotropy", "update.S_floor", "not in this report: noise edge"),
        ("anisotropy", "update.S", "no spectra of the update in this report"),
        ("alignment", "angles", "no angle curves in this report"),
    ],
)
def test_missing_curves_are_said_in_panels_by_module(kind: str, gone: str, words: str) -> None:
    assert words in prose_of(without_curves(example(kind, layers=1), gone))


@pytest.mark.parametrize("kind", ["anisotropy", pytest.param("alignment", marks=pytest.mark.slow)])
def test_module_kinds_that_are_not_shown_are_counted(kind: str) -> None:
    report = example(kind, layers=1, modules=tuple(f"{letter}_proj" for letter in "abcdefghijklm"))
    assert "first 12 of 13 module kinds" in prose_of(report)


def test_values_stand_in_the_cells_of_a_small_map() -> None:
    report = example("collapse", layers=2)
    words = words_of(report).splitlines()
    for layer in report.layers:
        assert number(layer.values["spectral_lift"]) in words


def test_each_tuned_model_has_its_colour() -> None:
    words = words_of(example("collapse", layers=1, runs=2))
    assert "■ 1 grpo/checkpoint-240 · " in words
    assert "■ 2 grpo/checkpoint-480 · " in words


def test_unresolved_matrices_stay_out_of_the_mean() -> None:
    report = example("collapse", rho=0.003)
    resolved = sum(layer.values["energy_right@8"] is not None for layer in report.layers)
    assert 0 < resolved < len(report.layers)
    assert f"mean over {resolved} of 28 matrices" in words_of(report)


@pytest.mark.parametrize("given", ["$\\frac{$", "a_b^c", "模型/基"])
def test_any_model_name_can_be_drawn(given: str) -> None:
    report = example(layers=1, modules=("q_proj",))
    refs = tuple(replace(ref, given=given) for ref in report.provenance.refs)
    report = replace(report, provenance=replace(report.provenance, refs=refs))
    assert render_figure(report, ".png")


def test_settings_of_matplotlib_neither_change_nor_matter() -> None:
    report = example("collapse", layers=1)
    expected = render_figure(report, ".png")
    with mpl.rc_context({"font.size": 30, "axes.facecolor": "red", "savefig.dpi": 7}):
        before = dict(mpl.rcParams)
        assert render_figure(report, ".png") == expected
        assert dict(mpl.rcParams) == before


def test_every_panel_of_a_kind_exists() -> None:
    assert {name for kind in KINDS.values() for name in panel_names(kind)} == set(PANELS)


def test_middle_of_curves_is_their_mean_where_all_are_defined() -> None:
    short = LayerRecord("a", 0, "x", (4, 4), curves={"c": Curve((1, 4), (0.1, 0.4))})
    long = LayerRecord("b", 0, "x", (8, 8), curves={"c": Curve((0, 1, 8), (9, 0.3, 0.9))})
    curves = [found for layer in (short, long) if (found := points(layer, "c"))]
    middle = middle_of(curves)
    assert middle is not None
    assert middle.x.tolist() == [1, 4]
    assert middle.mean[0] == pytest.approx(0.2)
    held = middle_of(curves, [4, 8])
    assert held is not None
    assert held.x.tolist() == [1, 4, 8]
    assert held.mean[-1] == pytest.approx((0.4 + 0.9) / 2)
