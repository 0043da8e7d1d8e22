"""Stacks on a device: the same torch code on CPU tensors, against numpy and closed forms.

The tests marked `gpu` run it on CUDA and compare with the CPU.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from geoscope.linalg import (
    Factors,
    Operand,
    factorise,
    stacked,
    svd_leading,
)
from geoscope.linalg import svd as svd_module
from geoscope.linalg.leading import leading_triplets
from geoscope.linalg.precision import full_precision
from geoscope.linalg.stacked import eigenpairs
from geoscope.linalg.stacked_leading import stacked_leading
from tests.helpers.matrices import gaussian, orthonormal, with_spectrum

# Around the block lengths (2048 along the longer side, 512 in the Gram matrix).
SHAPES = {
    "tall": (2100, 70),
    "wide": (70, 2100),
    "square": (90, 90),
    "two_gram_blocks": (600, 560),
    "exactly_two_blocks": (4096, 8),
    "one_column_beyond": (8, 4097),
    "one_row": (1, 33),
}
every_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


def stack(m: int, n: int, count: int = 3, *, seed: int = 0) -> Tensor:
    return torch.stack([gaussian(m, n, seed=seed + i) for i in range(count)])


def operands(m: int, n: int) -> Iterator[tuple[Tensor, Tensor | None, np.ndarray]]:
    plus, minus = stack(m, n), stack(m, n, seed=50)
    for dtype in (torch.bfloat16, torch.float32):
        one, other = plus.to(dtype), minus.to(torch.bfloat16)
        yield one, None, one.double().numpy()
        yield one, other, one.double().numpy() - other.double().numpy()


def close(found: Tensor, expected: np.ndarray) -> None:
    assert found.dtype == torch.float64
    scale = float(np.abs(expected).max()) or 1.0
    np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=1e-13 * scale)


# --- products -----------------------------------------------------------------------------------


@every_shape
@pytest.mark.parametrize("workspace", [2**40, 1], ids=["together", "one_by_one"])
def test_products_are_those_of_dense_algebra(
    shape: tuple[int, int], workspace: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stacked, "_WORKSPACE", workspace)
    m, n = shape
    X, Y = stack(5, n, seed=7), stack(5, m, seed=9)
    for plus, minus, dense in operands(m, n):
        turned = dense.transpose(0, 2, 1)
        gram = stacked.gram(plus, minus)
        close(gram, turned @ dense if m >= n else dense @ turned)
        assert torch.equal(gram, gram.mT)
        close(stacked.right(plus, minus, X), X.numpy() @ turned)
        close(stacked.left(plus, minus, Y), Y.numpy() @ dense)
        close(stacked.norm(plus, minus), np.sqrt((dense**2).sum((1, 2))))
        assert np.array_equal(stacked.single(plus, minus).numpy(), dense.astype(np.float32))


def test_a_stack_larger_than_the_workspace_gives_the_same_bytes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plus = stack(2100, 60, 4).bfloat16()
    whole = stacked.gram(plus, None)
    monkeypatch.setattr(stacked, "_WORKSPACE", 2 * 8 * 60 * 2048)
    assert torch.equal(stacked.gram(plus, None), whole)


def test_no_fp64_copy_of_the_stack_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stacked, "_WORKSPACE", 8 * 16 * 2048)
    plus = stack(5000, 16, 3).bfloat16()
    sizes = [block.numel() for _, _, block in stacked._blocks(plus, plus)]
    assert max(sizes) == 16 * 2048
    assert sum(sizes) == plus.numel()


def test_both_sides_are_upcast_before_they_are_subtracted() -> None:
    plus, minus = (torch.full((1, 2, 2), x, dtype=torch.bfloat16) for x in (256.0, 0.5))
    assert float((plus - minus)[0, 0, 0]) != 255.5
    assert float(stacked.norm(plus, minus)) == 2 * 255.5
    assert float(stacked.single(plus, minus)[0, 0, 0]) == 255.5


def test_views_are_read_right() -> None:
    weight = stack(30, 700).bfloat16().mT  # Conv1D is turned as a view
    assert not weight.is_contiguous()
    dense = weight.double().numpy()
    close(stacked.gram(weight, None), dense.transpose(0, 2, 1) @ dense)


# --- eigenpairs ---------------------------------------------------------------------------------


def semidefinite(spectrum: Tensor, *, seed: int) -> Tensor:
    Q = orthonormal(len(spectrum), len(spectrum), seed=seed)
    return (Q * spectrum) @ Q.T


SPECTRA = torch.stack(
    [
        torch.linspace(5, 1, 40),
        torch.ones(40),
        torch.zeros(40),
        torch.logspace(0, -12, 40),
        torch.cat([torch.full((4,), 3.0), torch.zeros(36)]),
    ]
).double()


@pytest.mark.parametrize("k", [0, 1, 8, 40])
@pytest.mark.parametrize("solve", ["batched", "side_by_side"])
def test_eigenpairs_have_the_spectrum_that_was_given(
    k: int, solve: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if solve == "side_by_side":  # as before torch 2.12 on CUDA: more matrices than lanes
        monkeypatch.setattr(stacked, "_solved", stacked._side_by_side)
    G = torch.stack([semidefinite(one, seed=i) for i, one in enumerate(SPECTRA)])
    found = eigenpairs(G, k)
    assert found.faults == (None,) * len(G)
    torch.testing.assert_close(found.values, SPECTRA, atol=1e-13, rtol=0)
    assert (found.rows is None) == (k == 0)
    if found.rows is not None and found.residuals is not None:
        assert found.rows.shape == (len(G), k, 40)
        unit = torch.eye(k, dtype=torch.float64).expand(len(G), k, k)
        torch.testing.assert_close(found.rows @ found.rows.mT, unit, atol=1e-12, rtol=0)
        assert float(found.residuals.max()) < 1e-13


def spoiled(where: Callable[[Tensor], Tensor], what: str) -> Callable[..., Any]:
    """torch.linalg.eigh that spoils what `where` says, as #192483 saw it."""
    right = torch.linalg.eigh

    def eigh(G: Tensor) -> tuple[Tensor, Tensor]:
        values, vectors = (part.clone() for part in right(G))
        bad = where(G)
        if what == "vectors":
            vectors[bad, :, -1] = vectors[bad, :, -2]
        elif what == "values":
            values[bad, 0] += 0.1 * values[bad, -1]
        elif what == "nan":
            vectors[bad] = torch.nan
        else:
            raise RuntimeError("the algorithm failed to converge")  # LinAlgError is one
        return values, vectors

    return eigh


