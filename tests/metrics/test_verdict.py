"""Which word is said of which update, by which rule, and what the model is called.

See docs/methods.md#verdict.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from geoscope.errors import OptionError
from geoscope.metrics import (
    CODES,
    THRESHOLDS,
    VERDICT_IDS,
    MatrixVerdict,
    Measured,
    judge,
    judge_model,
    verdict_dimension,
)
from geoscope.metrics.verdict import _of_base
from geoscope.records import Status, Verdict
from tests.helpers.matrices import DTYPES, gaussian, updated, with_spectrum
from tests.helpers.measuring import all_instances, judged, numbers, stored

DEGREE = math.pi / 180
K = 8


# --- four updates that one number cannot tell apart ---------------------------------------------


def principal(base: Tensor, k: int = 16) -> Tensor:
    U, S, Vh = torch.linalg.svd(base, full_matrices=False)
    return (U[:, :k] * S[:k]) @ Vh[:k]


def turned(base: Tensor, rho: float) -> Tensor:
    """A pure rotation R·W0 of relative size rho (to first order)."""
    X = gaussian(len(base), len(base), seed=21)
    step = (X - X.T) @ base
    return torch.linalg.matrix_exp((X - X.T) * (rho * base.norm() / step.norm())) @ base


def tuned(kind: str, base: Tensor, rho: float) -> Tensor:
    m, n = base.shape
    match kind:
        case "isotropic":
            return updated(base, gaussian(m, n, seed=22), rho)
        case "principal":
            return updated(base, principal(base), rho)
        case "rank_16":
            low = gaussian(m, 16, seed=23) @ gaussian(16, n, seed=24)
            return updated(base, low, rho)
        case _:
            return turned(base, rho)


BASES = {
    "gaussian": gaussian(128, 128, seed=1),
    "tall": gaussian(192, 128, seed=2),
    "power_law": with_spectrum(128, 160, torch.arange(1, 129) ** -0.3, seed=3),
}
KINDS = ("isotropic", "principal", "rank_16", "rotation")


def fingerprint(kind: str, base: Tensor, rho: float, dtype: torch.dtype) -> dict[str, object]:
    """Code, lift, stable rank over its null, spectral lift."""
    W0 = base.to(dtype)
    W1 = tuned(kind, W0.double(), rho).to(dtype)
    found, one = judged(W0, W1)
    lift, stable, spectral = numbers(found, f"lift@{one.k}", "update.stable_rank", "spectral_lift")
    return {
        "code": one.code,
        "words": one.words,
        "lift": lift,
        "stable": stable / found.nulls["update.stable_rank"],
        "spectral": spectral,
    }


@pytest.mark.parametrize(
    ("dtype", "rho"), [("fp32", 1e-3), ("fp32", 1e-2), ("fp32", 5e-2), ("bf16", 2e-2)]
)
@pytest.mark.parametrize("base", BASES)
def test_four_updates_are_told_apart(base: str, dtype: str, rho: float) -> None:
    """No single number does it: lift, stable rank and spectral share together do."""
    seen = {kind: fingerprint(kind, BASES[base], rho, DTYPES[dtype]) for kind in KINDS}
    isotropic, leading, low, rotation = (seen[kind] for kind in KINDS)

    assert isotropic["code"] == low["code"] == "OFF_PRINCIPAL"
    assert leading["code"] == "ON_PRINCIPAL"
    assert rotation["code"] in ("OFF_PRINCIPAL", "MIXED")

    for direction in (isotropic, low):
        assert direction["lift"] == pytest.approx(1, abs=0.4)  # 4 of its sd, √2/16
        assert direction["spectral"] == pytest.approx(1, abs=0.4)
    assert isotropic["stable"] == pytest.approx(1, abs=0.15)
    assert low["stable"] == pytest.approx(0.25, abs=0.1)
    assert isotropic["words"] == "indistinguishable from isotropic"
    assert low["words"] == "isotropic in direction, but on few directions"

    assert float(str(leading["lift"])) > 30
    assert float(str(leading["spectral"])) > 10
    assert leading["words"] == ""

    assert float(str(rotation["spectral"])) < 0.25
    assert str(rotation["words"]).startswith("rotates the singular frames")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("base", BASES)
def test_bf16_hides_all_four_at_one_in_a_thousand(base: str, kind: str) -> None:
    (W0,) = stored(torch.bfloat16, BASES[base])
    (W1,) = stored(torch.bfloat16, tuned(kind, W0.double(), 1e-3))
    found, one = judged(W0, W1)
    assert one.code == "UNDETERMINED"
    assert one.clause.startswith("ν ")
    assert found.status["update.stable_rank"] is Status.BELOW_RESOLUTION


def test_a_rotation_that_turns_the_leading_directions_far_distorts() -> None:
    base = with_spectrum(128, 128, torch.cat([torch.full((16,), 3.0), torch.ones(112)]), seed=4)
    found, one = judged(base.float(), turned(base, 1.2).float())
    assert one.code == "TOO_FAR"  # which stands before it
    one = judge(found, 16, {"too_far.cosine": -1.0})
    assert one.code == "SPECTRUM_DISTORTED"
    assert one.clause.startswith("mean angle")


def test_pissa_counted_twice_is_named() -> None:
    base = gaussian(256, 256, seed=5)
    found, one = judged(base.float(), (base + principal(base, 32)).float())
    assert one.code == "INIT_MISMATCH"
    rho, share = numbers(found, "relative_update", "spectral_share")
    assert rho > 0.2
    assert share == pytest.approx(1, abs=1e-6)


def test_one_direction_is_rank_collapse() -> None:
    base = gaussian(96, 96, seed=6)
    direction = gaussian(96, 1, seed=7) @ gaussian(1, 96, seed=8)
    assert judged(base.float(), updated(base, direction, 0.02).float())[1].code == "RANK_COLLAPSE"


def test_the_last_triplets_are_off_principal_though_they_move_singular_values() -> None:
    base = gaussian(128, 128, seed=9)
    last = base - principal(base, 112)
    found, one = judged(base.float(), updated(base, last, 0.01).float())
    assert numbers(found, "spectral_share")[0] > 0.9
    assert one.code == "OFF_PRINCIPAL"


# --- rules, in order ----------------------------------------------------------------------------

ORDINARY = {
    "relative_update": 1e-3,
    "precision_ratio": 0.01,
    "base_cosine": 1.0,
    "base_share": 2.5e-7,
    f"energy_of_base@{K}": 1e-7,
    "update.stable_rank": 30.0,
    "update.top_share@1": 0.03,
    f"energy_right@{K}": 0.06,
    f"energy_left@{K}": 0.06,
    f"energy_two_sided@{K}": 0.01,
    f"lift@{K}": 1.0,
    f"versus_base@{K}": 0.03,
    f"angle_left_mean@{K}": 1e-3,
    f"angle_right_mean@{K}": 1e-3,
    f"gap@{K}": 0.01,
    "nss": 1e-4,
    "spectral_share": 0.1,
    "spectral_lift": 1.0,
    "rank_ratio": 1.0,
}
SHORT = {
    "rho": "relative_update",
    "nu": "precision_ratio",
    "stable": "update.stable_rank",
    "top": "update.top_share@1",
    "C_R": f"energy_right@{K}",
    "C_L": f"energy_left@{K}",
    "C_LR": f"energy_two_sided@{K}",
    "lift": f"lift@{K}",
    "versus": f"versus_base@{K}",
    "left": f"angle_left_mean@{K}",
    "right": f"angle_right_mean@{K}",
    "nss": "nss",
    "share": "spectral_share",
    "spectral": "spectral_lift",
    "ratio": "rank_ratio",
}


def row_with(**changes: float) -> Measured:
    """An isotropic update's numbers with some of them changed."""
    nulls = {"update.stable_rank": 30.0, f"energy_two_sided@{K}": 0.01}
    return Measured(
        values={**ORDINARY, **{SHORT[key]: value for key, value in changes.items()}},
        nulls={**nulls, **{SHORT[side]: 0.0 for side in ("left", "right")}},
        weights={"update": 1.0, "base": 1e6, "parameters": 6400.0},
    )


