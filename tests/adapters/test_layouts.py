"""Do the layouts start from W, and is the error that they state the one that is there?

The oracle is dense fp64.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from geoscope.adapters import layouts
from geoscope.adapters.factors import LoraFactors
from geoscope.adapters.layouts import (
    MIRROR_TOLERANCE,
    anchor,
    effective_error,
    largest_product,
    mirror,
    residual,
    start_error,
)


def factors_of(B: Tensor, A: Tensor, scaling: float) -> LoraFactors:
    return LoraFactors(B, A, scaling, {}, {}, {}, {}, ())


def draw(
    m: int, n: int, r: int = 3, *, dtype: torch.dtype = torch.float32, scaling: float = 2.0
) -> tuple[Tensor, LoraFactors]:
    """W of unit scale and factors whose product is a tenth of it."""
    generator = torch.Generator().manual_seed(m * 1000 + n)
    W = torch.randn(m, n, generator=generator).to(dtype)
    B = torch.randn(m, r, generator=generator) * 0.1
    A = torch.randn(r, n, generator=generator) * 0.3
    return W, factors_of(B, A, scaling)


def product(factors: LoraFactors) -> Tensor:
    return factors.scaling * (factors.B.double() @ factors.A.double())


def relative(error: Tensor, W: Tensor) -> float:
    return float(error.double().norm() / W.double().norm())


SHAPES = [(16, 16), (40, 7), (7, 40), (1, 9), (9, 1)]


@pytest.fixture(params=[1 << 20, 64, 1], ids=["one block", "blocks", "rows"])
def _block(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layouts, "_BLOCK", request.param)


@pytest.mark.usefixtures("_block")
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("written", [torch.float32, torch.bfloat16, torch.float64])
def test_residual_and_product_give_w_to_the_stated_error(
    shape: tuple[int, int], stored: torch.dtype, written: torch.dtype
) -> None:
    W, factors = draw(*shape, dtype=stored)
    made = residual(W, factors, dtype=written)
    assert made.weight.dtype == written
    assert made.weight.shape == W.shape
    assert made.weight.is_contiguous()
    true = relative(made.weight.double() + product(factors) - W.double(), W)
    assert made.error == pytest.approx(true, rel=0.05, abs=1.5e-7)
    assert effective_error(W, made.weight, factors.A, factors.B, factors.scaling) == made.error
    assert made.error < (5e-3 if written == torch.bfloat16 else 1.5e-7)
    if written == torch.bfloat16 and W.numel() > 100:
        assert made.error > 5e-4  # the bad setting really is bad


def test_inputs_stay_as_they_are() -> None:
    """fp32 in and fp32 out is where a view could be changed in place."""
    W, factors = draw(20, 12)
    copies = W.clone(), factors.A.clone(), factors.B.clone()
    made = residual(W, factors, dtype=torch.float32)
    kept = made.weight.clone()
    effective_error(W, made.weight, factors.A, factors.B, factors.scaling)
    for layout in layouts.LAYOUTS:
        start_error(W, factors, layout, dtype=torch.float32)
    mirror(factors)
    anchor(factors)
    assert torch.equal(made.weight, kept)
    for now, before in zip((W, factors.A, factors.B), copies, strict=True):
        assert torch.equal(now, before)


def test_a_residual_is_the_rounded_difference() -> None:
    W, factors = draw(24, 10, dtype=torch.bfloat16)
    made = residual(W, factors, dtype=torch.float32)
    expected = (W.float() - factors.scaling * (factors.B @ factors.A)).to(torch.float32)
    torch.testing.assert_close(made.weight, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.usefixtures("_block")
def test_conv1d_is_turned_back() -> None:
    disk, factors = draw(10, 24)[0].T.contiguous(), draw(10, 24)[1]
    made = residual(disk.T, factors, dtype=torch.float32, transposed=True)
    assert made.weight.shape == disk.shape
    assert made.weight.is_contiguous()
    straight = residual(disk.T.contiguous(), factors, dtype=torch.float32)
    assert torch.equal(made.weight, straight.weight.T)
    assert made.error == pytest.approx(straight.error, rel=1e-6)


def test_a_zero_matrix_has_no_relative_error() -> None:
    W, factors = draw(6, 5)
    nothing = factors_of(torch.zeros(6, 3), factors.A, 2.0)
    assert residual(torch.zeros_like(W), nothing, dtype=torch.float32).error == 0.0
    made = residual(torch.zeros_like(W), factors, dtype=torch.bfloat16)
    assert made.error == math.inf


# --- mirror and anchor ----------------------------------------------------------------------------


@pytest.mark.usefixtures("_block")
@pytest.mark.parametrize("shape", [*SHAPES, (300, 200)])
def test_a_mirror_cancels_pair_by_pair(shape: tuple[int, int]) -> None:
    W, factors = draw(*shape, r=5)
    A, B = mirror(factors)
    assert A.shape == (10, shape[1])
    assert B.shape == (shape[0], 10)
    assert torch.equal(A[0::2], factors.A)
    assert torch.equal(A[1::2], factors.A)
    assert torch.equal(B[:, 0::2], factors.B)
    assert torch.equal(B[:, 1::2], -factors.B)
    largest = largest_product(A, B, factors.scaling / 2)
    assert largest <= MIRROR_TOLERANCE * float(W.abs().max())


def test_the_mirror_check_can_fail() -> None:
    W, factors = draw(30, 20)
    A, B = mirror(factors)
    B[3, 1] *= 1 + 1e-6
    assert largest_product(A, B, 1.0) > MIRROR_TOLERANCE * float(W.abs().max())
    B[0, 0] = math.nan
    assert math.isnan(largest_product(A, B, 1.0))
    expected = float(product(factors).abs().max())
    assert largest_product(factors.A, factors.B, factors.scaling) == pytest.approx(expected)


def test_layouts_share_no_storage() -> None:
    _, factors = draw(8, 6)
    (A, B), (A_kept, B_kept) = anchor(factors)
    assert torch.equal(B_kept, -B)
    assert torch.equal(A_kept, A)
    tensors = [A, B, A_kept, B_kept, *mirror(factors), factors.A, factors.B]
    assert len({one.untyped_storage().data_ptr() for one in tensors}) == len(tensors)
    assert all(one.is_contiguous() for one in tensors)


# --- the start in a trainer's dtype ---------------------------------------------------------------


@pytest.mark.usefixtures("_block")
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("trainer", [torch.float32, torch.bfloat16])
def test_the_start_error_is_that_of_the_model_which_a_trainer_holds(
    stored: torch.dtype, trainer: torch.dtype
) -> None:
    W, factors = draw(60, 50, dtype=stored)
    held = W.to(trainer).double()
    rewritten = (W.double() - product(factors)).float().to(trainer).double() + product(factors)
    error = start_error(W, factors, "residual", dtype=trainer)
    assert error == pytest.approx(relative(rewritten - held, held), rel=0.02, abs=1e-7)
    if trainer == torch.bfloat16:
        assert 5e-4 < error < 5e-3
    assert start_error(W, factors, "mirror", dtype=trainer) < 2e-8
    assert start_error(W, factors, "anchor", dtype=trainer) == 0.0


def test_a_mirror_merged_in_bf16_changes_no_weight() -> None:
    W, factors = draw(60, 50, dtype=torch.bfloat16)
    A, B = mirror(factors)
    merged = W.float() + factors.scaling / 2 * (B @ A)
    assert torch.equal(merged.to(torch.bfloat16), W)
