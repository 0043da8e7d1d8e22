"""Are the nulls what noise really gives? Against simulation and closed forms."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from geoscope import Options, compare
from geoscope.engine import one_blas_thread
from geoscope.linalg import FORMATS, Operand, factorise, iid
from geoscope.linalg.changes import changed_mask, expected_unchanged, side, unchanged
from geoscope.metrics import METRICS, Measured, nulls, spectrum
from geoscope.metrics.masks import MaskOverlaps, mask_overlaps
from tests.helpers.matrices import DTYPES, gaussian, save_model, updated
from tests.helpers.measuring import rows

BF16 = FORMATS[torch.bfloat16]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """As in the engine."""
    with one_blas_thread():
        yield


# --- iid matrices -------------------------------------------------------------------------------

SPECTRAL: dict[str, Callable[[Tensor], Tensor]] = {
    "stable": spectrum.stable_rank,
    "PR": spectrum.participation_ratio,
    "entropy": spectrum.entropy_rank,
    "effective": spectrum.effective_rank,
    "nuclear": spectrum.nuclear_ratio,
    "k90": lambda S: spectrum.energy_rank(S, level=0.9),
    "top": lambda S: spectrum.top_share(S, k=1),
    "top8": lambda S: spectrum.top_share(S, k=8),
}


@pytest.mark.parametrize("shape", [(30, 30), (24, 80), (80, 24)])
def test_sampled_spectra_are_those_of_gaussian_matrices(shape: tuple[int, int]) -> None:
    """Each singular value and each quantity: two samples of one distribution, at five errors."""
    sampled = nulls.iid_spectra(*shape, 0)
    dense = torch.linalg.svdvals(
        gaussian(400 * shape[0], shape[1], seed=1, sd=1.0).view(400, *shape)
    )
    for quantity in (lambda S: S, *SPECTRAL.values()):
        ours, theirs = quantity(sampled), quantity(dense)
        error = (ours.var(0) / len(ours) + theirs.var(0) / len(theirs)).sqrt()
        assert bool(((ours.mean(0) - theirs.mean(0)).abs() <= 5 * error).all())
        spread = ours.std(0) / theirs.std(0)
        assert bool(((spread > 0.6) & (spread < 1.6)).all())


# Limits of the Marchenko-Pastur law (docs/methods.md#spectrum), over q.
TABLE = {
    (1024, 1024): {
        "effective": 0.8050, "entropy": 0.6065, "PR": 0.5000, "stable": 0.25, "nuclear": 0.8488,
        "k90": 0.510, "top": 0.0039 / 1024,
    },
    (1024, 4096): {
        "effective": 0.9662, "entropy": 0.8825, "PR": 0.8000, "stable": 0.444, "nuclear": 0.9677,
        "k90": 0.761, "top": 0.0022 / 1024,
    },
    (1536, 8960): {
        "effective": 0.9774, "entropy": 0.9179, "PR": 0.8537, "stable": 0.500, "nuclear": 0.9781,
        "k90": 0.795,
    },
}  # fmt: skip


@pytest.mark.parametrize("shape", TABLE)
def test_sampled_nulls_have_the_tabulated_values(shape: tuple[int, int]) -> None:
    S = nulls.iid_spectra(*shape, 0)
    for key, expected in TABLE[shape].items():
        mean = float(SPECTRAL[key](S).mean())
        found = mean if key == "nuclear" else mean / min(shape)
        # the largest value of few draws fluctuates; bulk quantities do not
        assert found == pytest.approx(expected, rel=0.03 if key in ("stable", "top") else 2e-3), key


@pytest.mark.parametrize(
    ("shape", "share"), [((1536, 1536), 0.0396), ((256, 1536), 0.113), ((1536, 8960), 0.0203)]
)
def test_energy_of_the_leading_sixteen(shape: tuple[int, int], share: float) -> None:
    found = spectrum.top_share(nulls.iid_spectra(*shape, 0), k=16)
    assert float(found.mean()) == pytest.approx(share, rel=0.01)


def test_edges_of_the_bulk() -> None:
    """s = .02 at 1024×4096: from .64 to 1.92."""
    S = 0.02 * nulls.iid_spectra(1024, 4096, 0)
    assert float(S[:, 0].mean()) == pytest.approx(1.92, rel=0.01)
    assert float(S[:, -1].mean()) == pytest.approx(0.64, rel=0.01)


@pytest.mark.parametrize("beta", [0.05, 0.25, 0.5, 1.0])
def test_median_of_marchenko_pastur(beta: float) -> None:
    """Gavish & Donoho's threshold over it: ω(β) = λ(β)/√μ ≈ .56β³ − .95β² + 1.82β + 1.43."""
    mu = nulls.marchenko_pastur_median(beta)
    root = math.sqrt(beta**2 + 14 * beta + 1)
    threshold = math.sqrt(2 * (beta + 1) + 8 * beta / (beta + 1 + root))
    omega = 0.56 * beta**3 - 0.95 * beta**2 + 1.82 * beta + 1.43
    assert threshold / math.sqrt(mu) == pytest.approx(omega, abs=0.02)
    M = 800
    S = nulls.iid_spectra(int(beta * M), M, 0)
    assert float((S.square() / M).median(-1).values.mean()) == pytest.approx(mu, rel=0.03)


