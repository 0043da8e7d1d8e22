"""Every rule by which matrices combine (docs/methods.md#aggregation), against hand computation."""

from __future__ import annotations

import math
from collections.abc import Mapping

import pytest

from geoscope.metrics import METRICS, Instance, Measured, aggregate, instances
from geoscope.records import Status
from tests.helpers.matrices import gaussian, updated
from tests.helpers.measuring import all_instances, rows

KS = (2, 8)
INSTANCES = {one.id: one for one in all_instances(KS)}

# Three matrices of different sizes: the second is the largest, the third has most energy.
PARAMETERS = (100.0, 600.0, 200.0)
UPDATE = (1.0, 4.0, 16.0)  # ‖ΔW‖²
BASE = (100.0, 200.0, 400.0)
TUNED = (99.0, 210.0, 390.0)
NOISE = (0.01, 0.03, 0.05)
CHANGED = (10.0, 60.0, 130.0)
SHARES = (0.5, 0.25, 0.2)  # E_k of the base
NUMBERS = (0.1, 0.3, 0.8)
NULLS = (0.2, 0.4, 0.5)

# docs/methods.md#aggregation: what is not named there is an unweighted mean.
SUMMED = {"intruders", "intruders_right"}
LARGEST = {f"angle_{side}_max@{k}" for side in ("left", "right") for k in KS} | {"suggested_rank"}
ROOT_SUM_SQUARE = {f"{role}.frobenius_norm" for role in ("base", "tuned", "update")}
BY_PARAMETERS = {"update_sparsity", "update_sparsity_abs", "update_sparsity_exact"} | {
    f"mask_density_{mask}" for mask in ("low", "principal", "control")
}
BY_CHANGED = {f"mask_overlap_{mask}" for mask in ("low", "principal", "control")}
BY_ENERGY = {"outside_span", "auc_left", "auc_right", "base_share"} | {
    f"energy_{which}@{k}" for which in ("left", "right", "two_sided", "of_base") for k in KS
}
LIFTS = {f"lift@{k}" for k in KS}
OVER_BASE = {f"versus_base@{k}" for k in KS}
OWN_RULE = {"relative_update", "precision_ratio", "base_cosine"}
MEANS = set(INSTANCES) - SUMMED - LARGEST - ROOT_SUM_SQUARE - BY_PARAMETERS - BY_CHANGED
MEANS -= BY_ENERGY | LIFTS | OVER_BASE | OWN_RULE


def matrix(
    key: str, i: int, value: float | None, *, null: float | None = None, **weights: float
) -> Measured:
    """Matrix number i with one id."""
    return Measured(
        values={key: value},
        nulls={} if null is None else {key: null},
        status={key: Status.BELOW_RESOLUTION} if value is None else {},
        raw={key: 1e9} if value is None else {},
        weights={
            "parameters": PARAMETERS[i],
            "update": UPDATE[i],
            "base": BASE[i],
            "tuned": TUNED[i],
            "noise": NOISE[i],
            "changed": CHANGED[i],
            **{f"share@{k}": SHARES[i] for k in KS},
        }
        | weights,
    )


def three(
    key: str, numbers: tuple[float | None, ...] = NUMBERS, nulls: tuple[float, ...] = NULLS
) -> list[Measured]:
    return [
        matrix(key, i, number, null=null)
        for i, (number, null) in enumerate(zip(numbers, nulls, strict=True))
    ]


def combined(key: str, found: list[Measured]) -> float | int | None:
    return aggregate(found, [INSTANCES[key]])[0][key]


def combined_null(key: str, found: list[Measured]) -> float | None:
    return aggregate(found, [INSTANCES[key]])[1].get(key)


def weighted(numbers: tuple[float, ...], weights: tuple[float, ...]) -> float:
    return sum(x * w for x, w in zip(numbers, weights, strict=True)) / sum(weights)


# --- each rule ----------------------------------------------------------------------------------


@pytest.mark.parametrize("key", sorted(MEANS))
def test_what_has_no_rule_of_its_own_is_an_unweighted_mean(key: str) -> None:
    assert combined(key, three(key)) == pytest.approx((0.1 + 0.3 + 0.8) / 3)
    assert combined_null(key, three(key)) == pytest.approx((0.2 + 0.4 + 0.5) / 3)


