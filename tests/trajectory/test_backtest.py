"""Held-out errors from Grams against errors on the weights; what damping and choices may know."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

from geoscope.errors import OptionError
from geoscope.trajectory.backtest import PredictionProducts, backtest, pairs_of, skill_of
from geoscope.trajectory.extrapolators import EXTRAPOLATORS
from geoscope.trajectory.increments import Increments, increments_of_weights
from geoscope.trajectory.prediction import damp

STEPS = (0.0, 5.0, 10.0, 12.0, 20.0, 31.0, 40.0, 44.0, 60.0)
METHODS = tuple(EXTRAPOLATORS)


def model(
    drift: float, seed: int = 0, count: int = 6, steps: tuple[float, ...] = STEPS
) -> dict[str, list[torch.Tensor]]:
    """Weights at each step: drift·(t − t_0)·A + a walk of unit noise per step."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for number in range(count):
        A, W = (torch.randn(12, 10, generator=generator).double() for _ in range(2))
        path = [W]
        for before, after in pairwise(steps):
            noise = torch.randn(12, 10, generator=generator).double()
            path.append(path[-1] + drift * (after - before) * A + math.sqrt(after - before) * noise)
        weights[f"layers.{number}.weight"] = path
    return weights


def grams(
    weights: dict[str, list[torch.Tensor]], steps: tuple[float, ...] = STEPS
) -> dict[str, Increments]:
    return {name: increments_of_weights(steps, path) for name, path in weights.items()}


def walk(T: int, steps: tuple[float, ...] | None = None) -> Increments:
    """The expectation of a random walk with equal rates: H = diag(Δt)."""
    steps = steps or tuple(float(t) for t in range(T + 1))
    return Increments(
        steps, torch.tensor(steps).double().diff().diag(), (0.0,) * (T + 1), 1.0
    )  # fmt: skip


@pytest.mark.parametrize("method", METHODS)
def test_errors_are_those_on_the_weights(method: str) -> None:
    weights = model(0.3)
    test = backtest(grams(weights), METHODS)
    errors = test.error(method)
    for row, path in zip(errors, weights.values(), strict=True):
        inc = increments_of_weights(STEPS, path)
        updates = torch.stack([W - path[0] for W in path[1:]])
        for (o, tau), error in zip(test.pairs, row.tolist(), strict=True):
            w = EXTRAPOLATORS[method].weights(inc.observed(o), STEPS[tau])
            predicted = (w[:, None, None] * updates[:o]).sum(0)
            direct = float((predicted - updates[tau - 1]).square().sum())
            assert error == pytest.approx(direct, rel=1e-6)
            g = inc.G
            by_gram = g[tau - 1, tau - 1] - 2 * w @ g[:o, tau - 1] + w @ g[:o, :o] @ w
            assert error == pytest.approx(float(by_gram), rel=1e-6)


def test_damped_errors_and_factors_on_the_weights() -> None:
    weights = model(0.1)
    test = backtest(grams(weights))
    paths = [torch.stack([W - p[0] for W in p[1:]]) for p in weights.values()]
    errors = test.error("damped(linear)")
    for origin in range(2, 8):
        ahead = energy = 0.0
        for path in paths:
            for o in range(max(2, math.ceil(origin / 3)), origin):
                for tau in range(o + 1, origin + 1):
                    w = EXTRAPOLATORS["linear"].weights(walk(8, STEPS).observed(o), STEPS[tau])
                    D = (w[:, None, None] * path[:o]).sum(0) - path[o - 1]
                    ahead += float((D * (path[tau - 1] - path[o - 1])).sum())
                    energy += float(D.square().sum())
        factor = min(1.0, max(0.0, ahead / energy)) if energy else 0.0
        assert test.factor("linear", origin) == pytest.approx(factor, rel=1e-9)
        for row, path in zip(errors, paths, strict=True):
            for (o, tau), error in zip(test.pairs, row.tolist(), strict=True):
                if o == origin:
                    w = damp(
                        EXTRAPOLATORS["linear"].weights(walk(8, STEPS).observed(o), STEPS[tau]),
                        factor,
                    )
                    direct = (w[:, None, None] * path[:o]).sum(0) - path[tau - 1]
                    assert error == pytest.approx(float(direct.square().sum()), rel=1e-6)


def test_reported_origins() -> None:
    assert pairs_of(4) == ((2, 3), (2, 4), (3, 4))
    for T, first in ((4, 3), (9, 3), (10, 4), (27, 9)):
        test = backtest({"a": walk(T)})
        assert test.origins[test.rolling].unique().tolist() == list(range(first, T))
    for T in (1, 2, 3):
        test = backtest({"a": walk(T)})
        assert not test.rolling.any()
        assert test.skill("linear") is None
        assert test.skill("auto") is None
        assert test.best() == "hold"
        assert test.choice() == {"a": "hold"}


@pytest.mark.parametrize("steps", [STEPS, tuple(float(t) for t in range(9))])
def test_exact_lines_are_predicted_exactly(steps: tuple[float, ...]) -> None:
    generator = torch.Generator().manual_seed(3)
    rates = [torch.randn(9, 4, generator=generator).double() for _ in range(3)]
    inc = {str(i): increments_of_weights(steps, [1 + t * A for t in steps])
           for i, A in enumerate(rates)}  # fmt: skip
    test = backtest(inc)
    for method in test.moves:
        assert test.skill(method) == pytest.approx(1, abs=1e-12)
        assert test.factor(method) == pytest.approx(1, abs=1e-9)
    # one past pair is needed: origin 3 has it, so that auto is exact on every reported pair
    assert test.skill("auto") == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize("T", [6, 12, 27])
