"""The credible horizon: none for walks, far for drifts, and each of its three conditions."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

from geoscope.trajectory.backtest import Backtest, backtest
from geoscope.trajectory.horizon import LEAST_ORIGINS, Distance, _horizon, credible_horizon
from geoscope.trajectory.increments import Increments, increments_of_weights

EQUAL = tuple(10.0 * i for i in range(13))
UNEQUAL = (0.0, 4.0, 10.0, 25.0, 30.0, 44.0, 50.0, 51.0, 70.0, 90.0, 95.0, 120.0, 130.0)


def sampled(
    drift: float, seed: int, count: int = 12, steps: tuple[float, ...] = EQUAL, size: int = 4000
) -> Backtest:
    """Walks with a drift per unit of time, `size` entries a tensor."""
    generator = torch.Generator().manual_seed(seed)
    gaps = torch.tensor(steps).double().diff()[:, None]
    inc = {}
    for number in range(count):
        A = torch.randn(1, size, generator=generator).double()
        noise = torch.randn(len(gaps), size, generator=generator).double()
        rows = drift * gaps * A + gaps.sqrt() * noise
        inc[str(number)] = Increments(steps, rows @ rows.T, (0.0,) * len(steps), 1.0)
    return backtest(inc)


@pytest.mark.parametrize("steps", [EQUAL, UNEQUAL])
def test_a_walk_has_none(steps: tuple[float, ...]) -> None:
    inc = Increments(steps, torch.tensor(steps).double().diff().diag(), (0.0,) * 13, 1.0)
    test = backtest({str(i): inc for i in range(4)})
    for method in test.methods:
        found = credible_horizon(test, method)
        assert found.steps == 0
        assert found.stopped_by == "skill"


@pytest.mark.slow
def test_sampled_walks_seldom_have_one() -> None:
    """A pass at the nearest distance needs a median and a bound above 0 by chance."""
    found = [
        credible_horizon(sampled(0.0, seed), method, draws=199).steps
        for seed in range(10)
        for method in ("damped(linear)", "damped(relex_pinned)", "auto")
    ]
    assert sum(steps > 0 for steps in found) <= 3


@pytest.mark.parametrize("steps", [EQUAL, UNEQUAL])
def test_a_drift_has_one(steps: tuple[float, ...]) -> None:
    test = sampled(0.5, 1, steps=steps)
    for method in ("linear_origin", "damped(linear)", "damped(relex_pinned)", "auto"):
        found = credible_horizon(test, method)
        assert found.stopped_by == "end"
        assert found.resolved == found.steps
        # origins 4 … 11, three of which reach six checkpoints ahead
        reached = [one for one in found.distances if one.passes]
        assert [one.checkpoints for one in reached] == [1, 2, 3, 4, 5, 6]
        assert found.steps == min(steps[o + 6] - steps[o] for o in range(4, 7))
        assert found.distances[5].origins == 3


def test_distances_are_the_least_of_each_group() -> None:
    found = credible_horizon(sampled(0.5, 1, steps=UNEQUAL), "linear")
    least = [min(UNEQUAL[o + h] - UNEQUAL[o] for o in range(4, 13 - h)) for h in range(1, 9)]
    assert [one.steps for one in found.distances] == least
    assert least == sorted(least)


def test_one_odd_tensor_fails_the_bound() -> None:
    """One of eight tensors carries all the skill: without it, as in many draws, there is none."""
    walk, line = torch.eye(12, dtype=torch.float64), torch.full((12, 12), 20.0).double()
    inc = {str(i): Increments(EQUAL, walk, (0.0,) * 13, 1.0) for i in range(7)}
    inc["odd"] = Increments(EQUAL, line, (0.0,) * 13, 1.0)
    found = credible_horizon(backtest(inc), "linear_origin")
    first = found.distances[0]
    assert first.bound is not None and first.skill is not None
    assert first.skill > 0 > first.bound
    assert (found.steps, found.stopped_by) == (0, "bound")


def test_three_origins_are_needed() -> None:
    steps = tuple(float(t) for t in range(6))
    lines = {"a": Increments(steps, torch.ones(5, 5).double(), (0.0,) * 6, 1.0)}
    found = credible_horizon(backtest(lines), "linear")
    assert [one.origins for one in found.distances] == [2, 1]
    assert (found.steps, found.stopped_by) == (0, "origins")
    assert credible_horizon(backtest({"a": lines["a"].observed(3)}), "linear").distances == ()


def test_tensors_that_never_move() -> None:
    still = Increments(EQUAL, torch.zeros(12, 12, dtype=torch.float64), (0.0,) * 13, 1.0)
    found = credible_horizon(backtest({"still": still}), "linear")
    assert (found.steps, found.stopped_by) == (0, "origins")
    assert found.distances[0].skill is None
    assert found.distances[0].error is None


@pytest.mark.slow
@pytest.mark.parametrize(("drift", "found"), [(0.0, 0.0), (1.0, 6.0)])
def test_storage_rounding_is_not_taken_for_skill(drift: float, found: float) -> None:
    """bf16: fits average the last checkpoint's rounding away, which is a gain of a walk too."""
    generator = torch.Generator().manual_seed(1)
    inc = {}
    for number in range(8):
        A, W = (torch.randn(40000, generator=generator).double() for _ in range(2))
        path = [W.bfloat16()]
        for _ in range(12):
            W = W + 0.01 * (torch.randn(40000, generator=generator).double() + drift * A)
            path.append(W.bfloat16())
        inc[str(number)] = increments_of_weights(range(13), path)
    test = backtest(inc)
    horizons = {method: credible_horizon(test, method, draws=199) for method in test.methods}
    if drift == 0:
        assert horizons["damped(relex)"].steps > 0  # the gain
        assert max(one.resolved for one in horizons.values()) == found
    else:
        assert horizons["damped(linear)"].resolved == horizons["auto"].resolved == found