def test_nss_and_the_ranks_are_among_the_means() -> None:
    assert {"nss", "spectral_share", "update.effective_rank", "mask_lift_low"} <= MEANS
    assert {"intruder_energy", "angle_left_mean@8", "update.k90", "gap@2"} <= MEANS


@pytest.mark.parametrize("key", sorted(BY_PARAMETERS))
def test_sparsities_pool_the_entries(key: str) -> None:
    expected = (0.1 * 100 + 0.3 * 600 + 0.8 * 200) / 900
    assert combined(key, three(key)) == pytest.approx(expected)
    assert combined_null(key, three(key)) == pytest.approx(weighted(NULLS, PARAMETERS))


@pytest.mark.parametrize("key", sorted(BY_CHANGED))
def test_mask_overlaps_pool_the_changed_entries(key: str) -> None:
    expected = (0.1 * 10 + 0.3 * 60 + 0.8 * 130) / 200
    assert combined(key, three(key)) == pytest.approx(expected)
    assert combined_null(key, three(key)) == pytest.approx(weighted(NULLS, CHANGED))


@pytest.mark.parametrize("key", sorted(BY_ENERGY))
def test_captured_energy_is_all_that_is_captured_over_all_there_is(key: str) -> None:
    expected = (0.1 * 1 + 0.3 * 4 + 0.8 * 16) / 21
    assert combined(key, three(key)) == pytest.approx(expected)
    assert combined_null(key, three(key)) == pytest.approx(weighted(NULLS, UPDATE))


@pytest.mark.parametrize("key", sorted(ROOT_SUM_SQUARE))
def test_norms_combine_as_the_norm_of_the_whole(key: str) -> None:
    assert combined(key, three(key)) == pytest.approx(math.sqrt(0.01 + 0.09 + 0.64))


@pytest.mark.parametrize("key", sorted(LARGEST))
def test_of_the_largest_angles_and_needs_the_largest(key: str) -> None:
    numbers = (1, 9, 8) if INSTANCES[key].metric.integer else NUMBERS
    assert combined(key, three(key, numbers)) == max(numbers)


@pytest.mark.parametrize("key", sorted(SUMMED))
def test_intruders_are_counted_over_the_model(key: str) -> None:
    total = combined(key, three(key, (3, 0, 4)))
    assert total == 7
    assert isinstance(total, int)


def test_rho_is_the_root_of_all_energy_over_all_energy() -> None:
    found = three("relative_update")
    assert combined("relative_update", found) == pytest.approx(math.sqrt(21 / 700))


def test_rho_leaves_out_matrices_that_did_not_change() -> None:
    found = three("relative_update", (0.1, 0.0, 0.2))
    found[1].weights["update"] = 0.0
    assert combined("relative_update", found) == pytest.approx(math.sqrt(17 / 500))


def test_rho_of_a_model_that_did_not_change_is_zero() -> None:
    found = [matrix("relative_update", i, 0.0, update=0.0) for i in range(3)]
    assert combined("relative_update", found) == 0


def test_nu_is_all_noise_over_all_energy_of_what_changed() -> None:
    key = "precision_ratio"
    assert combined(key, three(key)) == pytest.approx(math.sqrt(0.09 / 21))
    unchanged = three(key, (0.1, 0.09, None))  # the third has neither a ν nor a share in it
    assert combined(key, unchanged) == pytest.approx(math.sqrt(0.04 / 5))


def test_lift_is_the_ratio_of_what_is_captured_to_what_is_expected() -> None:
    """Lift_i = C_i/null_i, null_i = k²/(mn); weighted by ‖ΔW‖² above and below."""
    captured = tuple(x * 64 / p for x, p in zip(NUMBERS, PARAMETERS, strict=True))
    expected = tuple(64 / p for p in PARAMETERS)
    ratio = weighted(captured, UPDATE) / weighted(expected, UPDATE)
    assert combined("lift@8", three("lift@8")) == pytest.approx(ratio)
    assert combined_null("lift@8", three("lift@8", nulls=(1, 1, 1))) == 1


def test_versus_base_is_the_ratio_of_what_is_captured_to_the_bases_own_share() -> None:
    captured = tuple(x * share for x, share in zip(NUMBERS, SHARES, strict=True))
    ratio = weighted(captured, UPDATE) / weighted(SHARES, UPDATE)
    assert combined("versus_base@8", three("versus_base@8")) == pytest.approx(ratio)


