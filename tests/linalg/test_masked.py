"""Entries that are small by themselves or in the leading part, against numpy's quantiles."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from geoscope.linalg.masked import keep_small, part_threshold, threshold
from tests.helpers.matrices import gaussian

DTYPES = [torch.bfloat16, torch.float32, torch.float64]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(40, 30), (30, 40), (700, 900)])  # the last one is bracketed
def test_what_is_kept_is_small_in_one_of_the_two(
    shape: tuple[int, int], dtype: torch.dtype
) -> None:
    W = gaussian(*shape, seed=1).to(dtype)
    U, S, Vh = torch.linalg.svd(W.double(), full_matrices=False)
    U, S, Vh, rho = U[:, :5], S[:5], Vh[:5], 0.2
    found = keep_small(W, U, S, Vh, rho)
    dense, leading = W.double().numpy(), ((U * S) @ Vh).numpy()
    edges = np.quantile(np.abs(leading), rho), np.quantile(np.abs(dense), rho)
    spec, euc = np.abs(leading) <= edges[0], np.abs(dense) <= edges[1]
    assert found.spec.tau == pytest.approx(edges[0], rel=1e-12)
    assert found.euc.tau == pytest.approx(edges[1], rel=1e-12)
    assert (found.count_spec, found.count_euc) == (spec.sum(), euc.sum())
    assert found.count_union == (spec | euc).sum()
    np.testing.assert_array_equal(found.kept.double().numpy(), np.where(spec | euc, dense, 0))
    assert found.energy == pytest.approx(np.sum(dense[spec | euc] ** 2), rel=1e-9)


@pytest.mark.parametrize("level", [0.0, 0.001, 0.5, 0.999, 1.0])
def test_quantiles_are_those_of_numpy(level: float) -> None:
    left, right = gaussian(600, 3, seed=2, sd=1.0), gaussian(3, 500, seed=3, sd=1.0)
    sizes = (left @ right).abs().numpy()
    expected = np.quantile(sizes, level)
    assert part_threshold(left, right, level).tau == pytest.approx(expected, rel=1e-12)
    assert threshold(left @ right, level).tau == pytest.approx(expected, rel=1e-12)
