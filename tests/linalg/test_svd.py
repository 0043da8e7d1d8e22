"""Singular values and leading subspaces are those of numpy's SVD, within the bounds they state."""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from geoscope.errors import NumericsError
from geoscope.linalg import Factors, Operand, blas, factorise, principal_angles
from geoscope.linalg import svd as svd_module
from tests.helpers.matrices import gaussian, generator, orthonormal, updated, with_spectrum

pytestmark = pytest.mark.usefixtures("every_route")

CUTS = (1, 8, 16)
ANGLE = 1e-8  # radians, promised wherever the gap is 1e-6 or more


def tail(*small: float, n: int = 40) -> Tensor:
    """A spectrum of n values from 1 to .5 whose last ones are these."""
    return torch.cat(
        [torch.linspace(1, 0.5, n - len(small)), torch.tensor(sorted(small)[::-1])]
    ).double()


REPEATED = torch.tensor([3.0, 2.0, 1.0, 0.5]).repeat_interleave(16)
OUTLIERS = torch.cat([torch.tensor([50.0, 40.0]), torch.ones(58)])
MATRICES: dict[str, Tensor] = {
    "random": gaussian(80, 80, seed=1),
    "tall": gaussian(600, 70, seed=2),
    "wide": gaussian(70, 600, seed=3),
    "one_row_more": gaussian(97, 96, seed=4),
    "one_column_more": gaussian(96, 97, seed=5),
    "larger": gaussian(300, 280, seed=6),
    "decaying": with_spectrum(48, 90, torch.logspace(0, -3, 48), seed=7),
    "repeated": with_spectrum(64, 96, REPEATED, seed=8),
    "near_flat": with_spectrum(60, 50, 1 + 1e-3 * torch.linspace(1, 0, 50), seed=9),
    "flat": with_spectrum(50, 60, torch.ones(50), seed=10),
    "power_law": with_spectrum(90, 90, torch.arange(1, 91) ** -1.0, seed=11),
    "outliers": with_spectrum(70, 60, OUTLIERS, seed=12),
    "rank_20": with_spectrum(90, 80, torch.linspace(2, 1, 20), seed=13),
    "rank_1": with_spectrum(30, 40, torch.ones(1), seed=14),
    "large_numbers": 1e30 * gaussian(40, 50, seed=15),
    "small_numbers": 1e-30 * gaussian(40, 50, seed=16),
    "two_by_two": torch.tensor([[3.0, 0.0], [4.0, 5.0]]).double(),
    "two_rows": gaussian(2, 700, seed=17),
    **{f"tail_{x:g}": with_spectrum(70, 40, tail(x, 2 * x), seed=18) for x in (1e-3, 1e-4, 1e-5)},
    **{f"tail_{x:g}": with_spectrum(40, 70, tail(x, 3 * x), seed=19) for x in (1e-6, 1e-8, 1e-9)},
}  # fmt: skip

every_matrix = pytest.mark.parametrize("name", MATRICES)