def test_the_cosine_of_a_model_is_that_of_all_its_entries() -> None:
    """⟨W0, W1⟩ = (‖W0‖² + ‖W1‖² − ‖ΔW‖²)/2 adds up, and so do the norms; cosines do not."""
    inner = (700 + 699 - 21) / 2
    expected = inner / math.sqrt(700 * 699)
    assert combined("base_cosine", three("base_cosine")) == pytest.approx(expected, rel=1e-14)
    assert combined_null("base_cosine", three("base_cosine", nulls=(0, 0, 0))) == 0


def test_every_id_has_a_rule_of_methods() -> None:
    """The sets above and the table of metrics say the same."""
    rules: dict[str, set[str]] = {}
    for key, instance in INSTANCES.items():
        rules.setdefault(instance.metric.aggregate, set()).add(key)
    assert rules == {
        "mean": MEANS,
        "sum": SUMMED,
        "max": LARGEST,
        "root_sum_square": ROOT_SUM_SQUARE,
        "parameters": BY_PARAMETERS,
        "changed": BY_CHANGED,
        "energy": BY_ENERGY,
        "lift": LIFTS,
        "versus_base": OVER_BASE,
        "relative_update": {"relative_update"},
        "precision_ratio": {"precision_ratio"},
        "base_cosine": {"base_cosine"},
    }


# --- what has no number -------------------------------------------------------------------------


@pytest.mark.parametrize("key", sorted(INSTANCES))
def test_a_value_without_a_number_never_enters_nor_does_its_raw_number(key: str) -> None:
    numbers = (2, 3, 4) if INSTANCES[key].metric.integer else NUMBERS
    with_hole = three(key, (numbers[0], None, numbers[2]))
    without = [three(key, numbers)[0], three(key, numbers)[2]]
    assert combined(key, with_hole) == combined(key, without)
    assert combined(key, with_hole) is not None


@pytest.mark.parametrize("key", sorted(INSTANCES))
def test_the_null_is_that_of_the_rows_that_were_averaged(key: str) -> None:
    with_hole = three(key, (NUMBERS[0], None, NUMBERS[2]))
    without = [three(key)[0], three(key)[2]]
    assert combined_null(key, with_hole) == combined_null(key, without)


@pytest.mark.parametrize("key", sorted(INSTANCES))
def test_an_entry_without_any_number_is_null_and_keeps_the_null_of_all_rows(key: str) -> None:
    nothing = three(key, (None, None, None))
    assert combined(key, nothing) is None
    assert combined_null(key, nothing) == combined_null(key, three(key))


def test_an_id_that_no_matrix_has_has_no_entry() -> None:
    found = three("nss")
    assert aggregate(found, [INSTANCES["spectral_share"]]) == ({}, {})
    assert aggregate([], list(INSTANCES.values())) == ({}, {})


def test_matrices_without_the_id_do_not_count() -> None:
    """As for the dimension of the verdict, which differs between shapes."""
    found = [*three("nss"), matrix("spectral_share", 0, 0.5)]
    assert combined("nss", found) == pytest.approx(0.4)
    assert combined("spectral_share", found) == 0.5


def test_a_null_that_only_some_rows_have_is_that_of_those() -> None:
    key = "nss"
    found = [matrix(key, 0, 0.1, null=0.2), matrix(key, 1, 0.3), matrix(key, 2, 0.8, null=0.4)]
    assert combined_null(key, found) == pytest.approx(0.3)
    assert combined_null(key, [matrix(key, 1, 0.3)]) is None


def test_shares_of_nothing_are_null_and_not_a_division_by_zero() -> None:
    for key in ("energy_right@8", "lift@8", "versus_base@8", "mask_overlap_low"):
        found = [matrix(key, i, 0.5, update=0.0, changed=0.0) for i in range(2)]
        assert combined(key, found) is None


# --- on matrices --------------------------------------------------------------------------------

MODEL = {  # shape → relative size of the update; the first one is too small for bf16
    (70, 40): 1e-4,
    (40, 70): 0.05,
    (64, 64): 0.2,
}