def beside(found: Measured, **nulls: float) -> Measured:
    """The row with other nulls."""
    return replace(found, nulls={**found.nulls, **{SHORT[key]: v for key, v in nulls.items()}})


def weighing(found: Measured, energy: float) -> Measured:
    """The row with another ‖ΔW‖²."""
    return replace(found, weights={**found.weights, "update": energy})


def without(found: Measured, key: str, status: Status, *, floor: float | None = None) -> Measured:
    floors = found.floors if floor is None else {**found.floors, SHORT[key]: floor}
    return replace(
        found,
        values={**found.values, SHORT[key]: None},
        status={**found.status, SHORT[key]: status},
        floors=floors,
    )


def code_of(found: Measured) -> str:
    return judge(found, K).code


def test_the_ordinary_row_holds_what_the_rules_take() -> None:
    templates = {one.replace("@k", f"@{K}") for one in VERDICT_IDS}
    assert set(ORDINARY) == templates
    assert set(VERDICT_IDS) <= {one.id.replace(f"@{K}", "@k") for one in all_instances((K,))}
    assert code_of(row_with()) == "OFF_PRINCIPAL"


def test_the_first_rule_that_matches_decides() -> None:
    """One row meets every rule; each is then taken away in turn, and the next one speaks."""
    steps: list[tuple[dict[str, float], str]] = [
        (
            {
                "rho": 0.3,
                "share": 0.95,
                "versus": 1.3,
                "nu": 0.7,
                "top": 0.95,
                "C_LR": 0.6,
                "C_L": 0.8,
                "nss": 0.06,
                "spectral": 20.0,
            },
            "INIT_MISMATCH",
        ),
        ({"rho": 0.1}, "UNDETERMINED"),
        ({"nu": 0.1}, "RANK_COLLAPSE"),
        ({"top": 0.5}, "ON_PRINCIPAL"),
        ({"C_LR": 0.04}, "ON_PRINCIPAL"),  # by its second form
        ({"versus": 0.15}, "SPECTRUM_DISTORTED"),
        ({"nss": 0.01}, "MIXED"),
        ({"C_L": 0.4}, "OFF_PRINCIPAL"),
    ]
    changes: dict[str, float] = {}
    for step, code in steps:
        changes.update(step)
        assert code_of(row_with(**changes)) == code