def test_exact_threshold_of_a_square_matrix() -> None:
    found = 4 / math.sqrt(3) / math.sqrt(nulls.marchenko_pastur_median(1.0))
    assert found == pytest.approx(2.858, abs=5e-4)


@pytest.mark.parametrize("shape", [(200, 200), (100, 400)])
def test_noise_has_signal_rank_zero_or_rarely_one(shape: tuple[int, int]) -> None:
    S = nulls.iid_spectra(*shape, 3)
    median = torch.tensor(nulls.marchenko_pastur_median(min(shape) / max(shape)))
    counts = spectrum.signal_rank(S, torch.zeros(len(S)), median.double(), shape=shape)
    assert float(counts.mean()) < 0.3
    assert float((counts > 1).double().mean()) < 0.1


def test_the_number_of_draws_grows_as_matrices_shrink() -> None:
    assert [len(nulls.iid_spectra(q, q, 0)) for q in (2, 64, 500, 2048)] == [2048, 64, 9, 4]
    assert float(nulls.iid_spectra(1, 7, 0).square().mean()) == pytest.approx(7, rel=0.05)


def test_a_null_depends_on_seed_and_shape_alone() -> None:
    first = nulls.iid_spectra(20, 30, 0).clone()
    iid._iid_spectra.cache_clear()
    for other in ((7, 9), (30, 30), (20, 31)):
        nulls.iid_spectra(*other, 5)
    assert torch.equal(nulls.iid_spectra(20, 30, 0), first)
    assert torch.equal(nulls.iid_spectra(30, 20, 0), first)
    assert not torch.equal(nulls.iid_spectra(20, 30, 1), first)


def test_the_order_of_a_checkpoint_leaves_its_nulls_alone(tmp_path: Path) -> None:
    def nulls_of(order: list[int]) -> dict[str, dict[str, float]]:
        shapes = {0: (20, 30), 1: (12, 12), 2: (30, 20), 3: (20, 30)}
        folder = tmp_path / "-".join(map(str, order))
        sides = {}
        for role, seed in (("base", 0), ("tuned", 50)):
            weights = {
                f"model.layers.{place}.mlp.m{i}.weight": gaussian(*shapes[i], seed=i + seed).float()
                for place, i in enumerate(order)
            }
            sides[role] = save_model(folder / role, weights)
        report = compare(sides["base"], sides["tuned"], options=Options(jobs=2))
        return {one.module: dict(one.nulls) for one in report.layers}

    forward, backward = nulls_of([0, 1, 2, 3]), nulls_of([3, 2])
    assert forward["m3"] == backward["m3"]
    assert forward["m2"] == backward["m2"]
    same = "update.stable_rank", "base.effective_rank", "update.k90", "lift@8"
    assert all(forward["m0"][key] == forward["m3"][key] == forward["m2"][key] for key in same)


# --- entries that stay the same -----------------------------------------------------------------

# Isotropic ΔW on a Gaussian W0, bf16 (docs/methods.md#unchanged-entries).
UNCHANGED = {
    1e-1: 0.018, 2e-2: 0.089, 1e-2: 0.173, 3e-3: 0.473, 1e-3: 0.775, 3e-4: 0.929, 1e-4: 0.977,
}  # fmt: skip


