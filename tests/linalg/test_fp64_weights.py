"""The worst of the differential run over random pairs: weights stored in fp64."""

from __future__ import annotations

import numpy as np
import torch

from geoscope.linalg import Operand, factorise
from geoscope.linalg.changes import unchanged
from geoscope.metrics.spectrum import signal_rank
from tests.helpers.matrices import with_spectrum


def test_a_zero_singular_value_of_fp64_weights_is_not_made_of_the_leading_ones() -> None:
    """The Gram route leaves 2e-13 of σ1 where σ falls from 1 to 2e-3 and then to rounding."""
    A = with_spectrum(201, 49, np.array([1.0, 8e-3, 6e-3, 4e-3, 2e-3]), seed=1)
    found = factorise(Operand(A[None]))
    assert found.methods[0]["how"] == "svdvals"
    assert found.methods[0]["fallback"].startswith("tail: fp64 weights")
    assert float(found.S[0, 5:].max()) < 1e-15
    assert factorise(Operand(A.float()[None])).methods[0]["how"].endswith("mended-tail")


def test_what_a_solver_leaves_of_a_zero_is_no_signal() -> None:
    S = torch.zeros(1, 128, dtype=torch.float64)
    S[0, :4], S[0, 4:40] = 1.0, 1e-16
    zero, median = torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    assert float(signal_rank(S, zero, median, shape=(128, 129))) == 4


def test_fp64_entries_are_rounded_to_bf16_once() -> None:
    """1 + 2⁻⁸ + 2⁻³⁰ lies above a tie of bf16, and fp32 rounds it onto the tie."""
    base = torch.full((2, 2), 1 + 2.0**-8 + 2.0**-30, dtype=torch.float64)
    tuned = torch.full((2, 2), 1 + 2.0**-7, dtype=torch.float64)
    assert unchanged(base, tuned).relative == 1.0
