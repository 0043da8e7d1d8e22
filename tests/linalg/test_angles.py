"""Principal angles are right from 1e-9 rad to 90°, in any company."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.linalg import subspace_angles
from torch import Tensor

from geoscope.linalg import Operand, factorise, principal_angles
from geoscope.linalg.perturbed import _angles
from tests.helpers.matrices import gaussian, orthonormal, with_spectrum


def bases_at(theta: list[float], d: int, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Two bases with exactly these principal angles, each in coordinates of its own."""
    k = len(theta)
    Q = orthonormal(d, 2 * k, seed=seed)
    angles = torch.tensor(theta, dtype=torch.float64)
    turned = Q[:, :k] * angles.cos() + Q[:, k:] * angles.sin()
    return Q[:, :k] @ orthonormal(k, k, seed=seed + 1), turned @ orthonormal(k, k, seed=seed + 2)


MIXED = [1e-9, 1e-7, 1e-5, 1e-3, 0.1, math.pi / 4, 1.0, 1.5, math.pi / 2]


@pytest.mark.parametrize("d", [18, 19, 40, 300])
def test_many_angles_at_once(d: int) -> None:
    """Small ones beside large ones, ascending; d ≤ 2k and d > 2k take different routes."""
    found = principal_angles(*bases_at(MIXED, d))
    assert found.tolist() == pytest.approx(MIXED, abs=2e-15 * d)


@pytest.mark.parametrize("shape", [(50, 3), (12, 6), (9, 8), (200, 64), (7, 1)])
def test_random_subspaces_as_scipy_has_them(shape: tuple[int, int]) -> None:
    d, k = shape
    for seed in range(5):
        Q0, Q1 = orthonormal(d, k, seed=seed), orthonormal(d, k, seed=seed + 50)
        expected = subspace_angles(Q0.numpy(), Q1.numpy())[::-1]
        found = principal_angles(Q0, Q1)
        np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=1e-13)
        assert bool((found.diff() >= 0).all())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("d", "k"), [(512, 8), (64, 64), (70, 64)])
def test_a_subspace_has_no_angle_to_itself(d: int, k: int, dtype: torch.dtype) -> None:
    Q = orthonormal(d, k, seed=3).to(dtype)
    turned = Q @ orthonormal(k, k, seed=4).to(dtype)
    assert float(principal_angles(Q, turned).max()) <= 4 * k**0.5 * torch.finfo(dtype).eps


def test_angles_of_vectors_that_leak_are_those_of_the_longer_vectors() -> None:
    """Rows that are known by their Gram matrix alone; as large as the vectors, and not diagonal."""
    held, rest = orthonormal(12, 4, seed=6), 0.7 * gaussian(5, 4, seed=7, sd=1.0)
    longer, _ = np.linalg.qr(torch.cat([held, rest]).numpy())
    expected = np.sort(subspace_angles(np.eye(17, 4), longer))
    found = np.sort(_angles(held, rest.mT @ rest).numpy())
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-7)


def test_orthogonal_subspaces_are_at_right_angles() -> None:
    Q = orthonormal(30, 20, seed=5)
    assert principal_angles(Q[:, :10], Q[:, 10:]).tolist() == pytest.approx([math.pi / 2] * 10)


def test_the_order_of_the_two_and_their_bases_do_not_matter() -> None:
    Q0, Q1 = orthonormal(40, 6, seed=6), orthonormal(40, 6, seed=7)
    found = principal_angles(Q0, Q1)
    torch.testing.assert_close(principal_angles(Q1, Q0), found, atol=1e-14, rtol=0)
    flipped = Q1 * torch.tensor([1, -1, 1, -1, -1, 1], dtype=torch.float64)
    torch.testing.assert_close(principal_angles(Q0.flip(1), flipped), found, atol=1e-14, rtol=0)
    R = orthonormal(40, 40, seed=8)
    torch.testing.assert_close(principal_angles(R @ Q0, R @ Q1), found, atol=1e-13, rtol=0)


def test_a_stack_equals_its_pairs() -> None:
    pairs = [bases_at([1e-6, 0.3], 30, seed=10 * i) for i in range(4)]
    stacked = principal_angles(*(torch.stack(side) for side in zip(*pairs, strict=True)))
    for found, pair in zip(stacked, pairs, strict=True):
        torch.testing.assert_close(found, principal_angles(*pair), atol=1e-15, rtol=0)


def arccos_alone(Q0: Tensor, Q1: Tensor) -> Tensor:
    return torch.acos(torch.linalg.svdvals(Q0.mT @ Q1).clamp(-1, 1)).flip(-1)


@pytest.mark.parametrize("theta", [0.0, 1e-6, 1e-5])
def test_arccos_alone_cannot_see_small_angles_in_fp32(theta: float) -> None:
    """The negative control: identical subspaces come out 1e-4 rad apart or more."""
    Q = orthonormal(512, 16, seed=0)
    turned = math.cos(theta) * Q[:, :8] + math.sin(theta) * Q[:, 8:]
    pair = Q[:, :8].float(), turned.float()
    assert abs(float(arccos_alone(*pair).max()) - theta) > 1e-4
    assert abs(float(principal_angles(*pair).max()) - theta) < 1e-6


@pytest.mark.parametrize("size", [1e-6, 1e-3, 0.05])
@pytest.mark.parametrize("shape", [(50, 50), (80, 30), (30, 80)])
def test_wedin_bounds_the_turn_of_a_subspace_with_a_gap(
    shape: tuple[int, int], size: float
) -> None:
    """‖sin Θ‖₂ ≤ ‖E‖₂/(σ_k − ‖E‖₂ − σ_{k+1}) on both sides, and it is met within a factor."""
    k = 6
    S = torch.cat([torch.linspace(3, 2, k), torch.linspace(1, 0.1, min(shape) - k)]).double()
    base = with_spectrum(*shape, S, seed=11)
    noise = gaussian(*shape, seed=12, sd=1.0)
    noise *= size / torch.linalg.matrix_norm(noise, 2)
    before, after = (factorise(Operand(A[None]), vectors=k, cuts=[k]) for A in (base, base + noise))
    sines = []
    for role in ("U", "Vh"):
        Q0, Q1 = getattr(before, role)[0], getattr(after, role)[0]
        angles = principal_angles(Q0, Q1) if role == "U" else principal_angles(Q0.T, Q1.T)
        sines.append(float(angles.sin().max()))
    bound = size / (2 - size - 1)
    assert max(sines) <= bound
    assert max(sines) > bound / 50