UP, DOWN = math.inf, -math.inf


@pytest.mark.parametrize(
    ("rest", "key", "limit", "meets", "code"),
    [
        # > and < of the rules exclude the limit, ≥ and ≤ include it
        ({"share": 1.0, "versus": 2.0, "C_LR": 0.1}, "rho", 0.2, UP, "INIT_MISMATCH"),
        ({"rho": 0.3, "versus": 2.0, "C_LR": 0.1}, "share", 0.9, UP, "INIT_MISMATCH"),
        ({"rho": 0.3, "share": 1.0, "C_LR": 0.1}, "versus", 1.2, UP, "INIT_MISMATCH"),
        ({}, "nu", 0.6, UP, "UNDETERMINED"),
        ({}, "top", 0.9, UP, "RANK_COLLAPSE"),
        ({}, "ratio", 0.9, DOWN, "SPECTRUM_DISTORTED"),
        ({}, "left", 10 * DEGREE, UP, "SPECTRUM_DISTORTED"),
        ({}, "right", 10 * DEGREE, UP, "SPECTRUM_DISTORTED"),
        ({}, "left", 1 * DEGREE, UP, "MIXED"),
        ({}, "right", 1 * DEGREE, UP, "MIXED"),
        ({}, "C_LR", 0.05, UP, "MIXED"),
        ({}, "versus", 0.2, UP, "MIXED"),
        ({}, "C_L", 0.5, UP, "MIXED"),
        ({}, "C_R", 0.5, UP, "MIXED"),
    ],
)
def test_limits_that_must_be_passed(
    rest: dict[str, float], key: str, limit: float, meets: float, code: str
) -> None:
    beyond = math.nextafter(limit, meets)
    assert code_of(row_with(**rest, **{key: beyond})) == code
    assert code_of(row_with(**rest, **{key: limit})) != code


@pytest.mark.parametrize(
    ("rest", "key", "limit", "code"),
    [
        ({}, "C_LR", 0.5, "ON_PRINCIPAL"),
        ({"spectral": 20.0, "versus": 0.6}, "share", 0.3, "ON_PRINCIPAL"),
        ({"share": 0.4, "versus": 0.6}, "spectral", 10.0, "ON_PRINCIPAL"),
        ({"share": 0.4, "spectral": 20.0}, "versus", 0.5, "ON_PRINCIPAL"),
        ({}, "nss", 0.05, "SPECTRUM_DISTORTED"),
    ],
)
def test_limits_that_need_only_be_reached(
    rest: dict[str, float], key: str, limit: float, code: str
) -> None:
    assert code_of(row_with(**rest, **{key: limit})) == code
    assert code_of(row_with(**rest, **{key: math.nextafter(limit, DOWN)})) != code


