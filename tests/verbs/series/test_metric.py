"""`--metrics` and `--metric`: which curve is taken, and what of it stands in the report."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from geoscope.demo import unpack
from geoscope.errors import OptionError
from geoscope.records import Report
from geoscope.report.text import render_text
from geoscope.sources.metric_file import TRAINER_STATE
from geoscope.sources.series import Series, open_series
from geoscope.trajectory.increments import Increments
from geoscope.trajectory.metric_relation import METRIC_RELATIONS
from geoscope.trajectory.rank1 import Rank1Path
from geoscope.verbs.series.follow import follow
from geoscope.verbs.series.metric import MetricCurve, metric_curve, metric_link
from geoscope.verbs.series.options import FollowOptions
from geoscope.verbs.series.report import IDS

STEPS = (40, 80, 120, 160, 200, 240, 280, 320)
REWARD = (0.2, 0.4, 0.5, 0.55, 0.7, 0.72, 0.73, 0.8)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The demo's run of 8 checkpoints, its log taken away."""
    unpack(tmp_path / "demo")
    (tmp_path / "demo" / "grpo" / "checkpoint-320" / TRAINER_STATE).unlink(missing_ok=True)
    return tmp_path / "demo"


@pytest.fixture
def series(run: Path) -> Series:
    return open_series([str(run / "grpo")])


def csv_of(folder: Path, *, steps: tuple[int, ...] = STEPS) -> str:
    rows = [f"{t},{y},{1 - y}" for t, y in zip(STEPS, REWARD, strict=True) if t in steps]
    path = folder / "metrics.csv"
    path.write_text("\n".join(["step,reward,loss", *rows]), encoding="utf-8")
    return str(path)


def log(run: Path, *names: str) -> None:
    entries = [{"step": t, **dict.fromkeys(names, y)} for t, y in zip(STEPS, REWARD, strict=True)]
    text = json.dumps({"log_history": entries})
    (run / "grpo" / "checkpoint-320" / TRAINER_STATE).write_text(text, encoding="utf-8")


# --- which curve ----------------------------------------------------------------------------------


def test_a_curve_is_taken_by_name(series: Series, tmp_path: Path) -> None:
    file = csv_of(tmp_path)
    curve, notes = metric_curve(series, FollowOptions(metrics=file, metric="reward"))
    assert curve == MetricCurve("reward", file, dict(zip(STEPS, REWARD, strict=True)))
    assert notes == ()


@pytest.mark.parametrize(
    ("name", "said"),
    [(None, "holds 2 curves.*`metric`: loss, reward"), ("kl", "no curve 'kl'.*loss, reward")],
)
def test_a_curve_that_is_not_clear_is_an_error_with_the_names(
    series: Series, tmp_path: Path, name: str | None, said: str
) -> None:
    with pytest.raises(OptionError, match=said) as raised:
        metric_curve(series, FollowOptions(metrics=csv_of(tmp_path), metric=name))
    assert "\n" not in str(raised.value)


def test_the_log_of_the_last_checkpoint_is_used_by_itself(run: Path, series: Series) -> None:
    assert metric_curve(series, FollowOptions()) == (None, ())
    log(run, "reward")
    curve, _ = metric_curve(series, FollowOptions())
    assert curve is not None
    assert (curve.name, curve.values[320]) == ("reward", 0.8)


def test_a_log_that_nobody_asked_for_stops_nothing(run: Path, series: Series) -> None:
    log(run, "reward", "loss")
    curve, notes = metric_curve(series, FollowOptions())
    assert curve is None
    assert "loss, reward" in notes[0]
    chosen, _ = metric_curve(series, FollowOptions(metric="loss"))
    assert chosen is not None
    (run / "grpo" / "checkpoint-320" / TRAINER_STATE).write_text("{", encoding="utf-8")
    curve, notes = metric_curve(series, FollowOptions())
    assert curve is None
    assert notes[0].startswith("not related to a metric: ")


def test_a_name_without_a_file_is_an_error(series: Series) -> None:
    with pytest.raises(OptionError, match=r"`metric` reward.*no trainer_state\.json.*`metrics`"):
        metric_curve(series, FollowOptions(metric="reward"))


def test_epochs_are_not_taken_for_steps(series: Series, tmp_path: Path) -> None:
    epochs = replace(series, unit="epoch")
    assert metric_curve(epochs, FollowOptions()) == (None, ())
    with pytest.raises(OptionError, match=r"counts epochs.*`steps`"):
        metric_curve(epochs, FollowOptions(metrics=csv_of(tmp_path), metric="reward"))