@pytest.mark.parametrize("what", ["vectors", "values", "nan", "error"])
def test_a_batch_that_comes_out_wrong_is_done_matrix_by_matrix(
    what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    G = torch.stack([semidefinite(SPECTRA[0], seed=i) for i in range(4)])
    right = eigenpairs(G, 6)
    alone: list[int] = []

    def eigh(M: Tensor) -> tuple[Tensor, Tensor]:
        if len(M) == 1:
            alone.append(1)
            return torch_eigh(M)
        return wrong(M)

    torch_eigh = torch.linalg.eigh
    wrong = spoiled(lambda M: torch.tensor([0, 2]), what)
    monkeypatch.setattr(torch.linalg, "eigh", eigh)
    found = eigenpairs(G, 6)
    assert len(alone) == (4 if what == "error" else 2)
    assert found.faults == (None,) * 4
    torch.testing.assert_close(found.values, right.values)
    assert found.rows is not None and right.rows is not None
    torch.testing.assert_close(found.rows.mT @ found.rows, right.rows.mT @ right.rows)


@pytest.mark.parametrize("what", ["vectors", "values", "nan", "error"])
def test_what_is_wrong_alone_too_goes_to_the_exact_method(
    what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One bad matrix in a stack; the others keep their route."""
    spectrum = torch.linspace(3, 1, 40, dtype=torch.float64)
    A = torch.stack([with_spectrum(60, 40, spectrum, seed=i) for i in range(3)])
    bad = stacked.gram(A, None)[1]

    def is_bad(G: Tensor) -> Tensor:
        return torch.tensor([torch.equal(one, bad) for one in G])

    def eigh(G: Tensor) -> tuple[Tensor, Tensor]:
        return wrong(G) if bool(is_bad(G).any()) else right(G)

    right, wrong = torch.linalg.eigh, spoiled(is_bad, what)
    monkeypatch.setattr(torch.linalg, "eigh", eigh)
    found = on_device(A, vectors=4, cuts=(4,))
    assert [one["how"] for one in found.methods] == ["gram-eigh", "svd", "gram-eigh"]
    assert "eigh: " in (found.methods[1]["fallback"] or "")
    torch.testing.assert_close(found.S, spectrum.expand(3, 40), atol=1e-12, rtol=0)


def test_memory_that_runs_out_is_not_taken_for_a_failed_driver(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def eigh(_: Tensor) -> None:
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(torch.linalg, "eigh", eigh)
    for count in (1, 3):
        with pytest.raises(torch.OutOfMemoryError):
            eigenpairs(torch.eye(8, dtype=torch.float64).repeat(count, 1, 1), 2)


def test_a_batch_that_needs_too_much_memory_is_halved(monkeypatch: pytest.MonkeyPatch) -> None:
    G = torch.stack([semidefinite(SPECTRA[0], seed=i) for i in range(5)])
    tried, right = [], torch.linalg.eigh

    def eigh(M: Tensor) -> tuple[Tensor, Tensor]:
        tried.append(len(M))
        if len(M) > 2:
            raise torch.OutOfMemoryError("no room")
        return right(M)

    monkeypatch.setattr(torch.linalg, "eigh", eigh)
    found = eigenpairs(G, 3)
    assert tried == [5, 2, 3, 1, 2]
    torch.testing.assert_close(found.values, SPECTRA[:1].expand(5, 40), atol=1e-13, rtol=0)


@pytest.mark.parametrize(
    ("version", "cuda", "batches"),
    [
        ("2.11.0+cu128", "12.8", False),
        ("2.12.0", "12.6", True),
        ("2.12.0a0+git1", "12.4", False),
        ("3.0.0", "13.0", True),
        ("2.13.0+cpu", None, False),
    ],
)
def test_batches_go_to_one_driver_call_where_torch_and_cuda_have_one(
    version: str, cuda: str | None, batches: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "__version__", version)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    assert stacked._batches_large() is batches


def on_device(A: Tensor, *, vectors: int = 0, cuts: tuple[int, ...] = ()) -> Factors:
    """`factorise` as it goes on a device."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Operand, "gram", lambda self: stacked.gram(self.plus, self.minus))
        return svd_module._factorise_stacked(Operand(A), vectors, cuts)


def test_a_zero_among_others() -> None:
    A = stack(50, 30, 3)
    A[1] = 0
    found = on_device(A, vectors=2, cuts=(2,))
    assert [one["fallback"] for one in found.methods] == [None] * 3
    assert torch.equal(found.S[1], torch.zeros(30, dtype=torch.float64))
    np.testing.assert_allclose(
        found.S.numpy(), np.linalg.svd(A.numpy(), compute_uv=False), atol=1e-12
    )


@pytest.mark.parametrize("vectors", [0, 4])
def test_a_short_tail_is_mended_on_the_device_too(vectors: int) -> None:
    """Among matrices without one, and with one that is too long."""
    spectra = torch.linspace(3, 1, 100, dtype=torch.float64).repeat(4, 1)
    spectra[1, -3:] = torch.tensor([2e-5, 1e-7, 3e-9])
    spectra[2, -70:] = 1e-6
    A = torch.stack([with_spectrum(130, 100, one, seed=i) for i, one in enumerate(spectra)])
    for stored in (A, A.mT):
        found = on_device(stored, vectors=vectors, cuts=(4,) if vectors else ())
        hows = [one["how"] for one in found.methods]
        exact = "svd" if vectors else "svdvals"
        assert hows == ["gram-eigh", "gram-eigh-mended-tail", exact, "gram-eigh"]
        assert found.methods[1]["fallback"] is None
        torch.testing.assert_close(found.S, spectra, atol=3e-14, rtol=0)


# --- leading triplets ---------------------------------------------------------------------------


def realistic(m: int, n: int, *, seed: int = 0) -> Tensor:
    """A bulk with log-normal rows and 24 power-law outliers, as weights of language models have."""
    bulk = torch.exp(0.3 * gaussian(m, 1, seed=seed, sd=1.0)) * gaussian(m, n, seed=seed + 1)
    edge = 0.02 * 1.1 * (m**0.5 + n**0.5)
    scale = 3 * edge * torch.arange(1, 25, dtype=torch.float64) ** -0.5
    U, V = orthonormal(m, 24, seed=seed + 2), orthonormal(n, 24, seed=seed + 3)
    return bulk + (U * scale) @ V.T


def realistic_stack(m: int, n: int, count: int = 3) -> Tensor:
    return torch.stack([realistic(m, n, seed=10 * i) for i in range(count)])


LEADING = {"square": (320, 320), "tall": (1100, 300), "wide": (300, 1100)}


def sine(X: Tensor, Y: Tensor) -> float:
    """Sine of the largest angle between two subspaces, given by rows."""
    return float(torch.linalg.matrix_norm(X - (X @ Y.T) @ Y, 2))


@pytest.mark.parametrize("shape", LEADING)
@pytest.mark.parametrize("k", [1, 8, 20])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_triplets_are_those_of_numpy_and_within_their_certificate(
    shape: str, k: int, dtype: torch.dtype
) -> None:
    A = realistic_stack(*LEADING[shape]).to(dtype)
    found = stacked_leading(Operand(A), k, budget=280)
    for one, dense in zip(found, A.double(), strict=True):
        U, S, Vh = np.linalg.svd(dense.numpy(), full_matrices=False)
        assert one.converged
        error = float((one.S - torch.from_numpy(S)[:k]).abs().max()) / S[0]
        assert error <= min(1e-9, one.residual + 1e-14)
        assert sine(one.Vh, torch.from_numpy(Vh)[:k]) <= one.sine
        assert sine(one.U, torch.from_numpy(U)[:, :k].T) <= 2 * one.sine
        unit = torch.eye(k, dtype=torch.float64)
        torch.testing.assert_close(one.Vh @ one.Vh.T, unit, atol=1e-10, rtol=0)
        residual = dense.T @ one.U.T - one.Vh.T * one.S
        assert float(residual.norm(dim=0).max()) <= one.residual * S[0] * 1.01 + 1e-12


def test_it_agrees_with_the_route_of_the_cpu() -> None:
    A = realistic_stack(400, 300).bfloat16()
    for i, one in enumerate(stacked_leading(Operand(A), 8)):
        other = leading_triplets(Operand(A[i : i + 1]), 8)
        torch.testing.assert_close(one.S, other.S, rtol=1e-10, atol=0)
        assert sine(one.Vh, other.Vh) <= one.sine + other.sine
        assert one.converged is other.converged is True


def test_an_update_is_subtracted_in_fp64_before_it_is_rounded() -> None:
    """Of rank 4 and five orders below the base: the space is exhausted after one block."""
    base = realistic_stack(300, 300, 2).float()
    direction = torch.stack([gaussian(300, 4, seed=i) @ gaussian(4, 300, seed=i) for i in (3, 5)])
    tuned = (base.double() + 1e-4 * direction).float()
    exact = torch.linalg.svdvals(tuned.double() - base.double())[:, :4]
    found = stacked_leading(Operand(tuned, base), 4)
    torch.testing.assert_close(torch.stack([one.S for one in found]), exact, rtol=1e-9, atol=0)


@pytest.mark.parametrize("k", [3, 8])
def test_an_exact_rank_four_is_found_or_refused(k: int) -> None:
    """After one block nothing is left but rounding: the remainder has no Cholesky factor."""
    spectrum = torch.tensor([4.0, 3.0, 2.0, 1.0])
    A = torch.stack([with_spectrum(300, 280, spectrum, seed=i) for i in range(2)])
    for one in stacked_leading(Operand(A), k):
        assert one.converged == (k <= 4)  # beyond the rank there are no directions to converge to
        torch.testing.assert_close(one.S[:3], spectrum[:3].double(), atol=1e-9, rtol=0)


def leading(A: Operand, k: int, **options: Any) -> Factors:
    """`factorise_leading` as it goes on a device."""
    chosen: dict[str, Any] = {"seed": 0, "budget": None, "certified": None} | options
    cuts = chosen.pop("cuts", (k,))
    return svd_leading._leading(A, k, cuts, None, chosen, as_stack=True)


def test_a_flat_spectrum_among_others_takes_the_gram_matrix_and_says_so() -> None:
    A = realistic_stack(900, 800)
    A[1] = gaussian(900, 800, seed=5)  # a bulk without outliers
    found = leading(Operand(A.bfloat16()), 8, budget=160)
    hows = [one["how"] for one in found.methods]
    assert [how.startswith("block-lanczos") for how in hows] == [True, False, True]
    assert "flat spectrum" in (found.methods[1]["fallback"] or "")
    assert found.methods[0]["fallback"] is None
    exact = torch.linalg.svdvals(A.bfloat16().double())[:, :8]
    torch.testing.assert_close(found.S, exact, rtol=1e-10, atol=0)
    assert found.U is not None and found.U.shape == (3, 900, 8)
    assert found.Vh is not None and found.Vh.shape == (3, 8, 800)


def test_a_spectrum_without_hope_is_given_up_early() -> None:
    flat = stacked_leading(Operand(stack(900, 900, 2).bfloat16()), 40)
    assert [one.converged for one in flat] == [False, False]
    assert all(one.dimension <= 176 for one in flat)


def test_too_small_a_budget_is_noticed() -> None:
    A = Operand(realistic_stack(800, 800, 2).bfloat16())
    for one in stacked_leading(A, 16, budget=40):
        assert not one.converged
        assert one.residual > 1e-6
    assert all(one["fallback"] for one in leading(A, 16, budget=40).methods)


def test_where_many_triplets_are_wanted_the_whole_spectrum_is_taken() -> None:
    found = leading(Operand(stack(80, 70)), 20)
    assert {one["fallback"] for one in found.methods} == {None}
    np.testing.assert_allclose(
        found.S.numpy(), np.linalg.svd(stack(80, 70).numpy(), compute_uv=False)[:, :20], rtol=1e-10
    )
    with pytest.raises(ValueError, match="too many for this method"):
        stacked_leading(Operand(stack(30, 20)), 15)


@pytest.mark.parametrize("k", [1, 8])
def test_a_zero_matrix_among_others_has_zero_values(k: int) -> None:
    A = realistic_stack(300, 280)
    A[1] = 0
    found = stacked_leading(Operand(A), k)
    assert torch.equal(found[1].S, torch.zeros(k, dtype=torch.float64))
    assert found[0].converged and found[2].converged
    method = leading(Operand(A), k).methods[1]
    assert (method["bound"], method["subspace_bound"]) == (0.0, None)


def test_equal_input_gives_equal_bytes_and_neighbours_do_not_matter() -> None:
    A = realistic_stack(300, 500).bfloat16()
    first, second = (stacked_leading(Operand(A), 8) for _ in range(2))
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one.Vh, other.Vh)
        assert torch.equal(one.U, other.U)
    alone = stacked_leading(Operand(A[1:2]), 8)[0]
    assert alone.dimension == first[1].dimension
    torch.testing.assert_close(alone.S, first[1].S, rtol=1e-12, atol=0)


def test_the_global_generator_is_left_alone() -> None:
    before = torch.random.get_rng_state()
    stacked_leading(Operand(realistic_stack(300, 280, 1)), 1)
    assert torch.equal(torch.random.get_rng_state(), before)


# --- fp32 with all its bits ---------------------------------------------------------------------


@pytest.fixture
def _precision() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


@pytest.mark.usefixtures("_precision")
def test_tf32_is_off_inside_and_as_it_was_outside() -> None:
    for given in ("high", "medium", "highest"):
        torch.set_float32_matmul_precision(given)
        with full_precision():
            assert torch.get_float32_matmul_precision() == "highest"
            with full_precision():
                pass
            assert torch.get_float32_matmul_precision() == "highest"
        assert torch.get_float32_matmul_precision() == given


@pytest.mark.usefixtures("_precision")
def test_of_overlapping_threads_the_last_restores() -> None:
    torch.set_float32_matmul_precision("high")
    entered, leave = threading.Event(), threading.Event()

    def other() -> None:
        with full_precision():
            entered.set()
            leave.wait(20)

    thread = threading.Thread(target=other)
    with full_precision():
        thread.start()
        assert entered.wait(20)
    assert torch.get_float32_matmul_precision() == "highest"  # the other is still inside
    leave.set()
    thread.join(20)
    assert torch.get_float32_matmul_precision() == "high"


# --- on CUDA ------------------------------------------------------------------------------------

gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


class TestOnCuda:
    """Twins of what stands above; the CPU is the reference."""

    pytestmark = gpu

    @every_shape
    def test_products(self, shape: tuple[int, int]) -> None:
        for plus, minus, dense in operands(*shape):
            there = Operand(plus.cuda(), None if minus is None else minus.cuda())
            turned = dense.transpose(0, 2, 1)
            close(there.gram().cpu(), turned @ dense if there.is_tall else dense @ turned)
            close(there.norm().cpu(), np.sqrt((dense**2).sum((1, 2))))
            X = stack(5, shape[1], seed=7)
            close(there.right(X.cuda()).cpu(), X.numpy() @ turned)

    @pytest.mark.parametrize("lanes", [False, True])
    def test_factors(self, lanes: bool, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(stacked, "_batches_large", lambda: not lanes)
        A = realistic_stack(400, 300, 9).bfloat16()
        here = factorise(Operand(A), vectors=16, cuts=(8, 16))
        there = factorise(Operand(A.cuda()), vectors=16, cuts=(8, 16))
        torch.testing.assert_close(there.S.cpu(), here.S, rtol=0, atol=1e-10 * float(here.S.max()))
        assert here.Vh is not None and there.Vh is not None
        for k in (8, 16):
            for ours, theirs in zip(here.Vh, there.Vh.cpu(), strict=True):
                assert sine(ours[:k], theirs[:k]) < 1e-8

    @pytest.mark.parametrize("tf32", ["high", "highest"])
    @pytest.mark.parametrize("k", [1, 8, 20])
    @pytest.mark.usefixtures("_precision")
    def test_leading_triplets(self, k: int, tf32: str) -> None:
        torch.set_float32_matmul_precision(tf32)
        A = realistic_stack(320, 320, 4).bfloat16()
        answers = stacked_leading(Operand(A.cuda()), k, budget=280)
        assert all(answer.converged for answer in answers)
        values = torch.stack([answer.S for answer in answers]).cpu()
        expected = torch.linalg.svdvals(A.double())[:, :k]
        torch.testing.assert_close(values, expected, rtol=1e-9, atol=0)