@pytest.mark.parametrize(("limit", "beyond"), [(10, "SPECTRUM_DISTORTED"), (1, "MIXED")])
def test_an_angle_is_forgiven_up_to_one_and_a_half_times_its_null(limit: int, beyond: str) -> None:
    null = limit * DEGREE  # 2 × it exceeds the limit of the rule
    for side in ("left", "right"):
        below, above = (beside(row_with(**{side: x * null}), **{side: null}) for x in (1.99, 2.01))
        assert code_of(above) == beyond
        assert code_of(below) != beyond


def test_the_larger_angle_counts_with_its_own_null() -> None:
    left, right = row_with(left=25 * DEGREE), row_with(right=25 * DEGREE)
    assert code_of(beside(right, right=20 * DEGREE)) != "SPECTRUM_DISTORTED"
    assert code_of(beside(left, right=20 * DEGREE)) == "SPECTRUM_DISTORTED"


# --- numbers that are missing -------------------------------------------------------------------


def test_zero_update_and_failures_come_before_the_rules() -> None:
    zero = without(row_with(top=0.99), "nu", Status.ZERO_UPDATE)
    assert code_of(zero) == "NO_UPDATE"
    for status in (Status.NON_FINITE, Status.NOT_CONVERGED):
        failed = judge(without(row_with(), "nss", status), K)
        assert (failed.code, failed.clause) == ("UNDETERMINED", status.value)


def test_a_condition_that_does_not_apply_is_dropped() -> None:
    complete = without(row_with(), "left", Status.NOT_APPLICABLE)
    assert code_of(complete) == "OFF_PRINCIPAL"
    both = without(complete, "right", Status.NOT_APPLICABLE)
    assert code_of(both) == "OFF_PRINCIPAL"
    assert "angle" not in judge(both, K).clause
    # the side that applies still counts
    assert code_of(without(row_with(right=5 * DEGREE), "left", Status.NOT_APPLICABLE)) == "MIXED"


def test_a_rule_whose_every_condition_is_dropped_does_not_fire() -> None:
    assert code_of(without(row_with(), "top", Status.NOT_APPLICABLE)) == "OFF_PRINCIPAL"
    found = row_with()
    for key in ("C_LR", "C_L", "C_R", "versus", "lift", "left", "right"):
        found = without(found, key, Status.NOT_APPLICABLE)
    assert code_of(found) == "MIXED"


@pytest.mark.parametrize("key", ["C_LR", "versus", "C_L", "C_R"])
def test_a_number_below_resolution_meets_no_condition(key: str) -> None:
    assert code_of(without(row_with(), key, Status.BELOW_RESOLUTION)) == "MIXED"


def test_no_rule_fires_on_a_number_below_resolution() -> None:
    for key, value in (("top", 0.99), ("nss", 0.2), ("ratio", 0.1)):
        found = row_with(**{key: value})
        assert code_of(found) != "OFF_PRINCIPAL"
        assert code_of(without(found, key, Status.BELOW_RESOLUTION)) == "OFF_PRINCIPAL"


def test_an_angle_below_resolution_is_bounded_by_what_rounding_turns() -> None:
    small = without(row_with(), "left", Status.BELOW_RESOLUTION, floor=0.5 * DEGREE)
    assert code_of(small) == "OFF_PRINCIPAL"
    large = without(row_with(), "left", Status.BELOW_RESOLUTION, floor=2 * DEGREE)
    assert code_of(large) == "MIXED"
    # an upper bound says nothing about an angle that would have to be large
    huge = without(row_with(), "left", Status.BELOW_RESOLUTION, floor=20 * DEGREE)
    assert code_of(huge) == "MIXED"
    unbounded = without(row_with(), "left", Status.BELOW_RESOLUTION)
    assert code_of(without(unbounded, "right", Status.BELOW_RESOLUTION)) == "MIXED"


