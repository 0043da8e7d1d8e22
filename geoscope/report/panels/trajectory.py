"""A series step by step: path, directions, rank-1 part, temporal components, held-out skill."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import SubFigure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from geoscope.records import LayerRecord, Steps
from geoscope.report.numbers import number
from geoscope.report.panels.drawing import (
    GREY,
    INK,
    LEFT,
    LIGHT,
    RIGHT,
    key_below,
    module_colours,
    nothing,
    panel_title,
)
from geoscope.report.panels.modules import Parts, shown_modules, shown_words, subject_of
from geoscope.report.sections import Section, Subject

__all__ = [
    "draw_trajectory_cosines",
    "draw_trajectory_norms",
    "draw_trajectory_pca",
    "draw_trajectory_rank1",
    "draw_trajectory_sigma1",
    "draw_trajectory_skill",
]

_SHOWN_SKILLS = (
    ("two_point", "two-point", "#56B4E9"),
    ("linear", "linear", RIGHT),
    ("damped(linear)", "linear, damped", INK),
    ("relex", "RELEX", LEFT),
    ("relex_pinned", "RELEX, pinned", "#CC79A7"),
    ("auto", "auto", "#009E73"),
)


def draw_trajectory_norms(area: SubFigure, parts: Parts) -> None:
    """Distance from the base and length of each step, relative to the base where it is known."""
    section = parts[0]
    axes = area.subplots()
    relative = _known(section.series.get("relative_update_by_step", ()))
    distance, step = (
        ("relative_update_by_step", "relative_step")
        if relative
        else ("update_norm_by_step", "step_norm")
    )
    if not _line(axes, section, distance, INK, "distance from the base ‖Δ‖"):
        nothing(axes, "no norms in this report")
        return
    _line(axes, section, step, LEFT, "length of the step ‖δ‖")
    _draw(axes, section, _walked(section.series.get(step, ())), GREY, "a walk of these steps", "--")
    below = "over the norm of the base" if relative else "in units of the weights"
    panel_title(axes, "Distance and step lengths", below)
    axes.set_ylim(0, None)
    key_below(area, axes)


def draw_trajectory_cosines(area: SubFigure, parts: Parts) -> None:
    """Cosines between the increments of all pairs of steps, all matrices together."""
    section = parts[0]
    axes = area.subplots()
    grams = [np.array(layer.gram) for layer in section.layers if layer.gram]
    if not grams:
        nothing(axes, "no Gram matrices in this report")
        return
    H = sum(grams[1:], grams[0])
    lengths = np.sqrt(np.diag(H))
    with np.errstate(divide="ignore", invalid="ignore"):
        cosines = H / np.outer(lengths, lengths)
    edges = np.array(section.steps, dtype=float)
    mesh = axes.pcolormesh(edges, edges, cosines, cmap="RdBu_r", vmin=-1, vmax=1)
    panel_title(axes, "Cosines between increments", "of a random walk 0 off the diagonal")
    axes.set(xlabel="step", ylabel="step")
    bar = area.colorbar(mesh, ax=axes, aspect=30, pad=0.02)
    bar.outline.set_visible(False)  # pyright: ignore[reportCallIssue]
    bar.ax.tick_params(length=0, colors=GREY)


def draw_trajectory_rank1(area: SubFigure, parts: Parts) -> None:
    """Share of the update's energy on its leading pair, by module kind."""
    section = parts[0]
    axes = area.subplots()
    drawn = 0
    colours = module_colours(shown_modules(parts))
    for module in shown_modules(parts):
        subject = subject_of(section, module)
        share = _pooled_share(subject)
        drawn += share is not None and _draw(axes, section, share, colours[module], module)
    if not drawn:
        nothing(axes, "no leading pairs in this report")
        return
    panel_title(axes, "Spatial rank-1 share σ1²/‖Δ‖²", f"by module kind{shown_words(parts)}")
    axes.set_ylim(0, None)
    key_below(area, axes)


def draw_trajectory_sigma1(area: SubFigure, parts: Parts) -> None:
    """σ1 of the update over the steps, the median of each module kind."""
    section = parts[0]
    axes = area.subplots()
    drawn = 0
    colours = module_colours(shown_modules(parts))
    for module in shown_modules(parts):
        subject = subject_of(section, module)
        rows = [layer.series["sigma1"] for layer in subject.layers if "sigma1" in layer.series]
        if rows:
            median = np.median(np.array(rows, dtype=float), axis=0)
            drawn += _draw(axes, section, tuple(median.tolist()), colours[module], module)
    if not drawn:
        nothing(axes, "no leading pairs in this report")
        return
    panel_title(axes, "Largest singular value of the update", "median of each module kind")
    axes.set_ylim(0, None)
    key_below(area, axes)


