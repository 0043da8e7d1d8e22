"""What initialisations stand on: leading and last triplets, thresholds, masks, a null."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from geoscope.linalg.head import head_triplets
from geoscope.linalg.iid import iid_top_share
from geoscope.linalg.masked import keep_small, part_threshold, threshold
from geoscope.linalg.tail import tail_triplets
from geoscope.linalg.triangular import leading_qr
from tests.helpers.matrices import DTYPES, gaussian, with_spectrum

Q = 520  # the least side that is searched in fp32, and a little


def sine(found: Tensor, truth: Tensor) -> float:
    """Of the largest angle between the spans of the columns."""
    return float(torch.linalg.matrix_norm(found - truth @ (truth.T @ found), 2))


def heavy(q: int) -> np.ndarray:
    return np.concatenate([30 * np.arange(1, 31) ** -0.7, np.linspace(2, 0.01, q - 30)])


SPECTRA = {
    "heavy": heavy(Q),
    "geometric": np.geomspace(1, 1e-6, Q),
    "outliers": np.r_[15.0, 9.0, np.linspace(3, 0.5, Q - 2)],
    "near tie at the cut": np.r_[np.linspace(3, 2, 12), 2 - 1e-4, np.linspace(1.9, 0.1, Q - 13)],
}


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("spectrum", SPECTRA.values(), ids=SPECTRA)
def test_leading_triplets_in_fp64(spectrum: np.ndarray, turned: bool) -> None:
    W = with_spectrum(700, Q, spectrum, seed=3)
    W = W.T.contiguous() if turned else W
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    found = head_triplets(W, 12)
    assert found.method["how"].startswith("gram32-refined"), found.method
    torch.testing.assert_close(found.S, S[:13], atol=1e-12 * float(S[0]), rtol=0)
    assert sine(found.U, U[:, :12]) <= 4e-9
    assert sine(found.Vh.T, Vh[:12].T) <= 4e-9
    assert found.method["subspace_bound"] <= 4e-9
    part, truth = (found.U * found.S[:12]) @ found.Vh, (U[:, :12] * S[:12]) @ Vh[:12]
    assert float((part - truth).norm()) <= 1e-8 * float(truth.norm())


def test_a_flat_spectrum_is_found_too() -> None:
    W = gaussian(800, 600, seed=1).bfloat16()
    U, S, _ = torch.linalg.svd(W.double(), full_matrices=False)
    found = head_triplets(W, 16)
    assert found.method["how"].startswith("gram32-refined")
    assert sine(found.U, U[:, :16]) <= 4e-9
    assert found.gap == pytest.approx(float((S[15] - S[16]) / S[15]), abs=1e-12)


def test_a_tie_at_the_cut_falls_back_and_says_so() -> None:
    spectrum = np.r_[np.full(40, 2.0), np.linspace(1, 0.1, Q - 40)]
    found = head_triplets(with_spectrum(600, Q, spectrum, seed=2), 12)
    assert not found.method["how"].startswith("gram32")
    assert found.method["fallback"] is not None
    torch.testing.assert_close(found.S, torch.full((13,), 2.0, dtype=torch.float64))


def test_an_outlier_that_hides_the_rest_from_fp32_falls_back() -> None:
    W = with_spectrum(700, Q, np.r_[60.0, np.linspace(1, 0.5, Q - 1)], seed=3)
    found = head_triplets(W, 12)
    assert "refinement stopped" in found.method["fallback"]
    assert sine(found.U, torch.linalg.svd(W, full_matrices=False).U[:, :12]) <= 4e-9


def test_small_matrices_and_large_parts_take_the_whole_spectrum() -> None:
    small = gaussian(60, 40, seed=1)
    assert head_triplets(small, 4).method["how"].startswith("gram-")
    assert head_triplets(small, 40).S.tolist()[-1] == 0.0
    assert head_triplets(small, 40).gap == 1.0
    wide = gaussian(600, Q, seed=1)
    assert head_triplets(wide, 200).method["how"].startswith("gram-")
    assert head_triplets(wide, 4, solver="exact").method["how"] == "svd"
    assert head_triplets(torch.zeros(6, 4), 2).gap is None


# --- the tail -----------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(90, 60), (60, 90), (64, 64)])
def test_last_triplets(shape: tuple[int, int]) -> None:
    W = gaussian(*shape, seed=5)
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    for k in (1, 5):
        found = tail_triplets(W, k)
        assert found.method["how"] == "gram-tail", found.method
        torch.testing.assert_close(found.S, S[-k:], atol=1e-13 * float(S[0]), rtol=0)
        part, truth = (found.U * found.S) @ found.Vh, (U[:, -k:] * S[-k:]) @ Vh[-k:]
        assert float((part - truth).norm()) <= 1e-8 * float(truth.norm())


def test_a_tail_that_the_gram_matrix_does_not_see() -> None:
    W = with_spectrum(80, 64, np.geomspace(1, 1e-12, 64), seed=6)
    found = tail_triplets(W, 4)
    assert found.method["how"] == "svd"
    assert "subspace bound" in found.method["fallback"]
    torch.testing.assert_close(found.S, torch.linalg.svdvals(W)[-4:], atol=1e-15, rtol=0)


def test_a_tail_within_a_wider_tolerance_needs_no_svd() -> None:
    W = with_spectrum(120, 100, np.geomspace(1, 1e-3, 100), seed=8)
    assert tail_triplets(W, 6).method["how"] == "svd"
    found = tail_triplets(W, 6, tolerance=1e-4)
    assert found.method["how"] == "gram-tail"
    assert 1e-9 < found.method["subspace_bound"] <= 1e-4
    Vh = torch.linalg.svd(W, full_matrices=False).Vh[-6:]
    sine = float(torch.linalg.matrix_norm(found.Vh - found.Vh @ Vh.T @ Vh, 2))
    assert sine <= found.method["subspace_bound"]
    refused = tail_triplets(with_spectrum(80, 64, np.geomspace(1, 1e-12, 64), seed=6), 4)
    assert refused.method["how"] == "svd"


def test_a_long_tail_is_the_whole() -> None:
    W = gaussian(30, 20, seed=1)
    found = tail_triplets(W, 20)
    torch.testing.assert_close((found.U * found.S) @ found.Vh, W)


# --- QR -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(30, 20), (20, 30)])
def test_leading_qr_is_that_of_the_whole(shape: tuple[int, int]) -> None:
    W = gaussian(*shape, seed=7)
    Q_whole, R_whole = torch.linalg.qr(W)
    for k in (1, 7, 20):
        Q_k, R_k = leading_qr(W, k)
        torch.testing.assert_close(Q_k, Q_whole[:, :k])
        torch.testing.assert_close(R_k, R_whole[:k])


# --- thresholds and masks -----------------------------------------------------------------------


@pytest.mark.parametrize("level", [0.0, 1e-9, 0.2, 0.5, 0.999, 1.0])
@pytest.mark.parametrize("dtype", [*DTYPES.values(), torch.float64])
def test_thresholds_equal_numpy(dtype: torch.dtype, level: float) -> None:
    for size in (1, 2, 3, 1000):
        A = gaussian(size, 1, seed=size).to(dtype)
        sizes = A.double().abs().numpy()
        found = threshold(A, level)
        assert found.tau == pytest.approx(float(np.quantile(sizes, level)), rel=1e-14)
        assert found.edge == sizes[sizes <= found.tau].max()


@pytest.mark.parametrize("level", [1e-6, 0.2, 0.7, 1 - 1e-6])
def test_thresholds_of_a_product_need_no_luck(level: float) -> None:
    """Brackets on smooth, constant and mostly vanishing entries."""
    left, right = gaussian(700, 3, seed=1), gaussian(3, 150, seed=2)
    half = left.clone()
    half[:500] = 0
    for one in (left, torch.ones_like(left), half):
        sizes = (one @ right).abs().numpy()
        found = part_threshold(one, right, level)
        assert found.tau == pytest.approx(float(np.quantile(sizes, level)), rel=1e-12, abs=1e-300)


def test_kept_entries_are_stored_numbers_and_true_zeros() -> None:
    W = gaussian(90, 70, seed=3).bfloat16()
    U, S, Vh = torch.linalg.svd(W.double(), full_matrices=False)
    found = keep_small(W, U[:, :4], S[:4], Vh[:4], 0.2)
    mask = ((U[:, :4] * S[:4]) @ Vh[:4]).abs() <= found.spec.tau
    mask |= W.double().abs() <= found.euc.tau
    assert torch.equal(found.kept, torch.where(mask, W, 0))
    assert not bool((found.kept.view(torch.int16) == -32768).any())  # −0
    assert found.count_union == int(mask.sum())
    assert found.energy == pytest.approx(float(found.kept.double().norm()) ** 2)


# --- the null -----------------------------------------------------------------------------------


def test_shares_of_gaussian_matrices() -> None:
    """Values of the methods reference, §8, and a simulation."""
    for shape, value in {(1536, 1536): 0.0396, (256, 1536): 0.113, (1536, 8960): 0.0203}.items():
        assert iid_top_share(*shape, 16, 0) == pytest.approx(value, rel=0.01)
    S = torch.linalg.svdvals(gaussian(300, 200, seed=1)).square()
    assert iid_top_share(300, 200, 20, 0) == pytest.approx(float(S[:20].sum() / S.sum()), rel=0.02)
    assert iid_top_share(200, 300, 20, 0) == iid_top_share(300, 200, 20, 0)
    assert iid_top_share(8, 5, 5, 0) == 1.0
