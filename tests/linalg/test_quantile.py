"""Quantiles of any size equal numpy's."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from geoscope.linalg import quantile
from tests.helpers.matrices import gaussian

LEVELS = (0.0, 1e-9, 0.1, 0.25, 0.3, 0.5, 0.7, 0.9, 1 - 1e-9, 1.0)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("size", [1, 2, 3, 10, 997])
def test_equals_numpy(size: int, level: float) -> None:
    values = gaussian(size, 1, seed=size)
    expected = float(np.quantile(values.numpy(), level))
    assert quantile(values, level) == pytest.approx(expected, rel=1e-14)


def test_shape_and_dtype_do_not_matter() -> None:
    values = gaussian(6, 35, seed=1)
    expected = quantile(values, 0.37)
    assert quantile(values.T, 0.37) == expected
    assert quantile(values.reshape(2, 3, 5, 7), 0.37) == expected
    assert quantile(values.float(), 0.37) == pytest.approx(expected, rel=1e-6)
    narrow = values.to(torch.bfloat16)
    assert quantile(narrow, 0.37) == float(np.quantile(narrow.double().numpy(), 0.37))


def test_the_ends_are_the_extremes() -> None:
    values = gaussian(40, 3, seed=2)
    assert quantile(values, 0.0) == float(values.min())
    assert quantile(values, 1.0) == float(values.max())


def test_ties_and_constants() -> None:
    assert quantile(torch.full((9,), 3.25), 0.3) == 3.25
    assert quantile(torch.tensor([1.0, 1.0, 2.0, 2.0]), 0.5) == 1.5
    assert quantile(torch.tensor([0.0, 10.0]), 0.25) == 2.5


def test_the_values_stay_in_their_order() -> None:
    values = gaussian(50, 1, seed=3)
    before = values.clone()
    quantile(values, 0.4)
    assert torch.equal(values, before)


@pytest.mark.slow
def test_more_entries_than_torch_accepts() -> None:
    """The negative control: torch refuses 2²⁴ + 1 entries, an ordinary embedding."""
    values = torch.arange(2**24 + 1, dtype=torch.float32).flip(0)
    with pytest.raises(RuntimeError, match="too large"):
        torch.quantile(values, 0.5)
    assert quantile(values, 0.5) == 2.0**23
    assert quantile(values, 0.25) == 2.0**22
