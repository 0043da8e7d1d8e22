"""A series step by step: path, directions, rank-1 part, temporal components, held-out skill."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import SubFigure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from geoscope.records import LayerRecord, Steps
from geoscope.report.numbers import number
from geoscope.report.panels.drawing import (
    GREY,
    INK,
    LEFT,
    LIGHT,
    RIGHT,
    key_below,
    log_axis,
    module_colours,
    nothing,
    panel_title,
)
from geoscope.report.panels.modules import Parts, shown_modules, shown_words, subject_of
from geoscope.report.sections import Section, Subject

__all__ = [
    "draw_trajectory_alignment",
    "draw_trajectory_changed",
    "draw_trajectory_cosines",
    "draw_trajectory_depth",
    "draw_trajectory_norms",
    "draw_trajectory_pca",
    "draw_trajectory_rank1",
    "draw_trajectory_ranks",
    "draw_trajectory_sigma1",
    "draw_trajectory_skill",
    "has_changes",
    "has_spectra",
]

_SHOWN_SKILLS = (
    ("two_point", "two-point", "#56B4E9"),
    ("linear", "linear", RIGHT),
    ("damped(linear)", "linear, damped", INK),
    ("relex", "RELEX", LEFT),
    ("relex_pinned", "RELEX, pinned", "#CC79A7"),
    ("auto", "auto", "#009E73"),
)

_DEPTH_SHARE = re.compile(r"depth_share@(\d{1,6})_by_step")
_AROUND = 1.2  # room above and below the lines of a logarithmic axis
# Ids by step, each over its null; of an adapter effective rank over r as it is.
_OF_RANKS = (
    ("update.stable_rank", "stable rank", INK),
    ("update.effective_rank", "effective rank", RIGHT),
    ("update.top_share@1", "top share", LEFT),
    ("rank_ratio", "effective rank, tuned", "#009E73"),
)
_OF_ALIGNMENT = (
    ("spectral_share", "NSS/ρ", INK),
    ("energy_two_sided@{k}", "C_LR({k})", RIGHT),
    ("angle_left_mean@{k}", "mean angle left", LEFT),
    ("angle_right_mean@{k}", "mean angle right", "#CC79A7"),
)


def has_changes(parts: Parts) -> bool:
    """Whether entries are stored step by step; an adapter is sent whole."""
    return "changed_share_by_step" in parts[0].series


def has_spectra(parts: Parts) -> bool:
    """Whether spectra by step were asked for."""
    return "update.stable_rank_by_step" in parts[0].series


def draw_trajectory_ranks(area: SubFigure, parts: Parts) -> None:
    """Ranks of the update by step, over those of an isotropic one."""
    section, axes = parts[0], area.subplots()
    _over_nulls(axes, section, _OF_RANKS)
    shares = section.series.get("effective_rank_share_by_step", ())
    _draw(axes, section, shares, "#E69F00", "effective rank, over r_max", "s:")
    _finish_over_nulls(area, axes, "Spectrum of the update by step")


def draw_trajectory_alignment(area: SubFigure, parts: Parts) -> None:
    """How the update lies in the base by step, over an isotropic one."""
    section, axes = parts[0], area.subplots()
    k = section.whole.k
    rows = [(key.format(k=k), label.format(k=k), colour) for key, label, colour in _OF_ALIGNMENT]
    _over_nulls(axes, section, rows)
    _finish_over_nulls(area, axes, "Alignment with the base by step")


def _over_nulls(axes: Axes, section: Section, rows: Sequence[tuple[str, str, str]]) -> None:
    for key, label, colour in rows:
        values = section.series.get(f"{key}_by_step", ())
        nulls = section.series.get(f"{key}_null", ())
        ratios = tuple(
            one / null if one is not None and null else None
            for one, null in zip(values, nulls, strict=False)
        )
        _draw(axes, section, ratios, colour, label)


def _finish_over_nulls(area: SubFigure, axes: Axes, title: str) -> None:
    if not axes.lines:
        nothing(axes, "no resolved number by step")
        return
    axes.axhline(1, color=GREY, lw=0.8)
    drawn = np.concatenate([np.asarray(line.get_ydata(), dtype=float) for line in axes.lines])
    above = drawn[drawn > 0]
    log_axis(axes, "y", float(above.min()) / _AROUND, float(above.max()) * _AROUND)
    panel_title(axes, title, "over the isotropic value; 1: as an isotropic update")
    key_below(area, axes)


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
    count = len(section.steps[1:])
    grams = [
        np.array([_at_steps(section, row) for row in layer.gram], dtype=float)
        for layer in section.layers
        if layer.gram and len(layer.gram) == count
    ]
    if not grams:
        nothing(axes, "no Gram matrices in this report")
        return
    H = sum(grams[1:], grams[0])
    with np.errstate(divide="ignore", invalid="ignore"):
        lengths = np.sqrt(np.diag(H))
        cosines = H / np.outer(lengths, lengths)
    edges = np.array(section.steps, dtype=float)
    mesh = axes.pcolormesh(edges, edges, cosines, cmap="RdBu_r", vmin=-1, vmax=1)
    panel_title(axes, "Cosines between increments", "of a random walk 0 off the diagonal")
    axes.set(xlabel="step", ylabel="step")
    bar = area.colorbar(mesh, ax=axes, aspect=30, pad=0.02)
    bar.outline.set_visible(False)  # pyright: ignore[reportCallIssue]
    bar.ax.tick_params(length=0, colors=GREY)


def draw_trajectory_changed(area: SubFigure, parts: Parts) -> None:
    """Share of stored entries that changed in a step, by module kind; dashed the isotropic null."""
    section = parts[0]
    axes = area.subplots()
    drawn = 0
    colours = module_colours(shown_modules(parts))
    for module in shown_modules(parts):
        subject = subject_of(section, module)
        for key, label, dashes in (
            ("changed_share_by_step", module, "o-"),
            ("changed_share_null", "", "--"),
        ):
            share = _of_entries(section, subject, key)
            drawn += share is not None and _draw(
                axes, section, share, colours[module], label, dashes
            )
    if not drawn:
        nothing(axes, "not every matrix has stored entries")
        return
    below = f"by module kind{shown_words(parts)}; dashed: isotropic; dotted: sync equals a copy"
    panel_title(axes, "Entries rewritten in a step", below)
    even = section.whole.values.get("sync_break_even")
    if even is not None:
        axes.axhline(float(even), color=GREY, ls=":", lw=1.2)
    axes.set_ylim(0, None)
    key_below(area, axes)


def draw_trajectory_depth(area: SubFigure, parts: Parts) -> None:
    """Share of the update's energy by block and step, and its centre beside that of the entries."""
    section = parts[0]
    axes = area.subplots()
    rows = _depth_rows(section)
    centre = _at_steps(section, section.series.get("depth_centre_by_step", ()))
    if not rows or not _known(centre):
        nothing(axes, "no energy by block in this report")
        return
    first, last = min(rows), max(rows)
    absent: Steps = (None,) * len(centre)
    table = [rows.get(block, absent) for block in range(first, last + 1)]
    edges = np.arange(first - 0.5, last + 1)
    steps = np.array(section.steps, dtype=float)
    mesh = axes.pcolormesh(steps, edges, np.array(table, dtype=float), cmap="Blues", vmin=0)
    axes.plot(*zip(*_points(section.steps[1:], centre), strict=True), "o-", ms=3, color=LEFT)
    if (null := section.whole.nulls.get("depth_centre")) is not None:
        axes.axhline(null, color=GREY, ls=":", lw=1.2)
    below = "share of each block; line: the centre, dotted: that of the entries"
    panel_title(axes, "Energy of the update by block", below)
    axes.set(xlabel="step", ylabel="block")
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    bar = area.colorbar(mesh, ax=axes, aspect=30, pad=0.02)
    bar.outline.set_visible(False)  # pyright: ignore[reportCallIssue]
    bar.ax.tick_params(length=0, colors=GREY)


