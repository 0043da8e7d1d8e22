"""Low-rank products have the spectra of their dense matrices, which are never made."""

from __future__ import annotations

import resource
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from geoscope.errors import NumericsError
from geoscope.linalg import Product, factorise_product, principal_angles
from tests.helpers.matrices import gaussian, orthonormal

seeded = settings(deadline=None, derandomize=True, database=None)

# m, n, r: tall, wide, square, r = q, r > q on one side and on both, one row
SHAPES = [(90, 40, 8), (40, 90, 8), (60, 60, 1), (30, 50, 30), (12, 50, 20), (9, 7, 16), (1, 9, 3)]
every_shape = pytest.mark.parametrize("shape", SHAPES)


def factors(m: int, n: int, r: int, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    return gaussian(m, r, seed=seed, sd=1.0), gaussian(r, n, seed=seed + 1, sd=0.1)


def dense(P: Product) -> np.ndarray:
    """(b, m, n) in extended precision, so that cancellation costs no digits that count here."""
    B, scale, A = (part.numpy().astype(np.longdouble) for part in (P.B, P.scale, P.A))
    return (B * scale[:, None, :]) @ A


def check(P: Product) -> None:
    """Values, norms and vectors of P against numpy's SVD of the dense product."""
    found = factorise_product(P, vectors=P.rank + 1)  # no more than the rank come back
    assert found.U is not None
    assert found.Vh is not None
    for i, A in enumerate(dense(P)):
        S = np.linalg.svd(A.astype(float), compute_uv=False)
        size = float(S[0]) or 1.0
        np.testing.assert_allclose(found.S[i].numpy(), S, rtol=0, atol=1e-12 * size)
        assert found.methods[i]["bound"] <= 1e-12
        assert float(P.norm()[i]) == pytest.approx(float(np.sqrt((A**2).sum())), rel=1e-12)
        U, Vh = found.U[i].numpy(), found.Vh[i].numpy()
        assert U.shape == (P.shape[0], P.rank)
        assert Vh.shape == (P.rank, P.shape[1])
        eye = np.eye(P.rank)
        np.testing.assert_allclose(U.T @ U, eye, rtol=0, atol=1e-13)
        np.testing.assert_allclose(Vh @ Vh.T, eye, rtol=0, atol=1e-13)
        again = (U * found.S[i, : P.rank].numpy()) @ Vh
        np.testing.assert_allclose(again, A.astype(float), rtol=0, atol=1e-12 * size)


# --- values and vectors -------------------------------------------------------------------------


@every_shape
def test_a_product_has_the_svd_of_its_dense_matrix(shape: tuple[int, int, int]) -> None:
    B, A = factors(*shape)
    P = Product.of(B, A, 0.7)
    check(P)
    found = factorise_product(P)
    q, rank = min(shape[:2]), min(shape)
    assert P.shape == shape[:2]
    assert P.rank == rank
    assert found.S.shape == (1, q)
    assert bool((found.S[:, rank:] == 0).all())
    assert found.U is found.Vh is None
    assert torch.equal(found.S, factorise_product(P, vectors=2).S)
    how = found.methods[0]
    assert (how["how"], how["subspace_bound"], how["fallback"]) == ("product-qr", None, None)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_factors_are_upcast_before_they_are_multiplied(dtype: torch.dtype) -> None:
    B, A = (part.to(dtype) for part in factors(80, 50, 6))
    P = Product.of(B, A, 2.0)
    assert P.B.dtype == P.A.dtype == P.scale.dtype == torch.float64
    expected = 2.0 * B.double().numpy() @ A.double().numpy()
    S = np.linalg.svd(expected, compute_uv=False)
    np.testing.assert_allclose(factorise_product(P).S[0].numpy(), S, rtol=0, atol=1e-12 * S[0])
    check(P)


def test_closed_forms() -> None:
    U, V = orthonormal(70, 4, seed=1), orthonormal(90, 4, seed=2)
    S = torch.tensor([5.0, 3.0, 2.0, 1e-5], dtype=torch.float64)
    found = factorise_product(Product.of(U * S, V.T, -1.5), vectors=2, cuts=(1, 2))
    torch.testing.assert_close(found.S[0, :4], 1.5 * S, rtol=0, atol=1e-14)
    assert found.U is not None
    assert float(principal_angles(found.U[0], U[:, :2]).max()) <= 1e-14
    # u·vᵀ has the one value ‖u‖·‖v‖, whatever the sign
    ones = factorise_product(Product.of(torch.ones(9, 1), torch.ones(1, 16), -2.0))
    assert ones.S[0].tolist() == pytest.approx([24.0] + [0.0] * 8, abs=1e-14)


def test_a_bound_on_the_subspace_comes_with_a_cut() -> None:
    U, V = orthonormal(30, 3, seed=3), orthonormal(20, 3, seed=4)

    def bound(S: list[float], *cuts: int) -> Any:
        P = Product.of(U * torch.tensor(S, dtype=torch.float64), V.T)
        return factorise_product(P, vectors=3, cuts=cuts).methods[0]["subspace_bound"]

    assert bound([3.0, 2.0, 1.0], 1, 2, 3) == pytest.approx(
        max(bound([3.0, 2.0, 1.0], k) for k in (1, 2, 3))
    )
    assert 0 < bound([3.0, 2.0, 1.0], 1) < 1e-13
    assert bound([3.0, 2.999, 1.0], 1) > 100 * bound([3.0, 2.0, 1.0], 1)
    assert bound([3.0, 3.0 - 1e-7, 1.0], 1) == 0  # defines no subspace: its gap says so
    assert bound([3.0, 2.0, 1.0], 4) == 1  # beyond the rank
    assert bound([3.0, 2.0, 1.0]) is None


def test_rank_deficient_factors() -> None:
    B, A = factors(60, 40, 8, seed=5)
    B[:, 4:] = B[:, :4] @ gaussian(4, 4, seed=6, sd=1.0)
    P = Product.of(B, A)
    check(P)
    assert float(factorise_product(P).S[0, 4]) <= 1e-14 * float(P.norm())
    B[:, 1:] = 0
    check(Product.of(B, A))


@pytest.mark.parametrize("size", [1e-200, 1e-30, 1e30, 1e200])
def test_sizes_may_be_shared_in_any_way(size: float) -> None:
    B, A = factors(50, 40, 5, seed=7)
    plain = factorise_product(Product.of(B, A))
    whole = factorise_product(Product.of(B * size, A / size))
    torch.testing.assert_close(whole.S, plain.S, rtol=1e-13, atol=0)
    assert whole.methods[0]["bound"] == pytest.approx(plain.methods[0]["bound"], rel=1e-9)
    shares = size ** torch.linspace(-1, 1, 5, dtype=torch.float64)
    each = Product.of(B * shares, A / shares[:, None])
    torch.testing.assert_close(factorise_product(each).S, plain.S, rtol=1e-12, atol=1e-14)
    assert float(each.norm()) == pytest.approx(float(plain.S.norm()), rel=1e-12)


def test_a_column_that_is_tiny_beside_others_keeps_its_digits() -> None:
    """Orthogonal terms of 1 and 1e-12: the error is relative to σ1, and no worse."""
    U, V = orthonormal(40, 2, seed=8), orthonormal(30, 2, seed=9)
    S = torch.tensor([1.0, 1e-12], dtype=torch.float64)
    found = factorise_product(Product.of(U, V.T, S)).S[0]
    assert float(found[1]) == pytest.approx(1e-12, rel=1e-3)


@seeded
@given(
    m=st.integers(1, 12),
    n=st.integers(1, 12),
    r=st.integers(0, 15),
    seed=st.integers(0, 10**6),
    scale=st.floats(-100, 100).filter(lambda x: x == 0 or abs(x) > 1e-9),
    dtype=st.sampled_from([torch.bfloat16, torch.float32, torch.float64]),
)
def test_any_small_product(
    m: int, n: int, r: int, seed: int, scale: float, dtype: torch.dtype
) -> None:
    B, A = factors(m, n, r, seed=seed)
    P = Product.of(B.to(dtype), A.to(dtype), scale)
    check(P)
    assert float(P.norm()) == pytest.approx(float(factorise_product(P).S.norm()), rel=1e-13)
    assert float(P.inner(P)) == pytest.approx(float(P.norm()) ** 2, rel=1e-12)


def test_the_bound_holds_where_sums_round_to_one_side() -> None:
    """Columns of equal entries, of which the one singular value is known."""
    for length in (100, 3000, 40000):
        for value in (0.1, 0.3, 0.7, 0.9):
            P = Product.of(
                torch.full((length, 1), value, dtype=torch.float64),
                torch.full((1, length), value, dtype=torch.float64),
            )
            found = factorise_product(P)
            exact = np.longdouble(value) ** 2 * length
            error = abs(np.longdouble(float(found.S[0, 0])) - exact) / exact
            assert float(error) <= found.methods[0]["bound"] <= 3e-13


# --- sums and differences -----------------------------------------------------------------------


def test_a_sum_of_products_is_the_product_of_stacked_factors() -> None:
    P, Q = Product.of(*factors(50, 40, 6, seed=10), 2.0), Product.of(*factors(50, 40, 3, seed=12))
    for total, expected in (
        (P + Q, dense(P) + dense(Q)),
        (P - Q, dense(P) - dense(Q)),
        (-P, -dense(P)),
    ):
        np.testing.assert_allclose(dense(total).astype(float), expected.astype(float), atol=1e-12)
        check(total)
    assert (P + Q).rank == 9


def trained(rho: float, *, seed: int = 14) -> tuple[Product, Product]:
    """A start that is not zero, and a small step from it, both stored in fp32."""
    B, A = factors(70, 50, 4, seed=seed)
    dB, dA = factors(70, 50, 4, seed=seed + 2)
    after = Product.of((B + rho * dB).float(), (A + rho * dA).float(), 0.5)
    return after, Product.of(B.float(), A.float(), 0.5)


@pytest.mark.parametrize("rho", [1e-1, 1e-3, 1e-6])
def test_a_small_difference_loses_no_digits(rho: float) -> None:
    after, before = trained(rho)
    step = after - before
    assert step.rank == 8
    expected = (dense(after) - dense(before)).astype(float)[0]
    S = np.linalg.svd(expected, compute_uv=False)
    found = factorise_product(step)
    np.testing.assert_allclose(found.S[0].numpy(), S, rtol=0, atol=1e-12 * S[0])
    assert float(step.norm()) == pytest.approx(float(np.linalg.norm(expected)), rel=1e-12)
    assert float(step.inner(step)) == pytest.approx(float(np.linalg.norm(expected)) ** 2, rel=1e-12)


def test_stacked_factors_lose_what_their_bound_says() -> None:
    """The negative control: P + (−Q) is 1e-6 of its terms, and so wide is its bound."""
    after, before = trained(1e-6)
    plain, near = (factorise_product(one) for one in (after + -before, after - before))
    error = float((plain.S - near.S).abs().max() / near.S.max())
    assert 1e-13 < error <= plain.methods[0]["bound"]
    assert plain.methods[0]["bound"] > 1e5 * near.methods[0]["bound"]
    # an inner product of the Grams has that error squared; through the QRs it has it once
    P = after + -before
    grams = ((P.B[0].T @ P.B[0]) * (P.A[0] @ P.A[0].T) * 0.25 * signs(8)).sum()
    exact = float(near.S.square().sum())
    assert abs(float(P.inner(P)) - exact) < 1e-7 * exact
    assert abs(float(grams) - exact) > 1e-6 * exact


def signs(r: int) -> Tensor:
    side = torch.cat([torch.ones(r // 2), -torch.ones(r // 2)]).double()
    return side[:, None] * side


def test_equal_products_differ_by_exact_zeros() -> None:
    P = Product.of(*factors(40, 30, 4, seed=18), 0.3)
    found = factorise_product(P - Product.of(*factors(40, 30, 4, seed=18), 0.3), vectors=2)
    assert found.methods[0] == {
        "how": "zero", "bound": 0.0, "subspace_bound": None, "fallback": None
    }  # fmt: skip
    assert bool((found.S == 0).all())


def test_terms_that_cancel_to_within_rounding_are_zero_and_say_so() -> None:
    """The two halves of a mirrored adapter before the first step."""
    B, A = factors(200, 100, 4, seed=20)
    B, A = torch.cat([B, -B], 1), torch.cat([A, A], 0)
    P = Product.of(B, A)
    found = factorise_product(P, vectors=3)
    assert bool((found.S == 0).all())
    assert float(P.norm()) == float(P.inner(P)) == 0
    assert found.methods[0]["how"] == "zero"
    assert found.methods[0]["fallback"] == "terms cancel to within rounding"
    B[0, 0] += 1e-6  # a step far above rounding is none of it
    assert factorise_product(Product.of(B, A)).methods[0]["how"] == "product-qr"


def test_matrices_of_a_stack_choose_their_difference_alone() -> None:
    """A close pair, a far one, one with another scale and one that shares sizes otherwise."""
    close_after, close_before = trained(1e-6)
    far_after, far_before = trained(0.1)[0], Product.of(*factors(70, 50, 4, seed=30), 0.5)
    other = Product.of(close_before.B, close_before.A, 0.25)
    shared = Product.of(1e8 * close_before.B, 1e-8 * far_before.A, 0.5)
    after, before = (
        Product(*(torch.cat(parts) for parts in zip(*map(fields, side), strict=True)))
        for side in (
            (close_after, far_after, close_after, far_after),
            (close_before, far_before, other, shared),
        )
    )
    step = after - before
    found = factorise_product(step)
    for i, A in enumerate(dense(after) - dense(before)):
        S = np.linalg.svd(A.astype(float), compute_uv=False)
        np.testing.assert_allclose(found.S[i].numpy(), S, rtol=0, atol=1e-12 * S[0])


def fields(P: Product) -> tuple[Tensor, Tensor, Tensor]:
    return P.B, P.scale, P.A


# --- products and inner products ----------------------------------------------------------------


@every_shape
def test_images_of_rows_and_inner_products(shape: tuple[int, int, int]) -> None:
    m, n, r = shape
    P, Q = Product.of(*factors(m, n, r, seed=22), 0.7), Product.of(*factors(m, n, 2, seed=24), -2.0)
    A, C = dense(P).astype(float), dense(Q).astype(float)
    X, Y = gaussian(3, n, seed=26, sd=1.0)[None], gaussian(3, m, seed=27, sd=1.0)[None]
    np.testing.assert_allclose(P.right(X).numpy(), X.numpy() @ A.transpose(0, 2, 1), atol=1e-13)
    np.testing.assert_allclose(P.left(Y).numpy(), Y.numpy() @ A, atol=1e-13)
    size = float(P.norm() * Q.norm())
    assert float(P.inner(Q)) == pytest.approx(float((A * C).sum()), abs=1e-13 * size)
    assert float(Q.inner(P)) == pytest.approx(float((A * C).sum()), abs=1e-13 * size)
    assert float((P - Q).norm() ** 2) == pytest.approx(
        float(P.norm() ** 2 - 2 * P.inner(Q) + Q.norm() ** 2), rel=1e-12, abs=1e-12 * size
    )


def test_a_stack_equals_its_matrices_bit_by_bit() -> None:
    pairs = [factors(130, 70, 5, seed=40 + 2 * i) for i in range(3)]
    scales = torch.tensor([[1.0], [0.3], [-2.0]])
    B, A = (torch.stack(side) for side in zip(*pairs, strict=True))
    P = Product.of(B, A, scales)
    found = factorise_product(P, vectors=3, cuts=(1, 3))
    assert len(P) == len(found.methods) == 3
    assert found.U is not None
    assert found.Vh is not None
    for i, (B, A) in enumerate(pairs):
        for one in (Product.of(B, A, float(scales[i])), P.row(i)):
            alone = factorise_product(one, vectors=3, cuts=(1, 3))
            assert alone.U is not None
            assert alone.Vh is not None
            assert torch.equal(alone.S[0], found.S[i])
            assert torch.equal(alone.U[0], found.U[i])
            assert torch.equal(alone.Vh[0], found.Vh[i])
            assert alone.methods[0] == found.methods[i]
            assert torch.equal(one.norm()[0], P.norm()[i])
            assert torch.equal(one.inner(one)[0], P.inner(P)[i])
    check(P)


# --- edges --------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["B", "A", "scale", "rank 0"])
def test_a_zero_factor_gives_zeros(which: str) -> None:
    B, A = factors(20, 30, 0 if which == "rank 0" else 4)
    P = Product.of(B * (which != "B"), A * (which != "A"), 0.0 if which == "scale" else 1.0)
    found = factorise_product(P, vectors=3, cuts=(1,))
    assert found.S.tolist() == [[0.0] * 20]
    assert float(P.norm()) == 0
    assert found.methods[0]["how"] == "zero"
    assert found.methods[0]["fallback"] is None
    check(P)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("which", ["B", "A", "scale"])
def test_numbers_that_are_none_are_refused_in_one_line(which: str, bad: float) -> None:
    B, A = factors(20, 30, 4)
    if which != "scale":
        {"B": B, "A": A}[which][1, 2] = bad
    P = Product.of(B, A, bad if which == "scale" else 1.0)
    uses: list[Callable[[], object]] = [lambda: factorise_product(P), P.norm, lambda: P.inner(P)]
    for use in uses:
        with pytest.raises(NumericsError, match="20×30 product hold NaN or infinity") as caught:
            use()
        assert "\n" not in str(caught.value)


def test_a_product_beyond_fp64_is_refused() -> None:
    with pytest.raises(NumericsError, match="overflow"):
        factorise_product(
            Product.of(torch.full((9, 1), 1e200, dtype=torch.float64), torch.ones(1, 9), 1e200)
        )
    with pytest.raises(NumericsError, match="overflow"):
        factorise_product(
            Product.of(torch.full((99, 1), 1e308, dtype=torch.float64), torch.ones(1, 9))
        )


@pytest.mark.parametrize(("B", "A"), [((5, 1), (8, 7)), ((2, 5, 4), (3, 4, 7)), ((5, 4), (3, 7))])
def test_factors_that_do_not_fit_are_refused(B: tuple[int, ...], A: tuple[int, ...]) -> None:
    with pytest.raises(NumericsError, match="do not multiply") as caught:
        Product.of(torch.ones(B), torch.ones(A))
    assert "×".join(map(str, B)) in str(caught.value) or len(B) == 2


def test_inputs_stay_as_they_are() -> None:
    B, A = factors(20, 30, 4)
    before = B.clone(), A.clone()
    P = Product.of(B, A, 3.0)
    factorise_product(P - Product.of(B, A, 2.0), vectors=2)
    assert torch.equal(B, before[0])
    assert torch.equal(A, before[1])


# --- memory -------------------------------------------------------------------------------------


class Largest(TorchDispatchMode):
    """The largest tensor that any operation returns, in entries."""

    entries = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for one in out if isinstance(out, tuple | list) else (out,):
            if isinstance(one, Tensor):
                self.entries = max(self.entries, one.numel())
        return out


@contextmanager
def growth() -> Iterator[list[int]]:
    """By how many bytes the peak of the process rose, LAPACK's workspaces included."""
    unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    grown: list[int] = []
    yield grown
    grown.append(unit * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak))


def test_nothing_of_the_dense_size_is_made() -> None:
    """200000 × 300000 would take 480 GB; its factors take 32 MB in fp64."""
    m, n, r = 200_000, 300_000, 8
    B, A = (part.to(torch.bfloat16) for part in factors(m, n, r, seed=60))
    with growth() as grown, Largest() as largest:
        P = Product.of(B, A, 0.1)
        found = factorise_product(P, vectors=r, cuts=(r,))
        step = P - Product.of(B, A, 0.2)
        size = float(step.norm())
        image = P.right(torch.ones(1, 1, n, dtype=torch.float64))
        own = float(P.inner(P))
    assert largest.entries <= 2 * n * r  # stacked factors of a difference
    assert grown[0] <= 20 * 8 * (m + n) * r
    assert image.shape == (1, 1, m)
    assert size == pytest.approx(float(P.norm()), rel=1e-12)
    # r × r algebra in closed form: σ² are the eigenvalues of (BᵀB)(AAᵀ)
    grams = [one.T @ one for one in (B.double().numpy(), A.T.double().numpy())]
    energies = np.sort(np.linalg.eigvals(grams[0] @ grams[1]).real)[::-1]
    np.testing.assert_allclose(found.S[0, :r].numpy(), 0.1 * np.sqrt(energies), rtol=1e-12)
    assert own == pytest.approx(0.01 * float(energies.sum()), rel=1e-12)
    assert bool((found.S[0, r:] == 0).all())
    assert found.methods[0]["bound"] <= 1e-10