def test_seeded() -> None:
    test = sampled(0.02, 2)
    one, two = (credible_horizon(test, "damped(linear)", seed=7) for _ in range(2))
    assert one == two
    other = credible_horizon(test, "damped(linear)", seed=8)
    assert [d.skill for d in other.distances] == [d.skill for d in one.distances]
    assert [d.bound for d in other.distances] != [d.bound for d in one.distances]


def test_errors_grow_with_the_distance() -> None:
    found = credible_horizon(sampled(0.1, 3), "damped(linear)")
    held = [one.held for one in found.distances[:6]]
    assert all(a < b for a, b in pairwise(held) if a and b)
    for one in found.distances:
        assert one.error is not None and math.isfinite(one.error)


@pytest.mark.parametrize(
    ("third", "stopped_by"),
    [
        ({"skill": -0.1, "bound": -0.2}, "skill"),
        ({"skill": 0.1, "bound": -0.2}, "bound"),
        ({"origins": LEAST_ORIGINS - 1}, "end"),
        ({"skill": None, "bound": None}, "end"),
        ({}, "end"),
    ],
)
def test_where_it_ends_and_how_far_rounding_explains_nothing(
    third: dict[str, float | None], stopped_by: str
) -> None:
    """Three distances: the first beyond rounding, the second as far as rounding explains."""
    far: dict[str, float | None] = {"skill": 0.3, "bound": 0.2, "floor": 0.25, "origins": 9}
    facts = [far | {"floor": 0.1}, far, far | third]
    distances = tuple(
        Distance(checkpoints=i, steps=10.0 * i, error=0.1, held=0.2, **own)  # pyright: ignore[reportArgumentType]
        for i, own in enumerate(facts, start=1)
    )
    found = _horizon(distances)
    assert found.steps == (20.0 if third else 30.0)
    assert found.resolved == 10.0
    assert found.stopped_by == stopped_by
    assert found.distances == distances


def test_no_distance_is_no_horizon() -> None:
    found = _horizon(())
    assert (found.steps, found.resolved, found.stopped_by) == (0.0, 0.0, "origins")
