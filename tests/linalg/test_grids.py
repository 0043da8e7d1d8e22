"""Grids are seen from the values, with their rounding; honest weights never are."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from geoscope.linalg.changes import side
from geoscope.linalg.grids import grid_of
from tests.helpers.matrices import DTYPES, gaussian
from tests.helpers.quantisers import GRIDS


def _weight(m: int, n: int, seed: int) -> Tensor:
    """Gaussian with four stronger directions, as trained weights have."""
    low = gaussian(m, 4, seed=seed + 1, sd=1.0) @ gaussian(4, n, seed=seed + 2, sd=1.0)
    return gaussian(m, n, seed=seed) + 0.015 * low


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("shape", [(256, 256), pytest.param((512, 384), marks=pytest.mark.slow)])
def test_a_grid_is_named_and_its_rounding_is_the_one_measured(
    grid: str, dtype: str, shape: tuple[int, int]
) -> None:
    quantise, name = GRIDS[grid]
    W = _weight(*shape, seed=len(grid))
    stored = quantise(W).to(DTYPES[dtype])
    found = grid_of(stored)
    assert found is not None
    assert found.name == name
    measured = float((stored.double() - W).norm())
    assert found.noise_with(side(stored).noise) == pytest.approx(measured, rel=0.1)


@pytest.mark.parametrize("grid", ["int8 row", "int4 32", "nf4"])
def test_strided_weights_are_seen_alike(grid: str) -> None:
    quantise, _ = GRIDS[grid]
    stored = quantise(_weight(256, 128, seed=5)).float()
    found, turned = grid_of(stored), grid_of(stored.T.contiguous().T)
    assert found == turned
    assert found is not None


def test_pruned_zeros_were_not_rounded() -> None:
    W = _weight(256, 256, seed=9)
    W[W.abs() < W.abs().median()] = 0
    stored = GRIDS["int8 row"][0](W).float()
    found = grid_of(stored)
    assert found is not None
    assert math.sqrt(found.energy) == pytest.approx(float((stored - W).norm()), rel=0.1)


def _ternary(W: Tensor, dim: int | None = None) -> Tensor:
    size = W.abs().mean() if dim is None else W.abs().mean(dim, keepdim=True)
    return torch.round(W / size).clamp(-1, 1) * size


def _pruned(W: Tensor, share: float) -> Tensor:
    return torch.where(W.abs() < W.abs().quantile(share), 0.0, W)


HONEST: dict[str, Callable[[Tensor], Tensor]] = {
    "gaussian": lambda W: W,
    "rank 1": lambda W: 50 * W[:, :1] @ W[:1],
    "heavy tails": lambda W: W**3 * 2500,
    "uniform": lambda W: torch.special.erf(W * 50),
    "tiny": lambda W: W * 2e-5,
    "around 1": lambda W: 1 + W,
    "close to 1": lambda W: 1 + W / 4,
    "all equal": torch.ones_like,
    "zero": torch.zeros_like,
    "constant rows": lambda W: W[:, :1].expand_as(W).clone(),
    "constant columns": lambda W: W[:1].expand_as(W).clone(),
    "ternary": _ternary,
    "ternary by row": lambda W: _ternary(W, 1),
    "binary": lambda W: W.sign() * 0.03,
    "binary by row": lambda W: W.sign() * W[:, :1].abs(),
    "ternary in training": lambda W: _ternary(W) + W / 10,
    "half pruned": lambda W: _pruned(W, 0.5),
    "mostly pruned": lambda W: _pruned(W, 0.95),
    "clamped": lambda W: W.clamp(-0.03, 0.03),
    "clamped hard": lambda W: W.clamp(-0.005, 0.005),
    "rectified": lambda W: W.clamp_min(0),
    "rows twice": lambda W: W[: -(-len(W) // 2)].repeat_interleave(2, 0)[: len(W)],
    "five rows": lambda W: W[torch.arange(len(W)) % 5],
    "five columns": lambda W: W[:, torch.arange(W.shape[1]) % 5],
    "half padded": lambda W: torch.cat([W[: len(W) // 2], W[:1].expand(len(W) - len(W) // 2, -1)]),
    "circulant": lambda W: torch.stack([W[0].roll(i) for i in range(len(W))]),
    "identity": lambda W: torch.eye(*W.shape, dtype=W.dtype),
    "bf16 in a wider file": lambda W: W.bfloat16().double(),
    "fp16 in a wider file": lambda W: W.half().double(),
    "fp16 around 1 in a wider file": lambda W: (1 + W).half().double(),
    "mean of two bf16": lambda W: (W.bfloat16().double() + W.flip(0).bfloat16().double()) / 2,
}
SHAPES = [(32, 32), (16, 64), (40, 48), (7, 1000), (256, 64), (130, 200)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", HONEST)
def test_honest_weights_lie_on_no_grid(kind: str, dtype: str) -> None:
    for i, shape in enumerate(SHAPES):
        W = HONEST[kind](gaussian(*shape, seed=i)).to(DTYPES[dtype])
        assert grid_of(W) is None, shape


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_hundred_gaussian_matrices_lie_on_no_grid(dtype: str) -> None:
    for seed in range(100):
        assert grid_of(gaussian(64, 96, seed=seed).to(DTYPES[dtype])) is None


def test_vectors_and_small_matrices_are_not_looked_at() -> None:
    quantise = GRIDS["int8 row"][0]
    assert grid_of(quantise(gaussian(16, 32, seed=0))) is None
    assert grid_of(torch.zeros(4096)) is None
