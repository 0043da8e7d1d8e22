"""docs/methods.md#leading-pairs: shares, cosines, signs, K, exponent, fixed directions, edge."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from geoscope.errors import NumericsError
from geoscope.linalg.operand import Operand
from geoscope.records import Status
from geoscope.trajectory.increments import Increments, increments_of_weights
from geoscope.trajectory.rank1 import (
    Rank1Path,
    align_signs,
    fixed_direction_energy,
    rank1_gram,
    rank1_increments,
    rank1_statistics,
    rank1_totals,
)
from geoscope.trajectory.statistics import statistics
from tests.helpers.series import number, simulated

STEPS = (0, 10, 20, 40, 50, 80, 100)
M, N = 24, 40


def path_of(updates: Tensor) -> Rank1Path:
    """updates: (T, m, n)."""
    U, S, Vh = torch.linalg.svd(updates, full_matrices=False)
    norm = torch.linalg.matrix_norm(updates)
    return Rank1Path(S[:, 0], S[:, 1], norm, U[:, :, 0].contiguous(), Vh[:, 0].contiguous())


def unit(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, generator=generator, dtype=torch.float64)
    return x / torch.linalg.vector_norm(x, dim=-1, keepdim=True)


def series(drift: float, seed: int = 0, **options) -> tuple[Tensor, Increments]:
    """(T, m, n) updates of a simulated series, and its increments."""
    weights = simulated(STEPS, drift=drift, entries=M * N, seed=seed, **options)
    updates = torch.stack(weights[1:]).double() - weights[0].double()
    return updates.reshape(-1, M, N), increments_of_weights(STEPS, weights)


def flipped(path: Rank1Path, seed: int = 0) -> Rank1Path:
    generator = torch.Generator().manual_seed(seed)
    signs = 1.0 - 2 * torch.randint(2, (len(path), 1), generator=generator).double()
    return replace(path, u=signs * path.u, v=signs * path.v)


def straight(sigma: Tensor) -> Rank1Path:
    """One pair of directions, of length σ(t)."""
    u, v = unit(M).expand(len(sigma), M), unit(N, seed=1).expand(len(sigma), N)
    return Rank1Path(sigma, torch.zeros_like(sigma), sigma, u, v)


def elapsed() -> Tensor:
    return torch.tensor(STEPS[1:], dtype=torch.float64)


def increments(path: Rank1Path) -> Increments:
    return replace(rank1_increments(path, STEPS), base_energy=1.0)


# --- signs --------------------------------------------------------------------------------------


def test_signs_of_singular_vectors_change_no_number() -> None:
    updates, inc = series(0.1)
    path = path_of(updates)
    local = path_of(torch.cat([updates[:1], updates.diff(dim=0)]))
    plain = rank1_statistics(path, inc, local=local)
    for seed in range(3):
        other = rank1_statistics(flipped(path, seed), inc, local=flipped(local, seed + 9))
        assert other.values == pytest.approx(plain.values, rel=1e-12)
        for key, value in plain.linearity.values.items():
            found = other.linearity.values[key]
            assert (found is None) if value is None else found == pytest.approx(value, rel=1e-9)
        for key, numbers in plain.series.items():
            assert other.series[key] == pytest.approx(numbers, rel=1e-12), key
        torch.testing.assert_close(rank1_gram(flipped(path, seed)), rank1_gram(path))


def test_aligned_signs_do_not_depend_on_the_given_ones() -> None:
    path = path_of(series(0.1)[0])
    aligned, flips, weak = align_signs(path)
    for i, turned in enumerate(flips):
        sign = -1 if turned else 1
        torch.testing.assert_close(aligned.u[i], sign * path.u[i])
        torch.testing.assert_close(aligned.v[i], sign * path.v[i])
    assert not flips[-1]
    products = (aligned.u[:-1] * aligned.u[1:]).sum(-1) + (aligned.v[:-1] * aligned.v[1:]).sum(-1)
    assert bool((products >= 0).all())
    again, flips_again, weak_again = align_signs(flipped(path))
    sign = float(again.u[-1] @ aligned.u[-1])
    torch.testing.assert_close(again.u, sign * aligned.u)
    assert weak_again == weak
    assert align_signs(aligned)[1] == (False,) * len(path)
    assert flips_again[-1] is False


def test_a_weak_cosine_is_said() -> None:
    path = straight(torch.ones(6, dtype=torch.float64))
    away = torch.linalg.qr(path.u[:1].T, mode="complete").Q[:, 1]
    u = path.u.clone()
    u[:2] = 0.1 * path.u[0] + math.sqrt(0.99) * away
    assert align_signs(replace(path, u=u))[2] == (1,)


# --- against dense matrices ---------------------------------------------------------------------


def test_k_is_the_gram_of_the_rank_1_parts() -> None:
    path = path_of(series(0.1)[0])
    Z = (path.sigma[:, None, None] * path.u[:, :, None] * path.v[:, None, :]).flatten(1)
    torch.testing.assert_close(rank1_gram(path), Z @ Z.T)
    weights = [torch.zeros(M * N, dtype=torch.float64), *Z]
    expected = statistics(increments_of_weights(STEPS, weights))
    found = statistics(rank1_increments(path, STEPS))
    for key in ("drift_fraction", "linear_r2", "temporal_pc1", "curvature"):
        assert found.values[key] == pytest.approx(expected.values[key], rel=1e-8), key


def test_step_wise_numbers_by_numpy() -> None:
    updates, inc = series(0.05)
    deltas = torch.cat([updates[:1], updates.diff(dim=0)])
    found = rank1_statistics(path_of(updates), inc, local=path_of(deltas))

    def parts(D: np.ndarray) -> tuple[float, float, np.ndarray]:
        U, S, Vh = np.linalg.svd(D)
        return S[0], S[1], np.outer(U[:, 0], Vh[0])

    firsts = [parts(D.numpy()) for D in updates]
    locals_ = [parts(D.numpy()) for D in deltas]
    norms = [np.linalg.norm(D.numpy()) for D in updates]
    expected = {
        "sigma1": [one[0] for one in firsts],
        "rank1_share": [one[0] ** 2 / norm**2 for one, norm in zip(firsts, norms, strict=True)],
        "gap21": [one[1] / one[0] for one in firsts],
        "direction_cosine_last": [(one[2] * firsts[-1][2]).sum() for one in firsts],
        "direction_cosine_first": [(one[2] * firsts[0][2]).sum() for one in firsts],
        "local_global_cosine": [(a[2] * b[2]).sum() for a, b in zip(locals_, firsts, strict=True)],
    }
    for key, numbers in expected.items():
        assert found.series[key] == pytest.approx(numbers, rel=1e-8, abs=1e-10), key
    assert len(found.series["direction_cosine"]) == len(STEPS) - 2
    assert found.series["local_global_cosine"][0] == pytest.approx(1)
    assert found.values["rank1_share"] == found.series["rank1_share"][-1]
    assert found.ill_defined == tuple(i for i, gap in enumerate(expected["gap21"]) if gap > 0.9)


def test_alpharl_norm_fraction_and_the_share_of_energy() -> None:
    """Σσ1/Σ‖Δ‖ [2510.00553] beside Σσ1²/Σ‖Δ‖², over tensors of unlike shape."""
    updates = [series(0.1, seed=seed)[0] for seed in range(2)] + [series(1.0)[0][:, :8, :30]]
    found = rank1_totals([path_of(one) for one in updates])
    for i in range(len(STEPS) - 1):
        tops = [np.linalg.norm(one[i].numpy(), 2) for one in updates]
        norms = [np.linalg.norm(one[i].numpy()) for one in updates]
        assert found.norm_fraction[i] == pytest.approx(sum(tops) / sum(norms))
        energy = sum(x**2 for x in tops) / sum(x**2 for x in norms)
        assert found.rank1_share[i] == pytest.approx(energy)
    assert found.final_fraction == found.norm_fraction[-1]
    assert found.final_share == found.rank1_share[-1]


@pytest.mark.slow
def test_isotropic_updates_meet_their_null() -> None:
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(4, 200, 300, generator=generator, dtype=torch.float64)
    found = rank1_totals([path_of(noise)])
    for i in range(4):
        assert found.norm_fraction[i] == pytest.approx(found.null_fraction[i], rel=0.03)
        assert found.rank1_share[i] == pytest.approx(found.null_share[i], rel=0.05)
    assert found.null_fraction[0] == pytest.approx(200**-0.5 + 300**-0.5)


# --- motion -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("power", "exponent"), [(1.0, 1.0), (0.5, 0.5)])
def test_exponents_of_drift_and_diffusion(power: float, exponent: float) -> None:
    path = straight(elapsed() ** power)
    found = rank1_statistics(path, increments(path))
    assert found.values["sigma1_exponent"] == pytest.approx(exponent, abs=1e-12)
    assert found.values["fixed_direction_energy"] == pytest.approx(1)
    assert found.values["rank1_share"] == pytest.approx(1)
    assert found.values["direction_cosine"] == pytest.approx(1)
    assert found.values["rank1_linearity"] == pytest.approx(1) or power < 1
    assert found.series["noise_edge"] == pytest.approx([0] * 6, abs=1e-6)


def test_the_exponent_of_a_walk_is_its_null() -> None:
    steps = range(21)
    weights = simulated(steps, entries=M * N)
    updates = torch.stack(weights[1:]).reshape(-1, M, N) - weights[0].reshape(M, N)
    found = rank1_statistics(path_of(updates), increments_of_weights(steps, weights))
    assert found.nulls["sigma1_exponent"] == pytest.approx(0.5, abs=0.02)
    assert found.values["sigma1_exponent"] == pytest.approx(0.5, abs=0.1)


def test_a_rank_1_line_beside_noise_is_found_and_counted() -> None:
    """At the end it stands far above the edge, and the noise alone does not."""
    updates, inc = series(0.0, rho=1e-3)
    spike = 8e-2 * torch.outer(unit(M), unit(N, seed=1))
    both = updates + elapsed()[:, None, None] / 10 * spike
    found = rank1_statistics(path_of(both), inc)
    assert number(found.series["above_edge"][-1]) >= 1
    noise = rank1_statistics(path_of(updates), inc)
    assert number(noise.series["above_edge"][-1]) <= 1
    edge = noise.series["noise_edge"][-1]
    assert edge == pytest.approx(1e-3 * 10 * (M**0.5 + N**0.5), rel=0.15)
    assert number(found.values["direction_cosine"]) > 0.9
    assert number(found.values["rank1_linearity"]) > 0.98
    assert found.values["sigma1_exponent"] == pytest.approx(1, abs=0.05)


@pytest.mark.slow
def test_fixed_directions_of_the_updates_themselves() -> None:
    """Against a fine search over random starts, and never below what the rank-1 parts give."""
    updates, inc = series(0.05)
    path = path_of(updates)
    operands = [Operand(D[None]) for D in updates]
    found = fixed_direction_energy(path, operands)
    energy = float(path.sigma.square().sum())
    best = 0.0
    for seed in range(40):
        u, v = unit(M), unit(N, seed=seed)
        for _ in range(200):
            u = torch.linalg.svd(updates @ v).Vh[0]
            v = torch.linalg.svd(u @ updates).Vh[0]
        best = max(best, float(((updates @ v) @ u).square().sum()) / energy)
    assert found == pytest.approx(best, rel=1e-6)
    alone = fixed_direction_energy(path)
    assert alone is not None
    assert 0 < alone <= 1
    assert rank1_statistics(path, inc, updates=operands).values[
        "fixed_direction_energy"
    ] == pytest.approx(found)


def test_directions_that_turn_by_a_right_angle_hold_half() -> None:
    basis = torch.eye(M, N, dtype=torch.float64)
    u = torch.stack([basis[:2, :M].T[:, 0], basis[:2, :M].T[:, 1]])
    v = torch.eye(2, N, dtype=torch.float64)
    one = torch.ones(2, dtype=torch.float64)
    path = Rank1Path(one, 0 * one, one, u, v)
    assert fixed_direction_energy(path) == pytest.approx(0.5)
    assert float(rank1_gram(path)[0, 1]) == 0


# --- undefined ----------------------------------------------------------------------------------


def test_a_step_that_did_not_move_has_no_direction() -> None:
    sigma = torch.tensor([0.0, 0, 1, 2, 3, 4], dtype=torch.float64)
    path = straight(sigma)
    found = rank1_statistics(path, increments(path))
    assert found.series["rank1_share"][:3] == (None, None, pytest.approx(1))
    assert found.series["direction_cosine"][:3] == (None, None, pytest.approx(1))
    assert found.values["direction_cosine"] == pytest.approx(1)
    assert found.values["direction_cosine_first_last"] is None
    assert found.status["direction_cosine_first_last"] is Status.NOT_APPLICABLE


def test_no_update_and_one_step() -> None:
    zero = straight(torch.zeros(6, dtype=torch.float64))
    found = rank1_statistics(zero, increments(zero))
    assert set(found.values.values()) == {None}
    assert set(found.status.values()) == {Status.ZERO_UPDATE}
    assert rank1_totals([zero]).final_share is None
    one = straight(torch.ones(1, dtype=torch.float64))
    single = rank1_statistics(one, rank1_increments(one, (0, 10)))
    assert single.values["rank1_share"] == pytest.approx(1)
    for key in ("direction_cosine", "sigma1_exponent", "fixed_direction_energy"):
        assert single.status[key] is Status.NOT_APPLICABLE, key


def test_below_resolution_keeps_the_number_apart() -> None:
    updates, inc = series(0.1, rho=3e-5, dtype=torch.bfloat16)
    found = rank1_statistics(path_of(updates), inc)
    assert found.status["rank1_share"] is Status.BELOW_RESOLUTION
    assert found.values["rank1_share"] is None
    assert 0 < found.raw["rank1_share"] < 1
    for key, value in found.values.items():
        assert (value is None) == found.status.get(key, Status.OK).is_null, key


def test_what_does_not_belong_together_is_refused() -> None:
    path = straight(torch.ones(6, dtype=torch.float64))
    with pytest.raises(NumericsError, match="one of each per step"):
        replace(path, u=path.u[:5])
    with pytest.raises(NumericsError, match="a path of 6 steps and increments of 2"):
        rank1_statistics(path, rank1_increments(straight(torch.ones(2).double()), (0, 1, 2)))
