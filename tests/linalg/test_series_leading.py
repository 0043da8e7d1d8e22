"""Leading pairs of a series, searched for one by one and certified together, against numpy."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from geoscope.linalg import Operand, factorise_leading, series_leading, svd_leading
from geoscope.linalg.certificate import Leading
from geoscope.linalg.differences import Differences
from geoscope.linalg.series_leading import SeriesBasis, SeriesPass, search
from tests.helpers.matrices import gaussian, updated, with_spectrum

SHAPES = {"tall": (700, 300), "wide": (300, 1300), "square": (310, 310)}
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64}
every_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
every_dtype = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)


def weights(shape: tuple[int, int], dtype: torch.dtype, count: int = 5) -> list[Tensor]:
    """A base and what a drift of a few directions makes of it, step by step, as they are stored."""
    found = [gaussian(*shape, seed=1)]
    for step in range(1, count):
        direction = with_spectrum(*shape, 0.5 ** torch.arange(6), seed=7)
        direction += 1e-3 * gaussian(*shape, seed=step)
        found.append(updated(found[-1], direction, 0.05))
    return [one.to(dtype) for one in found]


def exact(stored: list[Tensor]) -> list[list[np.ndarray]]:
    """Δ_i and δ_i in fp64, of the first one alone."""
    base, *later = (one.double().numpy() for one in stored)
    steps = [b - a for a, b in pairwise([base, *later])]
    return [[steps[0]], *([one - base, d] for one, d in zip(later[1:], steps[1:], strict=True))]


def searched(
    stored: list[Tensor], k: int = 2, *, warm: bool = True
) -> list[list[SeriesBasis | None]]:
    base, *later = stored
    found: list[list[SeriesBasis | None]] = []
    for before, one in pairwise([base, *later]):
        A = Differences(one, (base, before) if found else (base,))
        starts = [*found[-1], found[-1][0]][:2] if found and warm else [None] * len(A)
        found.append(search(A, 2, starts=starts, certified=1))
    return found


def passed(
    stored: list[Tensor], bases: list[list[SeriesBasis | None]], rows: int | None = None
) -> SeriesPass:
    m, n = stored[0].shape
    together = SeriesPass((m, n), bases)
    for start in range(0, m, rows or m):
        together.add([one[start : start + (rows or m)] for one in stored])
    return together


def close(found: Tensor, expected: np.ndarray, tolerance: float) -> None:
    atol = tolerance * (np.abs(expected).max() or 1.0)
    np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=atol)


def sine(ours: Tensor, theirs: np.ndarray) -> float:
    return float(np.linalg.norm(ours.numpy() - theirs * (ours.numpy() @ theirs)))


def first(leading: list[list[Leading | None]], side: str) -> Tensor:
    """u or v of the leading pair of every Δ."""
    return torch.stack([getattr(row[0], side)[0] for row in leading])


@every_shape
@every_dtype
@pytest.mark.parametrize("warm", [True, False])
def test_pairs_are_those_of_the_svd_and_their_bounds_hold(
    shape: tuple[int, int], dtype: torch.dtype, warm: bool
) -> None:
    stored = weights(shape, dtype)
    leading, _ = passed(stored, searched(stored, warm=warm)).leading(2, certified=1)
    assert [len(row) for row in leading] == [1, 2, 2, 2]
    for row, changes in zip(leading, exact(stored), strict=True):
        for one, dense in zip(row, changes, strict=True):
            assert one is not None and one.converged
            U, S, Vh = np.linalg.svd(dense, full_matrices=False)
            assert float(one.S[0]) == pytest.approx(S[0], rel=1e-9)
            assert float(one.S[1]) == pytest.approx(S[1], rel=1e-6)
            assert float(np.abs(one.S.numpy() - S[:2]).max()) <= one.residual * S[0]
            assert sine(one.Vh[0], Vh[0]) <= one.sine + 1e-9 < 1e-4
            assert sine(one.U[0], U[:, 0]) < 1e-4


@every_shape
@every_dtype
@pytest.mark.parametrize("rows", [None, 17, 128])
def test_products_are_those_of_dense_weights(
    shape: tuple[int, int], dtype: torch.dtype, rows: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the rows that come at a time, and those that are multiplied at a time."""
    monkeypatch.setattr(series_leading, "_BLOCK", 40 * shape[1])
    stored = weights(shape, dtype)
    together = passed(stored, searched(stored), rows)
    leading, products = together.leading(2, certified=1)
    assert products is not None
    base, *later = (one.double().numpy() for one in stored)
    flat = np.stack([base, *(b - a for a, b in pairwise([base, *later]))]).reshape(len(stored), -1)
    expected = flat @ flat.T
    scale = np.sqrt(np.outer(expected.diagonal(), expected.diagonal()))
    np.testing.assert_allclose(together.inner.numpy() / scale, expected / scale, atol=1e-12)
    u, v = first(leading, "U").numpy(), first(leading, "Vh").numpy()
    for tau, one in enumerate(later):
        known = slice(0, tau + 1)
        close(products[tau, known, known], u[known] @ (one - base) @ v[known].T, 1e-11)
        assert not products[tau, tau + 1 :].any() and not products[tau, :, tau + 1 :].any()


