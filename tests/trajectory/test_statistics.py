"""docs/methods.md#drift: closed forms, simulations, storage, spacing, and what is undefined."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch

from geoscope.kinds import MOTION
from geoscope.records import Status
from geoscope.thresholds import MOTION_THRESHOLDS
from geoscope.trajectory.headline import drift_or_diffusion
from geoscope.trajectory.increments import Increments, increments_of_weights
from geoscope.trajectory.statistics import STATISTICS, statistics
from geoscope.trajectory.storage_noise import corrected_gram, with_exact_base
from geoscope.trajectory.temporal import rank1_coefficients
from geoscope.trajectory.walk import sign_flip_p, walk
from tests.helpers.series import curve, from_steps, number, simulated


def one(T: int, drift: float = 0.0) -> Increments:
    """The exact increments of a walk of unit steps with this drift."""
    return from_steps(torch.eye(T, dtype=torch.float64) + drift**2)


# --- closed forms -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("T", "pc1", "centred", "coefficient", "line", "origin"),
    [
        (10, 0.813929, 0.619143, 0.958261, 0.612121, 0.803636),
        (27, 0.811058, 0.609449, 0.957926, 0.601648, 0.800529),
        (100, 0.810606, 0.608038, 0.958227, 0.600120, 0.800040),
    ],
)
def test_the_walk_of_methods_8(
    T: int, pc1: float, centred: float, coefficient: float, line: float, origin: float
) -> None:
    found = statistics(one(T))
    expected = {
        "temporal_pc1": pc1,
        "temporal_pc1_centred": centred,
        "rank1_coefficient_r2": coefficient,
        "linear_r2": line,
        "linear_r2_origin": origin,
        "drift_fraction": 0.0,
        "increment_cosine": 0.0,
        "curvature": math.sqrt(2),
        "straightness": 1 / math.sqrt(T),
    }
    for key, value in expected.items():
        assert found.values[key] == pytest.approx(value, abs=6e-7), key
        assert found.nulls[key] == pytest.approx(value, abs=6e-7), key
    assert found.series["cos_to_final"] == pytest.approx(
        [math.sqrt(i / T) for i in range(1, T + 1)]
    )


@pytest.mark.parametrize("T", [5, 27])
def test_eigenvalues_of_the_walk(T: int) -> None:
    G = one(T).G
    k = torch.arange(1, T + 1, dtype=torch.float64)
    exact = 1 / (4 * torch.sin((2 * k - 1) * math.pi / (4 * T + 2)).square())
    torch.testing.assert_close(torch.linalg.eigvalsh(G).flip(0), exact, rtol=1e-9, atol=1e-12)
    assert float(G.trace()) == T * (T + 1) / 2
    centred = 1 / (4 * math.sin(math.pi / (2 * T)) ** 2) / ((T**2 - 1) / 6)
    assert statistics(one(T)).values["temporal_pc1_centred"] == pytest.approx(centred, rel=1e-9)


@pytest.mark.parametrize(
    ("drift", "row"),
    [
        (0.1, (0.010, 0.010, 0.216, 0.839, 0.655, 0.974, 0.649, 0.831, 1.41)),
        (1.0, (0.50, 0.50, 0.720, 0.990, 0.973, 1.00, 0.973, 0.990, 1.00)),
    ],
)
def test_the_table_of_methods_6_2(drift: float, row: tuple[float, ...]) -> None:
    keys = ("drift_fraction", "increment_cosine", "straightness", "temporal_pc1",
            "temporal_pc1_centred", "rank1_coefficient_r2", "linear_r2", "linear_r2_origin",
            "curvature")  # fmt: skip
    found = statistics(one(27, drift))
    for key, value in zip(keys, row, strict=True):
        assert found.values[key] == pytest.approx(value, abs=6e-3), key
    share = drift**2 / (1 + drift**2)
    assert found.values["drift_fraction"] == pytest.approx(share, abs=1e-12)
    assert found.values["increment_cosine"] == pytest.approx(share, abs=1e-12)
    assert found.values["drift_to_noise"] == pytest.approx(drift, abs=1e-9)


@pytest.mark.parametrize("steps", [range(13), (100, 110, 115, 160, 161, 400)])
def test_a_line_is_a_line_at_any_spacing(steps: tuple[int, ...]) -> None:
    found = statistics(curve(steps, lambda t: (t, -2 * t)))
    for key in ("drift_fraction", "increment_cosine", "straightness", "temporal_pc1", "linear_r2",
                "temporal_pc1_centred", "rank1_coefficient_r2", "linear_r2_origin",
                "subspace_drift"):  # fmt: skip
        assert found.values[key] == pytest.approx(1, abs=1e-9), key
    for key in ("curvature", "residual_share"):
        assert found.values[key] == pytest.approx(0, abs=1e-6), key
    assert found.values["temporal_participation_ratio"] == pytest.approx(1)
    assert found.series["cos_to_final"] == pytest.approx([1.0] * (len(steps) - 1))
    # nothing is left for a curve to explain
    assert found.status_of("nonlinearity@quadratic") is Status.NOT_APPLICABLE
    assert drift_or_diffusion(found).code == "DRIFT"


def test_curves_are_known_by_their_own_columns() -> None:
    steps = (0, 1, 2, 4, 7, 9, 12, 20)
    shapes = {
        "nonlinearity@quadratic": lambda t: (t, t * t / 10),
        "nonlinearity@sqrt": lambda t: (math.sqrt(t), 3 * math.sqrt(t)),
    }
    for key, shape in shapes.items():
        found = statistics(curve(steps, shape))
        assert found.values[key] == pytest.approx(1, abs=1e-9), key
        assert number(found.values["linear_r2"]) < 0.999
    # ln has no base at t_0; what it explains is a path that is ln after a jump
    logs = [[math.log(t)] for t in steps[1:]]
    points = torch.tensor([[-3.0], *logs], dtype=torch.float64).diff(dim=0)
    found = statistics(from_steps(points @ points.T, steps))
    assert found.values["nonlinearity@log"] == pytest.approx(1, abs=1e-9)


def test_a_quarter_circle() -> None:
    """Equal turns of π/2T: cosine, curvature and straightness by trigonometry."""
    T = 10
    turn = math.pi / (2 * T)
    found = statistics(curve(range(T + 1), lambda t: (math.cos(turn * t), math.sin(turn * t))))
    assert found.values["increment_cosine"] == pytest.approx(math.cos(turn))
    assert found.values["curvature"] == pytest.approx(2 * math.sin(turn / 2))
    assert found.values["straightness"] == pytest.approx(
        math.sqrt(2) / (2 * T * math.sin(turn / 2))
    )
    assert found.values["update_norm"] == pytest.approx(math.sqrt(2))


# --- simulations --------------------------------------------------------------------------------


@pytest.mark.parametrize("drift", [0.0, 0.1, 1.0])
def test_simulated_series_meet_their_values(drift: float) -> None:
    inc = increments_of_weights(range(13), simulated(range(13), drift=drift))
    found, exact = statistics(inc), statistics(one(12, drift))
    for key in ("drift_fraction", "increment_cosine", "straightness", "temporal_pc1", "curvature",
                "temporal_pc1_centred", "rank1_coefficient_r2", "linear_r2", "linear_r2_origin",
                "temporal_participation_ratio", "subspace_drift", "residual_share",
                "nonlinearity@quadratic"):  # fmt: skip
        assert found.values[key] == pytest.approx(exact.values[key], abs=0.015), key
        assert found.nulls[key] == pytest.approx(exact.nulls[key], abs=0.005), key
    assert drift_or_diffusion(found).code == ("DRIFT" if drift else "NO_DRIFT")


IRREGULAR = (0, 1, 2, 5, 6, 10, 11, 12, 18, 20, 21, 25)


@pytest.mark.parametrize("start", [0, 1000])
def test_irregular_spacing_changes_nothing_of_a_drift(start: int) -> None:
    """Without noise, at the real steps; and the origin of the count does not matter."""
    steps = [start + t for t in IRREGULAR]
    found = statistics(increments_of_weights(steps, simulated(steps, drift=1.0, noise=0)))
    for key in ("drift_fraction", "linear_r2", "linear_r2_origin", "rank1_coefficient_r2"):
        assert found.values[key] == pytest.approx(1, abs=1e-9), key
    by_row = increments_of_weights(range(len(steps)), simulated(steps, drift=1.0, noise=0))
    assert number(statistics(by_row).values["linear_r2"]) < 0.99  # what the row index would give


def test_a_walk_at_irregular_steps_has_no_drift_and_meets_its_null() -> None:
    found = statistics(increments_of_weights(IRREGULAR, simulated(IRREGULAR)))
    assert found.values["drift_fraction"] == pytest.approx(0, abs=2e-3)
    for key in ("temporal_pc1", "linear_r2", "rank1_coefficient_r2", "curvature"):
        assert found.values[key] == pytest.approx(found.nulls[key], abs=0.01), key
    assert drift_or_diffusion(found).code == "NO_DRIFT"


def test_units_of_time_and_weight_change_nothing() -> None:
    weights = simulated(IRREGULAR, drift=0.4, entries=5000)
    plain = statistics(increments_of_weights(IRREGULAR, weights))
    scaled = statistics(
        increments_of_weights([70 + 10 * t for t in IRREGULAR], [1024 * W for W in weights])
    )
    for key in STATISTICS:
        if key not in ("update_norm", "path_length"):
            assert scaled.values[key] == pytest.approx(plain.values[key], rel=1e-7), key


# --- storage ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rho", "cosine"), [(1e-2, -0.03), (3e-3, -0.16), (1e-3, -0.25), (3e-4, -0.25)]
)
def test_a_stored_walk_seems_to_undo_its_steps(rho: float, cosine: float) -> None:
    weights = simulated(range(13), rho=rho, dtype=torch.bfloat16)
    found = statistics(increments_of_weights(range(13), weights))
    raw = {**found.values, **found.raw}
    assert raw["increment_cosine"] == pytest.approx(cosine, abs=0.012)
    noise = found.values["step_precision_ratio"]
    assert noise is not None
    if noise < 0.5:
        assert raw["increment_cosine"] == pytest.approx(-(noise**2) / 2, abs=0.01)
        assert found.values["drift_fraction_corrected"] == pytest.approx(0, abs=0.011)
    assert drift_or_diffusion(found).code == ("NO_DRIFT" if noise <= 0.6 else "UNDETERMINED")


@pytest.mark.parametrize(
    ("rho", "raw", "corrected"),
    [(1e-2, 0.48, 0.50), (3e-3, 0.37, 0.51), (1e-3, 0.15, None), (3e-4, 0.03, None)],
)
def test_a_stored_drift_of_one_half(rho: float, raw: float, corrected: float | None) -> None:
    weights = simulated(range(13), drift=1.0, rho=rho, dtype=torch.bfloat16)
    found = statistics(increments_of_weights(range(13), weights))
    seen = {**found.values, **found.raw}
    assert seen["drift_fraction"] == pytest.approx(raw, abs=0.012)
    for key in ("drift_fraction_corrected", "increment_cosine_corrected"):
        if corrected is None:
            assert found.values[key] is None
            assert found.status[key] is Status.BELOW_RESOLUTION
        else:
            assert found.values[key] == pytest.approx(corrected, abs=0.03)
    assert drift_or_diffusion(found).code == ("DRIFT" if corrected else "UNDETERMINED")


@pytest.mark.slow
@pytest.mark.parametrize("rho", [7e-3, 5e-3, 3.3e-3])
def test_the_headline_holds_for_stored_series_up_to_the_limit(rho: float) -> None:
    """ν(δ) = .31, .42 and .59: what the correction misses is not taken for drift."""
    for seed in range(4):
        for drift, code in ((0.0, "NO_DRIFT"), (0.1, "DRIFT")):
            weights = simulated(
                range(13), drift=drift, rho=rho, dtype=torch.bfloat16, seed=seed, entries=100_000
            )
            found = statistics(increments_of_weights(range(13), weights))
            assert drift_or_diffusion(found).code == code


def test_the_correction_takes_out_the_expected_rounding() -> None:
    H = 8 * torch.eye(3, dtype=torch.float64) + 1
    inc = Increments((0, 1, 2, 3), H, (0.25, 0.5, 1.0, 2.0), 1.0)
    expected = [[8.25, 1.5, 1.0], [1.5, 7.5, 2.0], [1.0, 2.0, 6.0]]
    assert corrected_gram(inc).tolist() == expected
    assert corrected_gram(with_exact_base(inc))[0, 0] == 8.5
    base = statistics(inc, base_exact=False).values["step_precision_ratio"]
    assert base == pytest.approx(math.sqrt((0.25 + 2 * 0.5 + 2 * 1 + 2) / 27))


def test_one_step_below_resolution_does_not_decide_the_corrected_cosine() -> None:
    """The fifth step is a tenth as long, and .8 of it is rounding."""
    lengths = torch.tensor([1.0, 1, 1, 1, 0.1, 1, 1, 1], dtype=torch.float64)
    H = lengths[:, None] * one(8, 1.0).H / 2 * lengths
    rounding = (0.0, *[0.0032] * 8)
    found = statistics(Increments(tuple(range(9)), H, rounding, 1.0))
    assert found.step_status[4] is Status.BELOW_RESOLUTION
    assert found.values["increment_cosine_corrected"] == pytest.approx(0.5, abs=0.01)


def test_status_by_the_noise_of_what_is_measured() -> None:
    """ν(δ) = .4 and ν(Δ) less: the steps are CAUTION, the path is OK."""
    inc = replace(one(12, 1.0), rounding=(0.0, *[0.16] * 12))
    found = statistics(inc)
    assert found.values["step_precision_ratio"] == pytest.approx(0.4, abs=0.01)
    assert found.status["drift_fraction"] is Status.CAUTION
    assert found.status_of("linear_r2") is Status.OK
    assert set(found.step_status) == {Status.CAUTION}
    assert found.update_status == (Status.CAUTION, *[Status.OK] * 11)
    loud = statistics(replace(inc, rounding=(0.0, *[100.0] * 12)))
    assert loud.status["linear_r2"] is Status.BELOW_RESOLUTION
    assert loud.values["linear_r2"] is None
    assert loud.raw["linear_r2"] == pytest.approx(found.values["linear_r2"])


# --- undefined ----------------------------------------------------------------------------------


def test_too_few_checkpoints() -> None:
    found = statistics(one(1))
    assert found.status["drift_fraction"] is Status.NOT_APPLICABLE
    assert found.status["temporal_pc1"] is Status.NOT_APPLICABLE
    assert found.values["update_norm"] == 1
    assert drift_or_diffusion(found).code == "UNDETERMINED"
    two = statistics(one(2))
    for key in ("drift_fraction", "increment_cosine", "temporal_pc1", "linear_r2_origin"):
        assert two.values[key] is not None, key
    for key in ("linear_r2", "rank1_coefficient_r2"):
        assert two.status[key] is Status.NOT_APPLICABLE, key
    assert drift_or_diffusion(two).code == "UNDETERMINED"
    three = statistics(one(3))
    assert three.values["linear_r2"] is not None
    assert three.status["nonlinearity@quadratic"] is Status.NOT_APPLICABLE


def test_nothing_moved() -> None:
    found = statistics(from_steps(torch.zeros(5, 5)))
    for key in STATISTICS:
        if key in ("update_norm", "path_length", "relative_update"):
            assert found.values[key] == 0
        else:
            assert found.status[key] is Status.ZERO_UPDATE, key
    assert drift_or_diffusion(found).code == "NO_UPDATE"


def test_some_steps_did_not_move() -> None:
    """Two checkpoints alike: what is 0/0 is left out of the means, never made 0 or 1."""
    H = torch.eye(6)
    H[2, 2] = 0
    found = statistics(from_steps(H))
    assert found.series["increment_cosine"] == (0.0, None, None, 0.0, 0.0)
    assert found.values["increment_cosine"] == 0
    only_first = statistics(from_steps(torch.tensor([1.0, 0, 0, 0]).diag()))
    assert only_first.status["linear_r2"] is Status.NOT_APPLICABLE
    assert only_first.status["increment_cosine"] is Status.NOT_APPLICABLE
    assert only_first.values["temporal_pc1"] == pytest.approx(1)


def test_not_finite() -> None:
    found = statistics(from_steps(torch.full((4, 4), torch.nan)))
    assert set(found.status.values()) == {Status.NON_FINITE}
    assert drift_or_diffusion(found).code == "UNDETERMINED"


@pytest.mark.parametrize("T", [1, 2, 3, 4, 8, 27])
def test_a_value_is_missing_exactly_where_its_status_says_so(T: int) -> None:
    for inc in (one(T), one(T, 1.0), replace(one(T), rounding=(1.0,) * (T + 1))):
        found = statistics(inc)
        for key, value in found.values.items():
            assert (value is None) == found.status_of(key).is_null, key


# --- the headline -------------------------------------------------------------------------------


def test_the_sign_test_is_exact() -> None:
    """Against brute force, and uniform for walks: at level .25 it speaks for about a quarter."""
    generator = torch.Generator().manual_seed(3)
    called = 0
    for _ in range(200):
        X = torch.randn(5, 40, generator=generator, dtype=torch.float64)
        H = X @ X.T
        p = sign_flip_p(H)
        signs = np.array(np.meshgrid(*[[1, -1]] * 5)).reshape(5, -1).T
        off = (H - H.diagonal().diag()).numpy()
        sums = np.einsum("ki,ij,kj->k", signs, off, signs)
        assert p == pytest.approx((sums >= off.sum() - 1e-9).mean())
        called += p <= 0.25
    assert 30 <= called <= 70
    assert sign_flip_p(torch.ones(20, 20)) == pytest.approx(1 / 4096, abs=2e-3)


def test_few_checkpoints_need_a_large_drift() -> None:
    assert drift_or_diffusion(statistics(one(4, 1.0))).code == "DRIFT"
    weak = drift_or_diffusion(statistics(one(4, 0.1)))
    assert weak.code == "NO_DRIFT"
    assert "would not be seen" in weak.text
    assert drift_or_diffusion(statistics(one(8, 0.1))).code == "DRIFT"


def test_steps_that_undo_one_another_are_called_so() -> None:
    H = torch.eye(10) - 0.4 * (torch.ones(9).diag(1) + torch.ones(9).diag(-1))
    found = drift_or_diffusion(statistics(from_steps(H)))
    assert found.code == "NO_DRIFT"
    assert "undo one another" in found.text


def test_limits_can_be_set_and_codes_are_known() -> None:
    found = statistics(one(12, 1.0))
    assert drift_or_diffusion(found).code in MOTION.codes
    strict = {**MOTION_THRESHOLDS, "level": 1e-9}
    assert drift_or_diffusion(found, thresholds=strict).code == "NO_DRIFT"


# --- sums and definitions of others -------------------------------------------------------------


def test_a_model_of_one_drifting_and_one_walking_tensor() -> None:
    """φ of the sum weighs by energy: ½·.5."""
    drifts = from_steps((torch.eye(12) + 1) / 2)
    assert statistics(drifts + one(12)).values["drift_fraction"] == pytest.approx(0.25)


def relex(deltas: np.ndarray, t: np.ndarray) -> tuple[float, np.ndarray, float]:
    """RELEX [2605.21468] on the stack itself: explained variance, coefficients, R² on t."""
    U, S, _ = np.linalg.svd(deltas, full_matrices=False)
    c = U[:, 0] * S[0]
    c = c if c[-1] > 0 else -c
    return S[0] ** 2 / (S**2).sum(), c, np.corrcoef(t, c)[0, 1] ** 2


@pytest.mark.parametrize("drift", [0.0, 0.3])
def test_relex_by_an_svd_of_the_stack(drift: float) -> None:
    weights = simulated(IRREGULAR, drift=drift, entries=3000)
    inc = increments_of_weights(IRREGULAR, weights)
    stack = (torch.stack(weights[1:]) - weights[0]).numpy()
    explained, c, r2 = relex(stack, np.array(IRREGULAR[1:]))
    found = statistics(inc)
    assert found.values["temporal_pc1"] == pytest.approx(explained, rel=1e-9)
    assert found.values["rank1_coefficient_r2"] == pytest.approx(r2, rel=1e-9)
    np.testing.assert_allclose(rank1_coefficients(inc), c, rtol=1e-8, atol=1e-9)


def test_the_rest_by_numpy_on_the_weights() -> None:
    weights = simulated(IRREGULAR, drift=0.3, entries=3000)
    D = (torch.stack(weights[1:]) - weights[0]).numpy()
    t = np.array(IRREGULAR[1:], dtype=float)
    found = statistics(increments_of_weights(IRREGULAR, weights))
    around = ((D - D.mean(0)) ** 2).sum()

    def missed(*columns: np.ndarray) -> float:
        X = np.stack(columns, 1)
        return ((D - X @ np.linalg.lstsq(X, D, rcond=None)[0]) ** 2).sum()

    line = missed(np.ones_like(t), t)
    _, _, early = np.linalg.svd(D[: len(t) // 2], full_matrices=False)
    _, _, whole = np.linalg.svd(D, full_matrices=False)
    expected = {
        "linear_r2": 1 - line / around,
        "linear_r2_origin": 1 - missed(t) / (D**2).sum(),
        "nonlinearity@quadratic": 1 - missed(np.ones_like(t), t, t * t) / line,
        "nonlinearity@sqrt": 1 - missed(np.ones_like(t), np.sqrt(t)) / line,
        "nonlinearity@log": 1 - missed(np.ones_like(t), np.log(t)) / line,
        "subspace_drift": abs(early[0] @ whole[0]),
        "residual_share": 1 - (D[-1] @ early[0]) ** 2 / (D[-1] @ D[-1]),
        "relative_update": np.linalg.norm(D[-1]) / np.linalg.norm(weights[0]),
    }
    for key, value in expected.items():
        assert found.values[key] == pytest.approx(value, rel=1e-8), key
    cosines = [a @ b / np.linalg.norm(a) / np.linalg.norm(b)
               for a, b in pairwise(D)]  # fmt: skip
    assert found.series["update_cosine"] == pytest.approx(cosines)


def test_the_walk_keeps_norms_and_nothing_else() -> None:
    inc = one(6, 2.0)
    assert walk(inc).H.diagonal().tolist() == inc.H.diagonal().tolist()
    assert float(walk(inc).H.sum()) == pytest.approx(float(inc.H.trace()))


@pytest.mark.parametrize(
    ("count", "added"),
    [
        (2, {"linear_r2_origin", "straightness", "temporal_pc1", "subspace_drift"}),
        (3, {"linear_r2", "rank1_coefficient_r2", "nonlinearity@sqrt", "nonlinearity@log"}),
        (4, {"nonlinearity@quadratic"}),
    ],
)
def test_each_statistic_comes_with_as_many_checkpoints_as_it_needs(
    count: int, added: set[str]
) -> None:
    """A fit has one point more than it has numbers; of fewer it says nothing."""
    gaps = torch.tensor([1.0, 2.0, 0.5, 1.5])[:count, None]
    rows = gaps.sqrt() * torch.randn(count, 500, generator=torch.Generator().manual_seed(3))
    found = statistics(from_steps((rows @ rows.T).double()))
    if count > 2:
        before = statistics(from_steps((rows[:-1] @ rows[:-1].T).double()))
        assert {before.values[key] for key in added} == {None}
    assert None not in {found.values[key] for key in added}
