"""Differences of one matrix from several others equal dense algebra in fp64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

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
    for (upright, squares), one in zip(A.upright(), dense, strict=True):
        rounded = one.astype(np.float32)
        assert float(squares) == pytest.approx(float((one**2).sum()), rel=1e-4)
        assert np.array_equal(upright.numpy(), rounded if A.is_tall else rounded.T)
    X = gaussian(3, min(shape), seed=4, sd=1.0)
    there, back = A.there_and_back(X)
    tall = dense[0] if A.is_tall else dense[0].T
    close(there, X.numpy() @ tall.T)
    close(back, X.numpy() @ tall.T @ tall)
    for part, blocks in A.blocks(length=64):
        for block, one in zip(blocks, dense, strict=True):
            assert np.array_equal(block.numpy(), one[part] if A.is_tall else one[:, part])


def test_lent_memory_is_what_comes_back() -> None:
    first, second, last = weights((260, 200), torch.bfloat16)
    A = Differences(last, (first, second))
    rooms = [torch.full((260, 200), 7.0) for _ in range(2)]
    found = A.upright(rooms)
    for room, (one, _), (own, _) in zip(rooms, found, A.upright(), strict=True):
        assert one is room
        assert torch.equal(room, own)