@pytest.fixture(scope="module")
def model() -> list[Measured]:
    """One row for each shape, in bf16, with an update of its own size and kind."""
    found = []
    for i, ((m, n), rho) in enumerate(MODEL.items()):
        base = gaussian(m, n, seed=i)
        low = gaussian(m, 5, seed=20 + i) @ gaussian(5, n, seed=30 + i)
        tuned = updated(base, low, rho)
        found += rows(base[None].bfloat16(), tuned[None].bfloat16(), ks=KS)
    return found


@pytest.fixture(scope="module")
def summary(model: list[Measured]) -> tuple[Mapping[str, float | int | None], Mapping[str, float]]:
    return aggregate(model, list(INSTANCES.values()))


def test_lift_of_the_model_is_its_energy_over_the_null_of_its_energy(model, summary) -> None:
    values, nulls = summary
    assert [one.values["lift@8"] is None for one in model] == [True, False, False]
    for k in KS:
        ratio = values[f"energy_two_sided@{k}"] / nulls[f"energy_two_sided@{k}"]
        assert values[f"lift@{k}"] == pytest.approx(ratio, rel=1e-12)


def test_size_of_the_model_is_that_of_all_its_entries(model, summary) -> None:
    values, _ = summary
    update = sum(one.weights["update"] for one in model)
    base = sum(one.weights["base"] for one in model)
    assert values["relative_update"] == pytest.approx(math.sqrt(update / base), rel=1e-12)
    entries = sum(m * n for m, n in MODEL)
    unchanged = sum(
        one.values["update_sparsity"] * m * n for one, (m, n) in zip(model, MODEL, strict=True)
    )
    assert values["update_sparsity"] == pytest.approx(unchanged / entries, rel=1e-12)


def test_rows_below_resolution_stay_out_of_the_summary(model, summary) -> None:
    values, nulls = summary
    key = "update.stable_rank"
    assert model[0].status[key] is Status.BELOW_RESOLUTION
    assert model[0].raw[key] > 1
    assert values[key] == pytest.approx(sum(one.values[key] for one in model[1:]) / 2)
    assert nulls[key] == pytest.approx(sum(one.nulls[key] for one in model[1:]) / 2)


def test_one_matrix_is_its_own_summary(model) -> None:
    values, nulls = aggregate(model[2:], list(INSTANCES.values()))
    for key, value in model[2].values.items():
        if value is None:
            assert values[key] is None, key
        else:
            assert values[key] == pytest.approx(value, rel=1e-12), key
    assert nulls == pytest.approx(model[2].nulls)


def test_the_order_of_the_matrices_changes_nothing(model, summary) -> None:
    assert aggregate(model[::-1], list(INSTANCES.values())) == summary


def test_lifts_of_different_dimensions_are_not_mixed() -> None:
    """k_v differs between shapes; each @k id averages the matrices that have it."""
    base = gaussian(24, 24, seed=1)
    tuned = updated(base, gaussian(24, 24, seed=2), 0.1)
    one = rows(base[None], tuned[None], ks=(2,))
    other = rows(base[None], tuned[None], ks=(3,))
    metric = next(one for one in METRICS if one.id == "lift@k")
    chosen: list[Instance] = instances(metric, (2, 3))
    values, _ = aggregate([*one, *other], chosen)
    assert values == pytest.approx(
        {"lift@2": one[0].values["lift@2"], "lift@3": other[0].values["lift@3"]}
    )


def test_sums_are_exact_whatever_the_sizes() -> None:
    key = "nss"
    found = [matrix(key, 0, x) for x in (1e16, 1.0, -1e16)]
    assert combined(key, found) == pytest.approx(1 / 3)


def test_counts_stay_whole_where_they_are_added_chosen_or_all_the_same() -> None:
    """A rank of 16 on every matrix is 16 of the model; a mean of unlike ones is none of them."""
    for key, numbers, whole in (
        ("intruders", (1, 2, 4), 7),
        ("suggested_rank", (3, 9, 4), 9),
        ("nominal_rank", (16, 16, 16), 16),
        ("update.k90", (5, 5, 5), 5),
    ):
        found = combined(key, three(key, numbers))
        assert (found, type(found)) == (whole, int), key
    unlike = combined("nominal_rank", three("nominal_rank", (8, 16, 16)))
    assert (unlike, type(unlike)) == (pytest.approx(40 / 3), float)
    same = combined("nss", three("nss", (0.5, 0.5, 0.5)))
    assert (same, type(same)) == (0.5, float)