@pytest.mark.parametrize("rho", UNCHANGED)
def test_expected_sparsity_has_the_tabulated_values(rho: float) -> None:
    base = side(gaussian(1024, 512, seed=1).to(torch.bfloat16))
    spread = rho * base.norm / (1024 * 512) ** 0.5
    found = expected_unchanged(base, FORMATS[torch.bfloat16], spread)
    assert found.relative == pytest.approx(UNCHANGED[rho], abs=2e-3)


@pytest.mark.parametrize("rho", [1e-4, 1e-3, 1e-2, 0.3])
@pytest.mark.parametrize("sd", [0.02, 1e-4])
@pytest.mark.parametrize(
    "dtypes", [("bf16", "bf16"), ("fp16", "fp16"), ("bf16", "fp32"), ("fp32", "bf16")]
)
def test_expected_sparsity_is_the_mean_of_simulated_ones(
    dtypes: tuple[str, str], sd: float, rho: float
) -> None:
    """All three rules, for a file of each dtype, within five binomial errors."""
    base = gaussian(400, 500, seed=2, sd=sd).to(DTYPES[dtypes[0]])
    stored = DTYPES[dtypes[1]]
    about = side(base)
    spread = rho * about.norm / base.numel() ** 0.5
    expected = expected_unchanged(about, FORMATS[stored], spread)
    tuned = (base.double() + spread * gaussian(400, 500, seed=3, sd=1.0)).to(stored)
    found = unchanged(base, tuned)
    for rule in ("relative", "absolute", "exact"):
        p, share = getattr(expected, rule), getattr(found, rule)
        assert abs(share - p) <= 5 * math.sqrt(p * (1 - p) / base.numel()) + 1e-5, rule


def test_nothing_added_leaves_everything_expected_to_stay() -> None:
    base = side(gaussian(20, 30, seed=4).to(torch.bfloat16))
    found = expected_unchanged(base, FORMATS[torch.bfloat16], 0.0)
    assert (found.relative, found.absolute, found.exact) == (1, 1, 1)


# --- masks --------------------------------------------------------------------------------------