# --- words --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, "indistinguishable from isotropic"),
        ({"lift": 2.0, "stable": 60.0}, "indistinguishable from isotropic"),
        ({"lift": 0.5, "stable": 15.0}, "indistinguishable from isotropic"),
        ({"stable": 14.0}, "isotropic in direction, but on few directions"),
        ({"lift": 2.1}, "enriched 2.1× over isotropic"),
        ({"lift": 16.4, "stable": 3.0}, "enriched 16× over isotropic"),
        ({"lift": 163.7}, "enriched 164× over isotropic"),
        ({"lift": 0.49}, "avoids the leading directions"),
        ({"spectral": 0.49}, "rotates the singular frames, keeps the singular values"),
        ({"spectral": 0.5}, "indistinguishable from isotropic"),
        (
            {"spectral": 0.2, "lift": 3.0},
            "rotates the singular frames, keeps the singular values; enriched 3× over isotropic",
        ),
        ({"spectral": 0.2, "lift": 0.1}, "rotates the singular frames, keeps the singular values"),
    ],
)
@pytest.mark.parametrize("mixed", [False, True])
def test_appended_words(changes: dict[str, float], words: str, mixed: bool) -> None:
    found = judge(row_with(**changes, **({"C_L": 0.6} if mixed else {})), K)
    assert found.code == ("MIXED" if mixed else "OFF_PRINCIPAL")
    assert found.words == words


@pytest.mark.parametrize("changes", [{"nss": 0.1}, {"C_LR": 0.7}, {"top": 0.95}, {"nu": 0.9}])
def test_other_codes_get_no_words(changes: dict[str, float]) -> None:
    assert judge(row_with(**changes), K).words == ""


def test_words_need_their_numbers() -> None:
    found = without(row_with(), "stable", Status.BELOW_RESOLUTION)
    assert judge(found, K).words == ""
    assert judge(without(found, "lift", Status.BELOW_RESOLUTION), K).words == ""


def test_the_clause_that_fired_is_named_with_its_numbers() -> None:
    assert judge(row_with(nss=0.1), K).clause == "NSS 0.1 ≥ 0.05"
    assert judge(row_with(ratio=0.5), K).clause == "rank ratio 0.5 < 0.9"
    assert judge(row_with(left=20 * DEGREE), K).clause == "mean angle 0.349 > 0.175"
    assert judge(row_with(C_LR=0.6), K).clause == f"C_LR({K}) 0.6 ≥ 0.5"
    assert judge(row_with(share=0.4, spectral=20.0, versus=0.6), K).clause == (
        f"NSS/ρ 0.4 ≥ 0.3 and NSS lift 20 ≥ 10 and C_LR/E_{K} 0.6 ≥ 0.5"
    )
    assert judge(row_with(C_L=0.6), K).clause == "no rule matched"


def test_the_entry_of_a_row_says_code_dimension_clause_and_words() -> None:
    assert judge(row_with(nss=0.1), K).to_json() == {
        "code": "SPECTRUM_DISTORTED",
        "k": K,
        "clause": "NSS 0.1 ≥ 0.05",
    }
    assert set(judge(row_with(), K).to_json()) == {"code", "k", "clause", "words"}


# --- limits -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value", "changes", "code"),
    [
        ("init_mismatch.relative_update", 0.5, {"rho": 0.3, "share": 1.0, "versus": 2.0}, "MIXED"),
        ("init_mismatch.spectral_share", 0.99, {"rho": 0.3, "share": 0.95, "versus": 2}, "MIXED"),
        ("init_mismatch.versus_base", 3.0, {"rho": 0.3, "share": 1.0, "versus": 2.0}, "MIXED"),
        ("undetermined.precision_ratio", 0.005, {}, "UNDETERMINED"),
        ("rank_collapse.top_share", 0.02, {}, "RANK_COLLAPSE"),
        ("on_principal.energy_two_sided", 0.005, {}, "ON_PRINCIPAL"),
        ("on_principal.spectral_share", 0.5, {"share": 0.4, "spectral": 20, "versus": 1}, "MIXED"),
        ("on_principal.spectral_lift", 30.0, {"share": 0.4, "spectral": 20, "versus": 1}, "MIXED"),
        ("on_principal.versus_base", 1.1, {"share": 0.4, "spectral": 20, "versus": 1}, "MIXED"),
        ("distorted.nss", 1e-5, {}, "SPECTRUM_DISTORTED"),
        ("distorted.rank_ratio", 1.1, {}, "SPECTRUM_DISTORTED"),
        ("distorted.angle", 1e-4, {}, "SPECTRUM_DISTORTED"),
        ("off_principal.energy_two_sided", 0.005, {}, "MIXED"),
        ("off_principal.versus_base", 0.01, {}, "MIXED"),
        ("off_principal.energy_one_sided", 0.05, {}, "MIXED"),
        ("off_principal.angle", 1e-4, {}, "MIXED"),
    ],
)
def test_every_limit_can_be_overridden(
    name: str, value: float, changes: dict[str, float], code: str
) -> None:
    found = row_with(**changes)
    assert code_of(found) != code
    assert judge(found, K, {name: value}).code == code