def test_a_random_walk_cannot_be_predicted(T: int) -> None:
    """In expectation: no method gains, and what is learned says hold."""
    test = backtest({"a": walk(T), "b": walk(T)}, METHODS)
    for method in test.moves:
        skill = test.skill(method)
        assert skill is not None and skill < 0, method
        assert test.factor(method) == 0
        assert test.skill(f"damped({method})") == 0
    assert test.skill("auto") == 0
    assert test.best() == "hold"
    assert set(test.choice().values()) == {"hold"}


def test_skills_of_a_random_walk_are_as_derived() -> None:
    """two_point at origin o: err/err_hold = 1 + (b − 1)²·o/(τ − o) with equal steps."""
    T = 12
    test = backtest({"a": walk(T)})
    error = test.error("two_point")[0] / test.held[0]
    for (o, tau), ratio in zip(test.pairs, error.tolist(), strict=True):
        assert ratio == pytest.approx(1 + (tau / o - 1) ** 2 * o / (tau - o))


def test_a_drift_is_found() -> None:
    test = backtest(grams(model(1.0, count=8)))
    for method in ("linear_origin", "damped(linear)", "damped(relex_pinned)", "auto"):
        skill = test.skill(method)
        assert skill is not None and skill > 0.8, method
    assert "hold" not in test.choice().values()


def test_each_tensor_is_judged_by_itself() -> None:
    """Lines beside walks: auto takes the first and holds the second."""
    lines, walks = model(2.0, count=4), model(0.0, seed=5, count=4)
    inc = grams(lines) | {f"w.{name}": one for name, one in grams(walks).items()}
    test = backtest(inc)
    skill = {name: value or 0 for name, value in test.tensor_skill("linear").items()}
    assert all(skill[name] > 0 for name in lines)
    assert not any(skill[f"w.{name}"] > 0 for name in walks)
    assert all(test.choice()[name] != "hold" for name in lines)


def test_nothing_is_learned_from_the_future() -> None:
    """Changing the last checkpoint changes no error of an earlier target."""
    weights = model(0.4)
    before = backtest(grams(weights))
    for path in weights.values():
        path[-1] = path[-1] + 50
    after = backtest(grams(weights))
    kept = before.targets < 8
    for method in before.methods:
        torch.testing.assert_close(before.error(method)[:, kept], after.error(method)[:, kept])
    assert before.factors != after.factors


def test_irregular_spacing_keeps_real_steps() -> None:
    """A subset of the checkpoints of a line-and-noise path: same pair, same hold error."""
    whole = grams(model(1.0))
    some = (0, 2, 3, 4, 6, 7, 8)
    path = {name: [one[i] for i in some] for name, one in model(1.0).items()}
    part = backtest(grams(path, tuple(STEPS[i] for i in some)))
    full = backtest(whole)
    mine, theirs = part.pairs.index((5, 6)), full.pairs.index((7, 8))
    torch.testing.assert_close(part.held[:, mine], full.held[:, theirs])
    assert part.distance[mine] == full.distance[theirs] == 16


def test_order_of_tensors_does_not_matter() -> None:
    inc = grams(model(0.3))
    turned = dict(reversed(list(inc.items())))
    one, two = backtest(inc), backtest(turned)
    assert one.choice() == two.choice()
    for method in one.methods:
        assert one.skill(method) == pytest.approx(two.skill(method), rel=1e-12)


def test_size_of_the_weights_does_not_matter() -> None:
    weights = model(0.3)
    small = {name: [1e-12 * W for W in path] for name, path in weights.items()}
    one, two = backtest(grams(weights)), backtest(grams(small))
    for method in one.methods:
        assert one.skill(method) == pytest.approx(two.skill(method), rel=1e-9)


def test_tensors_that_never_move() -> None:
    still = Increments(STEPS, torch.zeros(8, 8, dtype=torch.float64), (0.0,) * 9, 1.0)
    test = backtest({"still": still})
    assert test.skill("linear") is None
    assert test.factors["linear"] == 0
    assert test.choice() == {"still": "hold"}
    assert skill_of(torch.zeros(1), torch.zeros(1)) is None


def test_moves_from_elsewhere_stand_in_the_same_table() -> None:
    inc = grams(model(0.3))
    own = backtest(inc, ("linear",))
    test = backtest(inc, ("two_point",), others={"mine": own.moves["linear"]})
    assert test.skill("mine") == own.skill("linear")
    assert test.skill("damped(mine)") == own.skill("damped(linear)")
    assert "damped(mine)" in test.methods
    with pytest.raises(OptionError, match="one row per tensor"):
        backtest(inc, others={"mine": PredictionProducts(torch.zeros(1, 1), torch.zeros(1, 1))})


def test_what_is_refused() -> None:
    with pytest.raises(OptionError, match="no tensor"):
        backtest({})
    with pytest.raises(OptionError, match="other steps"):
        backtest({"a": walk(5), "b": walk(6)})
    with pytest.raises(OptionError, match="was not backtested"):
        backtest({"a": walk(5)}).error("damped(next)")
