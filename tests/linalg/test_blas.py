"""Products by BLAS equal those of numpy in fp64, whichever library takes them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from geoscope.linalg import blas
from tests.helpers.matrices import gaussian


@pytest.mark.parametrize("few", [0, 12], ids=["scipy", "torch"])
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 7, 12, 13, 30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
def test_gemm(rows: int, dtype: torch.dtype, few: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Contiguous, and with rows longer than what is taken of them; into part of a matrix, too."""
    monkeypatch.setattr(blas, "_FEW_ROWS", few)
    eps = torch.finfo(dtype).eps
    wide = gaussian(rows, 260, seed=1, sd=1.0).to(dtype)
    for A in (wide[:, :200], wide[:, 60:].clone()):
        for transposed in (False, True):
            B = gaussian(200, 90, seed=2, sd=1.0).to(dtype)
            B = B.T.contiguous() if transposed else B
            product = A.double().numpy() @ (B.T if transposed else B).double().numpy()
            for add in (False, True):
                whole = torch.ones(rows, 150, dtype=dtype)
                out = whole[:, 20:110]
                assert blas.gemm(A, B, out, add=add, Bt=transposed) is out
                expected = product + (1.0 if add else 0.0)
                np.testing.assert_allclose(out.double().numpy(), expected, rtol=0, atol=2e3 * eps)
                assert bool((whole[:, :20] == 1).all()) and bool((whole[:, 110:] == 1).all())


def test_gemm_with_a_transposed_left_side() -> None:
    A, B = gaussian(200, 5, seed=3, sd=1.0).double(), gaussian(200, 90, seed=4, sd=1.0).double()
    out = blas.gemm(A, B, torch.empty(5, 90, dtype=torch.float64), At=True)
    np.testing.assert_allclose(out.numpy(), A.T.numpy() @ B.numpy(), rtol=0, atol=1e-12)


def test_gemm_refuses_columns_that_are_not_next_to_each_other() -> None:
    A, out = gaussian(4, 6, seed=5).double(), torch.empty(4, 6, dtype=torch.float64)
    with pytest.raises(ValueError, match="unit stride"):
        blas.gemm(A, gaussian(6, 6, seed=6).double().T, out)
