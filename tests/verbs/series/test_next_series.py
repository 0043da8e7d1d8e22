"""NExt through files: trained, backtested and written, in seconds because it trains little here."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from geoscope.errors import OptionError, Stopped
from geoscope.verbs.options import Progress
from geoscope.verbs.series.extrapolate import extrapolate
from geoscope.verbs.series.follow import measure_series
from geoscope.verbs.series.model_vectors import model_vectors
from geoscope.verbs.series.next_series import next_forecast, origins_of
from geoscope.verbs.series.opening import open_followed
from geoscope.verbs.series.options import FollowOptions
from geoscope.verbs.series.report import Trajectory
from geoscope.verbs.series.tensors import MatchedSeries
from tests.helpers.matrices import gaussian, save_model

NAME = "model.layers.{}.mlp.up_proj.weight"


def run_of(root: Path, steps: tuple[int, ...]) -> list[str]:
    """Two matrices that drift along one direction each, in fp32; the base is step 0."""
    for step in (0, *steps):
        tensors = {"model.norm.weight": torch.ones(6)}
        for i in range(2):
            direction = torch.outer(gaussian(8, 1, seed=i)[:, 0], gaussian(6, 1, seed=9 + i)[:, 0])
            noise = gaussian(8, 6, seed=100 * step + i, sd=1e-4)
            tensors[NAME.format(i)] = (
                gaussian(8, 6, seed=50 + i) + step * direction + noise
            ).float()
        save_model(root / (f"checkpoint-{step}" if step else "base"), tensors)
    return [str(root / f"checkpoint-{step}") for step in steps]


def test_the_step_is_rank_one_and_scales_with_the_family(tmp_path: Path) -> None:
    points = run_of(tmp_path, (10, 20, 30, 40, 50))
    options = FollowOptions(base=str(tmp_path / "base"))
    made = extrapolate(
        points, 60, tmp_path / "out", method="next", options=options, extend=(0.5, 1.0),
        training=5, force=True,
    )  # fmt: skip
    assert set(made.counts) == {"next"}
    last = load_file(tmp_path / "checkpoint-50" / "model.safetensors")
    half, whole = (load_file(tmp_path / "out" / c / "model.safetensors") for c in ("c0.5", "c1"))
    for i in range(2):
        name = NAME.format(i)
        step = whole[name].double() - last[name].double()
        values = torch.linalg.svdvals(step)
        assert float(values[1]) < 1e-5 * float(last[name].norm())
        torch.testing.assert_close(
            half[name].double() - last[name].double(), step / 2, atol=2e-6, rtol=0
        )
    assert torch.equal(whole["model.norm.weight"], last["model.norm.weight"])


def test_the_plain_prediction_is_the_family_at_its_distance(tmp_path: Path) -> None:
    points = run_of(tmp_path, (10, 20, 30, 40, 50))
    options = FollowOptions(base=str(tmp_path / "base"))
    given = {"method": "next", "options": options, "training": 5, "force": True}
    extrapolate(points, 60, tmp_path / "plain", **given)  # type: ignore[arg-type]
    extrapolate(points, 60, tmp_path / "family", extend=(1.0,), **given)  # type: ignore[arg-type]
    plain, family = (
        load_file(tmp_path / place / "model.safetensors") for place in ("plain", "family/c1")
    )
    assert all(torch.equal(plain[name], family[name]) for name in plain)


def test_what_next_cannot_take_is_one_line(tmp_path: Path) -> None:
    points = run_of(tmp_path, (10, 20, 30, 50, 90))
    options = FollowOptions(base=str(tmp_path / "base"))
    with pytest.raises(OptionError, match="equal distances"):
        extrapolate(points, 100, tmp_path / "out", method="next", options=options, training=2)
    with pytest.raises(OptionError, match="needs 4"):
        extrapolate(points[:3], 100, tmp_path / "out", method="next", options=options, training=2)
    with pytest.raises(OptionError, match="`method` next"):
        extrapolate(points, 100, tmp_path / "out", options=options, extend=(1.0,))
    assert not (tmp_path / "out").exists()


def series_of(tmp_path: Path, count: int) -> tuple[MatchedSeries, Trajectory]:
    points = run_of(tmp_path, tuple(range(10, 10 * count + 1, 10)))
    return opened(points, base=str(tmp_path / "base"))


def opened(points: Sequence[Path | str], **kwargs: Any) -> tuple[MatchedSeries, Trajectory]:
    options = FollowOptions(**kwargs)
    found = open_followed(list(map(str, points)), options, Progress(), in_parts=False)
    return found, measure_series(found, options, Progress())


@pytest.mark.parametrize(
    ("origins", "told"),
    [(None, "at step 40 on"), (2, "at steps 40, 80 on"), (3, "at steps 40, 60, 80 on")],
)
def test_the_backtest_trains_at_its_origins_and_says_so(
    tmp_path: Path, origins: int | None, told: str
) -> None:
    points = run_of(tmp_path, tuple(range(10, 130, 10)))
    counts: list[tuple[int, int]] = []
    progress = Progress(on_network=lambda done, total: counts.append((done, total)))
    made = extrapolate(
        points, 130, tmp_path / "out", method="next", training=3, force=True, progress=progress,
        options=FollowOptions(base=str(tmp_path / "base")), origins=origins,
    )  # fmt: skip
    assert any(f"trained again {told}" in note for note in made.notes)
    assert any("takes 3 (`origins`)" in note for note in made.notes) == (origins != 3)
    networks = 3 * ((origins or 1) + 1)  # u, v and sigma at each origin and at the end
    assert counts == [(done, networks) for done in range(networks + 1)]


def test_without_force_it_trains_where_a_horizon_takes_it(tmp_path: Path) -> None:
    points = run_of(tmp_path, tuple(range(1, 13)))
    counts: list[int] = []
    progress = Progress(on_network=lambda _, total: counts.append(total))
    with pytest.raises(OptionError, match="next is credible"):
        extrapolate(
            points, 14, tmp_path / "out", method="next", training=1, progress=progress,
            options=FollowOptions(base=str(tmp_path / "base")),
        )  # fmt: skip
    assert set(counts) == {12}


@pytest.mark.slow
def test_the_whole_model_is_predicted_as_published(tmp_path: Path) -> None:
    """Norms by their raw difference in the network of their length, embeddings by their pair."""
    for step in range(0, 60, 10):
        g = torch.Generator().manual_seed(step)
        tensors = {
            NAME.format(0): torch.randn(8, 6, generator=g),
            "model.embed_tokens.weight": torch.randn(9, 6, generator=g),
            "model.norm.weight": 1 + step * torch.ones(6),
        }
        save_model(tmp_path / f"checkpoint-{step}", tensors)
    points = [tmp_path / f"checkpoint-{step}" for step in range(0, 60, 10)]
    made = extrapolate(
        points, 60, tmp_path / "out", method="next", training=300, force=True, whole_model=True
    )
    assert made.counts == {"next": 3}
    assert any("1 norms and biases are predicted" in note for note in made.notes)
    last = load_file(tmp_path / "checkpoint-50" / "model.safetensors")
    new = load_file(tmp_path / "out" / "model.safetensors")
    assert all(not torch.equal(new[name], last[name]) for name in last)
    step = new["model.norm.weight"] - last["model.norm.weight"]
    assert float(step.mean()) > 1  # ten a checkpoint; the published rate goes part of the way
    found, followed = opened(points, include=(".",))
    forecast = next_forecast(
        found, followed, 60, training=300, origins=1,
        vectors=model_vectors(found, FollowOptions(include=(".",)), Progress()),
    )  # fmt: skip
    torch.testing.assert_close(
        step.double(), forecast.vectors["model.norm.weight"], atol=1e-4, rtol=0
    )
    assert set(forecast.pairs) == {NAME.format(0), "model.embed_tokens.weight"}


def test_what_is_of_next_is_refused_of_others(tmp_path: Path) -> None:
    points = run_of(tmp_path, (10, 20, 30, 40, 50))
    with pytest.raises(OptionError, match="`origins` works only with `method` next"):
        extrapolate(points, 60, tmp_path / "out", origins=2)
    with pytest.raises(OptionError, match="`whole_model` works only with `method` next"):
        extrapolate(points, 60, tmp_path / "out", whole_model=True)
    with pytest.raises(OptionError, match="`origins` 0"):
        extrapolate(points, 60, tmp_path / "out", method="next", origins=0)


@pytest.mark.parametrize("T", range(4, 30))
@pytest.mark.parametrize("horizon", [1, 2, 5])
def test_origins_are_reported_ones_that_have_seen_a_target(T: int, horizon: int) -> None:
    horizon = min(horizon, T - 2)
    origins = origins_of(T, horizon)
    reported = [o for o in range(max(3, math.ceil(T / 3)), T) if o > horizon]
    assert set(origins) <= set(reported)
    assert len(origins) == min(3, len(reported))
    assert origins_of(T, horizon, 99) == tuple(reported)
    assert origins_of(T, horizon, 1) == (reported[0],)


def test_its_skill_is_that_from_these_origins_alone(tmp_path: Path) -> None:
    """A method that holds elsewhere would show the skill of holding there."""
    found, made = series_of(tmp_path, 9)
    forecast = next_forecast(found, made, 100, training=3)
    test = made.backtest({"next": forecast.moves}).at(forecast.origins)
    assert {o for o, _ in test.pairs} == set(forecast.origins)
    whole = made.backtest({"next": forecast.moves})
    here = torch.tensor([o in forecast.origins for o, _ in whole.pairs])
    error, held = whole.error("next")[:, here].sum(), whole.held[:, here].sum()
    assert test.skill("next") == pytest.approx(1 - float(error) / float(held))
    elsewhere = whole.error("next")[:, ~here]
    assert torch.equal(elsewhere, whole.held[:, ~here])


def test_threads_change_no_number(tmp_path: Path) -> None:
    found, made = series_of(tmp_path, 6)
    one, two = (next_forecast(found, made, 70, training=20, jobs=jobs) for jobs in (1, 3))
    for name, pair in one.pairs.items():
        assert torch.equal(pair.dense(), two.pairs[name].dense())
    assert torch.equal(one.moves.ahead, two.moves.ahead)


def test_a_stop_ends_training_at_the_next_step(tmp_path: Path) -> None:
    found, made = series_of(tmp_path, 6)

    def stop(done: int, _total: int) -> None:
        raise Stopped(signal.SIGINT)

    started = time.monotonic()
    with pytest.raises(Stopped):
        next_forecast(found, made, 70, training=10**7, progress=Progress(on_network=stop))
    assert time.monotonic() - started < 30  # all steps take hours