@every_shape
def test_searches_alone_find_the_same(shape: tuple[int, int]) -> None:
    stored = weights(shape, torch.bfloat16)
    leading, _ = passed(stored, searched(stored)).leading(2, certified=1)
    for i, row in enumerate(leading):
        for one, other in zip(row, (stored[0], stored[i]), strict=False):
            A = Operand(stored[i + 1][None], other[None])
            alone = factorise_leading(A, 2, cuts=(1,), certified=1)
            assert one is not None and alone.Vh is not None
            torch.testing.assert_close(one.S[:1], alone.S[0, :1], rtol=1e-9, atol=0)
            assert float((one.Vh[0] @ alone.Vh[0, 0]).abs()) > 1 - 1e-10


@every_shape
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_of_a_zero_step_there_is_no_basis_and_of_a_zero_update_no_product(
    shape: tuple[int, int], dtype: torch.dtype
) -> None:
    stored = weights(shape, dtype, 4)
    still = [stored[0], stored[1], stored[1], stored[2]]
    bases = searched(still)
    leading, products = passed(still, bases).leading(2, certified=1)
    assert [[one is None for one in row] for row in leading] == [
        [False],
        [False, True],
        [False] * 2,
    ]
    assert products is not None
    back = [stored[0], stored[1], stored[0], stored[2]]
    leading, products = passed(back, searched(back)).leading(2, certified=1)
    assert leading[1][0] is None and leading[1][1] is not None
    assert products is None


@pytest.mark.parametrize("size", [1e-25, 1e18, float("nan")])
def test_sizes_whose_squares_leave_fp32_are_not_searched(size: float) -> None:
    stored = [size * one for one in weights((300, 200), torch.float64, 2)]
    assert searched(stored) == [[None]]


def test_what_does_not_converge_says_so_and_the_whole_spectrum_is_taken() -> None:
    base = gaussian(420, 300, seed=1)
    flat = base + with_spectrum(420, 300, torch.linspace(1.0, 0.99, 300), seed=5)
    ((one,),), _ = passed([base, flat], searched([base, flat])).leading(2, certified=1)
    assert one is not None and not one.converged
    A = Operand(flat[None], base[None])
    factors = svd_leading.completed(A, 2, one, cuts=(1,))
    assert "flat spectrum" in factors.methods[0]["fallback"]
    S = np.linalg.svd(flat.numpy() - base.numpy(), compute_uv=False)
    np.testing.assert_allclose(factors.S[0].numpy(), S[:2], rtol=1e-10)


def test_a_turned_answer_is_that_of_the_transposed_matrix() -> None:
    stored = weights((260, 200), torch.float64, 2)
    ((one,),), _ = passed(stored, searched(stored)).leading(2, certified=1)
    assert one is not None
    turned = one.turned()
    A = (stored[1] - stored[0]).T
    assert float(turned.U[0] @ A @ turned.Vh[0]) == pytest.approx(float(one.S[0]), rel=1e-12)
