"""The rank-1 extrapolators: held-out errors against dense predictions; signs change nothing."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from geoscope.errors import NumericsError, OptionError
from geoscope.trajectory.backtest import backtest, pairs_of
from geoscope.trajectory.increments import Increments, increments_of_weights
from geoscope.trajectory.rank1 import Rank1Path
from geoscope.trajectory.spatial_rank1 import (
    SPATIAL,
    Pair,
    alpha_rank1,
    outer_moves,
    spatial_moves,
    spatial_rank1,
)
from tests.helpers.series import pair_products

STEPS = (0.0, 5.0, 10.0, 12.0, 20.0, 31.0, 40.0)


def path_of(updates: torch.Tensor) -> Rank1Path:
    """Leading pairs by a full SVD of each update (T, m, n)."""
    U, S, Vh = torch.linalg.svd(updates, full_matrices=False)
    return Rank1Path(S[:, 0], S[:, 1], updates.flatten(1).norm(dim=1), U[:, :, 0], Vh[:, 0])


def series(seed: int = 0) -> tuple[torch.Tensor, Increments]:
    """Updates (6, 9, 7), a drift and a walk, and their increments."""
    g = torch.Generator().manual_seed(seed)
    gaps = torch.tensor(STEPS).double().diff()[:, None, None]
    A = torch.randn(1, 9, 7, generator=g).double()
    steps = 0.3 * gaps * A + gaps.sqrt() * torch.randn(6, 9, 7, generator=g).double()
    updates = steps.cumsum(0)
    return updates, increments_of_weights(STEPS, [torch.zeros(9, 7).double(), *updates])


def observed(path: Rank1Path, count: int) -> Rank1Path:
    return Rank1Path(*(part[:count] for part in
                       (path.sigma, path.second, path.norm, path.u, path.v)))  # fmt: skip


def test_errors_are_those_of_dense_predictions() -> None:
    updates, inc = series()
    path = path_of(updates)
    moves = spatial_moves({"a": path}, {"a": inc}, {"a": pair_products(path.u, path.v, updates)})
    test = backtest({"a": inc}, ("linear",), others=moves)
    for place, (o, tau) in enumerate(test.pairs):
        seen = observed(path, o)
        Z = spatial_rank1(seen, inc.observed(o), STEPS[tau]).dense()
        last = updates[o - 1]
        now = path.sigma[o - 1] * torch.outer(path.u[o - 1], path.v[o - 1])
        dense = {
            "spatial_rank1": Z,
            "spatial_rank1_pinned": last + Z - now,
            "alpha_rank1": alpha_rank1(seen).dense(),
        }
        assert set(dense) == set(SPATIAL)
        for method, predicted in dense.items():
            direct = float((predicted - updates[tau - 1]).square().sum())
            assert float(test.error(method)[0, place]) == pytest.approx(direct, rel=1e-9)
    assert float(alpha_rank1(path).dense().norm()) == pytest.approx(float(updates[-1].norm()))


def test_signs_of_the_pairs_change_nothing() -> None:
    updates, inc = series()
    path = path_of(updates)
    signs = torch.tensor([1.0, -1, -1, 1, -1, 1]).double()[:, None]
    turned = replace(path, u=path.u * signs, v=path.v * signs)
    one, two = (
        spatial_moves({"a": p}, {"a": inc}, {"a": pair_products(p.u, p.v, updates)})
        for p in (path, turned)
    )
    for method in SPATIAL:
        torch.testing.assert_close(one[method].ahead, two[method].ahead)
        torch.testing.assert_close(one[method].energy, two[method].energy)
    torch.testing.assert_close(
        spatial_rank1(path, inc, 60).dense(), spatial_rank1(turned, inc, 60).dense()
    )


@pytest.mark.parametrize("exponent", [0.5, 1.0])
def test_a_fixed_direction_with_a_power_law_is_exact(exponent: float) -> None:
    g = torch.Generator().manual_seed(2)
    A = torch.outer(torch.randn(9, generator=g), torch.randn(7, generator=g)).double()
    updates = torch.stack([t**exponent * A for t in STEPS[1:]])
    inc = increments_of_weights(STEPS, [torch.zeros(9, 7).double(), *updates])
    path = path_of(updates)
    torch.testing.assert_close(spatial_rank1(path, inc, 90).dense(), 90**exponent * A)
    moves = spatial_moves({"a": path}, {"a": inc}, {"a": pair_products(path.u, path.v, updates)})
    test = backtest({"a": inc}, ("linear",), others=moves)
    for method in ("spatial_rank1", "spatial_rank1_pinned"):
        assert test.skill(method) == pytest.approx(1, abs=1e-10)
    assert test.skill("alpha_rank1") == pytest.approx(0, abs=1e-10)


def test_a_turn_at_constant_speed_on_its_clock_is_exact() -> None:
    """u on a great circle with angle .1·ln t, v fixed, σ1 = t."""
    e = torch.eye(9, dtype=torch.float64)
    v = torch.eye(7, dtype=torch.float64)[2]

    def update(t: float) -> torch.Tensor:
        angle = 0.1 * math.log(t)
        return t * torch.outer(math.cos(angle) * e[0] + math.sin(angle) * e[3], v)

    updates = torch.stack([update(t) for t in STEPS[1:]])
    inc = increments_of_weights(STEPS, [torch.zeros(9, 7).double(), *updates])
    torch.testing.assert_close(spatial_rank1(path_of(updates), inc, 200).dense(), update(200))


def test_a_random_walk_is_not_predicted() -> None:
    """Each entry its own walk: no rank-1 form gains on hold."""
    g = torch.Generator().manual_seed(4)
    steps = tuple(float(t) for t in range(13))
    paths, incs, products = {}, {}, {}
    for name in "abcdef":
        updates = torch.randn(12, 20, 16, generator=g).double().cumsum(0)
        incs[name] = increments_of_weights(steps, [torch.zeros(20, 16).double(), *updates])
        paths[name] = path_of(updates)
        products[name] = pair_products(paths[name].u, paths[name].v, updates)
    test = backtest(incs, ("linear",), others=spatial_moves(paths, incs, products))
    for method in SPATIAL:
        skill, damped = test.skill(method), test.skill(f"damped({method})")
        assert skill is not None and skill < 0
        assert damped is not None and damped < 0.01


def test_zero_updates_are_held() -> None:
    """The first two updates are zero, and then all of them."""
    updates, _ = series()
    updates[:2] = 0
    inc = increments_of_weights(STEPS, [torch.zeros(9, 7).double(), *updates])
    path = path_of(updates)
    moves = spatial_moves({"a": path}, {"a": inc}, {"a": pair_products(path.u, path.v, updates)})
    for method in SPATIAL:
        assert torch.isfinite(moves[method].ahead).all()
        assert torch.isfinite(moves[method].energy).all()
        assert moves[method].energy[0, 0] == 0
    still = spatial_rank1(observed(path, 2), inc.observed(2), 50)
    assert float(still.dense().norm()) == 0


def test_predictions_of_any_pair() -> None:
    """W_o + c·σ̂·û·v̂ᵀ, c the distance in units of the horizon."""
    updates, inc = series()
    g = torch.Generator().manual_seed(5)
    u, v = (torch.nn.functional.normalize(torch.randn(d, generator=g).double(), dim=0)
            for d in (9, 7))  # fmt: skip
    guess = Pair(3.0, u, v)
    products = pair_products(u[None], v[None], updates)[:, 0, 0]
    ahead, energy = outer_moves(inc, {4: guess}, {4: products}, horizon=3)
    for place, (o, tau) in enumerate(pairs_of(6)):
        if o != 4:
            assert (ahead[place], energy[place]) == (0, 0)
            continue
        D = (STEPS[tau] - STEPS[o]) / (40 / 6 * 3) * guess.dense()
        assert float(energy[place]) == pytest.approx(float(D.square().sum()))
        direct = float((D * (updates[tau - 1] - updates[o - 1])).sum())
        assert float(ahead[place]) == pytest.approx(direct)


def test_what_is_refused() -> None:
    updates, inc = series()
    path = path_of(updates)
    with pytest.raises(OptionError, match="of all tensors"):
        spatial_moves({}, {"a": inc}, {})
    with pytest.raises(NumericsError, match="is needed"):
        spatial_moves({"a": path}, {"a": inc}, {"a": torch.zeros(2, 2, 2)})
    with pytest.raises(NumericsError, match="do not belong"):
        spatial_rank1(observed(path, 3), inc, 60)