@cache
def masked_base(n: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Gaussian W0 of sd .02 as it is stored, and its rank-64 part."""
    base = gaussian(n, n, seed=9).to(dtype)
    found = factorise(Operand(base[None]), vectors=64)
    assert found.U is not None
    assert found.Vh is not None
    return base, (found.U[0] * found.S[0, :64]) @ found.Vh[0]


def isotropic_overlaps(n: int, rho: float, dtype: torch.dtype) -> MaskOverlaps:
    base, leading = masked_base(n, dtype)
    tuned = updated(base.double(), gaussian(n, n, seed=10), rho).to(dtype)
    changed = changed_mask(base, tuned)
    fmt, before = FORMATS[dtype], base.double()
    return mask_overlaps(before, leading, changed, base_side=side(before), tuned_format=fmt)


def check_overlaps(n: int, rho: float, principal: float, low: float, tolerance: float) -> None:
    """What an isotropic update shows is the tabulated value, and the matched null."""
    found = isotropic_overlaps(n, rho, torch.bfloat16)
    for key, expected in (("principal", principal), ("low", low)):
        assert found.overlap[key] == pytest.approx(expected, abs=tolerance), key
        assert found.density[key] == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize(
    ("n", "rho", "principal", "low"), [(256, 1e-3, 0.31, 0.960), (512, 1e-3, 0.41, 0.960)]
)
def test_isotropic_mask_overlaps(n: int, rho: float, principal: float, low: float) -> None:
    check_overlaps(n, rho, principal, low, tolerance=0.012)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rho", "principal", "low"),
    [
        (1e-1, 0.499, 0.507),
        (1e-2, 0.491, 0.564),
        (3e-3, 0.471, 0.730),
        (1e-3, 0.454, 0.960),
        (1e-4, 0.449, 1.000),
    ],
)
def test_isotropic_mask_overlaps_of_the_table(rho: float, principal: float, low: float) -> None:
    check_overlaps(1024, rho, principal, low, tolerance=0.01)


@pytest.mark.parametrize("rho", [1e-1, 1e-2, 1e-3, 3e-4])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_matched_null_is_what_an_isotropic_update_shows(dtype: str, rho: float) -> None:
    found = isotropic_overlaps(256, rho, DTYPES[dtype])
    error = 0.5 / math.sqrt(found.changed)
    for key, overlap in found.overlap.items():
        assert found.matched[key] == pytest.approx(overlap, abs=5 * error), key


@pytest.mark.parametrize(("visible", "low"), [(0.927, 0.318), (0.463, 0.537), (0.278, 0.736)])
def test_rounding_alone_gives_the_published_signature(visible: float, low: float) -> None:
    """Matched null at the densities of SFT, OPD and RLVR, d = .3; log2 sd matters a little."""
    changed = torch.rand(256, 256, generator=torch.Generator().manual_seed(11)) < visible
    for sd, tolerance in ((1.0, 0.006), (0.02, 0.025)):
        base = gaussian(256, 256, seed=9, sd=sd).to(torch.bfloat16).double()
        found = mask_overlaps(
            base, None, changed, base_side=side(base), tuned_format=BF16, density=0.3
        )
        assert found.matched["low"] == pytest.approx(low, abs=tolerance)
        assert found.overlap["low"] == pytest.approx(0.3, abs=0.01)  # this mask sees no weights


@pytest.mark.parametrize("density", [0.3, 0.5])
def test_masks_and_overlaps_are_those_of_the_definitions(density: float) -> None:
    """Bottom d of |W0|, top d of |its rank-64 part|, and the second without the first."""
    base, leading = (side.double().numpy() for side in masked_base(256, torch.bfloat16))
    changed = np.random.default_rng(11).random(base.shape) < 0.2 + 4 * np.abs(base)
    low = np.abs(base) <= np.quantile(np.abs(base), density)
    principal = np.abs(leading) >= np.quantile(np.abs(leading), 1 - density)
    masks = {"low": low, "principal": principal, "control": principal & ~low}
    found = mask_overlaps(
        torch.from_numpy(base),
        torch.from_numpy(leading),
        torch.from_numpy(changed),
        base_side=side(torch.from_numpy(base)),
        tuned_format=BF16,
        density=density,
    )
    assert found.changed == changed.sum()
    for key, mask in masks.items():
        assert found.overlap[key] == pytest.approx((mask & changed).sum() / changed.sum())
        assert found.density[key] == pytest.approx(mask.mean())
    # the matched null is one distribution over the entries: its parts add up
    outside = mask_overlaps(
        torch.from_numpy(base),
        torch.from_numpy(leading),
        torch.from_numpy(changed),
        base_side=side(torch.from_numpy(base)),
        tuned_format=BF16,
        density=1.0,
    )
    assert outside.matched["low"] == pytest.approx(1)


def test_the_reported_masks_are_those_of_rank_64_at_one_half() -> None:
    base = gaussian(80, 72, seed=13)
    tuned = updated(base, gaussian(80, 72, seed=14), 3e-3)
    W0, W1 = (side.to(torch.bfloat16) for side in (base, tuned))
    (found,) = rows(W0[None], W1[None], only=[f"mask_overlap_{x}" for x in ("low", "principal")])
    U, S, Vh = np.linalg.svd(W0.double().numpy(), full_matrices=False)
    sizes = {"low": -np.abs(W0.double().numpy()), "principal": np.abs((U * S)[:, :64] @ Vh[:64])}
    changed = changed_mask(W0, W1).numpy()
    for key, size in sizes.items():
        mask = size >= np.quantile(size, 0.5)
        expected = (mask & changed).sum() / changed.sum()
        assert found.values[f"mask_overlap_{key}"] == pytest.approx(expected, abs=1e-9), key


def test_a_mask_that_prefers_large_weights_is_far_from_its_null() -> None:
    base = gaussian(256, 256, seed=9).to(torch.bfloat16).double()
    changed = base.abs() > float(base.abs().median())
    found = mask_overlaps(base, None, changed, base_side=side(base), tuned_format=BF16)
    assert found.overlap["low"] < 0.02
    assert found.matched["low"] > 0.5


def test_masks_of_nothing_are_undefined() -> None:
    base = gaussian(8, 8, seed=9)
    everything = torch.ones(8, 8, dtype=torch.bool)
    for weight, changed in ((base, ~everything), (torch.zeros_like(base), everything)):
        found = mask_overlaps(weight, None, changed, base_side=side(weight), tuned_format=BF16)
        assert math.isnan(found.overlap["low"])
        assert math.isnan(found.matched["low"])


# --- an isotropic update reads as isotropic -----------------------------------------------------

DRAWS = 8
SHAPE = (128, 160)
KS = (2, 8, 16)


@cache
def isotropic() -> list[Measured]:
    m, n = SHAPE
    base = gaussian(m, n, seed=12)
    tuned = [updated(base, gaussian(m, n, seed=200 + draw), 3e-3) for draw in range(DRAWS)]
    stack = base.float().expand(DRAWS, m, n)
    return rows(stack, torch.stack(tuned).float(), ks=KS)


def relative_sd(key: str) -> float:
    """Standard deviation of value over null in one draw of an isotropic update."""
    m, n = SHAPE
    name, _, text = key.partition("@")
    k = int(text) if text.isdigit() else 1
    if name in ("energy_two_sided", "lift"):
        return math.sqrt(2) / k
    if name in ("energy_right", "energy_left"):
        return math.sqrt(2 / (k * (m if name == "energy_right" else n)))
    if name in ("nss", "spectral_share", "spectral_lift"):
        return 1 / math.sqrt(2 * min(m, n))
    if name.startswith("mask_"):
        return 0.01
    if name.startswith("angle_"):
        return 0.5 / k**0.5  # the pair at the cut has most of it
    return 0.05 if key in ("update.stable_rank", "update.top_share@1") else 0.02


RATIOS = [
    "update.stable_rank", "update.participation_ratio", "update.entropy_rank",
    "update.effective_rank", "update.nuclear_ratio", "update.k90", "update.k95", "update.k99",
    "update.top_share@1", "update.top_share@8", "nss", "spectral_share", "spectral_lift",
    "rank_ratio", "stable_rank_ratio", "outside_span", "auc_right", "auc_left",
    *[f"energy_right@{k}" for k in KS], *[f"energy_left@{k}" for k in KS],
    *[f"energy_two_sided@{k}" for k in KS], *[f"lift@{k}" for k in KS],
    "update_sparsity", "mask_lift_low", "mask_lift_principal", "mask_lift_control",
    "mask_overlap_low", "mask_overlap_principal", "mask_overlap_control",
    *[f"angle_left_mean@{k}" for k in KS], *[f"angle_right_mean@{k}" for k in KS],
]  # fmt: skip


@pytest.mark.parametrize("key", RATIOS)
def test_an_isotropic_update_reads_as_isotropic(key: str) -> None:
    ratios = []
    for one in isotropic():
        value = one.values[key]
        assert value is not None
        ratios.append(value / one.nulls[key])
    assert np.mean(ratios) == pytest.approx(1, abs=4 * relative_sd(key) / math.sqrt(DRAWS) + 0.005)


def test_every_null_is_looked_at() -> None:
    """Each id with a null is among RATIOS, or is told apart here with its reason."""
    named = {key.removeprefix("update.").partition("@")[0] for key in RATIOS}
    apart = {
        # bounds and counts rather than means: 0, q, the edges of the bulk
        "signal_rank", "numerical_rank", "condition_number",
        # below one in 1e4 here: an fp32 file rounds back almost nothing
        "update_sparsity_abs", "update_sparsity_exact",
        # of a flat spectrum of the adapter's rank (test_capacity); a full update has none
        "effective_rank_share", "entropy_rank_share", "k90_share", "k99_share", "tail_ratio",
        # of unrelated weights, and not of an isotropic update (test_distance)
        "base_cosine", "base_share", "energy_of_base",
    }  # fmt: skip
    assert named | apart == {one.id.partition("@")[0] for one in METRICS if one.null is not None}


def test_constant_nulls_are_their_formulas() -> None:
    found = isotropic()[0].nulls
    m, n = SHAPE
    assert found["energy_right@8"] == 8 / n
    assert found["energy_left@8"] == 8 / m
    assert found["energy_two_sided@8"] == 64 / (m * n)
    assert found["outside_span"] == pytest.approx(1 - m / n)
    assert found["auc_right"] == pytest.approx((m + 1) / (2 * n))
    assert found["auc_left"] == pytest.approx((m + 1) / (2 * m))
    assert found["update.condition_number"] == pytest.approx(
        (1 + (m / n) ** 0.5) / (1 - (m / n) ** 0.5)
    )
    assert found["update.numerical_rank"] == m
    assert found["update.signal_rank"] == 0
    assert found["lift@8"] == 1
