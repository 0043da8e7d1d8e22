"""The metric curve of a run, and how the weights of one matrix or of many go with it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import add

import torch

from geoscope.errors import CheckpointError, OptionError
from geoscope.records import Numbers
from geoscope.sources.metric_file import TRAINER_STATE, read_metrics, trainer_state_of
from geoscope.sources.series import Series
from geoscope.trajectory.increments import Increments
from geoscope.trajectory.metric_relation import metric_relation
from geoscope.trajectory.pls import LEAST_POINTS, PlsKernels, pls_kernels
from geoscope.trajectory.rank1 import Rank1Path, align_signs
from geoscope.trajectory.temporal import rank1_coefficients
from geoscope.verbs.series.options import FollowOptions

__all__ = ["MetricCurve", "MetricLink", "metric_curve", "metric_link"]


@dataclass(frozen=True)
class MetricCurve:
    """name: of the curve in file. values: step → y."""

    name: str
    file: str
    values: Mapping[int, float]


def metric_curve(
    series: Series, options: FollowOptions
) -> tuple[MetricCurve | None, tuple[str, ...]]:
    """The curve that was asked for, or that the last checkpoint has, and notes.

    Without `metrics` the trainer_state.json of the last checkpoint is read, if there is one; where
    it does not say which curve, or cannot be read, a note says so and the run is followed without.
    Raises OptionError where a curve that was asked for is not there, or not the only one.
    """
    if series.unit != "step":
        if options.metrics is not None or options.metric is not None:
            raise OptionError(
                f"{series.points[0].given}: counts {series.unit}s, and metric curves steps; give "
                "the steps of the checkpoints with `steps`"
            )
        return None, ()
    if options.metrics is not None:
        return _chosen(options.metrics, options.metric), ()
    state = trainer_state_of(series)
    if state is None:
        if options.metric is not None:
            raise OptionError(
                f"`metric` {options.metric}: the last checkpoint has no {TRAINER_STATE}; give "
                "`metrics` FILE"
            )
        return None, ()
    if options.metric is not None:
        return _chosen(str(state), options.metric), ()
    try:
        return _chosen(str(state), None), ()
    except (CheckpointError, OptionError) as error:
        return None, (f"not related to a metric: {error}",)


def _chosen(file: str, name: str | None) -> MetricCurve:
    curves = read_metrics(file)
    if name is None:
        if len(curves) > 1:
            raise OptionError(
                f"{file}: holds {len(curves)} curves; choose one with `metric`: {', '.join(curves)}"
            )
        name = next(iter(curves))
    if name not in curves:
        raise OptionError(f"{file}: has no curve {name!r}; there are {', '.join(curves)}")
    return MetricCurve(name, file, curves[name])


@dataclass(frozen=True)
class MetricLink:
    """A curve beside a series. rows: places of the checkpoints with a value at which the model has
    moved. features: of u1 of every matrix that has one at all of them.
    """

    curve: MetricCurve
    rows: tuple[int, ...]
    steps: tuple[float, ...]
    increments: Mapping[str, Increments]
    paths: Mapping[str, Rank1Path]
    features: Mapping[str, PlsKernels]
    seed: int

    def of(self, names: Sequence[str]) -> Numbers:
        """Of these matrices together: sums of Grams, √Σσ1², features side by side."""
        inc = reduce(add, (self.increments[name] for name in names))
        rows = list(self.rows)
        paths = [self.paths[name] for name in names if name in self.paths]
        features = [self.features[name] for name in names if name in self.features]
        return metric_relation(
            self.steps,
            [self.curve.values[int(step)] for step in self.steps],
            coefficient=rank1_coefficients(inc)[rows],
            norm=inc.G.diagonal().clamp_min(0).sqrt()[rows],
            sigma1=torch.stack([p.sigma for p in paths]).norm(dim=0)[rows] if paths else None,
            features=reduce(add, features) if features else None,
            seed=self.seed,
        )

    @property
    def note(self) -> str:
        """Which curve, and at how many checkpoints."""
        total = len(next(iter(self.increments.values())))
        return (
            f"metric {self.curve.name} of {self.curve.file}: a value at {len(self.rows)} of "
            f"{total} checkpoints"
        )


def metric_link(
    curve: MetricCurve,
    increments: Mapping[str, Increments],
    paths: Mapping[str, Rank1Path],
    *,
    seed: int = 0,
) -> MetricLink:
    """The curve beside the increments and leading pairs of Δ_i of a series' matrices."""
    total = reduce(add, increments.values())
    steps = total.steps[1:]
    moved = (total.G.diagonal() > 0).tolist()
    rows = tuple(i for i, step in enumerate(steps) if moved[i] and step in curve.values)
    features = {
        name: pls_kernels(align_signs(path)[0].u)
        for name, whole in paths.items()
        if len(rows) >= LEAST_POINTS
        for path in [_at(whole, rows)]
        if bool((path.sigma > 0).all())
    }
    kept = tuple(steps[i] for i in rows)
    return MetricLink(curve, rows, kept, increments, paths, features, seed)


def _at(path: Rank1Path, rows: Sequence[int]) -> Rank1Path:
    """The path at some of its steps."""
    at = list(rows)
    return Rank1Path(path.sigma[at], path.second[at], path.norm[at], path.u[at], path.v[at])