def _depth_rows(section: Section) -> dict[int, Steps]:
    """Block → its share of the update's energy, step by step."""
    return {
        int(match[1]): _at_steps(section, row)
        for key, row in section.series.items()
        if (match := _DEPTH_SHARE.fullmatch(key))
    }


def _at_steps(section: Section, row: Steps) -> Steps:
    """A number for each step after the base: None for what the row does not have."""
    count = len(section.steps[1:])
    return (*row, *(None,) * count)[:count]


def _of_entries(section: Section, subject: Subject, key: str) -> Steps | None:
    """A series of shares of the matrices of a kind, weighted by their entries."""
    rows = [_at_steps(section, layer.series.get(key, ())) for layer in subject.layers]
    weights = [float(math.prod(layer.shape)) for layer in subject.layers]
    if not all(map(_is_whole, rows)) or not sum(weights):
        return None
    return tuple(np.average(np.array(rows, dtype=float), axis=0, weights=weights).tolist())


def _is_whole(series: Steps) -> bool:
    """Whether there is a number at every step."""
    return bool(series) and None not in series


def draw_trajectory_rank1(area: SubFigure, parts: Parts) -> None:
    """Share of the update's energy on its leading pair, by module kind."""
    section = parts[0]
    axes = area.subplots()
    drawn = 0
    colours = module_colours(shown_modules(parts))
    for module in shown_modules(parts):
        subject = subject_of(section, module)
        share = _pooled_share(section, subject)
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
        rows = [
            _at_steps(section, layer.series["sigma1"])
            for layer in subject.layers
            if "sigma1" in layer.series
        ]
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


def _pooled_share(section: Section, subject: Subject) -> Steps | None:
    """Σσ1²/Σ‖Δ‖² of the matrices of a kind, step by step."""
    rows = [
        (_at_steps(section, layer.series["sigma1"]), _at_steps(section, norms))
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
