"""Leading triplets are certified: what is returned is right, or the exact method was taken."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from geoscope.linalg import Operand, factorise, factorise_leading
from geoscope.linalg.leading import leading_triplets
from geoscope.linalg.stacked_leading import stacked_leading
from tests.helpers.matrices import gaussian, generator, orthonormal, updated, with_spectrum


def realistic(m: int, n: int, *, seed: int = 0) -> Tensor:
    """A bulk with log-normal rows and 24 power-law outliers, as weights of language models have."""
    rows = torch.exp(0.3 * gaussian(m, 1, seed=seed, sd=1.0))
    bulk = rows * gaussian(m, n, seed=seed + 1)
    edge = float(torch.linalg.matrix_norm(bulk, 2))
    scale = 3 * edge * torch.arange(1, 25, dtype=torch.float64) ** -0.5
    U, V = orthonormal(m, 24, seed=seed + 2), orthonormal(n, 24, seed=seed + 3)
    return bulk + (U * scale) @ V.T


SHAPES = {"square": (400, 400), "tall": (1200, 300), "wide": (300, 1200), "one_off": (401, 400)}


@pytest.mark.parametrize("k", [1, 5, 8])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_triplets_are_those_of_the_svd(shape: str, k: int, dtype: torch.dtype) -> None:
    stored = realistic(*SHAPES[shape]).to(dtype)
    U, S, Vh = torch.linalg.svd(stored.double(), full_matrices=False)
    found = leading_triplets(Operand(stored[None]), k)
    assert found.converged
    assert float((found.S - S[:k]).abs().max()) <= 1e-9 * float(S[0])
    for basis, exact in ((found.Vh, Vh[:k]), (found.U, U[:, :k].T)):
        assert _sine(basis, exact) < 1e-5
        eye = torch.eye(k, dtype=torch.float64)
        torch.testing.assert_close(basis @ basis.T, eye, atol=1e-10, rtol=0)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_stated_bounds_hold(shape: str) -> None:
    stored = realistic(*SHAPES[shape], seed=7).to(torch.bfloat16)
    _, S, Vh = torch.linalg.svd(stored.double(), full_matrices=False)
    for k in (2, 8, 16):
        found = leading_triplets(Operand(stored[None]), k)
        assert float((found.S - S[:k]).abs().max()) <= found.residual * float(S[0])
        assert _sine(found.Vh, Vh[:k]) <= found.sine
        residual = stored.double() @ found.Vh.T - found.U.T * found.S
        backward = stored.double().T @ found.U.T - found.Vh.T * found.S
        worst = max(float(part.norm(dim=0).max()) for part in (residual, backward))
        assert worst <= found.residual * float(S[0]) * 1.01 + 1e-12


def test_an_update_is_subtracted_in_fp64_before_it_is_rounded() -> None:
    # The update lies five orders below the base, and rank 4 is all it has: the Krylov space is
    # exhausted after one block, and what follows is rounding.
    base = realistic(300, 300).to(torch.float32)
    direction = gaussian(300, 4, seed=3) @ gaussian(4, 300, seed=4)
    tuned = updated(base.double(), direction, 1e-5).to(torch.float32)
    exact = torch.linalg.svdvals(tuned.double() - base.double())[:4]
    found = leading_triplets(Operand(tuned[None], base[None]), 4)
    torch.testing.assert_close(found.S, exact, rtol=1e-9, atol=0)


def test_a_flat_spectrum_takes_the_exact_path_and_says_so() -> None:
    flat = gaussian(1536, 1536, seed=5).to(torch.bfloat16)
    found = factorise_leading(Operand(flat[None]), 40, cuts=(40,))
    assert "flat spectrum" in (found.methods[0]["fallback"] or "")
    whole = factorise(Operand(flat[None]), vectors=40, cuts=(40,))
    torch.testing.assert_close(found.S, whole.S[:, :40])


def test_too_small_a_budget_is_noticed_and_falls_back() -> None:
    stored = realistic(1000, 1000).to(torch.bfloat16)[None]
    short = leading_triplets(Operand(stored), 16, budget=24)
    assert not short.converged
    assert short.residual > 1e-5
    found = factorise_leading(Operand(stored), 16, cuts=(16,), budget=24)
    assert found.methods[0]["how"].startswith("gram")
    assert found.methods[0]["fallback"] is not None
    exact = torch.linalg.svdvals(stored[0].double())[:16]
    torch.testing.assert_close(found.S[0], exact, rtol=1e-10, atol=0)


def test_a_warm_start_changes_the_work_and_not_the_answer() -> None:
    base = realistic(400, 400).to(torch.bfloat16)
    tuned = updated(base.double(), gaussian(400, 400, seed=9), 1e-3).to(torch.bfloat16)
    before = leading_triplets(Operand(base[None]), 8)
    cold = leading_triplets(Operand(tuned[None]), 8)
    warm = leading_triplets(Operand(tuned[None]), 8, start=before.Vh)
    assert warm.converged
    assert warm.dimension < cold.dimension
    torch.testing.assert_close(warm.S, cold.S, rtol=1e-10, atol=0)
    assert _sine(warm.Vh, cold.Vh) < 1e-5


@pytest.mark.parametrize("height", [0.9, 1.2])
@pytest.mark.parametrize("seed", range(4))
def test_a_warm_start_finds_what_the_neighbour_has_nothing_of(height: float, seed: int) -> None:
    """A triplet from the tail, raised among the leading ones, is orthogonal to all of these."""
    base = realistic(400, 400, seed=seed)
    U, S, Vh = torch.linalg.svd(base)
    before = leading_triplets(Operand(base[None]), 8)
    tuned = base + (height * S[5] - S[200 + seed]) * torch.outer(U[:, 200 + seed], Vh[200 + seed])
    found = leading_triplets(Operand(tuned[None]), 8, start=before.Vh, seed=seed)
    assert found.converged
    exact = torch.linalg.svdvals(tuned)[:8]
    torch.testing.assert_close(found.S, exact, rtol=1e-9, atol=0)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("k", [1, 4, 12])
def test_values_alone_cost_less_and_keep_their_bound(shape: str, k: int) -> None:
    stored = realistic(*SHAPES[shape], seed=3).to(torch.bfloat16)
    exact = torch.linalg.svdvals(stored.double())[:k]
    full = leading_triplets(Operand(stored[None]), k)
    found = leading_triplets(Operand(stored[None]), k, certified=0)
    assert found.converged
    assert found.dimension <= full.dimension
    error = float((found.S - exact).abs().max() / exact[0])
    assert error <= min(found.bound, 1e-6) + 1e-15


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("k", "certified"), [(2, 1), (8, 3)])
def test_vectors_that_nobody_needs_are_not_waited_for(shape: str, k: int, certified: int) -> None:
    m, n = SHAPES[shape]
    # Behind the last vector that is wanted there is no gap: a search for the others would be long.
    spectrum = torch.cat(
        [1.5 - torch.arange(certified) / (4 * certified), torch.linspace(1, 0, 300 - certified)]
    )
    stored = with_spectrum(m, n, spectrum.double(), seed=4).to(torch.bfloat16)
    U, S, Vh = torch.linalg.svd(stored.double(), full_matrices=False)
    whole = leading_triplets(Operand(stored[None]), k, budget=290)
    found = leading_triplets(Operand(stored[None]), k, certified=certified, budget=290)
    assert found.converged
    assert found.dimension < whole.dimension
    for basis, exact in ((found.Vh, Vh[:certified]), (found.U, U[:, :certified].T)):
        assert _sine(basis[:certified], exact) <= found.sine < 1e-4
    error = float((found.S - S[:k]).abs().max() / S[0])
    assert error <= min(found.bound, 1e-6) + 1e-15


def test_a_whole_search_certifies_what_is_asked_of_a_stack_too() -> None:
    stored = torch.stack([realistic(400, 300, seed=i) for i in (1, 2)]).to(torch.bfloat16)
    for one, alone in zip(
        stacked_leading(Operand(stored), 6, certified=2), stored.double(), strict=True
    ):
        _, S, Vh = torch.linalg.svd(alone, full_matrices=False)
        assert one.converged
        assert _sine(one.Vh[:2], Vh[:2]) <= one.sine < 1e-4
        assert float((one.S - S[:6]).abs().max() / S[0]) <= min(one.bound, 1e-6) + 1e-15


@pytest.mark.parametrize("shape", SHAPES)
def test_both_ways_to_the_space_lead_to_the_same_triplets(shape: str) -> None:
    A = Operand(realistic(*SHAPES[shape]).to(torch.bfloat16)[None])
    products, gram = (leading_triplets(A, 8, by_gram=way) for way in (False, True))
    assert products.converged and gram.converged
    torch.testing.assert_close(products.S, gram.S, rtol=1e-10, atol=0)
    assert _sine(products.Vh, gram.Vh) < 1e-5


def test_equal_input_gives_equal_bytes() -> None:
    stored = realistic(300, 500).to(torch.bfloat16)[None]
    first, second = (leading_triplets(Operand(stored), 8) for _ in range(2))
    assert torch.equal(first.Vh, second.Vh)
    assert torch.equal(first.U, second.U)


def test_a_zero_matrix_has_zero_values() -> None:
    found = factorise_leading(Operand(torch.zeros(1, 300, 200)), 3)
    assert torch.equal(found.S, torch.zeros(1, 3, dtype=torch.float64))
    alone = leading_triplets(Operand(torch.zeros(1, 300, 200)), 3)
    assert torch.equal(alone.S, torch.zeros(3, dtype=torch.float64))
    for rows, side in ((alone.U, 300), (alone.Vh, 200)):
        assert rows.shape == (3, side)
        assert torch.equal(rows @ rows.T, torch.eye(3, dtype=torch.float64))
    assert alone.converged and alone.residual == 0


def test_what_fp32_holds_for_converged_has_to_hold_in_fp64() -> None:
    """σ4 to σ6 are .5 % of σ1: a Gram matrix in fp32 knows them to 1e-2, and stands still there."""
    tail = [8e-3, 7e-3, 6e-3, 5e-3, 4e-3, *[1e-5] * 192]
    W = with_spectrum(300, 200, torch.tensor([1.0, 0.9, 0.8, *tail], dtype=torch.float64), seed=1)
    found = leading_triplets(Operand(W[None]), 6, by_gram=True)
    assert found.dimension < 60  # of 90 that it might have taken
    assert not found.converged


def test_a_sketch_without_power_iterations_misses() -> None:
    """Negative control: what the certificate is for."""
    stored = realistic(600, 600)
    U, S, _ = torch.linalg.svd(stored, full_matrices=False)
    probe = torch.randn(600, 24, dtype=torch.float64, generator=generator(1))
    Q = torch.linalg.qr(stored @ probe).Q
    sketched, values, _ = torch.linalg.svd(Q @ (Q.T @ stored), full_matrices=False)
    assert _sine(sketched[:, :16].T, U[:, :16].T) > 0.5
    assert float((values[:16] - S[:16]).abs().max() / S[0]) > 1e-2
    assert _sine(leading_triplets(Operand(stored[None]), 16).U, U[:, :16].T) < 1e-5


def _sine(rows: Tensor, exact: Tensor) -> float:
    """Largest sine between the spans of two sets of orthonormal rows."""
    outside = rows - (rows @ exact.T) @ exact
    return float(np.linalg.norm(outside.numpy(), 2))