# --- at which checkpoints -------------------------------------------------------------------------


def walked(T: int, *, still: int = 0, seed: int = 0) -> tuple[Increments, Rank1Path]:
    """Increments and directions; the first `still` updates are zero."""
    generator = torch.Generator().manual_seed(seed)
    moves = torch.randn(T, 30, generator=generator, dtype=torch.float64)
    moves[:still] = 0
    sigma = moves.cumsum(0).norm(dim=1)
    u = torch.nn.functional.normalize(moves.cumsum(0), dim=1)
    inc = Increments(tuple(map(float, range(T + 1))), moves @ moves.T, (0.0,) * (T + 1), 1.0)
    return inc, Rank1Path(sigma, sigma * 0, sigma, u, torch.ones_like(u) / 30**0.5)


def test_only_checkpoints_with_a_value_at_which_the_model_moved_count() -> None:
    one, other = walked(12, still=1), walked(12, still=3, seed=1)
    curve = MetricCurve("reward", "m.csv", {t: t**0.5 for t in range(13) if t != 6})
    link = metric_link(curve, {"a": one[0], "b": other[0]}, {"a": one[1], "b": other[1]})
    assert link.rows == (1, 2, 3, 4, 6, 7, 8, 9, 10, 11)
    assert link.steps == (2, 3, 4, 5, 7, 8, 9, 10, 11, 12)
    assert "10 of 12" in link.note
    # b has no direction at some of them: its features are left out, not guessed
    assert set(link.features) == {"a"}
    assert link.of(["b"]).values["pls_r2"] is None
    both, alone = link.of(["a", "b"]), link.of(["a"])
    assert both.values["pls_r2"] == alone.values["pls_r2"] is not None
    assert both.values["metric_correlation"] != alone.values["metric_correlation"]


def test_a_metric_without_a_value_at_any_checkpoint_relates_to_nothing() -> None:
    inc, path = walked(8)
    link = metric_link(MetricCurve("reward", "m.csv", {100: 1.0}), {"a": inc}, {"a": path})
    assert link.of(["a"]).values["metric_points"] == 0
    assert "0 of 8" in link.note


# --- in the report --------------------------------------------------------------------------------


def followed(run: Path, **options: str | bool | None) -> Report:
    chosen = FollowOptions(base=str(run / "base"), jobs=1, **options)  # pyright: ignore[reportArgumentType]
    return follow([str(run / "grpo")], options=chosen)


@pytest.mark.slow
def test_the_report_relates_matrices_kinds_and_the_model(run: Path, tmp_path: Path) -> None:
    report = followed(run, metrics=csv_of(tmp_path), metric="reward")
    model = report.summary.model
    assert model["metric_points"] == 8
    assert {key for key in model if key.startswith(("metric_", "pls_"))} <= set(IDS)
    for values in (*(one.values for one in report.layers), *report.summary.modules.values()):
        assert set(METRIC_RELATIONS) <= set(values)
    # in sample and held out stand together, for the model and as means over matrices
    layers = [one.values for one in report.layers]
    for key in ("pls_r2", "pls_skill"):
        assert model[key] is not None
        mean = sum(one[key] or 0 for one in layers) / len(layers)
        assert model[f"{key}_mean"] == pytest.approx(mean)
    assert set(report.summary.nulls) >= {"pls_r2", "pls_r2_mean"}
    assert "a value at 8 of 8 checkpoints" in report.provenance.parameters["notes"][-1]
    text = render_text(report, width=100, colour=False, details=True)
    assert "relation with the metric" in text
    assert "held-out skill" in text
    assert Report.loads(report.dumps()) == report


def test_without_a_metric_the_report_says_nothing_of_one(run: Path) -> None:
    report = followed(run, directions=False)
    assert not [key for key in report.summary.model if key.startswith(("metric_", "pls_"))]
    assert "relation with the metric" not in render_text(
        report, width=100, colour=False, details=True
    )


@pytest.mark.slow
def test_without_directions_the_correlations_stand(run: Path, tmp_path: Path) -> None:
    report = followed(run, metrics=csv_of(tmp_path), metric="reward", directions=False)
    assert report.summary.model["metric_correlation"] is not None
    assert report.summary.model["pls_r2"] is None
    assert report.summary.model["pls_r2_mean"] is None