@pytest.mark.parametrize("rule", ["distorted", "off_principal"])
def test_the_factors_on_the_angle_null_can_be_overridden(rule: str) -> None:
    limit = 10 * DEGREE if rule == "distorted" else 1 * DEGREE
    found = beside(row_with(left=1.2 * limit), left=limit)
    assert code_of(found) != code_of(row_with(left=1.2 * limit))
    strict = judge(found, K, {f"{rule}.angle_over_null": 0.5})
    assert strict.code == code_of(row_with(left=1.2 * limit))


def test_the_limits_of_the_words_can_be_overridden() -> None:
    found = row_with(lift=1.5, spectral=0.7)
    assert judge(found, K, {"words.enriched": 1.2}).words == "enriched 1.5× over isotropic"
    assert judge(found, K, {"words.avoids": 1.8}).words == "avoids the leading directions"
    assert judge(found, K, {"words.spectral_lift": 0.8}).words.startswith("rotates")


def test_unknown_limits_are_refused() -> None:
    with pytest.raises(OptionError, match=r"distorted\.nsss"):
        judge(row_with(), K, {"distorted.nsss": 1.0})


def test_every_limit_has_a_standing_and_belongs_to_a_rule() -> None:
    rules = {code.lower() for code in CODES} | {"distorted", "words", "capacity", "lineage"}
    for name, threshold in THRESHOLDS.items():
        assert threshold.standing.strip()
        assert name.partition(".")[0] in rules


# --- the model ----------------------------------------------------------------------------------


def model(*parts: tuple[str, dict[str, float], float], limits: dict[str, float] | None = None):
    """The verdict on matrices given as (module, changes to the ordinary row, ‖ΔW‖²)."""
    found = [weighing(row_with(**changes), energy) for _, changes, energy in parts]
    return verdict(found, [module for module, _, _ in parts], limits)


def verdict(
    found: list[Measured], modules: list[str], limits: dict[str, float] | None = None
) -> Verdict:
    judged_rows: list[MatrixVerdict] = [judge(one, K, limits) for one in found]
    names = [f"layers.{i}.{module}" for i, module in enumerate(modules)]
    return judge_model(names, modules, found, judged_rows, limits)


OFF: dict[str, float] = {}
ON = {"C_LR": 0.7}
DISTORTED = {"nss": 0.1}
RANK = {"top": 0.95}


def test_half_of_the_energy_names_the_model() -> None:
    found = model(("q", OFF, 5.0), ("k", ON, 3.0), ("v", DISTORTED, 2.0))
    assert (found.code, found.share) == ("OFF_PRINCIPAL", 0.5)
    assert found.shares == pytest.approx(
        {"ON_PRINCIPAL": 0.3, "SPECTRUM_DISTORTED": 0.2, "OFF_PRINCIPAL": 0.5}
    )
    assert found.counts == {"ON_PRINCIPAL": 1, "SPECTRUM_DISTORTED": 1, "OFF_PRINCIPAL": 1}


def test_energy_counts_and_not_the_number_of_matrices() -> None:
    found = model(("q", OFF, 1.0), ("k", OFF, 1.0), ("v", OFF, 1.0), ("o", ON, 9.0))
    assert (found.code, found.share) == ("ON_PRINCIPAL", 0.75)