def numpy_svd(A: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    U, S, Vh = np.linalg.svd(A.double().numpy(), full_matrices=False)
    return torch.from_numpy(U), torch.from_numpy(S), torch.from_numpy(Vh)


@cache
def exact(name: str) -> tuple[Tensor, Tensor, Tensor]:
    return numpy_svd(MATRICES[name])


def routes() -> dict[str, Callable[..., Factors]]:
    """The route of the CPU, LAPACK's SVD, and the batched route of other devices, run here."""

    def batched(A: Operand, *, vectors: int, cuts: tuple[int, ...]) -> Factors:
        return svd_module._factorise_stacked(A, vectors, cuts)

    def lapack(A: Operand, *, vectors: int, cuts: tuple[int, ...]) -> Factors:
        return factorise(A, vectors=vectors, cuts=cuts, solver="exact")

    return {"auto": factorise, "exact": lapack, "batched": batched}


every_route = pytest.mark.parametrize("route", routes())


def sine(Q0: Tensor, Q1: Tensor) -> float:
    """Sine of the largest angle between two subspaces, given by columns."""
    return float(principal_angles(Q0, Q1).max().sin())


# --- values -------------------------------------------------------------------------------------


@every_route
@every_matrix
def test_values_are_those_of_numpy(name: str, route: str) -> None:
    """Without and with vectors: within the bound that is stated, and within 1e-10·σ1 anyway."""
    _, S, _ = exact(name)
    for vectors in (0, min(8, len(S))):
        cuts = CUTS[:2] if vectors == 8 else ()
        found = routes()[route](Operand(MATRICES[name][None]), vectors=vectors, cuts=cuts)
        assert found.S.shape == (1, len(S))
        assert bool((found.S[0].diff() <= 0).all())
        assert bool((found.S >= 0).all())
        error = float((found.S[0] - S).abs().max()) / float(S[0])
        (how,) = found.methods
        assert error <= 1e-10
        # numpy's own error, of a few eps, is not a part of the bound
        assert error <= how["bound"] + 100 * 2.0**-53


@pytest.mark.parametrize("name", [name for name in MATRICES if name.startswith("tail")])
def test_small_values_keep_six_digits(name: str) -> None:
    """Below 3e-5·σ1 they are computed again, to eps·σ1; the Gram matrix alone gives eps·σ1²/2σ."""
    _, S, _ = exact(name)
    found = factorise(Operand(MATRICES[name][None]))
    error = (found.S[0] - S).abs()
    mended = float(S[-1]) < 3e-5
    assert float(error.max()) <= (1e-14 if mended else 1e-11)
    assert float((error / S).max()) <= max(1e-6, 1e-14 / float(S[-1]))


def test_the_quantities_of_a_low_rank_matrix_survive() -> None:
    """The effective rank of an exact rank-16 512² is off by 2e-6 through the Gram alone."""
    from geoscope.metrics.spectrum import effective_rank

    low = gaussian(512, 16, seed=20) @ gaussian(16, 512, seed=21)
    found = factorise(Operand(low[None]))
    assert float(effective_rank(found.S[0])) == pytest.approx(
        float(effective_rank(numpy_svd(low)[1])), rel=1e-9
    )
    gram = torch.linalg.eigvalsh(low.T @ low).flip(0).clamp_min(0).sqrt()
    assert abs(float(effective_rank(gram)) / float(effective_rank(found.S[0])) - 1) > 1e-7


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_stored_pairs_and_their_difference(dtype: torch.dtype) -> None:
    base = gaussian(120, 90, seed=22)
    tuned = updated(base, gaussian(120, 90, seed=23), 0.01)
    stack = torch.stack([base, tuned]).to(dtype)
    for A, dense in (
        (Operand(stack), stack.double()),
        (Operand(stack[1:], stack[:1]), stack[1:].double() - stack[:1].double()),
    ):
        found = factorise(A, vectors=8, cuts=[8])
        for S, U, one in zip(found.S, found.U, dense, strict=True):  # pyright: ignore[reportArgumentType]
            expected = numpy_svd(one)
            assert float((S - expected[1]).abs().max()) <= 1e-12 * float(S[0])
            assert sine(U, expected[0][:, :8]) <= ANGLE


# --- subspaces ----------------------------------------------------------------------------------


def defined_cuts(S: Tensor) -> list[int]:
    """Cuts at which the matrix defines a subspace: a relative gap of 1e-6 or more."""
    after = torch.cat([S[1:], S.new_zeros(1)])
    return [
        k for k in CUTS if k <= len(S) and float(S[k - 1] - after[k - 1]) > 1e-6 * float(S[k - 1])
    ]


@every_route
@every_matrix
def test_subspaces_are_those_of_numpy(name: str, route: str) -> None:
    U, S, Vh = exact(name)
    vectors = max((k for k in CUTS if k <= len(S)), default=1)
    cuts = tuple(k for k in CUTS if k <= len(S))
    found = routes()[route](Operand(MATRICES[name][None]), vectors=vectors, cuts=cuts)
    assert found.U is not None
    assert found.Vh is not None
    assert found.U.shape == (1, MATRICES[name].shape[0], vectors)
    assert found.Vh.shape == (1, vectors, MATRICES[name].shape[1])
    (how,) = found.methods
    for k in defined_cuts(S):
        for mine, theirs in ((found.U[0], U), (found.Vh[0].T, Vh.T)):
            error = sine(mine[:, :k], theirs[:, :k])
            gap = float(S[k - 1] - (S[k] if k < len(S) else 0)) / float(S[0])
            of_numpy = 2e-14 / gap
            assert error <= ANGLE
            if how["subspace_bound"] is not None:
                assert error <= how["subspace_bound"] + of_numpy


@every_route
@every_matrix
def test_triplets_belong_together(name: str, route: str) -> None:
    """A·v = σu, orthonormal sides, whatever basis of a repeated σ was chosen."""
    A = MATRICES[name]
    _, S, _ = exact(name)
    vectors = int((S > 1e-3 * S[0]).sum().clamp_max(16))
    found = routes()[route](Operand(A[None]), vectors=vectors, cuts=())
    assert found.U is not None
    assert found.Vh is not None
    U, Vh, scale = found.U[0], found.Vh[0], float(S[0])
    residual = A @ Vh.T - U * found.S[0, :vectors]
    assert float(residual.abs().max()) <= 1e-12 * scale
    eye = torch.eye(vectors, dtype=torch.float64)
    # one side comes from the other by division by σ, so it carries eps·σ1/σ
    worst = 1e-13 * (scale / float(S[vectors - 1])) ** 2
    torch.testing.assert_close(U.T @ U, eye, atol=1e-12 + worst, rtol=0)
    torch.testing.assert_close(Vh @ Vh.T, eye, atol=1e-12 + worst, rtol=0)


def test_a_transpose_has_the_sides_exchanged() -> None:
    A = gaussian(200, 60, seed=24)
    one = factorise(Operand(A[None]), vectors=8, cuts=[8])
    other = factorise(Operand(A.T[None]), vectors=8, cuts=[8])
    assert one.U is not None
    assert other.Vh is not None
    torch.testing.assert_close(one.S, other.S, atol=1e-14, rtol=0)
    assert sine(one.U[0], other.Vh[0].T) <= ANGLE


def test_cuts_do_not_change_the_values() -> None:
    A = Operand(gaussian(90, 80, seed=25)[None])
    plain, with_cuts = factorise(A), factorise(A, vectors=16, cuts=CUTS)
    torch.testing.assert_close(plain.S, with_cuts.S, atol=1e-14, rtol=0)
    assert plain.U is None
    assert plain.Vh is None


# --- when another method is taken ---------------------------------------------------------------


def method(A: Tensor, **options: Any) -> dict[str, Any]:
    (how,) = factorise(Operand(A[None]), **options).methods
    assert set(how) == {"how", "bound", "subspace_bound", "fallback"}
    return how


@pytest.mark.usefixtures("one_by_one")
def test_an_ordinary_matrix_goes_through_its_gram_matrix() -> None:
    how = method(MATRICES["random"], vectors=8, cuts=[8])
    assert how["how"] == "gram-tridiagonal"
    assert how["fallback"] is None
    assert how["bound"] < 1e-6
    assert how["subspace_bound"] < 4e-9


@pytest.mark.usefixtures("one_by_one")
def test_a_short_tail_is_mended() -> None:
    for name in ("tail_1e-05", "tail_1e-06", "tail_1e-09"):
        how = method(MATRICES[name])
        assert how["how"] == "gram-tridiagonal-mended-tail"
        assert how["fallback"] is None
    assert method(MATRICES["tail_0.001"])["how"] == "gram-tridiagonal"


@pytest.mark.parametrize("vectors", [0, 6])
def test_a_matrix_of_a_stack_that_needs_more_goes_on_by_itself(vectors: int) -> None:
    """Zero, of low rank, with a tail, beyond the range of squares; the others stay together."""
    ordinary = [gaussian(70, 40, seed=40 + i) for i in range(3)]
    odd = [
        torch.zeros(70, 40, dtype=torch.float64),
        with_spectrum(70, 40, torch.linspace(2, 1, 12), seed=44),
        with_spectrum(70, 40, tail(1e-6, 3e-6), seed=45),
        1e-200 * ordinary[0],
    ]
    stack = torch.stack([ordinary[0], *odd, *ordinary[1:]])
    cuts = (6,) if vectors else ()
    found = factorise(Operand(stack), vectors=vectors, cuts=cuts)
    for i, A in enumerate(stack):
        alone = factorise(Operand(A[None]), vectors=vectors, cuts=cuts)
        assert torch.equal(found.S[i], alone.S[0])
        assert found.methods[i] == alone.methods[0]
        if vectors:
            assert found.Vh is not None and alone.Vh is not None
            assert found.U is not None and alone.U is not None
            assert torch.equal(found.Vh[i], alone.Vh[0])
            assert torch.equal(found.U[i], alone.U[0])
            if not found.methods[i]["how"].startswith("svd"):
                assert torch.equal(found.S[i], factorise(Operand(A[None])).S[0])
        np.testing.assert_allclose(found.S[i], numpy_svd(A)[1], atol=1e-14 * float(A.norm() or 1))


def test_a_stack_that_does_not_converge_goes_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> Tensor:
        raise RuntimeError("linalg.eigh: the algorithm failed to converge")

    monkeypatch.setattr(torch.linalg, "eigh", fail)
    stack = torch.stack([gaussian(50, 40, seed=46), gaussian(50, 40, seed=47)])
    found = factorise(Operand(stack))
    for i, A in enumerate(stack):
        np.testing.assert_allclose(found.S[i], numpy_svd(A)[1], atol=1e-13)
        assert found.methods[i]["how"] == "gram-tridiagonal"


def test_a_long_tail_falls_back_and_says_so() -> None:
    """More values below 1e-4·σ1 than are worth mending."""
    S = torch.cat([torch.linspace(1, 0.5, 30), torch.logspace(-5, -8, 90)])
    A = with_spectrum(130, 120, S, seed=26)
    how = method(A)
    assert how["how"] == "svdvals"
    assert how["fallback"].startswith("tail: least singular value below")
    assert method(A, vectors=4, cuts=[4])["how"] == "svd"
    found = factorise(Operand(A[None]))
    assert float((found.S[0] - numpy_svd(A)[1]).abs().max()) <= 1e-14


def close_cut(gap: float) -> Tensor:
    """σ of .01 beside σ1 = 1, eight above the cut and the rest a relative `gap` below it."""
    S = torch.cat([torch.ones(1), torch.full((7,), 0.01), torch.full((32,), 0.01 * (1 - gap))])
    S[1:8] *= torch.linspace(1.2, 1, 7)
    S[8:] *= torch.linspace(1, 0.5, 32)
    return with_spectrum(50, 40, S, seed=27)


def test_a_cut_with_a_small_gap_falls_back_and_says_so() -> None:
    A = close_cut(1e-5)
    how = method(A, vectors=8, cuts=[8])
    assert how["how"] == "svd"
    assert how["fallback"].startswith("subspace bound")
    assert "k in [8]" in how["fallback"]
    found = factorise(Operand(A[None]), vectors=8, cuts=[8])
    assert found.U is not None
    assert sine(found.U[0], numpy_svd(A)[0][:, :8]) <= ANGLE
    # the same matrix at a cut that is well defined, and with no cut at all
    assert method(A, vectors=1, cuts=[1])["fallback"] is None
    assert method(A, vectors=8)["fallback"] is None


def test_a_cut_that_defines_nothing_is_not_paid_for() -> None:
    """Below a relative gap of 1e-6 no method gives the subspace; its gap says so."""
    assert method(close_cut(1e-8), vectors=8, cuts=[8])["fallback"] is None
    assert method(MATRICES["flat"], vectors=8, cuts=[8])["fallback"] is None


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_exact_is_taken_when_asked_for(dtype: torch.dtype) -> None:
    A = MATRICES["random"]
    solver = "exact" if dtype == torch.float64 else "auto"
    for vectors, how in ((0, "svdvals"), (8, "svd")):
        found = method(A, vectors=vectors, cuts=[8] if vectors else [], solver=solver, dtype=dtype)
        assert (found["how"], found["fallback"]) == (how, None)
        assert found["bound"] == 8 * torch.finfo(dtype).eps
    values = factorise(Operand(A[None]), solver=solver, dtype=dtype).S
    assert values.dtype == torch.float64
    error = float((values[0] - exact("random")[1]).abs().max()) / float(values[0, 0])
    assert error <= 80 * torch.finfo(dtype).eps
    assert (error > 1e-9) == (dtype == torch.float32)


@pytest.mark.parametrize("shape", [(6, 4), (4, 6), (5, 5)])
def test_the_zero_matrix_has_zeros_and_some_basis(shape: tuple[int, int]) -> None:
    found = factorise(Operand(torch.zeros(1, *shape)), vectors=3, cuts=[3])
    assert torch.equal(found.S, torch.zeros(1, 4 if 4 in shape else 5, dtype=torch.float64))
    assert found.methods[0]["how"] == "zero"
    assert found.U is not None
    assert found.Vh is not None
    eye = torch.eye(3, dtype=torch.float64)
    assert torch.equal(found.U[0].T @ found.U[0], eye)
    assert torch.equal(found.Vh[0] @ found.Vh[0].T, eye)
    same = torch.ones(1, *shape)
    assert factorise(Operand(same, same)).methods[0]["how"] == "zero"


@pytest.mark.usefixtures("one_by_one")
def test_a_routine_that_fails_is_replaced_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> Tensor:
        raise NumericsError("LAPACK's dstemr failed with code 3")

    monkeypatch.setattr(blas, "eigenvectors", fail)
    A = MATRICES["random"]
    how = method(A, vectors=8, cuts=[8])
    assert (how["how"], how["fallback"]) == ("svd", "LAPACK's dstemr failed with code 3")


def test_no_driver_left_is_an_error_with_the_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> Tensor:
        raise RuntimeError("linalg.svd: the algorithm failed to converge")

    monkeypatch.setattr(torch.linalg, "svdvals", fail)
    with pytest.raises(NumericsError, match="no SVD driver converged on a 80×80 matrix"):
        factorise(Operand(MATRICES["random"][None]), solver="exact")


def test_fp32_that_does_not_converge_is_done_in_fp64(monkeypatch: pytest.MonkeyPatch) -> None:
    svdvals = torch.linalg.svdvals

    def picky(A: Tensor, **options: Any) -> Tensor:
        if A.dtype == torch.float32:
            raise RuntimeError("linalg.svd: the algorithm failed to converge")
        return svdvals(A, **options)

    monkeypatch.setattr(torch.linalg, "svdvals", picky)
    found = factorise(Operand(MATRICES["random"][None]), dtype=torch.float32)
    assert float((found.S[0] - exact("random")[1]).abs().max()) <= 1e-13


# --- stacks and threads -------------------------------------------------------------------------


@every_route
def test_a_stack_equals_its_matrices(route: str) -> None:
    """Though each of them may take a route of its own."""
    tails = [tail(x, n=60) for x in (1e-9, 0.1)]
    rows = [
        gaussian(60, 70, seed=28),
        with_spectrum(60, 70, tails[0], seed=29),
        with_spectrum(60, 70, tails[1], seed=30),
    ]
    run = routes()[route]
    together = run(Operand(torch.stack(rows)), vectors=8, cuts=(8,))
    assert len(together.methods) == 3
    for i, one in enumerate(rows):
        alone = run(Operand(one[None]), vectors=8, cuts=(8,))
        torch.testing.assert_close(together.S[i], alone.S[0], atol=1e-13, rtol=0)
        assert together.U is not None
        assert alone.U is not None
        assert sine(together.U[i], alone.U[0]) <= ANGLE


@pytest.mark.parametrize("workers", [1, 4])
def test_the_bits_do_not_depend_on_the_number_of_threads(workers: int) -> None:
    """Several matrices at once, each worker with one BLAS thread, as the engine does."""
    names = ["random", "tall", "wide", "larger", "repeated", "tail_1e-06", "rank_20"] * 3

    def work(name: str) -> Factors:
        return factorise(Operand(MATRICES[name][None]), vectors=2, cuts=[1, 2])

    alone = {name: work(name) for name in set(names)}
    with ThreadPoolExecutor(workers) as pool:
        for name, found in zip(names, pool.map(work, names), strict=True):
            for part in ("S", "U", "Vh"):
                assert torch.equal(getattr(found, part), getattr(alone[name], part)), (name, part)
            assert found.methods == alone[name].methods


def test_weyl_and_mirsky_bound_the_move_of_the_values() -> None:
    for seed, size in ((31, 1e-6), (32, 1e-2), (33, 1.0)):
        A, E = gaussian(70, 50, seed=seed, sd=1.0), size * gaussian(70, 50, seed=seed + 9, sd=1.0)
        before, after, moved = (factorise(Operand(X[None])).S[0] for X in (A, A + E, E))
        assert float((after - before).abs().max()) <= float(moved[0]) * (1 + 1e-9)
        assert float((after - before).norm()) <= float(moved.norm()) * (1 + 1e-9)


# --- what is not done, and why ------------------------------------------------------------------


def test_an_fp32_gram_matrix_loses_the_tail() -> None:
    """Negative control: good to 1e-6 at the top, and wholly wrong at the end."""
    A = with_spectrum(200, 120, torch.logspace(0, -5, 120), seed=34)
    S = numpy_svd(A)[1]
    single = A.float()
    gram = torch.linalg.eigvalsh(single.T @ single).flip(0).clamp_min(0).sqrt().double()
    assert float((gram[:10] / S[:10] - 1).abs().max()) < 1e-5
    assert float((gram[-10:] / S[-10:] - 1).abs().max()) > 0.9
    assert float((factorise(Operand(A[None])).S[0] / S - 1).abs().max()) < 1e-6


def test_an_fp64_gram_matrix_alone_loses_what_is_mended() -> None:
    A = MATRICES["tail_1e-08"]
    gram = torch.linalg.eigvalsh(A @ A.T).flip(0).clamp_min(0).sqrt()
    S = exact("tail_1e-08")[1]
    assert abs(float(gram[-1] / S[-1]) - 1) > 1e-3
    assert abs(float(factorise(Operand(A[None])).S[0, -1] / S[-1]) - 1) < 1e-5


def test_a_sketch_without_power_iterations_misses_a_flat_spectrum() -> None:
    """Negative control: a randomised range finder with eight columns more, on Gaussian noise."""
    A = gaussian(200, 200, seed=35, sd=1.0)
    k = 16
    test_matrix = torch.randn(200, k + 8, dtype=torch.float64, generator=generator(36))
    Q = torch.linalg.qr(A @ test_matrix).Q
    U = Q @ torch.linalg.svd(Q.T @ A, full_matrices=False).U
    right = numpy_svd(A)[0][:, :k]
    assert sine(U[:, :k], right) > 0.9
    found = factorise(Operand(A[None]), vectors=k, cuts=[k])
    assert found.U is not None
    assert sine(found.U[0], right) <= ANGLE


def test_angles_to_a_basis_that_is_off_show_up() -> None:
    """The measure that these tests use can see an error of 1e-8."""
    Q = orthonormal(50, 9, seed=37)
    off = math.cos(2e-8) * Q[:, :8] + math.sin(2e-8) * Q[:, 8:].expand(50, 8) / math.sqrt(8)
    assert sine(Q[:, :8], off) > ANGLE


@pytest.mark.parametrize("shape", [(60, 20), (20, 60)])
@pytest.mark.parametrize("solver", ["auto", "exact"])
def test_vectors_of_a_stack_lie_in_memory_as_those_of_one_matrix(
    shape: tuple[int, int], solver: str
) -> None:
    """Else products with them would round in another way, and numbers depend on the stack."""
    stack = torch.stack([gaussian(*shape, seed=i) for i in range(3)])
    for height in (1, 3):
        factors = factorise(Operand(stack[:height]), vectors=4, solver=solver)
        assert factors.U is not None and factors.Vh is not None
        assert factors.U.mT.is_contiguous() and factors.Vh.is_contiguous()
