"""The figures of docs/study.md, from the CSV files."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.study.design import LEVELS
from benchmarks.study.outcomes import EARLY, END, OUTCOMES
from benchmarks.study.resampling import Estimate
from benchmarks.study.tables import Results

__all__ = ["FIGURES", "write_figures"]

_COLOURS = dict(zip(OUTCOMES, ("#b2182b", "#ef8a62", "#2166ac", "#bbbbbb"), strict=True))
_SHOWN = 24


def _outcomes(results: Results) -> Figure:
    """A mark for each run at its method and rate, in the colour of its outcome."""
    study = results.study
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    methods, blocks = list(dict.fromkeys(study.method)), list(dict.fromkeys(study.block))
    for method, block, level, outcome in zip(
        study.method, study.block, study.level, study.outcomes, strict=True
    ):
        height = methods.index(method) + 0.7 * ((blocks.index(block) + 0.5) / len(blocks) - 0.5)
        axes.plot(level, height, "s", color=_COLOURS[outcome], ms=5)
    axes.set_yticks(range(len(methods)), methods)
    axes.set_xticks(range(LEVELS), [f"rate {n + 1}" for n in range(LEVELS)])
    axes.invert_yaxis()
    for outcome, colour in _COLOURS.items():
        axes.plot([], [], "s", color=colour, label=outcome)
    axes.legend(ncols=4, loc="upper center", bbox_to_anchor=(0.5, 1.12), frameon=False)
    return figure


def _aucs(results: Results) -> Figure:
    """AUC at both checkpoints of the statistics that tell most at the early one."""
    known = [line for line in results.lines[EARLY] if line.auc.value is not None]
    known.sort(key=lambda line: abs((line.auc.value or 0.5) - 0.5), reverse=True)
    figure = Figure(figsize=(7, 6), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    shown = known[:_SHOWN]
    _forest(left, [line.auc for line in shown], results.bars[EARLY], f"step {EARLY}, all runs")
    ends = {line.name: line.auc for line in results.lines[END]}
    _forest(right, [ends[line.name] for line in shown], results.bars[END], f"step {END}, all runs")
    left.set_yticks(range(len(shown)), [line.name for line in shown], fontsize=6)
    left.invert_yaxis()
    return figure


def _forest(axes: Axes, estimates: list[Estimate], bar: float, title: str) -> None:
    for place, each in enumerate(estimates):
        if each.value is not None and each.low is not None and each.high is not None:
            axes.plot([each.low, each.high], [place, place], color="#555555", lw=1)
            axes.plot(each.value, place, "o", color="#2166ac", ms=4)
    axes.axvspan(0.5 - bar, 0.5 + bar, color="#eeeeee", zorder=0)
    axes.axvline(0.5, color="#999999", lw=0.8)
    axes.set_xlim(0, 1)
    axes.set_title(title, fontsize=8)
    axes.set_xlabel("AUC for failed; grey: the best by chance", fontsize=7)


def _size(results: Results) -> Figure:
    """Relative update against accuracy gained, in the colour of the outcome."""
    study = results.study
    figure = Figure(figsize=(7, 3), layout="constrained")
    for axes, step in zip(figure.subplots(1, 2, sharey=True), (EARLY, END), strict=True):
        rho = study.statistic("relative_update", step)
        for outcome, colour in _COLOURS.items():
            own = study.outcomes == outcome
            axes.plot(rho[own], study.gain[own], "o", color=colour, ms=3, label=outcome)
        axes.set_xscale("log")
        axes.set_xlabel(f"relative update ρ at step {step}", fontsize=8)
    figure.axes[0].set_ylabel("accuracy gained at the end", fontsize=8)
    figure.axes[0].legend(fontsize=6)
    return figure


FIGURES: Mapping[str, Callable[[Results], Figure]] = {
    "outcomes": _outcomes,
    "aucs": _aucs,
    "size": _size,
}


def write_figures(results: Results, folder: Path) -> None:
    """study-NAME.svg for each figure; equal tables give equal bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context({"svg.hashsalt": "study", "svg.fonttype": "none"}):
        for name, draw in FIGURES.items():
            draw(results).savefig(folder / f"study-{name}.svg", metadata={"Date": None})