def test_without_half_of_the_energy_the_model_is_mixed() -> None:
    found = model(("q", OFF, 4.9), ("k", ON, 3.1), ("v", DISTORTED, 2.0))
    assert (found.code, found.share) == ("MIXED", 0.0)
    mixed = model(("q", OFF, 4.0), ("k", ON, 3.0), ("v", {"C_L": 0.6}, 3.0))
    assert (mixed.code, mixed.share) == ("MIXED", pytest.approx(0.3))


def test_the_flagged_are_named_worst_first_and_by_kind() -> None:
    found = model(
        ("q", OFF, 90.0), ("k", ON, 1.0), ("v", RANK, 3.0), ("v", DISTORTED, 2.0), ("o", OFF, 4.0)
    )
    assert found.flagged == ("layers.2.v", "layers.3.v", "layers.1.k")
    assert "Flagged 3 of 5 matrices (k 1, v 2), worst: layers.2.v" in found.text


def test_nothing_changed_anywhere() -> None:
    rows = [without(weighing(row_with(), 0.0), "nu", Status.ZERO_UPDATE) for _ in range(3)]
    found = verdict(rows, ["q", "k", "v"])
    assert (found.code, found.share, found.shares) == ("NO_UPDATE", None, {})
    assert found.counts == {"NO_UPDATE": 3}


def test_matrices_without_a_number_are_counted_apart() -> None:
    failed = Measured(
        values=dict.fromkeys(ORDINARY),
        status=dict.fromkeys(ORDINARY, Status.NON_FINITE),
        weights={"parameters": 6400.0},
    )
    found = verdict([row_with(), failed], ["q", "k"])
    assert (found.code, found.share) == ("OFF_PRINCIPAL", 1.0)
    assert found.counts == {"UNDETERMINED": 1, "OFF_PRINCIPAL": 1}
    assert "1 without a verdict" in found.text
    flagged = verdict([row_with(C_LR=0.7), failed], ["q", "k"])
    assert "1 without a verdict" in flagged.text
    alone = verdict([failed], ["q"])
    assert (alone.code, alone.share) == ("UNDETERMINED", None)


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        (OFF, "OFF_PRINCIPAL"),
        (ON, "ON_PRINCIPAL"),
        (DISTORTED, "SPECTRUM_DISTORTED"),
        (RANK, "RANK_COLLAPSE"),
        ({"rho": 0.3, "share": 1.0, "versus": 2.0}, "INIT_MISMATCH"),
        ({"nu": 0.9}, "UNDETERMINED"),
        ({"C_L": 0.6}, "MIXED"),
    ],
)
def test_the_text_states_a_pattern_and_no_outcome(changes: dict[str, float], code: str) -> None:
    found = model(("q", changes, 1.0))
    assert found.code == code
    if code not in ("UNDETERMINED", "MIXED"):
        assert found.text.startswith("pattern consistent with")
    for claim in ("accuracy", "training collapsed", "will lose", "failed", "broken"):
        assert claim not in found.text
    if code == "UNDETERMINED":
        assert "adapter itself or the fp32 master weights would settle it" in found.text


def test_intruders_are_told_with_a_warning() -> None:
    found = row_with()
    found.values["intruders"] = 7
    text = verdict([found], ["q"]).text
    assert "7 intruder dimensions (the count is not causal)" in text
    assert "intruder" not in verdict([row_with()], ["q"]).text


def test_the_models_words_weigh_captured_energy() -> None:
    """Lift of the model: (8·.01·3 + 1·.01·1)/(.01·3 + .01·1) = 6.25."""
    found = model(("q", {"lift": 8.0}, 3.0), ("k", {"lift": 1.0}, 1.0))
    assert "enriched 6.2× over isotropic" in found.text


def test_the_models_words_take_means_over_its_matrices() -> None:
    def words(key: str, *numbers: float) -> str:
        rows = zip("qkv", numbers, strict=True)
        return model(*((module, {key: number}, 1.0) for module, number in rows)).text

    assert "indistinguishable from isotropic" in words("stable", 60.0, 5.0, 20.0)  # 28 of 30
    assert "on few directions" in words("stable", 20.0, 10.0, 10.0)  # 13 of 30
    assert "rotates the singular frames" in words("spectral", 0.1, 0.6, 0.7)
    assert "rotates the singular frames" not in words("spectral", 0.4, 0.6, 0.7)


