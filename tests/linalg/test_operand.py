"""Products with stored matrices equal dense algebra in fp64, whatever the shape and the dtype."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from geoscope.linalg import Operand
from tests.helpers.matrices import gaussian

pytestmark = pytest.mark.usefixtures("every_route")

# Around the block lengths (512 along the longer side, 256 in the Gram matrix), and off by one.
SHAPES = {
    "tall": (1100, 70),
    "wide": (70, 1100),
    "one_row_more": (97, 96),
    "one_column_more": (96, 97),
    "two_gram_blocks": (300, 300),
    "exactly_two_blocks": (1024, 40),
    "one_row_beyond": (40, 1025),
    "tiny": (2, 2),
    "two_columns": (600, 2),
}
DTYPES = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
    "fp64": torch.float64,
}

every_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


def operands(shape: tuple[int, int]) -> Iterator[tuple[Operand, np.ndarray]]:
    """A stack of two in each dtype, alone and as differences, with its dense value by numpy."""
    m, n = shape
    plus = torch.stack([gaussian(m, n, seed=1), gaussian(m, n, seed=2)])
    minus = plus + 0.01 * torch.stack([gaussian(m, n, seed=3), gaussian(m, n, seed=4)])
    for dtype in DTYPES.values():
        one = plus.to(dtype)
        yield Operand(one), one.double().numpy()
        for other in (minus.to(dtype), minus.to(torch.bfloat16)):
            yield Operand(one, other), one.double().numpy() - other.double().numpy()


def close(found: Tensor, expected: np.ndarray) -> None:
    scale = float(np.abs(expected).max()) or 1.0
    np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=1e-13 * scale)


@every_shape
def test_dense_is_the_difference_in_fp64(shape: tuple[int, int]) -> None:
    for A, expected in operands(shape):
        assert A.dense().dtype == torch.float64
        assert np.array_equal(A.dense().numpy(), expected)
        assert A.shape == shape
        assert len(A) == 2
        assert A.is_tall == (shape[0] >= shape[1])


@every_shape
def test_gram_is_that_of_the_shorter_side(shape: tuple[int, int]) -> None:
    for A, expected in operands(shape):
        turned = expected.transpose(0, 2, 1)
        tall = shape[0] >= shape[1]
        gram = A.gram()
        close(gram, turned @ expected if tall else expected @ turned)
        assert torch.equal(gram, gram.mT)


@every_shape
def test_images_of_rows(shape: tuple[int, int]) -> None:
    m, n = shape
    for k in (1, 5):
        X = torch.stack([gaussian(k, n, seed=5, sd=1.0), gaussian(k, n, seed=6, sd=1.0)])
        Y = torch.stack([gaussian(k, m, seed=7, sd=1.0), gaussian(k, m, seed=8, sd=1.0)])
        for A, expected in operands(shape):
            close(A.right(X), X.numpy() @ expected.transpose(0, 2, 1))
            close(A.left(Y), Y.numpy() @ expected)


@every_shape
def test_norms(shape: tuple[int, int]) -> None:
    for A, expected in operands(shape):
        close(A.norm(), np.sqrt((expected**2).sum((1, 2))))


@every_shape
def test_a_row_is_a_stack_of_one(shape: tuple[int, int]) -> None:
    for A, expected in operands(shape):
        for i in (0, 1):
            assert len(A.row(i)) == 1
            assert np.array_equal(A.row(i).dense()[0].numpy(), expected[i])
            assert torch.equal(A.row(i).gram()[0], A.gram()[i])


@every_shape
def test_fp32_forms_are_rounded_after_the_subtraction(shape: tuple[int, int]) -> None:
    for A, expected in operands(shape):
        (upright, squares), gram = A.row(1).upright(), A.row(1).gram32()
        assert float(squares) == pytest.approx(float((expected[1] ** 2).sum()), rel=1e-4)
        assert upright.dtype == gram.dtype == torch.float32
        rounded = expected[1].astype(np.float32)
        assert np.array_equal(upright.numpy(), rounded if A.is_tall else rounded.T)
        exact = A.row(1).gram()[0].numpy()
        np.testing.assert_allclose(gram.numpy(), exact, rtol=0, atol=1e-4 * np.abs(exact).max())


@every_shape
@pytest.mark.parametrize("rows", [1, 3, 12, 13, 40])
def test_products_of_any_number_of_rows_agree(shape: tuple[int, int], rows: int) -> None:
    for A, expected in operands(shape):
        one, q = A.row(1), min(A.shape)
        X = gaussian(rows, q, seed=rows)
        there, back = one.there_and_back(X)
        upright = expected[1] if A.is_tall else expected[1].T
        image = X.numpy() @ upright.T
        np.testing.assert_allclose(there.numpy(), image, rtol=0, atol=1e-12 * np.abs(image).max())
        twice = image @ upright
        np.testing.assert_allclose(back.numpy(), twice, rtol=0, atol=1e-12 * np.abs(twice).max())


@every_shape
def test_blocks_cover_the_longer_side_once(shape: tuple[int, int]) -> None:
    A, expected = next(operands(shape))
    seen = 0
    for part, block in A.blocks(0):
        assert part.start == seen
        assert part.stop - part.start <= 1024
        whole = expected[0][part] if A.is_tall else expected[0][:, part]
        assert np.array_equal(block.numpy(), whole)
        seen = part.stop
    assert seen == max(shape)


@pytest.mark.parametrize(
    ("dtype", "plus", "minus"),
    [("bf16", 256.0, 0.5), ("fp16", 2048.0, 0.5), ("fp32", 2.0**24, 0.5)],
)
def test_both_sides_are_upcast_before_they_are_subtracted(
    dtype: str, plus: float, minus: float
) -> None:
    """The difference is not a number of the format; subtracted there, it would round away."""
    one, other = (torch.full((1, 2, 2), x, dtype=DTYPES[dtype]) for x in (plus, minus))
    assert float((one - other)[0, 0, 0]) != plus - minus
    A = Operand(one, other)
    assert float(A.dense()[0, 0, 0]) == plus - minus
    assert float(A.norm()) == 2 * (plus - minus)
    assert float(A.gram()[0, 0, 1]) == 2 * (plus - minus) ** 2


@pytest.mark.parametrize("shape", [(600, 30), (30, 600)])
def test_views_of_larger_tensors_are_read_right(shape: tuple[int, int]) -> None:
    """Transposed (Conv1D is turned as a view) and strided weights."""
    m, n = shape
    weight = gaussian(n, m, seed=9).to(torch.bfloat16).T[None]
    other = gaussian(2 * m, 2 * n, seed=10).to(torch.bfloat16)[::2, ::2][None]
    assert not weight.is_contiguous()
    A = Operand(weight, other)
    expected = weight.double().numpy() - other.double().numpy()
    turned = expected.transpose(0, 2, 1)
    close(A.gram(), turned @ expected if m > n else expected @ turned)
    X = gaussian(3, n, seed=11, sd=1.0)[None]
    close(A.right(X), X.numpy() @ turned)


def test_inputs_stay_as_they_are() -> None:
    base, tuned = gaussian(40, 30, seed=12)[None], gaussian(40, 30, seed=13)[None]
    before = base.clone(), tuned.clone()
    A = Operand(tuned, base)
    A.gram()
    A.norm()
    A.dense().zero_()
    A.right(torch.ones(1, 1, 30, dtype=torch.float64))
    assert torch.equal(base, before[0])
    assert torch.equal(tuned, before[1])
    alone = Operand(base)
    alone.dense().zero_()
    assert torch.equal(base, before[0])
