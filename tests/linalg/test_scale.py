"""Zero, rank-deficient and extreme matrices through every fast route, against numpy at scale 1."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from geoscope.errors import NumericsError
from geoscope.linalg import Operand, factorise, factorise_leading
from geoscope.linalg.head import head_triplets
from geoscope.linalg.leading import leading_triplets
from geoscope.linalg.scale import outside, power_of_two
from geoscope.linalg.stacked_leading import stacked_leading
from geoscope.linalg.svd import Factors
from geoscope.linalg.tail import tail_triplets
from tests.helpers.matrices import gaussian

SIDE = 512  # from which on leading triplets have a route of their own
SCALES = (
    *(1e-300, 1e-40, 1e38, 1e300),
    *(pytest.param(scale, marks=pytest.mark.slow) for scale in (1e-200, 1e-30, 1e30, 1e200)),
)


def leading(A: Tensor) -> Tensor:
    return factorise_leading(Operand(A[None]), 3, cuts=(2,)).S[0]


def values_only(A: Tensor) -> Tensor:
    return factorise_leading(Operand(A[None]), 3, certified=0).S[0]


def whole(A: Tensor) -> Tensor:
    return factorise(Operand(A[None]), vectors=2, cuts=(2,)).S[0]


def exact(A: Tensor) -> Tensor:
    return factorise(Operand(A[None]), solver="exact").S[0]


def stacked(A: Tensor) -> Tensor:
    """Between a zero matrix and one of another size."""
    stack = torch.stack([torch.zeros_like(A), A, A / 2])
    return stacked_leading(Operand(stack), 2)[1].S


def head(A: Tensor) -> Tensor:
    return head_triplets(A, 3).S


def truth(A: Tensor) -> np.ndarray:
    return np.linalg.svd(A.numpy(), compute_uv=False)


@pytest.fixture(scope="module")
def plain() -> Tensor:
    return gaussian(SIDE, SIDE, seed=3, sd=1.0) + 40 * torch.eye(SIDE, dtype=torch.float64)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("route", [leading, values_only, whole, stacked, head])
def test_a_power_of_two_moves_every_route_by_that_power_alone(
    plain: Tensor, route: Callable[[Tensor], Tensor], scale: float
) -> None:
    power = float(power_of_two(torch.tensor(scale, dtype=torch.float64)))
    expected = route(plain)
    np.testing.assert_allclose(route(plain * power) / power, expected, rtol=1e-12)
    np.testing.assert_allclose(expected, truth(plain)[: len(expected)], rtol=1e-7)


@pytest.mark.parametrize("scale", SCALES)
def test_the_exact_method_and_the_tail_hold_at_any_scale(scale: float) -> None:
    A = gaussian(60, 40, seed=4, sd=1.0)
    power = float(power_of_two(torch.tensor(scale, dtype=torch.float64)))
    np.testing.assert_allclose(exact(A * power) / power, truth(A), rtol=1e-12)
    np.testing.assert_allclose(tail_triplets(A * power, 4).S / power, truth(A)[-4:], rtol=1e-9)
    assert float(Operand((A * power)[None]).norm()) / power == pytest.approx(float(A.norm()))


def deficient() -> dict[str, Tensor]:
    zero = torch.zeros(SIDE, SIDE + 40, dtype=torch.float64)
    row, entry, block = zero.clone(), zero.clone(), zero.clone()
    row[3] = gaussian(1, SIDE + 40, seed=5)[0]
    entry[7, 9] = -1e-3
    block[:16, 32:48] = gaussian(16, 16, seed=6)
    return {
        "row": row,
        "entry": entry,
        "block": block,
        "constant": zero + 1e-3,
        "rank 1": gaussian(SIDE, 1, seed=7) @ gaussian(1, SIDE + 40, seed=8),
        "rank 2": gaussian(SIDE, 2, seed=7) @ gaussian(2, SIDE + 40, seed=8),
    }


@pytest.mark.parametrize("route", [leading, values_only, stacked, head])
@pytest.mark.parametrize("what", deficient())
def test_few_directions_are_found_and_the_others_are_zero(
    what: str, route: Callable[[Tensor], Tensor]
) -> None:
    A = deficient()[what]
    found, expected = route(A), truth(A)
    np.testing.assert_allclose(found, expected[: len(found)], atol=1e-7 * expected[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_what_did_not_change_enters_no_search(dtype: torch.dtype) -> None:
    W = gaussian(SIDE, SIDE, seed=9).to(dtype)[None]
    found = factorise_leading(Operand(W, W.clone()), 2, cuts=(1,))
    assert not found.S.any()
    assert found.methods[0]["how"] == "zero"
    alone = leading_triplets(Operand(W, W.clone()), 2)
    assert alone.converged and alone.dimension == 0
    assert all(one.dimension == 0 for one in stacked_leading(Operand(W, W.clone()), 2))
    unit: Factors = found
    assert unit.U is not None and torch.equal(unit.U[0].T @ unit.U[0], torch.eye(2).double())


def test_an_update_far_below_its_base_is_found_where_it_is_not_rounded_away() -> None:
    base = gaussian(SIDE, SIDE, seed=10, sd=1e-30).float()
    tuned = (base.double() + gaussian(SIDE, SIDE, seed=11, sd=1e-33)).float()
    update = tuned.double() - base.double()
    found = factorise_leading(Operand(tuned[None], base[None]), 2, cuts=(1,)).S[0]
    np.testing.assert_allclose(found, truth(update * 2.0**100)[:2] * 2.0**-100, rtol=1e-7)


def test_a_norm_that_overflows_is_an_error_and_none_that_does_not() -> None:
    large = torch.full((1, 4, 4), 1e307, dtype=torch.float64)
    assert float(Operand(large).norm()) == pytest.approx(4e307)
    with pytest.raises(NumericsError, match="overflows fp64"):
        Operand(large * 10).norm()


def test_an_ordinary_matrix_is_not_scaled(monkeypatch: pytest.MonkeyPatch, plain: Tensor) -> None:
    def scaled(A: Operand) -> tuple[Operand, Tensor]:
        raise AssertionError("a copy in fp64 that nobody needs")

    monkeypatch.setattr(Operand, "scaled", scaled)
    for route in (leading, values_only, whole, stacked, head):
        route(plain)
        route(plain * 1e-3)


def test_the_sizes_that_are_outside() -> None:
    numbers = torch.tensor([1e-9, 1.0, 1e9], dtype=torch.float64)
    assert not outside(numbers, torch.float32)
    for one in (0.0, 1e-30, 1e30, float("inf"), float("nan")):
        assert outside(torch.tensor([1.0, one]), torch.float32)
    assert not outside(torch.tensor([1e-76, 1e76], dtype=torch.float64), torch.float64)
