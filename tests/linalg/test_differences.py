"""Differences of one matrix from several others: blocks, products, leading triplets together."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from geoscope.errors import NumericsError
from geoscope.linalg import Factors, Operand, factorise_differences, factorise_leading, svd_leading
from geoscope.linalg.differences import Differences
from tests.helpers.matrices import gaussian, updated, with_spectrum

SHAPES = {"tall": (700, 300), "wide": (300, 1300), "square": (310, 310), "many_blocks": (2100, 200)}
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64}
every_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


def weights(shape: tuple[int, int], dtype: torch.dtype, count: int = 3) -> list[Tensor]:
    """A base and what a drift of a few directions makes of it, step by step, as they are stored."""
    spectrum = 0.5 ** torch.arange(6)
    found = [gaussian(*shape, seed=1)]
    for step in range(1, count):
        direction = with_spectrum(*shape, spectrum, seed=7) + 1e-3 * gaussian(*shape, seed=step)
        found.append(updated(found[-1], direction, 0.05))
    return [one.to(dtype) for one in found]


def exact(A: Differences) -> list[np.ndarray]:
    plus = A.plus.double().numpy()
    return [plus - one.double().numpy() for one in A.minus] or [plus]


def close(found: Tensor, expected: np.ndarray, tolerance: float = 1e-13) -> None:
    atol = tolerance * (np.abs(expected).max() or 1.0)
    np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=atol)


@every_shape
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("others", [0, 1, 2])
def test_products_are_those_of_dense_differences(
    shape: tuple[int, int], dtype: torch.dtype, others: int
) -> None:
    first, second, last = weights(shape, dtype)
    A = Differences(last, (first, second.to(torch.bfloat16))[:others])
    assert len(A) == max(1, others)
    dense = exact(A)
    for upright, one in zip(A.upright(), dense, strict=True):
        rounded = one.astype(np.float32)
        assert np.array_equal(upright.numpy(), rounded if A.is_tall else rounded.T)
    rows = [gaussian(3 + i, min(shape), seed=i, sd=1.0) for i in range(len(A))]
    beside = gaussian(5, shape[1], seed=9, sd=1.0)
    pairs, images = A.there_and_back(rows, beside)
    close(images, beside.numpy() @ dense[0].T)
    for X, (there, back), one in zip(rows, pairs, dense, strict=True):
        tall = one if A.is_tall else one.T
        close(there, X.numpy() @ tall.T)
        close(back, X.numpy() @ tall.T @ tall)
    assert A.there_and_back(rows)[1].shape == (0, shape[0])


def test_lent_memory_is_what_comes_back() -> None:
    first, second, last = weights((260, 200), torch.bfloat16)
    A = Differences(last, (first, second))
    rooms = [torch.full((260, 200), 7.0) for _ in range(2)]
    found = A.upright(rooms)
    for room, one, own in zip(rooms, found, A.upright(), strict=True):
        assert one is room
        assert torch.equal(room, own)


@pytest.fixture
def _searching(monkeypatch: pytest.MonkeyPatch) -> None:
    """Searches also of matrices so small that their whole spectrum would be cheaper."""
    monkeypatch.setattr(svd_leading, "leading_pays", lambda *_, **__: True)
    monkeypatch.setattr(svd_leading, "krylov_takes_gram", lambda *_, **__: False)


searching = pytest.mark.usefixtures("_searching")


def together(
    A: Differences,
    near: tuple[Factors | None, ...] = (None, None),
    beside: Tensor | None = None,
    k: int = 2,
) -> tuple[list[Factors], Tensor]:
    squares = torch.tensor([float((one**2).sum()) for one in exact(A)], dtype=torch.float64)
    rows = torch.zeros(0, A.plus.shape[1], dtype=torch.float64) if beside is None else beside
    return factorise_differences(
        A, k, certified=1, squares=squares, near=near[: len(A)], beside=rows, cuts=(1,)
    )


def right(factors: Factors) -> Tensor:
    assert factors.Vh is not None
    return factors.Vh[0, 0]


@searching
@every_shape
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_leading_pairs_are_those_of_the_svd(shape: tuple[int, int], dtype: torch.dtype) -> None:
    first, second, last = weights(shape, dtype)
    A = Differences(last, (first, second))
    near, _ = together(Differences(second, (first, first)))
    beside = gaussian(4, shape[1], seed=9, sd=1.0)
    for start in ((None, None), tuple(near)):
        found, images = together(A, start, beside)
        for one, dense in zip(found, exact(A), strict=True):
            U, S, Vh = np.linalg.svd(dense, full_matrices=False)
            (method,) = one.methods
            assert method["how"].startswith("block-lanczos") and method["fallback"] is None
            np.testing.assert_allclose(one.S[0].numpy(), S[:2], rtol=1e-7)
            assert abs(float(one.S[0, 0]) - S[0]) <= method["bound"] * S[0]
            assert one.U is not None
            for ours, theirs in ((right(one), Vh[0]), (one.U[0, :, 0], U[:, 0])):
                sine = np.linalg.norm(ours.numpy() - theirs * (ours.numpy() @ theirs))
                assert sine <= method["subspace_bound"] + 1e-9 < 1e-4
        seen = torch.cat([beside, right(found[0])[None]]).numpy()
        close(images, seen @ exact(A)[0].T, 1e-12)


@searching
@every_shape
def test_they_are_those_of_each_alone(shape: tuple[int, int]) -> None:
    first, second, last = weights(shape, torch.bfloat16)
    A = Differences(last, (first, second))
    found, _ = together(A)
    for one, other in zip(found, (first, second), strict=True):
        alone = factorise_leading(Operand(last[None], other[None]), 2, cuts=(1,), certified=1)
        torch.testing.assert_close(one.S[0, 0], alone.S[0, 0], rtol=1e-9, atol=0)
        assert float((right(one) @ right(alone)).abs()) > 1 - 1e-10


@searching
@every_shape
@pytest.mark.parametrize("which", [0, 1])
def test_a_difference_of_zero_has_zeros_and_leaves_the_other_as_it_is(
    shape: tuple[int, int], which: int
) -> None:
    first, second, last = weights(shape, torch.bfloat16)
    others = (last, second) if which == 0 else (first, last)
    found, images = together(Differences(last, others), beside=gaussian(2, shape[1], seed=3))
    assert found[which].methods[0]["how"] == "zero"
    assert torch.equal(found[which].S, torch.zeros(1, 2, dtype=torch.float64))
    alone = factorise_leading(Operand(last[None], others[1 - which][None]), 2, certified=1)
    torch.testing.assert_close(found[1 - which].S[:, 0], alone.S[:, 0], rtol=1e-9, atol=0)
    if which == 0:
        assert torch.equal(images, torch.zeros_like(images))


@searching
@every_shape
@pytest.mark.parametrize("size", [1e-25, 1e18])
def test_sizes_whose_squares_leave_fp32(shape: tuple[int, int], size: float) -> None:
    first, second, last = (size * one.double() for one in weights(shape, torch.float64))
    A = Differences(last, (first, second))
    found, images = together(A)
    for one, dense in zip(found, exact(A), strict=True):
        S = np.linalg.svd(dense, compute_uv=False)
        np.testing.assert_allclose(one.S[0].numpy(), S[:2], rtol=1e-7)
    close(images, right(found[0])[None].numpy() @ exact(A)[0].T, 1e-10)


@searching
def test_a_flat_spectrum_takes_the_gram_matrix_and_the_images_are_of_its_vector() -> None:
    base = gaussian(420, 300, seed=1)
    _, second, last = weights((420, 300), torch.float64)
    flat = last - with_spectrum(420, 300, torch.linspace(1.0, 0.99, 300), seed=5)
    A = Differences(last, (flat, second))
    found, images = together(A, beside=base[:3])
    assert "flat spectrum" in found[0].methods[0]["fallback"]
    assert found[1].methods[0]["how"].startswith("block-lanczos")
    seen = torch.cat([base[:3], right(found[0])[None]]).numpy()
    close(images, seen @ exact(A)[0].T, 1e-12)


@searching
@pytest.mark.parametrize("error", [NumericsError("broken"), RuntimeError("broken")])
def test_a_search_that_fails_says_so_and_the_answer_is_exact(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(svd_leading, "leading_of_differences", broken)
    first, second, last = weights((420, 300), torch.bfloat16)
    A = Differences(last, (first, second))
    found, images = together(A)
    for one, dense in zip(found, exact(A), strict=True):
        assert one.methods[0]["fallback"] == "block Lanczos failed: broken"
        S = np.linalg.svd(dense, compute_uv=False)
        np.testing.assert_allclose(one.S[0].numpy(), S[:2], rtol=1e-10)
    close(images, right(found[0])[None].numpy() @ exact(A)[0].T, 1e-12)


@pytest.mark.parametrize("shape", [(30, 20), (60, 2000), (8, 7)])
def test_small_matrices_take_their_whole_spectrum(shape: tuple[int, int]) -> None:
    first, second, last = weights(shape, torch.bfloat16)
    A = Differences(last, (first, second))
    found, images = together(A, beside=gaussian(3, shape[1], seed=2))
    for one, dense in zip(found, exact(A), strict=True):
        S = np.linalg.svd(dense, compute_uv=False)
        np.testing.assert_allclose(one.S[0].numpy(), S[:2], rtol=1e-9, atol=1e-12 * S[0])
    seen = torch.cat([gaussian(3, shape[1], seed=2), right(found[0])[None]]).numpy()
    close(images, seen @ exact(A)[0].T, 1e-12)