def draw_trajectory_pca(area: SubFigure, parts: Parts) -> None:
    """The run in its two leading temporal directions, and a walk of the same steps in its own."""
    section = parts[0]
    axes = area.subplots()
    drawn = False
    for prefix, colour, label in (("walk_", LIGHT, "random walk"), ("", INK, "this run")):
        x, y = (_known(section.series.get(f"{prefix}component{i}", ())) for i in (1, 2))
        if x and len(x) == len(y):
            drawn = True
            axes.plot([0, *x], [0, *y], "o-", ms=3, lw=1.2, color=colour, label=label)
    if not drawn:
        nothing(axes, "no temporal components in this report")
        return
    panel_title(axes, "Temporal components", "a walk draws this curve, too; see the drift fraction")
    axes.set(xlabel="first direction", ylabel="second direction")
    key_below(area, axes)


def draw_trajectory_skill(area: SubFigure, parts: Parts) -> None:
    """Held-out skill against the distance ahead."""
    section = parts[0]
    axes = area.subplots()
    distance = section.series.get("distance", ())
    drawn = False
    for method, label, colour in _SHOWN_SKILLS:
        skills = section.series.get(f"skill_by_distance@{method}", ())
        points = [
            (x, y)
            for x, y in zip(distance, skills, strict=False)
            if x is not None and y is not None
        ]
        if points:
            drawn = True
            axes.plot(*zip(*points, strict=True), "o-", ms=3, lw=1.2, color=colour, label=label)
    if not drawn:
        nothing(axes, "too few checkpoints to hold any out")
        return
    axes.axhline(0, color=GREY, lw=0.8)
    _show_below(axes)
    below = f"0: no better than the last checkpoint{_horizon(axes, section)}"
    panel_title(axes, "Held-out skill by distance", below)
    axes.set(xlabel="steps ahead", ylabel="skill")
    key_below(area, axes)


def _show_below(axes: Axes) -> None:
    """From −1 to 1; where a skill is lower the axis goes on, logarithmic beyond −1."""
    lowest = min(axes.get_ylim()[0], -1.05)
    if axes.dataLim.y0 >= -1.05:
        axes.set_ylim(-1.05, 1.05)
        return
    axes.set_yscale("symlog", linthresh=1)
    decades = [-(10.0**power) for power in range(1 + int(np.log10(-lowest)))]
    axes.set_ylim(1.5 * lowest, 1.15)
    axes.yaxis.set_major_locator(FixedLocator([*decades[::-1], -0.5, 0, 0.5, 1]))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_locator(NullLocator())


def _horizon(axes: Axes, section: Section) -> str:
    """A line at the credible horizon, and its words."""
    steps = section.whole.values.get("horizon")
    if not steps:
        return ""
    axes.axvline(float(steps), color=GREY, ls=":", lw=1.2)
    return f"; dotted: credible horizon, {number(steps)} steps"


def _walked(steps: Steps) -> Steps:
    """√Σ‖δ‖²: how far from its start a walk of these steps is expected."""
    lengths = np.array([np.nan if length is None else length for length in steps], dtype=float)
    return tuple(np.sqrt(np.cumsum(lengths**2)).tolist())


def _pooled_share(subject: Subject) -> Steps | None:
    """Σσ1²/Σ‖Δ‖² of the matrices of a kind, step by step."""
    rows = [
        (layer.series["sigma1"], norms)
        for layer in subject.layers
        if "sigma1" in layer.series and (norms := _norms(layer))
    ]
    if not rows:
        return None
    sigma, norm = (np.array([row[i] for row in rows], dtype=float) for i in (0, 1))
    energy = (norm**2).sum(0)
    share = np.divide((sigma**2).sum(0), energy, out=np.full_like(energy, np.nan), where=energy > 0)
    return tuple(None if np.isnan(one) else float(one) for one in share)


def _norms(layer: LayerRecord) -> Steps:
    return layer.series.get("update_norm_by_step", ())


def _known(series: Steps) -> list[float]:
    return [item for item in series if item is not None]


def _line(axes: Axes, section: Section, key: str, colour: str, label: str) -> bool:
    return _draw(axes, section, section.series.get(key, ()), colour, label)


def _draw(
    axes: Axes, section: Section, series: Steps, colour: str, label: str, dashes: str = "o-"
) -> bool:
    """One number a step after the base; whether there was any."""
    points = list(_points(section.steps[1:], series))
    if points:
        axes.plot(*zip(*points, strict=True), dashes, ms=3, lw=1.2, color=colour, label=label)
        axes.set_xlabel("step")
    return bool(points)


def _points(steps: Sequence[int], series: Steps) -> Iterator[tuple[int, float]]:
    return ((t, one) for t, one in zip(steps, series, strict=False) if one is not None)