def test_limits_in_force_are_echoed_whole() -> None:
    found = model(("q", OFF, 1.0), limits={"distorted.nss": 1e-5})
    assert found.code == "SPECTRUM_DISTORTED"
    assert set(found.thresholds) == {
        key for key in THRESHOLDS if not key.startswith(("capacity.", "lineage."))
    }
    assert found.thresholds["distorted.nss"] == 1e-5
    assert found.thresholds["undetermined.precision_ratio"] == 0.6


# --- what --explain prints ----------------------------------------------------------------------


def test_explain_names_each_condition_once_with_what_it_met() -> None:
    found = model(("q", {"nss": 0.1}, 1.0), ("k", {"nss": 0.02}, 1.0), ("v", {}, 1.0))
    entries = {(one["code"], one["condition"]): one for one in found.explain}
    assert len(entries) == len(found.explain)
    nss = entries["SPECTRUM_DISTORTED", "NSS ≥"]
    assert (nss["holds"], nss["of"]) == (1, 3)
    assert (nss["least"], nss["largest"], nss["threshold"]) == (1e-4, 0.1, 0.05)
    assert nss["standing"] == THRESHOLDS["distorted.nss"].standing
    # the first matrix was decided before OFF_PRINCIPAL was asked
    off = entries["OFF_PRINCIPAL", "C_LR(k) ≤"]
    assert (off["holds"], off["of"]) == (2, 2)
    codes = [one["code"] for one in found.explain]
    assert codes == sorted(codes, key=CODES.index)


def test_explain_joins_matrices_of_different_dimension() -> None:
    small, large = row_with(), row_with()
    renamed = {key.replace(f"@{K}", "@64"): value for key, value in large.values.items()}
    large = replace(large, values=renamed)
    judged_rows = [judge(small, K), judge(large, 64)]
    found = judge_model(["a", "b"], ["q", "q"], [small, large], judged_rows)
    conditions = [one["condition"] for one in found.explain]
    assert len(conditions) == len({(one["code"], one["condition"]) for one in found.explain})
    assert {one["of"] for one in found.explain} == {2}
    assert "C_LR/E_k ≤" in conditions


def test_explain_of_numbers_that_are_missing() -> None:
    found = without(row_with(), "top", Status.BELOW_RESOLUTION)
    (top,) = [one for one in verdict([found], ["q"]).explain if one["code"] == "RANK_COLLAPSE"]
    assert (top["holds"], top["of"], top["least"], top["largest"]) == (0, 1, None, None)


def test_explain_shows_the_angle_limit_of_the_rule() -> None:
    found = beside(row_with(left=1 * DEGREE), left=20 * DEGREE)
    entries = {one["condition"]: one for one in verdict([found], ["q"]).explain}
    assert entries["mean angle >"]["threshold"] == pytest.approx(40 * DEGREE)


@pytest.mark.parametrize(
    ("shape", "k"),
    [((2, 3), 1), ((15, 90), 1), ((64, 70), 8), ((512, 520), 64), ((4096, 14336), 64)],
)
def test_dimension_of_the_verdict(shape: tuple[int, int], k: int) -> None:
    assert verdict_dimension(shape) == k
    assert verdict_dimension(shape, rank=128) == max(1, min(128, min(shape) // 8))


def test_the_base_as_part_of_the_update_is_told_over_matrices_by_their_energy() -> None:
    """Energies 1 and 3; C_LR (.5·1 + .3·3)/4, of which the base gives (.4·1 + .2·3)/4."""
    plain, verdict = judged(*(gaussian(24, 20, seed=i) for i in (1, 2)))
    rows = [
        replace(
            plain,
            values={f"energy_of_base@{K}": own, f"energy_two_sided@{K}": both},
            weights={"update": energy},
        )
        for own, both, energy in ((0.4, 0.5, 1.0), (0.2, 0.3, 3.0))
    ]
    words = [replace(verdict, k=K)] * 2
    limits = {"off_principal.energy_two_sided": 0.05}
    told = _of_base(words, rows, limits)
    assert told.endswith("of C_LR 0.35 that alone gives 0.25")
    assert _of_base(words, rows, {"off_principal.energy_two_sided": 0.26}) == ""
    half = [replace(row, values={**row.values, f"energy_of_base@{K}": 0.1}) for row in rows]
    assert _of_base(words, half, limits) == ""  # less than half of C_LR
