"""Can the oracle be trusted? Closed forms, published reference numbers and textbook inequalities.

Nothing here touches the package: the oracle is judged by answers known on paper. Where a number was
simulated, the tolerance says how far draws of that size spread.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.linalg import hadamard

from tests.helpers.oracle import (
    INTRUDERS,
    NULL_STATUSES,
    ROLES,
    SIMULATED,
    OracleRow,
    counted_storage,
    ids,
    mp_median,
    oracle_row,
    round_to,
    signal_edge,
    simulated_turns,
    ulp,
)

EXACT = 1e-12
DEGREE = math.pi / 180


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def orthogonal(m: int, k: int, seed: int) -> np.ndarray:
    """k orthonormal columns in R^m."""
    Q, _ = np.linalg.qr(rng(seed).standard_normal((m, k)))
    return Q


def gaussian_pair(shape, rho, storage, *, update=None, seed=0):
    """Gaussian W0 of sd .02 and W0 + update scaled to ‖update‖ = ρ‖W0‖, both as stored."""
    base = round_to(0.02 * rng(seed).standard_normal(shape), storage)
    update = rng(seed + 1).standard_normal(shape) if update is None else update(base)
    update = update * (rho * np.linalg.norm(base) / np.linalg.norm(update))
    return base, round_to(base + update, storage)


def random_low_rank(base: np.ndarray) -> np.ndarray:
    m, n = base.shape
    return rng(7).standard_normal((m, 16)) @ rng(8).standard_normal((16, n))


def read(row: OracleRow, key: str) -> float:
    """The number of an id, resolved or not."""
    return row.raw[key] if key in row.raw else resolved(row, key)


def resolved(row: OracleRow, key: str) -> float:
    """The number of an id, which must not be null."""
    number = row.values[key]
    assert number is not None, key
    return number


def assert_numbers(row, expected, tolerance=EXACT):
    for key, number in expected.items():
        assert read(row, key) == pytest.approx(number, abs=tolerance, rel=tolerance), key


def assert_null(row, keys, status):
    for key in keys:
        assert row.values[key] is None, key
        assert row.status[key] == status, key


# --- storage formats


@pytest.mark.parametrize(("storage", "dtype"), [("fp16", np.float16), ("fp32", np.float32)])
def test_rounding_and_ulp_are_those_of_numpy(storage, dtype):
    x = rng().standard_normal(20000) * 10.0 ** rng(1).integers(-9, 4, 20000)
    x = np.concatenate([x, [0.0, 65504.0, 65519.0, 65520.0, -7e4, 6e-8, 2.9e-8, 2.0**-14]])
    with np.errstate(over="ignore"):
        stored = x.astype(dtype)
    assert np.array_equal(round_to(x, storage), stored.astype(np.float64))
    stored = stored[np.abs(stored) < 65504]  # np.spacing of the largest fp16 number is inf
    assert np.array_equal(
        ulp(stored.astype(np.float64), storage), np.abs(np.spacing(np.abs(stored)))
    )


def test_bf16_is_the_upper_half_of_fp32():
    x = (rng().standard_normal(20000) * 10.0 ** rng(1).integers(-39, 30, 20000)).astype(np.float32)
    x = np.concatenate([x, np.array([1.00390625, 1.01171875, 0.0, 3.4e38], np.float32)])
    bits = x.view(np.uint32).astype(np.uint64)
    nearest_even = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
    expected = nearest_even.astype(np.uint32).view(np.float32).astype(np.float64)
    assert np.array_equal(round_to(x.astype(np.float64), "bf16"), expected)


@pytest.mark.parametrize(
    ("storage", "at_one", "at_zero"),
    [("bf16", 2**-7, 2**-133), ("fp16", 2**-10, 2**-24), ("fp32", 2**-23, 2**-149)],
)
def test_ulp_at_one_and_at_zero(storage, at_one, at_zero):
    w = np.array([1.0, -1.0, 1.5, 0.75, 0.0, at_zero])
    expected = np.array([at_one, at_one, at_one, at_one / 2, at_zero, at_zero])
    assert np.array_equal(ulp(w, storage), expected)


@pytest.mark.parametrize(("storage", "expected"), [("bf16", 1.6617e-3), ("fp16", 2.0771e-4)])
def test_rounding_noise_of_a_gaussian_is_the_published_one(storage, expected):
    w = rng().standard_normal((700, 700))
    stored = round_to(w, storage)
    from_ulp = np.sqrt(np.sum(ulp(stored, storage) ** 2) / 12) / np.linalg.norm(w)
    measured = np.linalg.norm(stored - w) / np.linalg.norm(w)
    assert from_ulp == pytest.approx(expected, rel=4e-3)
    assert measured == pytest.approx(expected, rel=4e-3)


def test_fp32_of_bf16_numbers_counts_as_bf16_from_1024_entries():
    w = round_to(rng().standard_normal((32, 32)), "bf16")
    assert counted_storage(w, "fp32") == "bf16"
    assert counted_storage(w[:, :31], "fp32") == "fp32"
    assert counted_storage(w, "fp64") == "fp64"
    w[3, 3] = round_to(1 + 2**-12, "fp32")
    assert counted_storage(w, "fp32") == "fp32"


def test_upcast_bf16_pair_reads_as_the_bf16_pair():
    base, tuned = gaussian_pair((32, 48), 1e-2, "bf16")
    assert oracle_row(base, tuned, storage="fp32") == oracle_row(base, tuned, storage="bf16")
    other = oracle_row(base, tuned, storage="fp64")
    assert resolved(other, "precision_ratio") < 1e-10


def test_values_that_the_storage_cannot_hold_are_refused():
    with pytest.raises(ValueError, match="tuned holds values that bf16 cannot store"):
        oracle_row(np.eye(2), np.eye(2) * 1.001, storage="bf16", base_storage="fp64")


# --- size


def test_precision_ratio_and_size_of_a_small_pair():
    base = np.array([[1.0, 2.0], [0.0, -4.0]])
    tuned = np.array([[1.0, 2.0], [0.0, -4.0625]])
    row = oracle_row(base, tuned, storage="bf16")
    # ulps 2^-7, 2^-6, 2^-133 and 2^-5; the last entry moves by two of its own
    noise = math.sqrt((2**-14 + 2**-12 + 2**-10) / 12)
    expected = {
        "relative_update": 0.0625 / math.sqrt(21),
        "precision_ratio": noise / 0.0625,
        "update_sparsity": 0.75,
        "update_sparsity_abs": 0.75,
        "update_sparsity_exact": 0.75,
    }
    assert_numbers(row, expected)


def test_the_three_sparsities_count_different_things():
    base = np.array([[1.0, 1e-4, 0.0, 1.0, 1e-3], [2.0, 3.0, 4.0, 5.0, 6.0]])
    tuned = base + np.array([[1e-4, 8e-6, 0.0, 0.01, 5e-5], [0.0, 0.0, 0.0, 0.0, 0.0]])
    row = oracle_row(base, tuned, storage="fp64")
    # 1e-4 on 1 vanishes in bf16; 8e-6 on 1e-4 does not, but is below 1e-5; 5e-5 on 1e-3 is not
    assert resolved(row, "update_sparsity") == 7 / 10
    assert resolved(row, "update_sparsity_abs") == 8 / 10
    assert resolved(row, "update_sparsity_exact") == 6 / 10


# --- spectrum


def test_spectrum_two_one_one():
    W = orthogonal(5, 3, 1) @ np.diag([2.0, 1.0, 1.0]) @ orthogonal(3, 3, 2).T
    row = oracle_row(W, 1.5 * W, storage="fp64", ks=(1,))
    for role, scale in (("base", 1), ("tuned", 1.5), ("update", 0.5)):
        expected = {
            "frobenius_norm": scale * math.sqrt(6),
            "spectral_norm": scale * 2,
            "effective_rank": 2**1.5,
            "participation_ratio": 2,
            "stable_rank": 1.5,
            "nuclear_ratio": math.sqrt(2.6666666666666667 / 3),
            "condition_number": 2,
            "numerical_rank": 3,
            "k90": 3,
            "k95": 3,
            "k99": 3,
            "top_share@1": 2 / 3,
        }
        assert_numbers(row, {f"{role}.{name}": x for name, x in expected.items()})
        assert_numbers(row, {f"{role}.entropy_rank": 2.381102}, 5e-7)


def test_level_reached_exactly_counts():
    S = np.sqrt([90.0, 5.0, 4.0, 1.0])
    row = oracle_row(np.diag(S), 2 * np.diag(S), storage="fp64", ks=(1,))
    assert [resolved(row, f"base.k{level}") for level in (90, 95, 99)] == [1, 2, 3]


def test_identity_has_every_rank_n_and_rank_one_has_every_rank_one():
    u, v = orthogonal(20, 1, 3), orthogonal(20, 1, 4)
    row = oracle_row(np.eye(20), np.eye(20) + 3 * u @ v.T, storage="fp64", ks=(1,))
    ranks = ("stable_rank", "participation_ratio", "entropy_rank", "effective_rank")
    assert_numbers(row, {f"base.{name}": 20 for name in (*ranks, "numerical_rank", "k99")})
    assert_numbers(row, {"base.k90": 18, "base.k95": 19, "base.nuclear_ratio": 1})
    assert_numbers(row, {"base.condition_number": 1, "base.top_share@8": 0.4})
    assert_numbers(row, {f"update.{name}": 1 for name in ranks}, 1e-9)
    assert_numbers(row, {"update.k99": 1, "update.numerical_rank": 1, "update.top_share@1": 1})
    assert_null(row, ["update.condition_number"], "NOT_APPLICABLE")


@pytest.mark.parametrize(
    ("width", "ranks"),  # tolerances width·2^-7, width·2^-10 and width·2^-23, to be exceeded
    [(4, {"bf16": 2, "fp16": 3, "fp32": 4}), (16, {"bf16": 1, "fp16": 2, "fp32": 4})],
)
def test_numerical_rank_uses_the_longer_side_and_the_eps_of_the_storage(width, ranks):
    S = np.zeros((4, width))
    np.fill_diagonal(S, [1.0, 2.0**-4, 2.0**-6, 2.0**-9])
    for storage, rank in ranks.items():
        row = oracle_row(S, 2 * S, storage=storage, ks=(1,))
        assert resolved(row, "base.numerical_rank") == rank, storage
        assert (row.values["base.condition_number"] is None) == (rank < 4)
    mixed = oracle_row(S, 2 * S, storage="bf16", base_storage="fp32", ks=(1,))
    assert resolved(mixed, "base.numerical_rank") == 4
    assert resolved(mixed, "tuned.numerical_rank") == ranks["bf16"]
    assert read(mixed, "update.numerical_rank") == ranks["bf16"]
    assert mixed.nulls["update.numerical_rank"] == 4


def test_condition_number_of_an_iid_matrix():
    row = oracle_row(*gaussian_pair((100, 400), 0.1, "fp64"), storage="fp64")
    assert row.nulls["base.condition_number"] == pytest.approx(3.0, rel=1e-12)
    assert resolved(row, "base.condition_number") == pytest.approx(3.0, rel=0.1)
    square = oracle_row(*gaussian_pair((20, 20), 0.1, "fp64"), storage="fp64")
    assert "base.condition_number" not in square.nulls


@pytest.mark.parametrize("shape", [(40, 40), (24, 60), (60, 24)])
def test_renyi_chain(shape):
    row = oracle_row(*gaussian_pair(shape, 0.1, "fp64"), storage="fp64")
    for role in ROLES:
        names = ("stable_rank", "participation_ratio", "entropy_rank", "effective_rank")
        chain = [resolved(row, f"{role}.{name}") for name in names]
        assert 1 < chain[0] < chain[1] < chain[2] < chain[3] < min(shape)


def test_marchenko_pastur_median():
    # optimal hard threshold of Gavish and Donoho, ω(β) = λ*(β)/√μ_β: ω(1) = 2.858
    assert 4 / math.sqrt(3) / math.sqrt(mp_median(1.0)) == pytest.approx(2.858, abs=5e-4)
    for m, n in ((500, 500), (250, 1000)):
        S = np.linalg.svd(rng(m).standard_normal((m, n)), compute_uv=False)
        assert mp_median(m / n) == pytest.approx(np.median(S**2) / n, rel=1e-2)
    assert mp_median(1e-6) == pytest.approx(1.0, abs=1e-3)  # q ≪ M: all singular values equal


def test_signal_edge_of_marchenko_pastur():
    # sd .02 gives 1.92 at 1024 by 4096 and 2.56 at 4096 by 4096, here as rounding noise
    silent = np.full(1024, 1e-9)
    assert signal_edge(silent, 1024, 4096, 0.02 * 2**11) == pytest.approx(1.92, rel=EXACT)
    assert signal_edge(silent, 4096, 4096, 0.02 * 2**12) == pytest.approx(2.56, rel=EXACT)
    # and here as the median of an iid bulk
    for shape in ((300, 300), (150, 600)):
        S = np.linalg.svd(0.02 * rng(2).standard_normal(shape), compute_uv=False)
        edge = 0.02 * (math.sqrt(shape[0]) + math.sqrt(shape[1]))
        assert signal_edge(S, *shape, 0.0) == pytest.approx(edge, rel=0.02)
        assert S[0] == pytest.approx(edge, rel=0.04)


def test_signal_rank_sees_a_planted_signal_above_the_edge_only():
    m, n, s = 200, 300, 0.02
    edge = s * (math.sqrt(m) + math.sqrt(n))
    noise = s * rng(5).standard_normal((m, n))
    U, V = orthogonal(m, 3, 6), orthogonal(n, 3, 7)
    base = rng(8).standard_normal((m, n))
    for size, rank in ((1.6 * edge, 3), (0.2 * edge, 0)):
        row = oracle_row(base, base + noise + size * U @ V.T, storage="fp64", ks=(1,))
        assert resolved(row, "update.signal_rank") == rank
    assert row.nulls["update.signal_rank"] == 0


def test_signal_rank_of_a_rounding_difference_is_judged_by_the_rounding_noise():
    # Half of the update's singular values vanish, so that the median sees no bulk at all.
    base = np.full((8, 8), 1.0)
    update = np.zeros((8, 8))
    update[:3, :3] = np.diag([2**-7, 2**-3, 1.0])
    row = oracle_row(base, base + update, storage="bf16", base_storage="fp64", ks=(1,))
    edge = (
        resolved(row, "precision_ratio") * resolved(row, "update.frobenius_norm") / 8 * 2 * 8**0.5
    )
    assert 2**-7 < edge < 2**-3
    assert resolved(row, "update.signal_rank") == 2  # the update's noise is that of the tuned side
    assert oracle_row(base, base + update, storage="fp64").values["update.signal_rank"] == 3


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((512, 512), (0.8050, 0.6065, 0.5000, 0.25, 0.8488, 0.510)),
        ((256, 1024), (0.9662, 0.8825, 0.8000, 0.444, 0.9677, 0.761)),
        ((120, 700), (0.9774, 0.9179, 0.8537, 0.500, 0.9781, 0.795)),
    ],
)
def test_simulated_spectral_nulls_are_those_of_marchenko_pastur(shape, expected):
    # The published limits of q/M = 1, 1/4, .1714; σ1 of q = 120 still lies 3 % inside the edge.
    W = np.zeros(shape)
    nulls = oracle_row(W, W, storage="fp64", ks=(1,), simulate=2).sampled_nulls
    q = min(shape)
    names = ("effective_rank", "entropy_rank", "participation_ratio", "stable_rank")
    per_q = {f"update.{name}": q for name in names} | {"update.nuclear_ratio": 1, "update.k90": q}
    for (key, unit), number in zip(per_q.items(), expected, strict=True):
        tolerance = 0.06 if key == "update.stable_rank" else 0.01
        assert nulls[key][0] / unit == pytest.approx(number, rel=tolerance), key
    first = (1 / math.sqrt(shape[0]) + 1 / math.sqrt(shape[1])) ** 2
    assert nulls["update.top_share@1"][0] == pytest.approx(first, rel=0.06)
    for role in ROLES:
        assert {f"{role}.{name}" for name in SIMULATED} <= set(nulls)


# --- collapse: diagonal and rotated pairs

DIAGONAL = np.diag([4.0, 3.0, 2.0, 1.0])


def test_nss_of_diagonal_pairs():
    first = oracle_row(DIAGONAL, np.diag([5.0, 3.0, 2.0, 1.0]), storage="fp64", ks=(1,))
    assert_numbers(first, {"nss": 1 / math.sqrt(30), "relative_update": 1 / math.sqrt(30)})
    assert_numbers(first, {"spectral_share": 1, "spectral_lift": 2})
    last = oracle_row(DIAGONAL, np.diag([4.0, 3.0, 2.0, 1.5]), storage="fp64", ks=(1,))
    assert_numbers(last, {"nss": 0.09128709}, 5e-9)


def test_rank_ratios_are_tuned_over_base():
    row = oracle_row(np.diag([2.0, 1.0, 1.0]), np.eye(3), storage="fp64", ks=(1,))
    assert_numbers(row, {"rank_ratio": 3 / 2**1.5, "stable_rank_ratio": 2})


def test_left_rotation_by_thirty_degrees():
    c, s = math.cos(30 * DEGREE), math.sin(30 * DEGREE)
    R = np.eye(4)
    R[0, 0], R[0, 3], R[3, 0], R[3, 3] = c, -s, s, c
    row = oracle_row(DIAGONAL, R @ DIAGONAL, storage="fp64", ks=(1, 2, 3, 4))
    assert_numbers(row, {"nss": 0, "angle_left_mean@1": 30 * DEGREE}, 1e-12)
    assert_numbers(row, {"angle_left_max@2": 30 * DEGREE, "angle_left_mean@2": 15 * DEGREE})
    assert_numbers(row, {"relative_update": 0.38966380, "energy_two_sided@1": 0.0630469}, 1e-7)
    right, left = np.array([0.941176, 0, 0, 0.058824]), np.array([0.117930, 0, 0, 0.882070])
    for k in (1, 2, 3, 4):
        assert_numbers(row, {f"energy_right@{k}": right[:k].sum()}, 1e-6)
        assert_numbers(row, {f"energy_left@{k}": left[:k].sum()}, 1e-6)
    for k in (1, 2, 3):
        assert read(row, f"angle_right_max@{k}") < 1e-12
    # max|cos| of the turned vectors is .8660254: no intruder
    assert_numbers(row, dict.fromkeys(INTRUDERS, 0))
    assert_numbers(row, {"rank_ratio": 1, "stable_rank_ratio": 1})


def test_swapped_pair_turns_the_leading_direction_only():
    row = oracle_row(DIAGONAL, np.diag([2.9, 3.0, 2.0, 1.0]), storage="fp64", ks=(1, 2))
    for side in ("left", "right"):
        assert_numbers(row, {f"angle_{side}_max@1": 90 * DEGREE})
        assert read(row, f"angle_{side}_max@2") < 1e-12
    assert_numbers(row, {"gap@1": 0.25, "gap@2": 1 / 3})


def test_exactly_degenerate_pair_has_angle_zero_as_a_subspace():
    U, V = orthogonal(6, 4, 1), orthogonal(5, 4, 2)
    turn = np.eye(4)
    turn[:2, :2] = [[math.cos(0.7), -math.sin(0.7)], [math.sin(0.7), math.cos(0.7)]]
    base = U @ np.diag([2.0, 2.0, 1.0, 0.5]) @ V.T
    tuned = (U @ turn) @ np.diag([2.1, 2.0, 1.0, 0.5]) @ (V @ turn).T
    row = oracle_row(base, tuned, storage="fp64", ks=(2,))
    for side in ("left", "right"):
        assert read(row, f"angle_{side}_max@2") < 1e-12


@pytest.mark.parametrize("theta", [1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6])
def test_bases_at_an_exact_angle(theta):
    Q = orthogonal(64, 16, 3)
    turned = math.cos(theta) * Q[:, :8] + math.sin(theta) * Q[:, 8:]
    V, S = orthogonal(40, 8, 4), np.diag(np.arange(16.0, 8.0, -1.0))
    row = oracle_row(Q[:, :8] @ S @ V.T, turned @ S @ V.T, storage="fp64", ks=(8,))
    expected = {"angle_left_mean@8": theta, "angle_left_max@8": theta}
    assert row.values["angle_left_mean@8"] is not None
    assert_numbers(row, expected, 1e-9)


def test_halves_of_a_hadamard_matrix_are_orthogonal():
    H = hadamard(4) / 2
    S = np.diag([3.0, 2.0])
    base, tuned = H[:, :2] @ S @ np.eye(2, 4), H[:, 2:] @ S @ np.eye(2, 4)
    row = oracle_row(base, tuned, storage="fp64", ks=(2,))
    assert_numbers(row, {"angle_left_mean@2": math.pi / 2, "angle_left_max@2": math.pi / 2})
    assert read(row, "angle_right_max@2") < 1e-12


def test_simulated_turns_are_those_of_first_order_where_noise_is_small():
    S, k, m, n = np.array([3.0, 2.0, 1.0]), 1, 4, 3
    turns = simulated_turns(S, (m, n), 1e-4, (k,), draws=2000)
    # the pairs (3, 2), (3, 1) and, on the left, one direction outside
    pairs = 13 / 25 + 10 / 64
    for drawn, energy in ((turns.left[k], pairs + 1 / 9), (turns.right[k], pairs)):
        assert np.sqrt(np.mean(drawn**2)) == pytest.approx(1e-4 * math.sqrt(energy), rel=0.05)


def test_simulated_turns_of_nothing_and_of_everything():
    S = np.array([3.0, 2.0, 1.0])
    still = simulated_turns(S, (4, 3), 0.0, (1,))
    assert np.max(still.left[1]) < 1e-12
    assert np.array_equal(still.singular_values[0], S)
    lost = simulated_turns(S, (4, 3), 1e9, (1,), draws=4000)
    # the angle of two random lines of R^4: 1/2·π - mean of asin
    assert np.mean(np.cos(lost.left[1]) ** 2) == pytest.approx(1 / 4, abs=0.02)


def test_angle_below_its_rounding_null_is_not_resolved():
    base, tuned = gaussian_pair((64, 64), 1e-1, "bf16", update=lambda W: W)
    row = oracle_row(base, tuned, storage="bf16")  # scaled by 1.1 and rounded: no true angle
    assert row.status["angle_left_mean@8"] == row.status["angle_left_max@8"] == "BELOW_RESOLUTION"
    assert 0.2 * row.floors["angle_left_mean@8"] < row.raw["angle_left_mean@8"]
    assert row.raw["angle_left_mean@8"] < row.floors["angle_left_mean@8"]


@pytest.mark.parametrize(("multiple", "visible"), [(0.5, False), (2, True), (4, True)])
def test_angle_resolution_starts_where_rounding_ends(multiple, visible):
    base, tuned = gaussian_pair((64, 96), multiple * 1.66e-3, "bf16")
    row = oracle_row(base, tuned, storage="bf16", ks=(8,))
    for side in ("left", "right"):
        for name in ("mean", "max"):
            assert (row.values[f"angle_{side}_{name}@8"] is not None) == visible


# --- alignment


def test_pissa_counted_twice():
    base = 0.02 * rng(3).standard_normal((128, 96))
    U, S, Vh = np.linalg.svd(base, full_matrices=False)
    r = 12
    share = np.sum(S[:r] ** 2) / np.sum(S**2)
    row = oracle_row(base, base + (U[:, :r] * S[:r]) @ Vh[:r], storage="fp64", ks=(r,))
    assert row.k_v == r
    expected = {"nss": math.sqrt(share), "relative_update": math.sqrt(share)}
    expected |= {"energy_two_sided@12": 1, "versus_base@12": 1 / share, "spectral_share": 1}
    assert_numbers(row, expected)
    assert row.verdict == "INIT_MISMATCH"


def test_isotropic_update_reads_its_nulls():
    base, tuned = gaussian_pair((256, 320), 1e-3, "fp64")
    row = oracle_row(base, tuned, storage="fp64", ks=(8, 32), curves=True)
    m, n = base.shape
    for k in (8, 32):
        spread = {
            f"energy_right@{k}": math.sqrt(2 / (k * m)),
            f"energy_left@{k}": math.sqrt(2 / (k * n)),
            f"energy_two_sided@{k}": math.sqrt(2) / k,
            f"lift@{k}": math.sqrt(2) / k,
            "outside_span": 0.03,
            "auc_right": 0.02,
            "auc_left": 0.02,
        }
        for key, sd in spread.items():
            assert resolved(row, key) == pytest.approx(row.nulls[key], rel=3.5 * sd), key
        for side in ("left", "right"):
            key = f"angle_{side}_mean@{k}"
            assert resolved(row, key) == pytest.approx(row.sampled_nulls[key][0], rel=0.4)
    assert row.nulls["energy_two_sided@8"] == 64 / (256 * 320)
    for key in ("nss", "spectral_share", "spectral_lift"):
        assert resolved(row, key) == pytest.approx(row.sampled_nulls[key][0], rel=0.15)
    assert row.sampled_nulls["spectral_lift"][0] == pytest.approx(1, rel=0.05)
    assert resolved(row, "spectral_lift") == pytest.approx(
        resolved(row, "nss") / resolved(row, "relative_update") * math.sqrt(320)
    )
    stable = m * n / (math.sqrt(m) + math.sqrt(n)) ** 2
    assert resolved(row, "update.stable_rank") == pytest.approx(stable, rel=0.1)


def test_energy_is_the_share_inside_projectors():
    base, tuned = gaussian_pair((30, 20), 0.1, "fp64")
    row = oracle_row(base, tuned, storage="fp64", ks=(1, 5, 20), curves=True)
    D = tuned - base
    left_basis = np.linalg.eigh(base @ base.T)[1][:, ::-1]
    right_basis = np.linalg.eigh(base.T @ base)[1][:, ::-1]
    total = np.linalg.norm(D) ** 2
    for k in (1, 5, 20):
        P, Q = left_basis[:, :k] @ left_basis[:, :k].T, right_basis[:, :k] @ right_basis[:, :k].T
        assert_numbers(row, {f"energy_left@{k}": np.linalg.norm(P @ D) ** 2 / total}, 1e-9)
        assert_numbers(row, {f"energy_right@{k}": np.linalg.norm(D @ Q) ** 2 / total}, 1e-9)
        assert_numbers(row, {f"energy_two_sided@{k}": np.linalg.norm(P @ D @ Q) ** 2 / total}, 1e-9)
    assert_numbers(row, {"outside_span": 1 - resolved(row, "energy_left@20"), "gap@20": 1})
    # C_R(k) is a sum over directions, so its mean weighs direction i by (q - i + 1)/q
    steps = np.sum((D @ right_basis) ** 2, axis=0) / total
    assert_numbers(row, {"auc_right": np.sum(steps * np.arange(20, 0, -1)) / 20}, 1e-9)


def test_transposed_pair_swaps_left_and_right():
    base, tuned = gaussian_pair((40, 24), 0.2, "fp32")
    row = oracle_row(base, tuned, storage="fp32", ks=(5,), curves=True)
    turned = oracle_row(base.T, tuned.T, storage="fp32", ks=(5,), curves=True)

    def mirror(key: str) -> str:
        if key.startswith("intruder"):
            return key.removesuffix("_right") if key.endswith("_right") else f"{key}_right"
        for here, there in (("left", "right"), ("right", "left")):
            if f"_{here}" in key:
                return key.replace(f"_{here}", f"_{there}")
        return key

    assert set(row.values) == set(ids((5, 3), curves=True))
    for key, number in row.values.items():
        assert resolved(turned, mirror(key)) == pytest.approx(number, rel=1e-9, abs=1e-12), key
    for key, number in row.nulls.items():
        assert turned.nulls[mirror(key)] == pytest.approx(number, rel=1e-9), key


@pytest.mark.parametrize("storage", ["bf16", "fp32"])
def test_mirsky_and_triangle_bounds(storage):
    for rho in (1e-3, 1e-1):
        row = oracle_row(*gaussian_pair((48, 64), rho, storage), storage=storage)
        assert 0 < read(row, "nss") <= read(row, "relative_update") * (1 + EXACT)
        assert abs(
            resolved(row, "tuned.spectral_norm") - resolved(row, "base.spectral_norm")
        ) <= read(row, "update.spectral_norm")


# --- intruders


def test_intruders_of_a_diagonal_base():
    def turned_by(degrees: float):
        c, s = math.cos(degrees * DEGREE), math.sin(degrees * DEGREE)
        base = np.zeros((6, 4))
        np.fill_diagonal(base, [4.0, 3.0, 2.0, 1.0])
        R = np.eye(6)
        R[0, 0], R[0, 5], R[5, 0], R[5, 5] = c, -s, s, c  # towards a direction outside span(U0)
        return oracle_row(base, R @ base, storage="fp64", ks=(1,))

    assert_numbers(turned_by(59), {"intruders": 0, "intruder_energy": 0})
    assert_numbers(turned_by(61), {"intruders": 1, "intruder_energy": 16 / 30})
    assert_numbers(turned_by(61), {"intruders_right": 0, "intruder_energy_right": 0})


def test_intruders_look_at_the_ten_leading_directions():
    base = np.zeros((60, 24))
    np.fill_diagonal(base, np.arange(24.0, 0.0, -1.0))
    # every tuned left vector leaves the span; the right ones stay
    row = oracle_row(base, np.roll(base, 30, axis=0), storage="fp64", ks=(1,))
    assert_numbers(row, {"intruders": 10, "intruder_energy": 1, "intruders_right": 0})


# --- statuses


def test_zero_update():
    base = rng().standard_normal((32, 24))
    row = oracle_row(base, base.copy(), storage="fp64", ks=(8, 64), curves=True)
    numbers = {"relative_update": 0, "nss": 0, "rank_ratio": 1, "stable_rank_ratio": 1}
    numbers |= {"update.frobenius_norm": 0, "update.spectral_norm": 0, "update_sparsity": 1}
    numbers |= {"update_sparsity_abs": 1, "update_sparsity_exact": 1, "angle_left_max@8": 0}
    numbers |= {"angle_left_mean@8": 0, "angle_right_max@8": 0, **dict.fromkeys(INTRUDERS, 0)}
    assert_numbers(row, numbers, 0)
    assert not set(numbers) & set(row.status)
    zero = [key for key in row.values if key.startswith("update.")][2:]
    zero += ["precision_ratio", "spectral_share", "spectral_lift", "outside_span", "auc_left"]
    zero += ["energy_right@8", "energy_two_sided@3", "lift@8", "versus_base@8", "lift@64"]
    assert_null(row, zero, "ZERO_UPDATE")
    assert_null(row, ["angle_left_mean@64", "gap@64"], "NOT_APPLICABLE")
    assert resolved(row, "gap@8") > 0
    assert row.verdict == "NO_UPDATE"


def test_zero_base_and_zero_tuned():
    W, zero = rng().standard_normal((32, 24)), np.zeros((32, 24))
    ratios = ["rank_ratio", "stable_rank_ratio", "angle_left_mean@8", *INTRUDERS]
    from_zero = oracle_row(zero, W, storage="fp64", ks=(8,), curves=True)
    against = ["relative_update", "nss", "spectral_share", "spectral_lift", "energy_left@8"]
    against += ["lift@8", "versus_base@8", "gap@8", "outside_span", "auc_right", "base.stable_rank"]
    against += ["base.signal_rank", "base.numerical_rank", "base.condition_number"]
    assert_null(from_zero, against + ratios, "NOT_APPLICABLE")
    assert_numbers(from_zero, {"base.spectral_norm": 0, "update_sparsity": 0}, 0)
    assert resolved(from_zero, "update.k90") == resolved(from_zero, "tuned.k90") > 1
    assert from_zero.verdict == "TOO_FAR"

    to_zero = oracle_row(W, zero, storage="fp64", ks=(8,))
    assert_null(to_zero, [*ratios, "tuned.k99", "tuned.signal_rank"], "NOT_APPLICABLE")
    assert_numbers(to_zero, {"nss": 1, "relative_update": 1, "tuned.frobenius_norm": 0})

    both = oracle_row(zero, zero, storage="fp64", ks=(8,))
    assert_null(both, ["lift@8", "update.k90", "precision_ratio"], "ZERO_UPDATE")
    assert_null(both, ["relative_update", "nss", "gap@8", "base.k90"], "NOT_APPLICABLE")
    assert both.verdict == "NO_UPDATE"


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("side", [0, 1])
def test_one_non_finite_entry_silences_the_row(bad, side):
    pair = list(gaussian_pair((32, 24), 0.1, "bf16"))
    pair[side][5, 5] = bad
    row = oracle_row(*pair, storage="bf16", curves=True)
    assert_null(row, ids((8, 64, 3), curves=True), "NON_FINITE")
    assert len(row.status) == len(row.values) == len(ids((8, 64, 3), curves=True))
    assert row.verdict == "UNDETERMINED"


def test_complete_bases_and_large_k_do_not_apply():
    base, tuned = gaussian_pair((8, 20), 0.1, "fp64")
    row = oracle_row(base, tuned, storage="fp64", ks=(8, 9))
    assert_null(row, ["angle_left_mean@8", "angle_left_max@8"], "NOT_APPLICABLE")
    assert resolved(row, "angle_right_mean@8") > 0
    names = ("energy_right", "energy_left", "energy_two_sided", "lift", "versus_base", "gap")
    assert_null(row, [f"{name}@9" for name in names], "NOT_APPLICABLE")
    assert_null(row, ["angle_right_mean@9", "angle_left_max@9"], "NOT_APPLICABLE")
    assert not [key for key in row.nulls if key.endswith("@9")]
    square = oracle_row(*gaussian_pair((7, 7), 0.1, "fp64"), storage="fp64", ks=(1,), curves=True)
    assert_null(square, ["outside_span", "update.top_share@8"], "NOT_APPLICABLE")


@pytest.mark.parametrize(
    ("rho", "top", "energy", "amplitude"),
    [
        (0.3, None, None, None),
        (3e-2, None, None, "CAUTION"),
        (1e-2, None, "CAUTION", "BELOW_RESOLUTION"),
        (5e-3, "CAUTION", "BELOW_RESOLUTION", "BELOW_RESOLUTION"),
        (1e-3, "BELOW_RESOLUTION", "BELOW_RESOLUTION", "BELOW_RESOLUTION"),
    ],
)
def test_precision_classes(rho, top, energy, amplitude):
    base, tuned = gaussian_pair((96, 64), rho, "bf16")
    row = oracle_row(base, tuned, storage="bf16", ks=(8,), curves=True)
    if rho >= 1e-2:  # below, what was rounded back is missing from ‖ΔW‖
        grown = math.sqrt(1 + rho**2)  # ‖W1‖/‖W0‖
        assert resolved(row, "precision_ratio") == pytest.approx(1.66e-3 / rho * grown, rel=0.02)
    expected = {
        "update.stable_rank": top,
        "update.spectral_norm": top,
        "update.top_share@1": top,
        "update.top_share@8": top,
        **dict.fromkeys(("nss", "spectral_share", "spectral_lift", *INTRUDERS), top),
        **dict.fromkeys(("energy_left@8", "energy_right@8", "energy_two_sided@8"), top),
        **dict.fromkeys(("lift@8", "versus_base@8", "outside_span", "auc_left"), top),
        "update.participation_ratio": energy,
        "update.entropy_rank": energy,
        "update.k90": energy,
        "update.k95": energy,
        "update.effective_rank": amplitude,
        "update.nuclear_ratio": amplitude,
        "update.k99": amplitude,
        "update.numerical_rank": amplitude,
    }
    for key, status in expected.items():
        assert row.status.get(key) == status, key
        assert (key in row.raw) == (status == "BELOW_RESOLUTION"), key
    unfloored = ["relative_update", "update_sparsity", "update.frobenius_norm", "rank_ratio"]
    unfloored += ["update.signal_rank", "gap@8", "base.k99", "tuned.effective_rank"]
    assert not set(unfloored) & set(row.status)


@pytest.mark.parametrize(
    ("nu", "top", "energy", "amplitude"),
    [
        (0.0199, "OK", "OK", "OK"),
        (0.0201, "OK", "OK", "CAUTION"),
        (0.0999, "OK", "OK", "CAUTION"),
        (0.1001, "OK", "CAUTION", "BELOW_RESOLUTION"),
        (0.1999, "OK", "CAUTION", "BELOW_RESOLUTION"),
        (0.2001, "CAUTION", "BELOW_RESOLUTION", "BELOW_RESOLUTION"),
        (0.5999, "CAUTION", "BELOW_RESOLUTION", "BELOW_RESOLUTION"),
        (0.6001, "BELOW_RESOLUTION", "BELOW_RESOLUTION", "BELOW_RESOLUTION"),
    ],
)
def test_precision_thresholds(nu, top, energy, amplitude):
    tuned = np.ones((4, 4))  # noise 4·2^-7/√12; the update is a multiple of the identity: PR = q
    base = tuned - 2**-6 / math.sqrt(12) / nu * np.eye(4)
    row = oracle_row(base, tuned, storage="bf16", base_storage="fp64", ks=(1,))
    assert resolved(row, "precision_ratio") == pytest.approx(nu, rel=1e-12)
    keys = ("update.stable_rank", "update.k90", "update.k99")
    assert [row.status.get(key, "OK") for key in keys] == [top, energy, amplitude]
    assert (row.verdict == "UNDETERMINED") == (nu > 0.6)


def test_amplitude_class_follows_the_participation_ratio():
    # The same ν = .011: iid has q/PR = 2, a rank-one update q/PR = 64.
    spread = gaussian_pair((64, 64), 0.15, "bf16")
    single = gaussian_pair((64, 64), 0.15, "bf16", update=lambda W: np.ones(W.shape))
    rows = [oracle_row(*pair, storage="bf16") for pair in (spread, single)]
    assert [row.status.get("update.k99") for row in rows] == [None, "CAUTION"]
    assert [row.status.get("update.k90") for row in rows] == [None, None]


def test_null_values_and_null_statuses_agree():
    for rho in (0.1, 1e-2, 1e-3):
        row = oracle_row(*gaussian_pair((16, 40), rho, "bf16"), storage="bf16", curves=True)
        for key, number in row.values.items():
            assert (number is None) == (row.status.get(key, "OK") in NULL_STATUSES), key
            assert number is None or math.isfinite(number), key
        assert set(row.nulls) <= set(row.values)
        assert not {key for key in row.nulls if "intruder" in key or "versus" in key}


# --- sampled nulls


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rho", "expected"), [(1e-1, 0.018), (1e-2, 0.173), (1e-3, 0.775), (1e-4, 0.977)]
)
def test_isotropic_sparsity_in_bf16(rho, expected):
    # tuned stays in fp32: a bf16 file would have another ρ than the intended one
    base = round_to(0.02 * rng().standard_normal((300, 300)), "bf16")
    update = rng(9).standard_normal(base.shape)
    update *= rho * np.linalg.norm(base) / np.linalg.norm(update)
    tuned = round_to(base + update, "fp32")
    row = oracle_row(base, tuned, storage="fp32", base_storage="bf16", ks=(1,), simulate=2)
    mean, error = row.sampled_nulls["update_sparsity"]
    assert mean == pytest.approx(expected, abs=4e-3)
    assert error < 3e-3
    assert resolved(row, "update_sparsity") == pytest.approx(expected, abs=4e-3)
    assert row.sampled_nulls["update_sparsity_exact"][0] < 1e-2


def test_sampled_nulls_are_seeded_and_know_their_error():
    base, tuned = gaussian_pair((40, 30), 1e-2, "bf16")
    few, again, many, other = (
        oracle_row(base, tuned, storage="bf16", simulate=draws, seed=seed).sampled_nulls
        for draws, seed in ((20, 0), (20, 0), (200, 0), (20, 1))
    )
    assert few == again
    assert few != other
    for key, (mean, error) in few.items():
        assert abs(mean - many[key][0]) <= 5 * math.hypot(error, many[key][1]), key
        assert error > 0
    shrinkage = np.mean([few[key][1] / many[key][1] for key in few])
    assert shrinkage == pytest.approx(math.sqrt(10), rel=0.3)
    with pytest.raises(ValueError, match="simulate"):
        oracle_row(base, tuned, storage="bf16", simulate=1)


# --- verdict


def leading(base: np.ndarray, triplets: slice) -> np.ndarray:
    U, S, Vh = np.linalg.svd(base, full_matrices=False)
    return (U[:, triplets] * S[triplets]) @ Vh[triplets]


UPDATES = {
    "isotropic": (None, "OFF_PRINCIPAL"),
    "random rank 16": (random_low_rank, "OFF_PRINCIPAL"),
    "leading triplets rescaled": (lambda W: leading(W, slice(16)), "ON_PRINCIPAL"),
    # The leading angles are 0, hence unresolved: bounded by what rounding alone turns.
    "last triplets": (lambda W: leading(W, slice(-16, None)), "OFF_PRINCIPAL"),
    "one direction": (
        lambda W: np.outer(rng(7).standard_normal(W.shape[0]), rng(8).standard_normal(W.shape[1])),
        "RANK_COLLAPSE",
    ),
    "left side only": (
        lambda W: np.linalg.svd(W)[0][:, :16] @ rng(7).standard_normal((16, W.shape[1])),
        "MIXED",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", UPDATES)
@pytest.mark.parametrize("rho", [1e-1, 1e-2, 1e-3])
def test_verdict_of_known_updates(name, rho):
    update, expected = UPDATES[name]
    pair = gaussian_pair((256, 256), rho, "fp32", update=update)
    assert oracle_row(*pair, storage="fp32", ks=()).verdict == expected


def test_verdict_forgives_angles_that_an_isotropic_update_has_too():
    row = oracle_row(*gaussian_pair((256, 256), 0.2, "fp32"), storage="fp32", ks=())
    assert resolved(row, "angle_left_mean@32") > 10 * DEGREE
    assert row.verdict == "OFF_PRINCIPAL"


@pytest.mark.slow
@pytest.mark.parametrize("name", UPDATES)
def test_verdict_of_known_updates_in_bf16(name):
    update, expected = UPDATES[name]
    for rho, verdict in ((1e-1, expected), (1e-3, "UNDETERMINED")):
        pair = gaussian_pair((256, 256), rho, "bf16", update=update)
        assert oracle_row(*pair, storage="bf16", ks=()).verdict == verdict


def test_middle_triplets_distort_the_spectrum():
    pair = gaussian_pair((256, 256), 0.1, "fp32", update=lambda W: leading(W, slice(80, 120)))
    row = oracle_row(*pair, storage="fp32", ks=())
    assert resolved(row, "nss") > 5e-2
    assert resolved(row, "spectral_share") > 0.3  # ON_PRINCIPAL but for C_LR/E_k
    assert resolved(row, "spectral_lift") > 10
    assert row.verdict == "SPECTRUM_DISTORTED"
    smaller = gaussian_pair((256, 256), 0.05, "fp32", update=lambda W: leading(W, slice(80, 120)))
    assert oracle_row(*smaller, storage="fp32", ks=()).verdict != "SPECTRUM_DISTORTED"


@pytest.mark.parametrize(("degrees", "verdict"), [(20, "SPECTRUM_DISTORTED"), (5, "MIXED")])
def test_a_turn_of_the_leading_directions_beyond_ten_degrees(degrees, verdict):
    S = np.diag([10.0] * 8 + [1.0] * 56)
    c, s, one = math.cos(degrees * DEGREE), math.sin(degrees * DEGREE), np.eye(8)
    R = np.eye(64)
    R[:8, :8], R[:8, 8:16], R[8:16, :8], R[8:16, 8:16] = c * one, -s * one, s * one, c * one
    row = oracle_row(S, round_to(R @ S, "fp32"), storage="fp32", ks=())
    assert row.k_v == 8
    assert resolved(row, "angle_left_mean@8") == pytest.approx(degrees * DEGREE, rel=1e-6)
    assert read(row, "nss") < 1e-6
    energy = 2 * (1 - c) * (800 + 8)
    assert_numbers(row, {"relative_update": math.sqrt(energy / 856)}, 1e-6)
    assert row.verdict == verdict


def block_update(k: int, q: int, energies, seed: int = 0) -> np.ndarray:
    """Unit-norm Gaussian blocks; energies of (inside, left only, right only, outside) the top k."""
    D = rng(seed).standard_normal((q, q))
    inside, outside = slice(k), slice(k, q)
    blocks = [(inside, inside), (inside, outside), (outside, inside), (outside, outside)]
    for block, energy in zip(blocks, energies, strict=True):
        D[block] *= math.sqrt(energy) / np.linalg.norm(D[block])
    return D


@pytest.mark.parametrize(
    ("leading", "energies", "verdict"),
    [
        (10.0, (0.04, 0.30, 0.30, 0.36), "OFF_PRINCIPAL"),
        (10.0, (0.06, 0.30, 0.30, 0.34), "MIXED"),  # C_LR > .05, and C_LR/E_k = .064
        (10.0, (0.00, 0.52, 0.00, 0.48), "MIXED"),  # C_L
        (10.0, (0.00, 0.00, 0.52, 0.48), "MIXED"),  # C_R
        (10.0, (0.48, 0.01, 0.01, 0.50), "MIXED"),
        (10.0, (0.52, 0.01, 0.01, 0.46), "ON_PRINCIPAL"),  # C_LR alone: the lift is at most 8
        (1.05, (0.025, 0.30, 0.30, 0.375), "OFF_PRINCIPAL"),
        (1.05, (0.03, 0.30, 0.30, 0.37), "MIXED"),  # C_LR/E_k = .22
    ],
)
def test_verdict_by_captured_energy(leading, energies, verdict):
    S = np.diag([leading] * 8 + [1.0] * 56)  # a gap at k_v = 8 keeps the angles far below 1°
    update = 1e-4 * np.linalg.norm(S) * block_update(8, 64, energies)
    row = oracle_row(S, S + update, storage="fp64", ks=())
    assert_numbers(row, {"energy_two_sided@8": energies[0]}, 1e-9)
    assert_numbers(row, {"energy_left@8": energies[0] + energies[1]}, 1e-9)
    assert 0 < resolved(row, "angle_left_mean@8") < 1 * DEGREE
    assert row.verdict == verdict


@pytest.mark.parametrize(("share", "verdict"), [(0.92, "RANK_COLLAPSE"), (0.88, "OFF_PRINCIPAL")])
def test_verdict_by_the_top_share(share, verdict):
    # On a diagonal base with a gap; the last directions hold the update.
    S = np.diag([2.0] * 8 + [1.0] * 56)
    S[range(56, 64), range(56, 64)] = 0.5
    update = np.zeros((64, 64))
    update[63, 62], update[60, 61] = math.sqrt(share), math.sqrt(1 - share)
    noise = 1e-4 * block_update(8, 64, (0.01, 0.3, 0.3, 0.39))  # so that the angles are resolved
    row = oracle_row(S, S + 1e-2 * (update + noise), storage="fp64", ks=())
    assert resolved(row, "update.top_share@1") == pytest.approx(share, abs=1e-3)
    assert row.verdict == verdict


@pytest.mark.parametrize(("q", "verdict"), [(64, "MIXED"), (128, "ON_PRINCIPAL")])
def test_verdict_of_a_plain_rescaling_needs_a_lift_of_ten(q, verdict):
    base = rng().standard_normal((q, q))
    noise = 1e-3 * rng(1).standard_normal((q, q))  # resolves the angles
    row = oracle_row(base, 1.01 * base + 1e-2 * noise, storage="fp64", ks=())
    assert resolved(row, "spectral_lift") == pytest.approx(math.sqrt(q), rel=1e-2)
    assert resolved(row, f"versus_base@{q // 8}") == pytest.approx(1, rel=1e-2)
    assert resolved(row, f"energy_two_sided@{q // 8}") < 0.5
    assert row.verdict == verdict


@pytest.mark.parametrize(("along", "verdict"), [(0.33, "ON_PRINCIPAL"), (0.27, "MIXED")])
def test_verdict_needs_three_tenths_of_the_update_in_the_spectrum(along, verdict):
    # Part of the update rescales W0, part turns its two leading pairs, the rest lies outside.
    m, n, rho = 16, 2600, 1e-3
    S = np.concatenate([[1.3, 1.2], np.linspace(1.0, 0.9, 14)])
    base = np.zeros((m, n))
    np.fill_diagonal(base, S)
    turn, outside = np.zeros((m, n)), np.zeros((m, n))
    turn[0, 1], turn[1, 0] = math.sqrt(0.5), -math.sqrt(0.5)
    outside[:, m:] = rng().standard_normal((m, n - m))
    outside /= np.linalg.norm(outside)
    scaled = along * base / np.linalg.norm(base)
    update = scaled + math.sqrt(0.2) * turn + math.sqrt(0.8 - along**2) * outside
    row = oracle_row(base, base + rho * np.linalg.norm(base) * update, storage="fp64", ks=())
    assert resolved(row, "spectral_share") == pytest.approx(along, abs=0.01)
    assert resolved(row, "spectral_lift") > 10
    assert resolved(row, "versus_base@2") > 0.5 > resolved(row, "energy_two_sided@2")
    assert row.verdict == verdict


@pytest.mark.parametrize(("foreign", "verdict"), [(0.15, "INIT_MISMATCH"), (0.25, "ON_PRINCIPAL")])
def test_double_count_with_another_update_on_it(foreign, verdict):
    # Spectral share √(1 - foreign): .92 and .87; what is foreign lies outside the base's span.
    base = np.zeros((64, 640))
    base[:, :64] = np.diag(np.linspace(2, 1, 64))
    update, other = np.zeros_like(base), np.zeros_like(base)
    update[:, :8] = base[:, :8]
    other[:, 64:] = rng().standard_normal((64, 576))
    other *= math.sqrt(foreign / (1 - foreign)) * np.linalg.norm(update) / np.linalg.norm(other)
    row = oracle_row(base, base + update + other, storage="fp64", ks=())
    assert resolved(row, "relative_update") > 0.2
    assert resolved(row, "versus_base@8") > 1.2
    assert (resolved(row, "spectral_share") > 0.9) == (verdict == "INIT_MISMATCH")
    assert row.verdict == verdict


def test_a_smaller_tail_is_a_fall_of_the_effective_rank():
    S = np.concatenate([[10.0], np.linspace(0.12, 0.11, 7), np.linspace(0.1, 0.08, 56)])
    fallen = np.where(np.arange(64) >= 8, 0.5 * S, S)
    row = oracle_row(np.diag(S), np.diag(fallen), storage="fp64", ks=())
    assert resolved(row, "nss") < 5e-2
    assert resolved(row, "rank_ratio") < 0.9
    assert row.verdict == "SPECTRUM_DISTORTED"


@pytest.mark.parametrize(
    ("shape", "k_v"), [((2, 3), 1), ((15, 90), 1), ((64, 70), 8), ((520, 512), 64)]
)
def test_verdict_dimension(shape, k_v):
    W = np.zeros(shape)
    row = oracle_row(W, W, storage="bf16", ks=(2,))
    assert row.k_v == k_v
    assert f"energy_left@{k_v}" in row.values
