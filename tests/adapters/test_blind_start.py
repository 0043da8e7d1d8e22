"""Which products are taken for the start of a method that takes it out of the base?"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from geoscope.adapters.blind_start import blind_start
from geoscope.adapters.factors import LoraFactors
from geoscope.adapters.geora import geora
from geoscope.adapters.lora import lora
from geoscope.adapters.milora import milora
from geoscope.adapters.olora import olora
from geoscope.adapters.pissa import pissa
from geoscope.adapters.table import INITIALISATIONS
from geoscope.linalg.product import Product
from tests.helpers.matrices import gaussian, orthonormal, with_spectrum

RANK, ALPHA = 4, 12.0
SCALING = ALPHA / RANK
STARTS = {"pissa": pissa, "milora": milora, "olora": olora, "geora": geora}
every_start = pytest.mark.parametrize("name", STARTS)


def base(m: int = 60, n: int = 44, *, seed: int = 1) -> Tensor:
    """A spectrum that falls as that of a trained matrix."""
    return with_spectrum(m, n, np.arange(1, min(m, n) + 1) ** -0.4, seed=seed).float()


def seen(W: Tensor, B: Tensor, A: Tensor, *, rank: int = RANK, scaling: float = SCALING):
    return blind_start(W, Product.of(B, A, scaling), rank=rank, scaling=scaling)


def trained(found: LoraFactors, size: float, *, seed: int = 5) -> tuple[Tensor, Tensor]:
    """The factors after steps of this relative size in random directions."""
    moved = []
    for i, one in enumerate((found.B, found.A)):
        step = gaussian(*one.shape, seed=seed + i)
        moved.append(one.double() + size * step * one.norm() / step.norm())
    return moved[0], moved[1]


def test_the_starts_are_those_of_every_method_that_takes_from_the_base() -> None:
    assert set(STARTS) == {name for name, one in INITIALISATIONS.items() if one.needs_layout}


@every_start
@pytest.mark.parametrize("size", [0.0, 0.01, 0.05])
@pytest.mark.parametrize("shape", [(60, 44), (44, 60), (48, 48)])
def test_a_start_is_seen_after_a_small_training(
    name: str, size: float, shape: tuple[int, int]
) -> None:
    W = base(*shape)
    assert seen(W, *trained(STARTS[name](W, RANK, alpha=ALPHA), size)) == name


@pytest.mark.parametrize("name", ["pissa", "olora", "geora"])
def test_a_start_that_bf16_rounded_is_seen(name: str) -> None:
    W = base().bfloat16()
    found = STARTS[name](W, RANK, alpha=ALPHA)
    assert seen(W, found.B.bfloat16(), found.A.bfloat16()) == name


def test_both_conventions_of_geora_are_seen() -> None:
    W = base()
    for convention in ("geora", "pissa"):
        found = geora(W, RANK, alpha=ALPHA, scale_convention=convention)
        assert seen(W, found.B, found.A) == "geora"


@every_start
def test_it_is_a_matter_of_this_base(name: str) -> None:
    """Negative control: the start of another matrix with the same spectrum."""
    other = base(seed=7)
    found = STARTS[name](other, RANK, alpha=ALPHA)
    assert seen(base(), found.B, found.A) is None
    assert seen(other, found.B, found.A) == name


@every_start
def test_the_rank_of_the_adapter_counts(name: str) -> None:
    """The start of rank 8 is not that of rank 4, and not of rank 16."""
    W = base()
    found = STARTS[name](W, 8, alpha=8 * SCALING)
    for rank in (4, 16):
        assert seen(W, found.B, found.A, rank=rank) != name
    assert seen(W, found.B, found.A, rank=8) == name


@every_start
def test_half_of_a_start_is_none(name: str) -> None:
    W = base()
    found = STARTS[name](W, RANK, alpha=ALPHA)
    for factor in (0.5, -1.0):
        assert seen(W, factor * found.B, found.A) is None


@pytest.mark.parametrize("size", [1e-3, 0.1, 1.0, 10.0])
def test_a_random_product_is_no_start(size: float) -> None:
    W = base()
    for seed in range(4):
        B, A = gaussian(60, RANK, seed=seed), gaussian(RANK, 44, seed=90 + seed)
        update = size * float(W.norm()) / float((B @ A).norm()) / SCALING
        assert seen(W, update * B, A) is None


@pytest.mark.parametrize("rho", [1e-3, 0.05, 0.5])
def test_a_trained_lora_is_no_start(rho: float) -> None:
    """B has grown from zero along the base's own leading directions, as gradients often lie."""
    W = base()
    U, _, Vh = torch.linalg.svd(W.double(), full_matrices=False)
    A = lora(W, RANK, alpha=ALPHA, seed=3).A.double()
    B = U[:, :RANK] @ (Vh[:RANK] @ A.T).T
    B = B * rho * W.double().norm() / (SCALING * (B @ A).norm())
    assert seen(W, B, A) is None


@pytest.mark.parametrize("rho", [1e-3, 0.05])
def test_an_update_on_the_principal_directions_is_no_start(rho: float) -> None:
    """All of it lies where PiSSA begins, but for its size."""
    W = base()
    found = pissa(W, RANK, alpha=ALPHA)
    assert seen(W, rho * found.B, found.A) is None


def test_values_in_another_order_are_no_start() -> None:
    """The leading directions, paired otherwise: all energy in the block, none on its diagonal."""
    W = base()
    found = pissa(W, RANK, alpha=ALPHA)
    assert seen(W, found.B.roll(1, dims=1), found.A) is None


def test_nothing_is_said_where_nothing_can_be() -> None:
    W = base()
    B, A = gaussian(60, RANK, seed=1), gaussian(RANK, 44, seed=2)
    assert seen(W, torch.zeros_like(B), A) is None
    assert seen(torch.zeros_like(W), B, A) is None
    wide = gaussian(60, 50, seed=3), gaussian(50, 44, seed=4)
    assert seen(W, *wide, rank=50) is None, "a rank above the shorter side has no start"


def test_a_square_orthogonal_base_has_no_leading_directions_of_its_own() -> None:
    """Of equal singular values the triplets are arbitrary; a random product is none of them."""
    W = orthonormal(40, 40, seed=1)
    B, A = gaussian(40, RANK, seed=2), gaussian(RANK, 40, seed=3)
    assert seen(W, B, A) is None
