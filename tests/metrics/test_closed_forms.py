"""Numbers that are known in closed form: by the functions, and through files."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from scipy.linalg import hadamard
from torch import Tensor

from geoscope import LayerRecord, Options, Status, compare
from geoscope.linalg import principal_angles
from geoscope.linalg.changes import side
from geoscope.metrics import alignment, collapse, nulls, size, spectrum
from geoscope.metrics.metric import ROLES
from tests.helpers.matrices import gaussian, orthonormal, save_model, with_spectrum
from tests.helpers.measuring import numbers, row

DEGREE = math.pi / 180
E = 1e-12


def fp64(*values: Any) -> Tensor:
    return torch.tensor(values[0] if len(values) == 1 else values, dtype=torch.float64)


# --- ranks of a spectrum ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("quantity", "expected"),
    [
        (spectrum.effective_rank, 2**1.5),
        (spectrum.entropy_rank, 2.381101577952299),  # exp(-(⅔ ln ⅔ + ⅓ ln ⅙))
        (spectrum.participation_ratio, 2.0),
        (spectrum.stable_rank, 1.5),
        (spectrum.spectral_norm, 2.0),
        (lambda S: 3 * spectrum.nuclear_ratio(S) ** 2, 8 / 3),  # (Σσ)²/Σσ²
        (lambda S: spectrum.top_share(S, k=1), 2 / 3),
        (lambda S: spectrum.top_share(S, k=2), 5 / 6),
        (lambda S: spectrum.top_share(S, k=3), 1.0),
        (lambda S: spectrum.energy_rank(S, level=0.9), 3),
        (lambda S: spectrum.energy_rank(S, level=5 / 6), 2),
        (lambda S: spectrum.condition_number(S, fp64(2**-7), shape=(3, 4)), 2.0),
        (lambda S: spectrum.numerical_rank(S, fp64(2**-7), shape=(3, 4)), 3),
        (lambda S: alignment.gap(S, 0 * S[..., 0], k=1, shape=(3, 4)), 0.5),
        (lambda S: alignment.gap(S, 0 * S[..., 0], k=2, shape=(3, 4)), 0.0),
        (
            lambda S: alignment.gap(S, 0 * S[..., 0], k=3, shape=(3, 4)),
            1.0,
        ),  # nothing comes after the last
    ],
)
def test_spectrum_two_one_one(quantity: Any, expected: float) -> None:
    S = fp64(2, 1, 1)
    assert float(quantity(S)) == pytest.approx(expected, rel=1e-14)
    stacked = quantity(torch.stack([fp64(1, 1, 1), S]))
    assert float(stacked[1]) == pytest.approx(expected, rel=1e-14)


RANKS = (
    spectrum.stable_rank,
    spectrum.participation_ratio,
    spectrum.entropy_rank,
    spectrum.effective_rank,
)


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("n", [1, 2, 7, 512])
def test_a_flat_spectrum_has_every_rank_n_and_one_value_every_rank_1(rank: Any, n: int) -> None:
    assert float(rank(torch.ones(n, dtype=torch.float64))) == pytest.approx(n, rel=E)
    one = torch.zeros(n, dtype=torch.float64)
    one[0] = 0.3
    assert float(rank(one)) == pytest.approx(1, rel=E)


@pytest.mark.parametrize(
    ("n", "k90", "k95", "k99"), [(10, 9, 10, 10), (100, 90, 95, 99), (1, 1, 1, 1)]
)
def test_levels_of_a_flat_spectrum(n: int, k90: int, k95: int, k99: int) -> None:
    S = torch.full((n,), 0.1, dtype=torch.float64)
    found = [float(spectrum.energy_rank(S, level=level)) for level in (0.90, 0.95, 0.99)]
    assert found == [k90, k95, k99]


def test_zero_spectra_are_undefined_and_not_one() -> None:
    S = torch.zeros(5, dtype=torch.float64)
    for rank in RANKS:
        assert math.isnan(float(rank(S)))
    assert math.isnan(float(spectrum.nuclear_ratio(S)))
    assert math.isnan(float(spectrum.top_share(S, k=1)))
    assert math.isnan(float(spectrum.energy_rank(S, level=0.9)))
    assert math.isnan(float(collapse.nss(S, S)))
    assert float(spectrum.spectral_norm(S)) == 0


@pytest.mark.parametrize(
    ("shape", "eps", "rank"),
    [((4, 4), 2.0**-7, 3), ((4, 100), 2.0**-7, 1), ((4, 8), 2.0**-7, 2), ((4, 4), 2.0**-23, 4)],
)
def test_numerical_rank_counts_above_the_longer_side_times_eps(
    shape: tuple[int, int], eps: float, rank: int
) -> None:
    S = fp64(1.0, 0.07, 0.05, 0.01)
    assert float(spectrum.numerical_rank(S, fp64(eps), shape=shape)) == rank


@pytest.mark.parametrize(
    ("dtype", "side", "defined"),
    [("bf16", 127, True), ("bf16", 128, False), ("fp16", 1023, True), ("fp16", 1024, False)],
)
def test_numerical_rank_does_not_apply_where_its_tolerance_exceeds_everything(
    dtype: str, side: int, defined: bool
) -> None:
    eps = fp64({"bf16": 2.0**-7, "fp16": 2.0**-10}[dtype])
    rank = float(spectrum.numerical_rank(fp64(1.0, 1.0), eps, shape=(2, side)))
    assert math.isnan(rank) != defined


def test_condition_number_needs_a_resolved_tail() -> None:
    eps = fp64(2.0**-7)
    assert float(spectrum.condition_number(fp64(1, 0.1), eps, shape=(2, 3))) == pytest.approx(10)
    assert math.isnan(float(spectrum.condition_number(fp64(1, 0.01), eps, shape=(2, 3))))


# --- pairs, through files -----------------------------------------------------------------------

BASE = torch.diag(fp64(4, 3, 2, 1))


def rotation(degrees: float, plane: tuple[int, int], n: int = 4) -> Tensor:
    R = torch.eye(n, dtype=torch.float64)
    i, j = plane
    c, s = math.cos(degrees * DEGREE), math.sin(degrees * DEGREE)
    R[i, i], R[i, j], R[j, i], R[j, j] = c, -s, s, c
    return R


def double_count(base: Tensor, r: int) -> Tensor:
    """base plus its own leading r triplets, as when a PiSSA adapter is added to it."""
    U, S, Vh = torch.linalg.svd(base, full_matrices=False)
    return base + (U[:, :r] * S[:r]) @ Vh[:r]


PISSA = gaussian(48, 64, seed=3)
PAIRS = {
    "larger_first": (BASE, torch.diag(fp64(5, 3, 2, 1))),
    "larger_last": (BASE, torch.diag(fp64(4, 3, 2, 1.5))),
    "rotated": (BASE, rotation(30, (0, 3)) @ BASE),
    "swapped": (BASE, torch.diag(fp64(2.9, 3, 2, 1))),
    "same": (BASE, BASE.clone()),
    "identity": (torch.eye(6, dtype=torch.float64), 2 * torch.eye(6, dtype=torch.float64)),
    "rank_one": (
        torch.outer(fp64(1, 2, 2), fp64(3, 4)),
        torch.outer(fp64(1, 2, 2), fp64(4, 3)),
    ),
    "pissa": (PISSA, double_count(PISSA, 6)),
    "two_one_one": (
        with_spectrum(5, 3, fp64(2, 1, 1), seed=4),
        3 * with_spectrum(5, 3, fp64(2, 1, 1), seed=4),
    ),
    # ΔW = (e3 e1ᵀ + 2 e2 e4ᵀ)/1000 on a diagonal base: every captured energy can be counted
    "entries": (BASE, BASE + 1e-3 * fp64(
        [[0, 0, 0, 0], [0, 0, 0, 2], [1, 0, 0, 0], [0, 0, 0, 0]]
    )),
}  # fmt: skip


@pytest.fixture(scope="module")
def layers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, LayerRecord]:
    """The rows of one fp64 checkpoint that holds all pairs."""
    root = tmp_path_factory.mktemp("closed")
    names = {key: f"model.layers.{i}.mlp.{key}.weight" for i, key in enumerate(PAIRS)}
    base, tuned = (
        save_model(root / name, {names[key]: pair[i].clone() for key, pair in PAIRS.items()})
        for i, name in enumerate(("base", "tuned"))
    )
    report = compare(base, tuned, options=Options(ks=(1, 2, 3, 4, 6), curves=True))
    return {one.module: one for one in report.layers}


def value(found: LayerRecord, key: str) -> float:
    """The number, or what stands behind a BELOW_RESOLUTION."""
    number = found.values[key]
    number = found.raw[key] if number is None else number
    return float(number)


@pytest.mark.parametrize(
    ("pair", "expected"),
    [
        ("larger_first", {"relative_update": 1 / 30**0.5, "nss": 1 / 30**0.5}),
        ("larger_first", {"spectral_share": 1, "update.stable_rank": 1, "lift@1": 16}),
        ("larger_first", {"energy_two_sided@1": 1, "versus_base@1": 30 / 16}),
        ("larger_last", {"nss": 0.5 / 30**0.5, "relative_update": 0.5 / 30**0.5}),
        ("larger_last", {"energy_two_sided@3": 0, "energy_two_sided@4": 1, "lift@3": 0}),
        ("rotated", {"relative_update": 0.38966380, "nss": 0, "spectral_share": 0}),
        ("rotated", {f"energy_right@{k}": 0.941176 for k in (1, 2, 3)}),
        ("rotated", {f"energy_left@{k}": 0.117930 for k in (1, 2, 3)}),
        ("rotated", {"energy_right@4": 1, "energy_left@4": 1, "energy_two_sided@1": 0.0630469}),
        ("rotated", {"angle_left_mean@1": 30 * DEGREE, "angle_left_max@2": 30 * DEGREE}),
        ("rotated", {"angle_left_mean@2": 15 * DEGREE, "angle_left_mean@3": 10 * DEGREE}),
        ("rotated", {f"angle_right_max@{k}": 0 for k in (1, 2, 3)}),
        ("rotated", {"rank_ratio": 1, "stable_rank_ratio": 1, "intruders": 0}),
        ("swapped", {"angle_left_max@1": 90 * DEGREE, "angle_right_mean@1": 90 * DEGREE}),
        ("swapped", {"angle_left_max@2": 0, "angle_right_max@2": 0}),
        ("swapped", {"gap@1": 0.25, "gap@2": 1 / 3, "gap@4": 1}),
        ("identity", {f"{role}.stable_rank": 6 for role in ROLES}),
        ("identity", {f"{role}.effective_rank": 6 for role in ROLES}),
        ("identity", {"base.k90": 6, "base.nuclear_ratio": 1, "nss": 1, "rank_ratio": 1}),
        ("rank_one", {f"{role}.effective_rank": 1 for role in ROLES}),
        ("rank_one", {f"{role}.entropy_rank": 1 for role in ROLES}),
        ("rank_one", {f"{role}.stable_rank": 1 for role in ROLES}),
        ("rank_one", {f"{role}.participation_ratio": 1 for role in ROLES}),
        ("rank_one", {f"{role}.k99": 1 for role in ROLES}),
        ("rank_one", {"base.spectral_norm": 15, "base.frobenius_norm": 15, "nss": 0}),
        # right vectors (3, 4)/5 and (4, 3)/5, one left vector
        ("rank_one", {"angle_right_mean@1": math.acos(24 / 25), "angle_left_mean@1": 0}),
        ("two_one_one", {"base.effective_rank": 2**1.5, "update.entropy_rank": 2.3811015780}),
        ("two_one_one", {"tuned.participation_ratio": 2, "update.stable_rank": 1.5}),
        ("two_one_one", {"base.condition_number": 2, "base.top_share@1": 2 / 3}),
        ("entries", {"energy_left@1": 0, "energy_left@2": 0.8, "energy_left@3": 1}),
        ("entries", {"energy_right@1": 0.2, "energy_right@3": 0.2, "energy_right@4": 1}),
        ("entries", {"energy_two_sided@3": 0.2, "energy_two_sided@2": 0, "lift@3": 0.2 * 16 / 9}),
        ("entries", {"auc_right": (3 * 0.2 + 1) / 4, "auc_left": (0 + 0.8 + 1 + 1) / 4}),
        ("entries", {"update.stable_rank": 1.25, "update_sparsity_exact": 14 / 16}),
    ],
)  # fmt: skip
def test_known_numbers(
    layers: dict[str, LayerRecord], pair: str, expected: dict[str, float]
) -> None:
    for key, number in expected.items():
        tolerance = 1e-8 if "angle" in key else 1e-6 if 0 < number < 1 else 1e-9
        assert value(layers[pair], key) == pytest.approx(number, abs=tolerance), key


def test_an_update_across_a_gap_turns_its_planes_by_first_order(
    layers: dict[str, LayerRecord],
) -> None:
    """1e-3·e3e1ᵀ on σ = (4, 3, 2, 1): the left plane (1, 3) turns by δσ1/(σ1² − σ3²)."""
    found = layers["entries"]
    assert value(found, "angle_left_mean@1") == pytest.approx(1e-3 * 4 / 12, rel=1e-3)
    assert value(found, "angle_right_mean@1") == pytest.approx(1e-3 * 2 / 12, rel=1e-3)


def test_pissa_counted_twice(layers: dict[str, LayerRecord]) -> None:
    found = layers["pissa"]
    share = float(spectrum.top_share(torch.linalg.svdvals(PISSA), k=6))
    assert value(found, "nss") == pytest.approx(share**0.5, rel=1e-10)
    assert value(found, "relative_update") == pytest.approx(share**0.5, rel=1e-10)
    assert value(found, "spectral_share") == pytest.approx(1, rel=1e-10)
    for key in ("energy_two_sided@6", "energy_left@6", "energy_right@6"):
        assert value(found, key) == pytest.approx(1, rel=1e-10)
    assert value(found, "versus_base@6") == pytest.approx(1 / share, rel=1e-10)
    assert found.verdict is not None
    assert found.verdict["code"] == "INIT_MISMATCH"


def test_nothing_changed(layers: dict[str, LayerRecord]) -> None:
    found = layers["same"]
    for key in ("relative_update", "nss", "angle_left_max@2", "angle_right_mean@1"):
        assert (found.values[key], found.status_of(key)) == (0, Status.OK)
    for key in ("update_sparsity", "update_sparsity_abs", "update_sparsity_exact"):
        assert found.values[key] == 1
    for key in ("update.stable_rank", "update.k90", "lift@2", "spectral_share", "energy_left@1"):
        assert (found.values[key], found.status_of(key)) == (None, Status.ZERO_UPDATE)
    assert found.verdict is not None
    assert found.verdict["code"] == "NO_UPDATE"


# --- directions that are new --------------------------------------------------------------------


def intruding(base: Tensor, tuned: Tensor) -> list[float]:
    ids = ("intruders", "intruder_energy", "intruders_right", "intruder_energy_right")
    return numbers(row(base, tuned, only=ids), *ids)


@pytest.mark.parametrize(("degrees", "count"), [(30, 0), (59.9, 0), (60.1, 1), (90, 1)])
def test_an_intruder_stands_more_than_60_degrees_from_every_base_vector(
    degrees: float, count: int
) -> None:
    """The leading left vector turns into the part of the space that the base does not use."""
    base = torch.zeros(20, 6, dtype=torch.float64)
    base[:6] = torch.diag(fp64(9, 5, 4, 3, 2, 1))
    share = 81 / (81 + 25 + 16 + 9 + 4 + 1)
    left, energy, right, energy_right = intruding(base, rotation(degrees, (0, 19), 20) @ base)
    assert (left, right, energy_right) == (count, 0, 0)
    assert energy == pytest.approx(count * share)
    turned = intruding(base.T.contiguous(), (rotation(degrees, (0, 19), 20) @ base).T.contiguous())
    assert turned == pytest.approx([0, 0, count, count * share])


def test_a_matrix_of_zeros_has_no_direction_that_could_intrude() -> None:
    ids = ("intruders", "intruder_energy", "intruders_right", "intruder_energy_right")
    base, zeros = torch.diag(fp64(9, 5, 4, 3, 2, 1)), torch.zeros(6, 6, dtype=torch.float64)
    for pair in ((base, zeros), (zeros, base)):
        found = row(*pair, only=ids)
        assert [found.values[key] for key in ids] == [None] * 4
        assert {found.status[key] for key in ids} == {Status.NOT_APPLICABLE}


def test_a_vector_spread_over_four_base_vectors_scores_one_half() -> None:
    """c = ½ is not below ½; over five it is."""
    base = torch.diag(fp64(9, 5, 4, 3, 2, 1))
    for spread, count in ((4, 0), (5, 1)):
        Q = torch.eye(6, dtype=torch.float64)
        v = torch.zeros(6, dtype=torch.float64)
        v[:spread] = spread**-0.5
        w = Q[0] - v
        H = Q - 2 * torch.outer(w, w) / (w @ w)  # the mirror image of e1 is v
        scores = (H @ base).T  # the leading left vector of H·base is v
        assert float(torch.linalg.vector_norm(scores[0])) == pytest.approx(9)
        left, *_ = intruding(base, H @ base)
        # the mirror spreads e2…e_spread too, each with a large part of its own left
        assert left >= count
        assert (left == 0) == (count == 0)


def test_only_ten_directions_are_asked() -> None:
    n = 24
    base = torch.diag(torch.linspace(2, 1, n, dtype=torch.float64))
    wide = torch.cat([base, torch.zeros(n, n, dtype=torch.float64)])
    new = torch.cat([torch.zeros(n, n, dtype=torch.float64), base])
    assert intruding(wide, new) == [10, 1.0, 0, 0.0]


# --- angles, size, storage ----------------------------------------------------------------------


@pytest.mark.parametrize("exponent", [1, 2, 3, 4, 5, 6])
@pytest.mark.parametrize("k", [1, 5])
def test_bases_at_an_exact_angle(exponent: int, k: int) -> None:
    theta = 10.0**-exponent
    Q = orthonormal(60, 2 * k, seed=exponent)
    turned = math.cos(theta) * Q[:, :k] + math.sin(theta) * Q[:, k:]
    found = principal_angles(Q[:, :k], turned)
    assert float((found - theta).abs().max()) < 1e-9


def test_angles_of_the_scipy_examples() -> None:
    import numpy as np

    A = torch.from_numpy(np.random.RandomState(0).randn(4, 3))
    found = principal_angles(torch.linalg.qr(A[:, :2]).Q, torch.linalg.qr(A[:, [2]]).Q)
    assert float(found) / DEGREE == pytest.approx(55.83244988, abs=1e-8)
    H = torch.tensor(hadamard(4), dtype=torch.float64)
    halves = principal_angles(torch.linalg.qr(H[:, :2]).Q, torch.linalg.qr(H[:, 2:]).Q)
    assert (halves / DEGREE).tolist() == pytest.approx([90, 90])


def test_an_exactly_degenerate_pair_has_no_angle_as_a_subspace() -> None:
    """σ = (2, 2, 1): any two vectors of the first plane may be returned; the plane stands."""
    base = with_spectrum(9, 7, fp64(2, 2, 1), seed=8)
    found = row(base, base + 1e-9 * gaussian(9, 7, seed=9, sd=1.0), ks=(2,))
    key = "angle_left_max@2"
    angle = found.values[key] if found.values[key] is not None else found.raw[key]
    assert float(angle or 0) < 1e-8
    assert numbers(found, "gap@2") == pytest.approx([0.5])


@pytest.mark.parametrize(
    ("dtype", "expected"), [(torch.bfloat16, 1.6617e-3), (torch.float16, 2.0771e-4)]
)
def test_rounding_noise_of_normal_numbers(dtype: torch.dtype, expected: float) -> None:
    """What rounding really does, and what is foretold from the stored numbers alone.

    The latter is .2 % high in bf16: what rounds up to a power of two shows the wider spacing there.
    """
    values = gaussian(2000, 1000, seed=10, sd=1.0)
    narrow = values.to(dtype)
    real = float((narrow.double() - values).norm() / values.norm())
    assert real == pytest.approx(expected, rel=1e-3)
    found = side(narrow)
    assert found.noise / found.norm == pytest.approx(expected, rel=3e-3)


def test_size_of_a_zero_base_is_undefined() -> None:
    assert math.isnan(float(size.relative_update(fp64(1.0), fp64(0.0))))
    assert float(size.relative_update(fp64(0.0), fp64(2.0))) == 0
    assert math.isnan(float(size.precision_ratio(fp64(1.0), fp64(0.0))))
    assert float(size.precision_ratio(fp64(1.0), fp64(4.0))) == 0.25


@pytest.mark.parametrize(
    ("m", "n", "edge", "condition"), [(1024, 4096, 1.92, 3.0), (4096, 4096, 2.56, None)]
)
def test_edges_of_marchenko_pastur(m: int, n: int, edge: float, condition: float | None) -> None:
    S = torch.zeros(min(m, n), dtype=torch.float64)
    noise = fp64(0.02 * (m * n) ** 0.5)
    median = fp64(nulls.marchenko_pastur_median(m / n))
    found = float(spectrum.noise_edge(S, noise, median, shape=(m, n)))
    assert found == pytest.approx(edge, rel=E)
    ratio = float(nulls.condition_number(shape=(m, n)))
    assert math.isnan(ratio) if condition is None else ratio == pytest.approx(condition)


def test_a_signal_counts_above_the_edge_of_its_own_bulk() -> None:
    """Three planted directions on iid noise; their strength decides, whatever the scale."""
    noise = gaussian(120, 200, seed=11, sd=1.0)
    edge = 120**0.5 + 200**0.5
    for scale in (1e-6, 1.0):
        for strength, count in ((2.0, 3), (0.3, 0)):
            signal = with_spectrum(120, 200, fp64([strength * edge] * 3), seed=12)
            base = torch.zeros(120, 200, dtype=torch.float64) + 1
            found = row(base, base + scale * (noise + signal), only=["update.signal_rank"])
            assert numbers(found, "update.signal_rank") == [count]


def test_nss_and_shares_of_given_spectra() -> None:
    base, tuned = fp64(4, 3, 2, 1), fp64(4, 3, 2, 1.5)
    assert float(collapse.nss(base, tuned)) == pytest.approx(0.09128709, abs=1e-8)
    assert float(collapse.spectral_share(base, tuned, fp64(1.0))) == pytest.approx(0.5)
    lifted = collapse.spectral_lift(base, tuned, fp64(1.0), shape=(4, 16))
    assert float(lifted) == pytest.approx(2.0)
    norms = 30**0.5, 31.25**0.5
    ratio = collapse.stable_rank_ratio(base[:1], fp64(norms[0]), tuned[:1], fp64(norms[1]))
    assert float(ratio) == pytest.approx(31.25 / 30)
    flat = torch.ones(4, dtype=torch.float64)
    assert float(collapse.rank_ratio(flat, fp64(1, 1, 0, 0))) == pytest.approx(0.5)
    assert math.isnan(float(collapse.spectral_share(base, base, fp64(0.0))))
