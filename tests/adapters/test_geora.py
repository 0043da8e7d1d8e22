"""GeoRA against an oracle of its own, its edges, and the mistakes that it must not make."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from geoscope.adapters.factors import LoraFactors
from geoscope.adapters.geora import geora
from geoscope.errors import NumericsError, OptionError
from geoscope.records import Status
from tests.helpers.matrices import DTYPES, gaussian, orthonormal, with_spectrum
from tests.helpers.oracle_initial import geora as oracle

SHAPES = {
    "tall": (96, 40), "wide": (40, 96), "square": (64, 64), "narrow": (200, 6),
    "large": (900, 640), "large wide": (640, 1200),
}  # fmt: skip


def realistic(m: int, n: int, *, seed: int = 0) -> Tensor:
    """Rows of different scales and a few large directions."""
    rows = torch.exp(0.3 * gaussian(m, 1, seed=seed, sd=1.0))
    k = min(m, n, 8)
    U, V = orthonormal(m, k, seed=seed + 1), orthonormal(n, k, seed=seed + 2)
    outliers = (U * torch.linspace(3.0, 1.2, k, dtype=torch.float64)) @ V.T
    return rows * gaussian(m, n, seed=seed + 3) + 0.02 * (m**0.5 + n**0.5) * outliers


def product(found: LoraFactors) -> np.ndarray:
    return (found.B.double() @ found.A.double()).numpy()


def assert_agrees(found: LoraFactors, W: Tensor, r: int, **options: object) -> None:
    """With the oracle: thresholds and densities, energies, and the product."""
    truth = oracle(W.double().numpy(), r, s=found.scaling, **options)  # pyright: ignore
    got = {key: value for key, value in found.facts.items() if value is not None}
    assert set(got) == set(truth.facts)
    assert got["tau_euc"] == truth.facts["tau_euc"]
    assert got["density_euc"] == truth.facts["density_euc"]
    assert got["tau_spec"] == pytest.approx(truth.facts["tau_spec"], rel=1e-6)
    for key in ("density_spec", "density_union", "density_intersection", "jaccard"):
        assert got[key] == pytest.approx(truth.facts[key], abs=1e-6), key
    for key in ("masked_energy", "captured_energy", "head_energy", "relative_norm"):
        assert got[key] == pytest.approx(truth.facts[key], rel=1e-7), key
    assert got["gap"] == pytest.approx(truth.facts["gap"], abs=1e-9)
    assert_close(product(found), truth.product, 1e-6)


def assert_close(found: np.ndarray, truth: np.ndarray, tolerance: float) -> None:
    assert np.linalg.norm(found - truth) <= tolerance * np.linalg.norm(truth)


@pytest.mark.parametrize("dtype", [*DTYPES, "fp64"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_agrees_with_the_oracle(shape: tuple[int, int], dtype: str) -> None:
    W = realistic(*shape).to(DTYPES.get(dtype, torch.float64))
    assert_agrees(geora(W, 4), W, 4)


@pytest.mark.parametrize("rho", [1e-6, 0.013, 0.5, 0.999])
def test_agrees_at_other_levels(rho: float) -> None:
    W = realistic(90, 60).bfloat16()
    assert_agrees(geora(W, 5, rho=rho), W, 5, rho=rho)


@pytest.mark.parametrize("spec_rank", [1, 4, 9, 60])
def test_agrees_at_other_ranks_of_the_mask(spec_rank: int) -> None:
    W = realistic(90, 60)
    assert_agrees(geora(W, 4, spec_rank=spec_rank), W, 4, spec_rank=spec_rank)


def test_agrees_at_full_rank() -> None:
    W = realistic(30, 20)
    found = geora(W, 20)
    assert_agrees(found, W, 20)
    assert found.facts["gap"] == 1.0  # σ_{q+1} = 0
    assert found.nulls["captured_energy"] == 1.0


def test_agrees_by_the_exact_solver() -> None:
    W = realistic(700, 560).bfloat16()
    quick, exact = geora(W, 8), geora(W, 8, solver="exact")
    assert quick.method["masked"]["how"].startswith("gram32-refined")
    assert exact.method["masked"]["how"] == "svd"
    assert_close(product(quick), product(exact), 1e-6)
    assert_agrees(exact, W, 8)


@pytest.mark.slow
@given(
    m=st.integers(2, 40), n=st.integers(2, 40), seed=st.integers(0, 10**6),
    dtype=st.sampled_from([*DTYPES.values(), torch.float64]), rho=st.floats(0.02, 0.98),
    part=st.floats(0.0, 1.0),
)  # fmt: skip
@settings(max_examples=80, deadline=None)
def test_agrees_on_any_shape(
    m: int, n: int, seed: int, dtype: torch.dtype, rho: float, part: float
) -> None:
    W = gaussian(m, n, seed=seed).to(dtype)
    r = 1 + int(part * (min(m, n) - 1))
    truth = oracle(W.double().numpy(), r, rho=rho).facts
    found = geora(W, r, rho=rho)
    assert found.facts["tau_euc"] == truth["tau_euc"]
    assert found.facts["density_euc"] == truth["density_euc"]
    assert found.facts["tau_spec"] == pytest.approx(truth["tau_spec"], rel=1e-6, abs=1e-15)
    assert found.facts["density_union"] == pytest.approx(truth["density_union"], abs=1e-6)
    assert found.facts["masked_energy"] == pytest.approx(truth["masked_energy"], rel=1e-6)
    assert found.B.shape == (m, r)
    assert found.A.shape == (r, n)


# --- what is promised of the factors ------------------------------------------------------------


def test_scaling_and_conventions() -> None:
    W = realistic(48, 32)
    plain, divided = geora(W, 4, alpha=12), geora(W, 4, alpha=12, scale_convention="pissa")
    assert plain.scaling == divided.scaling == 3.0
    assert_agrees(divided, W, 4, divided=True)
    assert_close(3 * product(divided), product(plain), 1e-6)
    same = geora(W, 4, alpha=4, scale_convention="pissa")
    assert torch.equal(same.B, geora(W, 4, alpha=4).B)
    assert geora(W, 4).scaling == 2.0


def test_the_residual_gives_the_weights_back() -> None:
    for dtype in DTYPES.values():
        W = realistic(128, 96).to(dtype)
        found = geora(W, 8)
        initial = found.scaling * (found.B @ found.A)
        residual = W.float() - initial
        error = (residual + initial - W.float()).norm() / W.float().norm()
        assert float(error) <= 1e-7


def test_factors_are_balanced_signed_and_fp32() -> None:
    found = geora(realistic(80, 50).bfloat16(), 6)
    assert found.A.dtype == found.B.dtype == torch.float32
    assert found.A.is_contiguous() and found.B.is_contiguous()
    torch.testing.assert_close(found.B.norm(dim=0), found.A.norm(dim=1))
    largest = found.B.abs().argmax(0)
    assert bool((found.B.gather(0, largest[None]) > 0).all())
    off = found.A @ found.A.T
    torch.testing.assert_close(off, torch.diag(off.diagonal()), atol=1e-6, rtol=0)


def test_same_input_same_bytes() -> None:
    W = realistic(640, 600).bfloat16()
    before = W.clone()
    one, two = geora(W, 8), geora(W, 8)
    assert torch.equal(one.A, two.A) and torch.equal(one.B, two.B)
    assert one.facts == two.facts and one.nulls == two.nulls
    assert torch.equal(W, before)


def test_a_strided_matrix_is_its_copy() -> None:
    """As a Conv1D weight comes from the reader: turned, not copied."""
    W = realistic(40, 64).bfloat16()
    assert torch.equal(geora(W.T, 4).B, geora(W.T.contiguous(), 4).B)


# --- edges --------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [0, -1, 9, 1000])
def test_a_rank_that_does_not_fit(rank: int) -> None:
    with pytest.raises(OptionError, match=rf"rank {rank} does not fit a 12×8 matrix.*at most 8"):
        geora(realistic(12, 8), rank)
    with pytest.raises(OptionError, match=rf"spec-rank {rank} does not fit"):
        geora(realistic(12, 8), 2, spec_rank=rank)


@pytest.mark.parametrize("rho", [0.0, 1.0, -0.1, 2.0, float("nan")])
def test_a_level_outside_the_open_interval(rho: float) -> None:
    with pytest.raises(OptionError, match="between 0 and 1"):
        geora(realistic(12, 8), 2, rho=rho)


def test_other_settings_that_make_no_sense() -> None:
    with pytest.raises(OptionError, match="alpha is 0"):
        geora(realistic(12, 8), 2, alpha=0)
    with pytest.raises(OptionError, match="scale convention 'peft'"):
        geora(realistic(12, 8), 2, scale_convention="peft")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_entries_that_are_not_finite_are_counted(bad: float) -> None:
    W = realistic(12, 8).bfloat16()
    W[3, 4] = W[5, 1] = bad
    with pytest.raises(NumericsError, match="2 of 96 entries are NaN or infinite in a 12×8"):
        geora(W, 2)


def test_zeros() -> None:
    with pytest.raises(NumericsError, match="every entry of a 12×8 matrix is zero"):
        geora(torch.zeros(12, 8), 2)
    half = realistic(40, 30)
    half[:20] = 0  # W and W_r vanish together: the mask keeps nothing
    with pytest.raises(NumericsError, match=r"rho = 0\.2 keeps of a 40×30 matrix are all zero"):
        geora(half, 2)


def test_many_zeros_are_noted() -> None:
    W = realistic(40, 30)
    W[torch.rand(40, 30, generator=torch.Generator().manual_seed(0)) < 0.4] = 0
    found = geora(W, 3)
    assert found.facts["tau_euc"] == 0.0
    assert found.facts["density_euc"] == pytest.approx(float((W == 0).double().mean()))
    assert any("0.2-quantile of |W| is 0" in note for note in found.notes)
    assert_agrees(found, W, 3)


def test_an_ill_conditioned_subspace_is_noted() -> None:
    flat = geora(torch.eye(32, dtype=torch.float64) + 1e-9 * realistic(32, 32), 4, rho=0.9999)
    assert float(flat.facts["gap"] or 0) < 1e-6
    assert any(note.startswith("ill-conditioned subspace") for note in flat.notes)
    spread = geora(with_spectrum(40, 30, np.geomspace(1, 1e-3, 30), seed=1), 2, rho=0.9)
    assert spread.notes == ()


@pytest.mark.parametrize("size", [1e-30, 1e25])
def test_extreme_sizes_agree(size: float) -> None:
    """fp32 Gram matrices would under- and overflow; the answer does not change."""
    W = realistic(600, 520)
    found, plain = geora(size * W, 6), geora(W, 6)
    assert plain.method["masked"]["fallback"] is None
    assert_close(product(found) / size, product(plain), 1e-6)
    assert found.facts["density_union"] == plain.facts["density_union"]


def test_every_value_has_its_status() -> None:
    found = geora(realistic(24, 16), 3)
    assert found.status == {}
    assert set(found.nulls) == {
        "density_intersection", "jaccard", "captured_energy", "head_energy",
    }  # fmt: skip
    assert set(found.method) == {"spectral", "masked"}
    for method in found.method.values():
        assert set(method) == {"how", "bound", "subspace_bound", "fallback"}
    assert Status.OK not in found.status.values()


# --- the mistakes that it must not make ---------------------------------------------------------


def test_a_sketch_does_not_find_the_subspace() -> None:
    """PEFT's randomised SVD of W_geo, which is why the search is exact."""
    W = gaussian(640, 600, seed=4)
    truth = oracle(W.numpy(), 16)
    torch.manual_seed(0)
    U, _, _ = torch.svd_lowrank(torch.from_numpy(truth.W_geo).float(), 16, niter=4)
    found = geora(W, 16)
    basis = np.linalg.svd(truth.product)[0][:, :16]
    missed = [
        float(np.linalg.norm(Q - basis @ (basis.T @ Q), 2))
        for Q in (U.double().numpy(), np.linalg.qr(found.B.double().numpy())[0])
    ]
    assert missed[0] > 0.5
    assert missed[1] < 1e-5


def test_ties_are_kept() -> None:
    """bf16 weights have them, and "<" would drop them."""
    W = realistic(96, 64).bfloat16()
    found = geora(W, 4).facts
    strict = oracle(W.double().numpy(), 4, strict=True).facts
    assert float(found["density_euc"] or 0) > 0.2
    assert float(found["density_euc"] or 0) > strict["density_euc"] + 1e-3


@pytest.mark.parametrize("shape", [(120, 24), (24, 120), (48, 48)])
def test_the_null_of_captured_energy_is_that_of_noise_of_the_shape(shape: tuple[int, int]) -> None:
    found = geora(realistic(*shape), 6)
    shares = []
    for seed in range(40):
        energies = torch.linalg.svdvals(gaussian(*shape, seed=900 + seed)).square()
        shares.append(float(energies[:6].sum() / energies.sum()))
    drawn = np.array(shares)
    error = drawn.std() / np.sqrt(len(drawn))
    assert found.nulls["captured_energy"] == pytest.approx(drawn.mean(), abs=6 * error)
