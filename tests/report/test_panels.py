"""What panels draw is what the report holds; nothing overlaps and nothing is cut."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
from matplotlib.figure import Figure, SubFigure
from matplotlib.text import Text

from geoscope.errors import OptionError
from geoscope.records import LayerRecord, Report
from geoscope.report.figures import figure
from geoscope.report.panels.modules import MODEL_COLOURS
from geoscope.report.sections import dimension, sections
from geoscope.report.worst import worst
from tests.helpers.examples import STEPS, example

FEW = ("q_proj", "up_proj")


def curve(layer: LayerRecord, key: str) -> np.ndarray:
    return np.array(layer.curves[key], dtype=float)


def lines(made: Figure, colour: str, dashes: str = "-") -> list[np.ndarray]:
    return [
        np.column_stack(line.get_data())
        for axes in made.axes
        for line in axes.lines
        if (line.get_color(), line.get_linestyle()) == (colour, dashes)
    ]


def of_model(report: Report, tuned: int) -> list[LayerRecord]:
    return [layer for layer in report.layers if layer.tuned == tuned]


def test_models_are_drawn_over_each_other_in_their_colours() -> None:
    report = example("compare", layers=1, modules=("q_proj",), runs=2)
    made = figure(report, "capture")
    assert len(made.axes) == 1
    for tuned, colour in zip((1, 2), MODEL_COLOURS, strict=False):
        (layer,) = of_model(report, tuned)
        for side, dashes in (("right", "-"), ("left", "-.")):
            (drawn,) = lines(made, colour, dashes)
            np.testing.assert_allclose(drawn, curve(layer, f"energy_{side}"))
    (base,) = lines(made, "#6b6b6b")
    np.testing.assert_allclose(base, curve(report.layers[0], "energy_base"))


@pytest.mark.parametrize("name", ["spectra", "spectra_by_module"])
def test_spectra_of_models_are_scaled_by_their_own_null(name: str) -> None:
    kind = "compare" if name == "spectra" else "anisotropy"
    report = example(kind, layers=1, modules=("q_proj",), runs=2)
    made = figure(report, name)
    for tuned, colour in zip((1, 2), MODEL_COLOURS, strict=False):
        (layer,) = of_model(report, tuned)
        (drawn,) = lines(made, colour)
        scale = curve(layer, "update.S_null")[0, 1]
        np.testing.assert_allclose(drawn[:, 1], curve(layer, "update.S")[:, 1] / scale)


def test_angles_are_those_of_the_matrices_with_the_band_of_their_nulls() -> None:
    report = example("alignment", layers=4, modules=("q_proj",))
    (axes,) = figure(report, "angles").axes
    keys = [f"angle_right_mean@{dimension(layer)}" for layer in report.layers]
    pairs = list(zip(report.layers, keys, strict=True))
    angles = [math.degrees(layer.values[key] or 0) for layer, key in pairs]
    nulls = [math.degrees(layer.nulls[key]) for layer, key in pairs]
    dots, band, bar = (np.array(line.get_xdata()) for line in axes.lines[:3])
    assert sorted(dots) == pytest.approx(sorted(angles))
    assert band == pytest.approx(np.quantile(nulls, (0.1, 0.9)))
    assert bar == pytest.approx([np.median(nulls)])


def test_the_worst_matrices_are_drawn_from_their_own_curves() -> None:
    report = example("anisotropy", layers=6, modules=FEW)
    (part,) = sections(report)
    chosen = worst(part, 8)
    sizes = sorted((layer.values["relative_update"] or 0 for layer in report.layers), reverse=True)
    assert [layer.values["relative_update"] for layer in chosen] == sizes[:8]
    for axes, layer in zip(figure(report, "worst").axes, chosen, strict=True):
        for line, key in zip(axes.lines, ("update.S", "update.S_null"), strict=False):
            np.testing.assert_allclose(np.column_stack(line.get_data()), curve(layer, key))


# --- series ---------------------------------------------------------------------------------------


def test_a_walk_of_the_same_steps_stands_beside_the_run() -> None:
    report = example("trajectory", layers=1, modules=("q_proj",))
    steps = (3.0, 4.0, 12.0)
    series = {"relative_step": steps, "relative_update_by_step": (3.0, 5.0, 13.0)}
    report = replace(report, summary=replace(report.summary, steps=STEPS[:4], series=series))
    drawn = {line.get_label(): line for line in figure(report, "trajectory_norms").axes[0].lines}
    walk = np.array(drawn["a walk of these steps"].get_ydata())
    assert walk == pytest.approx([3.0, 5.0, 13.0])  # √(9), √(9+16), √(25+144)
    assert drawn["length of the step ‖δ‖"].get_ydata() == pytest.approx(steps)


def skill_panel(*skills: float, horizon: float = 0.0) -> Figure:
    report = example("trajectory", layers=1, modules=("q_proj",))
    series = {
        "distance": tuple(10.0 * (i + 1) for i in range(len(skills))),
        "skill_by_distance@linear": skills,
    }
    model = {**report.summary.model, "horizon": horizon}
    return figure(
        replace(report, summary=replace(report.summary, series=series, model=model)),
        "trajectory_skill",
    )


def test_skill_below_minus_one_is_seen() -> None:
    (axes,) = skill_panel(0.5, -1.5, -300.0).axes
    assert axes.get_ylim()[0] < -300
    assert axes.get_yscale() == "symlog"
    low, high = axes.get_ylim()
    places = axes.transData.transform([(10, y) for y in (low, -1, 0, 1)])[:, 1]
    assert places[1] - places[0] > 0 and places[3] - places[2] > 0.15 * (places[3] - places[0])
    (axes,) = skill_panel(0.5, -0.9).axes
    assert axes.get_ylim() == (-1.05, 1.05) and high > 1


def test_the_horizon_stands_in_the_panel_of_skill() -> None:
    made = skill_panel(0.5, 0.4, horizon=20.0)
    marks = [line for line in made.axes[0].lines if line.get_linestyle() == ":"]
    assert [set(np.array(line.get_xdata()).tolist()) for line in marks] == [{20.0}]
    assert any("horizon, 20.0 steps" in words.get_text() for words in texts(made))


def test_the_map_of_cosines_fills_its_panel() -> None:
    made = figure(example("trajectory", layers=1, modules=("q_proj",)), "trajectory_cosines")
    axes = made.axes[0].get_window_extent()
    assert axes.width > 0.75 * made.bbox.width


@pytest.mark.parametrize("key", ["gram", "steps", "series"])
def test_a_step_that_a_report_lacks_is_not_drawn(key: str) -> None:
    """Every panel of a run, where one matrix, all of them or the run itself has a step fewer."""
    report = example("trajectory", layers=1, modules=("q_proj", "k_proj"))
    first, *others = report.layers
    if key == "steps":
        report = replace(report, summary=replace(report.summary, steps=STEPS[:-1]))
    elif key == "gram":
        report = replace(report, layers=(replace(first, gram=first.gram[1:]), *others))
    else:
        shorter = {name: row[1:] for name, row in first.series.items()}
        report = replace(report, layers=(replace(first, series=shorter), *others))
    made = figure(report)
    assert any(axes.lines for axes in made.axes)


# --- places ---------------------------------------------------------------------------------------


def texts(area: Figure | SubFigure) -> Iterable[Text]:
    """All words that are drawn."""
    for text in area.findobj(Text):
        if text.get_text().strip() and text.get_visible():
            yield text


def shown(made: Figure) -> list[tuple[str, np.ndarray]]:
    """Words that are drawn, and where: left, bottom, right, top."""
    made.canvas.draw()  # pyright: ignore[reportAttributeAccessIssue]
    hidden = {text for axes in made.axes if not axes.axison for text in axes.findobj(Text)}
    ticks = {
        label
        for axes in made.axes
        for axis in (axes.xaxis, axes.yaxis)
        for label in axis.findobj(Text)
    }
    drawn = {
        tick.label1
        for axes in made.axes
        if axes.axison
        for axis in (axes.xaxis, axes.yaxis)
        for tick in axis._update_ticks()  # pyright: ignore[reportAttributeAccessIssue]
        if tick.label1.get_visible()
    } | {axis.label for axes in made.axes for axis in (axes.xaxis, axes.yaxis)}
    kept = [
        text
        for text in texts(made)
        if (text in drawn or text not in ticks)
        and (text not in hidden or text.get_color() == "#6b6b6b")
    ]
    return [(text.get_text(), place_of(text)) for text in kept]


def place_of(text: Text) -> np.ndarray:
    """Without the empty lines of a title, which make room."""
    place = np.array(text.get_window_extent().extents)
    lines = text.get_text().split("\n")
    empty = sum(not line.strip() for line in lines)
    place[1] += (place[3] - place[1]) * empty / len(lines)
    return place


def overlapping(places: list[tuple[str, np.ndarray]]) -> list[tuple[str, str]]:
    """Words that stand over each other by more than a pixel or two."""
    return [
        (words, others)
        for (words, one), (others, other) in combinations(places, 2)
        if (np.minimum(one[2:], other[2:]) - np.maximum(one[:2], other[:2])).min() > 2
    ]


SIZES: dict[str, tuple[str, dict[str, object]]] = {
    "one matrix": ("compare", {"layers": 1, "modules": ("q_proj",)}),
    "two layers": ("alignment", {"layers": 2}),
    "two models": ("compare", {"layers": 2, "runs": 2}),
    "two models by module": ("alignment", {"layers": 2, "runs": 2}),
    "series": ("trajectory", {"layers": 2}),
    "adapter": ("init-adapter", {"layers": 2}),
    "200 layers": ("compare", {"layers": 200, "modules": FEW, "hidden": 64}),
}


def check_places(kind: str, options: dict[str, object], style: str) -> None:
    made = figure(example(kind, **options), style=style)  # pyright: ignore[reportArgumentType]
    places = shown(made)
    width, height = made.bbox.width, made.bbox.height
    inside = (-1, -1, width + 1, height + 1)
    cut = [
        words
        for words, place in places
        if (place[:2] < inside[:2]).any() or (place[2:] > inside[2:]).any()
    ]
    assert places and cut == []
    assert overlapping(places) == []


def test_no_words_are_cut_or_overlap() -> None:
    check_places(*SIZES["two models"], "paper")


@pytest.mark.slow
@pytest.mark.parametrize("style", ["screen", "paper"])
@pytest.mark.parametrize("size", SIZES)
def test_no_words_are_cut_or_overlap_at_any_size(size: str, style: str) -> None:
    check_places(*SIZES[size], style)


def test_paper_is_as_wide_as_a_page_of_text_and_has_no_title() -> None:
    report = example("collapse", layers=1, modules=FEW)
    paper, screen = (figure(report, style=style) for style in ("paper", "screen"))
    assert paper.get_figwidth() < 7.1 < screen.get_figwidth()
    assert [bool(made.texts) for made in (paper, screen)] == [False, True]
    with pytest.raises(OptionError, match="style 'page' is not one of screen, paper"):
        figure(report, style="page")
