"""Spacing, rounding and rounding cells are those of the floating formats, number by number."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy.stats import norm
from torch import Tensor

from geoscope.linalg import FORMATS, FloatFormat, effective_format
from geoscope.linalg.storage import (
    bf16_bounds,
    normal_cdf,
    round_to,
    rounding_cell,
    squared_spacing,
)
from tests.helpers.matrices import gaussian, generator

NARROW = (torch.bfloat16, torch.float16)
BF16 = FORMATS[torch.bfloat16]
every_narrow = pytest.mark.parametrize("dtype", NARROW, ids=["bf16", "fp16"])


def every_number(dtype: torch.dtype) -> Tensor:
    """All finite numbers of a 16-bit format but the two outermost, as stored."""
    codes = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    numbers = codes.view(dtype)
    return numbers[numbers.double().abs() < torch.finfo(dtype).max]


def next_away(numbers: Tensor) -> Tensor:
    """The number of the format behind each one, seen from zero."""
    return (numbers.view(torch.int16) + 1).view(numbers.dtype)


def shaken(count: int, *, seed: int, least: int, largest: int) -> Tensor:
    """fp64 numbers of both signs over many orders of two."""
    g = generator(seed)
    mantissa = 1 + torch.rand(count, dtype=torch.float64, generator=g)
    exponent = torch.randint(least, largest, (count,), generator=g)
    sign = 1 - 2 * torch.randint(0, 2, (count,), generator=g)
    return torch.ldexp(mantissa, exponent) * sign


# --- which format -------------------------------------------------------------------------------


def wide(count: int, dtype: torch.dtype) -> Tensor:
    return gaussian(count, 1, seed=1, sd=1.0).to(torch.bfloat16).to(dtype)


@pytest.mark.parametrize(
    ("weight", "name"),
    [
        (wide(1024, torch.float32), "bfloat16"),
        (wide(1023, torch.float32), "float32"),  # by chance, with so few
        (wide(1024, torch.float16), "bfloat16"),
        (wide(4096, torch.float64), "float64"),
        (wide(4096, torch.bfloat16), "bfloat16"),
        (gaussian(2048, 1, seed=2).float(), "float32"),
        (gaussian(2048, 1, seed=2).half(), "float16"),
        (torch.zeros(64, 64), "bfloat16"),
    ],
)
def test_a_wide_file_of_bf16_numbers_counts_as_bf16(weight: Tensor, name: str) -> None:
    assert effective_format(weight).name == name
    assert effective_format(weight.reshape(-1, 1)).name == name


@pytest.mark.parametrize("position", [0, 1023, 1024, 9999])
def test_one_number_beyond_bf16_is_enough(position: int) -> None:
    weight = wide(10000, torch.float32)
    weight[position] = 1 + 2.0**-12
    assert effective_format(weight).name == "float32"


@pytest.mark.parametrize("dtype", FORMATS)
def test_eps_and_least_normal_are_those_of_torch(dtype: torch.dtype) -> None:
    assert FORMATS[dtype].eps == torch.finfo(dtype).eps
    assert 2.0 ** FORMATS[dtype].min_exponent == torch.finfo(dtype).tiny


# --- spacing and rounding -----------------------------------------------------------------------


@every_narrow
def test_spacing_is_the_distance_to_the_next_number(dtype: torch.dtype) -> None:
    """For every number there is, subnormal ones and zero among them."""
    numbers = every_number(dtype)
    distance = (next_away(numbers).double() - numbers.double()).abs()
    assert torch.equal(squared_spacing(numbers, FORMATS[dtype]), distance.square())


def test_spacing_of_fp32_is_that_of_numpy() -> None:
    values = shaken(5000, seed=3, least=-120, largest=120).float()
    expected = np.abs(np.spacing(values.numpy()).astype(np.float64)) ** 2
    assert np.array_equal(squared_spacing(values, FORMATS[torch.float32]).numpy(), expected)


@pytest.mark.parametrize(
    ("dtype", "least", "largest"),
    [(torch.bfloat16, -140, 120), (torch.float16, -28, 15), (torch.float32, -152, 120)],
)
def test_rounding_is_that_of_the_hardware(dtype: torch.dtype, least: int, largest: int) -> None:
    """To nearest, ties to even, subnormals kept."""
    values = shaken(20000, seed=4, least=least, largest=largest)
    expected = values.to(dtype).double()
    assert torch.equal(round_to(values, FORMATS[dtype]), expected)


@every_narrow
def test_ties_go_to_the_even_number(dtype: torch.dtype) -> None:
    numbers = every_number(dtype)
    ties = (numbers.double() + next_away(numbers).double()) / 2
    inside = ties.isfinite()
    assert torch.equal(round_to(ties[inside], FORMATS[dtype]), ties[inside].to(dtype).double())


def test_fp64_is_left_alone() -> None:
    values = shaken(100, seed=5, least=-300, largest=300)
    assert torch.equal(round_to(values, FORMATS[torch.float64]), values)


# --- cells --------------------------------------------------------------------------------------


def step(values: Tensor, up: bool) -> Tensor:
    return torch.nextafter(values, torch.full_like(values, torch.inf if up else -torch.inf))


@every_narrow
def test_a_cell_holds_what_rounds_to_its_number_and_nothing_else(dtype: torch.dtype) -> None:
    """One fp64 step inside and one outside of each bound, for every number there is."""
    fmt, numbers = FORMATS[dtype], every_number(dtype).double()
    low, high = rounding_cell(numbers, fmt)
    assert torch.equal(round_to(step(low, up=True), fmt), numbers)
    assert torch.equal(round_to(step(high, up=False), fmt), numbers)
    assert bool((round_to(step(low, up=False), fmt) < numbers).all())
    assert bool((round_to(step(high, up=True), fmt) > numbers).all())


@every_narrow
def test_the_cell_of_any_value_is_that_of_the_number_it_rounds_to(dtype: torch.dtype) -> None:
    values = shaken(1000, seed=6, least=-10, largest=10)
    found = rounding_cell(values, FORMATS[dtype])
    for bound, expected in zip(found, rounding_cell(values.to(dtype), FORMATS[dtype]), strict=True):
        assert torch.equal(bound, expected)


def reads_within(fmt: FloatFormat, reach: float) -> Callable[[Tensor, Tensor], Tensor]:
    """Whether x, stored as fmt and loaded as bf16, lies within reach of v."""
    return lambda x, v: (round_to(round_to(x, fmt), BF16) - v).abs() <= reach


@pytest.mark.parametrize("reach", [0.0, 1e-5, 0.01])
@pytest.mark.parametrize("dtype", FORMATS, ids=str)
def test_bounds_through_the_file_and_bf16(dtype: torch.dtype, reach: float) -> None:
    """Just inside and just outside of the bounds, by doing both roundings."""
    fmt = FORMATS[dtype]
    values = round_to(shaken(20000, seed=7, least=-24, largest=4), BF16)
    low, high = bf16_bounds(values, reach, fmt)
    within = reads_within(fmt, reach)
    there = high > low
    assert bool(there.all()) == (dtype is not torch.float16 or reach > 0)
    # where fp16 is coarser than bf16, some bf16 numbers cannot be read from a file at all
    assert torch.equal(low[~there], high[~there])
    assert not bool(within(values, values)[~there].any())
    values, low, high = values[there], low[there], high[there]
    # a wider file moves a bound by half its own spacing, which is not followed up
    slack = 2.0**-15 if fmt.fraction_bits == 23 else 0.0
    span = (high - low) * slack + torch.maximum(low.abs(), high.abs()) * 2.0**-50
    assert bool(within(low + span, values).all())
    assert bool(within(high - span, values).all())
    assert not bool(within(low - span, values).any())
    assert not bool(within(high + span, values).any())


def test_fp16_files_have_cells_of_their_own() -> None:
    """The negative control: the cell of bf16 alone is off by up to a twelfth of its width."""
    values = round_to(shaken(1000, seed=8, least=-10, largest=4), BF16)
    direct = bf16_bounds(values, 0.0, BF16)
    through = bf16_bounds(values, 0.0, FORMATS[torch.float16])
    width = direct[1] - direct[0]
    moved = ((direct[1] - through[1]).abs() / width).max()
    assert float(moved) == pytest.approx(1 / 12)


def test_normal_distribution_function() -> None:
    x = torch.linspace(-8, 8, 101, dtype=torch.float64)
    np.testing.assert_allclose(normal_cdf(x).numpy(), norm.cdf(x.numpy()), rtol=1e-12)
