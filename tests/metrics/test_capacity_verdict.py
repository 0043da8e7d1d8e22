"""Which word is said of how an adapter uses its rank, by which rule (docs/methods.md#capacity)."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from geoscope.errors import OptionError
from geoscope.metrics import (
    CAPACITY_CODES,
    THRESHOLDS,
    Measured,
    judge_capacity,
    judge_capacity_model,
)
from geoscope.records import Status, Verdict

OWN = ("capacity.", "unrelated.", "too_far.")
LIMITS = {key: one.value for key, one in THRESHOLDS.items() if key.startswith(OWN)}
UP, DOWN = math.inf, -math.inf
KEYS = {
    "k90": "k90_share",
    "k99": "k99_share",
    "tail": "tail_ratio",
    "effective": "effective_rank_share",
    "suggested": "suggested_rank",
}
# An update whose spectrum falls: .6 of the rank holds 90 %, the tail is small.
ORDINARY = {"k90": 0.6, "k99": 0.9, "tail": 0.02, "effective": 0.7, "suggested": 5.0}
SATURATED = {"k90": 0.9, "tail": 0.5}
COLLAPSED = {"effective": 0.05}
IDLE = {"k99": 0.4}


def row_with(rank: float = 12, r_max: float | None = None, **changes: float) -> Measured:
    """Numbers of an adapter; r_max: default the nominal rank."""
    numbers = {KEYS[key]: value for key, value in {**ORDINARY, **changes}.items()}
    return Measured(
        values={"nominal_rank": rank, "precision_ratio": 1e-3, **numbers},
        weights={"update": 1.0, "rank": rank if r_max is None else r_max},
    )


def without(found: Measured, key: str, status: Status) -> Measured:
    name = KEYS.get(key, key)
    return replace(
        found, values={**found.values, name: None}, status={**found.status, name: status}
    )


def failed(status: Status) -> Measured:
    """As `measure_nothing` leaves it."""
    keys = ("nominal_rank", "precision_ratio", *KEYS.values())
    return Measured(values=dict.fromkeys(keys), status=dict.fromkeys(keys, status))


def full(suggested: float = 5.0) -> Measured:
    found = row_with(suggested=suggested)
    for key in ("nominal_rank", "k90", "k99", "tail", "effective"):
        found = without(found, key, Status.NOT_APPLICABLE)
    return replace(found, weights={"update": 1.0})


def code_of(found: Measured, **limits: float) -> str:
    given = {f"capacity.{key}": value for key, value in limits.items()}
    return judge_capacity(found, given).code


# --- rules, in order ----------------------------------------------------------------------------


def test_the_limits_are_those_of_methods() -> None:
    assert LIMITS == {
        "capacity.collapse_rank": 16,
        "capacity.saturated_k90": 0.75,
        "capacity.saturated_tail": 0.1,
        "capacity.concentrated": 0.1,
        "capacity.idle_k99": 0.5,
        "unrelated.cosine": 0.05,
        "unrelated.deviations": 3.0,
        "too_far.cosine": 0.6,
    }


def test_the_first_rule_that_matches_decides() -> None:
    """One row meets every rule; each is then taken away in turn, and the next one speaks."""
    changes = {**SATURATED, **COLLAPSED, **IDLE}
    steps = [
        ({}, "SATURATED"),
        ({"tail": 0.01}, "CONCENTRATED"),
        ({"effective": 0.3}, "IDLE"),
        ({"k99": 0.9}, "USED"),
    ]
    for step, code in steps:
        changes.update(step)
        assert code_of(row_with(**changes)) == code


@pytest.mark.parametrize(
    ("rest", "key", "limit", "meets", "code"),
    [
        ({"tail": 0.5}, "k90", 0.75, UP, "SATURATED"),
        ({"k90": 0.9}, "tail", 0.1, UP, "SATURATED"),
        ({}, "k99", 0.5, DOWN, "IDLE"),
    ],
)
def test_limits_that_need_only_be_reached(
    rest: dict[str, float], key: str, limit: float, meets: float, code: str
) -> None:
    assert code_of(row_with(**rest, **{key: limit})) == code
    assert code_of(row_with(**rest, **{key: math.nextafter(limit, -meets)})) == "USED"


def test_the_limit_of_a_concentrated_rank_must_be_passed() -> None:
    assert code_of(row_with(effective=math.nextafter(0.1, DOWN))) == "CONCENTRATED"
    assert code_of(row_with(effective=0.1)) == "USED"


@pytest.mark.parametrize(
    ("rank", "code"), [(12, "CONCENTRATED"), (15, "CONCENTRATED"), (16, "RANK_COLLAPSE"),
                       (256, "RANK_COLLAPSE")],
)  # fmt: skip
def test_from_rank_16_on_concentration_is_a_collapse(rank: int, code: str) -> None:
    assert code_of(row_with(rank, effective=0.05)) == code


def test_idle_counts_the_nominal_rank_and_not_a_doubled_one() -> None:
    """k99/r_max = .4 of r_max = 2r is .8 of the r that it was trained with."""
    assert code_of(row_with(8, k99=0.4)) == "IDLE"
    assert code_of(row_with(8, r_max=16, k99=0.4)) == "USED"
    assert code_of(row_with(8, r_max=16, k99=0.25)) == "IDLE"
    assert code_of(row_with(8, r_max=16, k99=0.2501)) == "USED"


# --- numbers that are missing -------------------------------------------------------------------


def test_what_comes_before_the_rules() -> None:
    zero = without(row_with(**SATURATED), "precision_ratio", Status.ZERO_UPDATE)
    assert code_of(zero) == "NO_UPDATE"
    for status in (Status.NON_FINITE, Status.NOT_CONVERGED):
        found = judge_capacity(failed(status))
        assert (found.code, found.clause) == ("UNDETERMINED", status.value)
    assert code_of(full()) == "FULL_UPDATE"


def test_a_missing_number_meets_no_rule_and_rules_none_out() -> None:
    """A rank whose tail is rounding was not seen to be used."""
    unresolved = row_with()
    for key in ("k90", "k99", "tail", "effective"):
        unresolved = without(unresolved, key, Status.BELOW_RESOLUTION)
    found = judge_capacity(unresolved)
    assert found.code == "UNDETERMINED"
    assert found.clause == "no number to rule out SATURATED or CONCENTRATED or IDLE"
    # amplitudes alone are missing: SATURATED is ruled out by k90, the others are open
    partly = unresolved
    for key in ("k90",):
        partly = replace(partly, values={**partly.values, KEYS[key]: 0.6})
    assert judge_capacity(partly).clause == "no number to rule out CONCENTRATED or IDLE"
    assert code_of(without(row_with(), "tail", Status.BELOW_RESOLUTION)) == "USED"
    assert code_of(without(row_with(k90=0.9), "tail", Status.BELOW_RESOLUTION)) == "UNDETERMINED"
    assert code_of(without(row_with(**IDLE), "tail", Status.BELOW_RESOLUTION)) == "IDLE"


def test_the_clause_that_fired_is_named_with_its_numbers() -> None:
    assert (
        judge_capacity(row_with(**SATURATED)).clause == "k90/r_max 0.9 ≥ 0.75 and σ_r/σ1 0.5 ≥ 0.1"
    )
    assert judge_capacity(row_with(**COLLAPSED)).clause == "effective rank/r_max 0.05 < 0.1"
    assert judge_capacity(row_with(**IDLE)).clause == "k99/r 0.4 ≤ 0.5"
    assert judge_capacity(row_with()).clause == "no rule of misuse matched"


def test_the_entry_of_a_row_has_no_dimension() -> None:
    assert judge_capacity(row_with(**IDLE)).to_json() == {
        "code": "IDLE",
        "clause": "k99/r 0.4 ≤ 0.5",
    }


# --- limits -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value", "changes", "code"),
    [
        ("saturated_k90", 0.5, {"tail": 0.5}, "SATURATED"),
        ("saturated_tail", 0.01, {"k90": 0.9}, "SATURATED"),
        ("concentrated", 0.8, {}, "CONCENTRATED"),
        ("idle_k99", 0.95, {}, "IDLE"),
    ],
)
def test_every_limit_can_be_overridden(
    name: str, value: float, changes: dict[str, float], code: str
) -> None:
    assert code_of(row_with(**changes)) == "USED"
    assert code_of(row_with(**changes), **{name: value}) == code


def test_unknown_limits_are_refused() -> None:
    with pytest.raises(OptionError, match=r"capacity\.idle"):
        judge_capacity(row_with(), {"capacity.idle": 1.0})


# --- the model ----------------------------------------------------------------------------------


def model(*found: Measured, limits: dict[str, float] | None = None) -> Verdict:
    names = [f"layers.{i}.q" for i in range(len(found))]
    judged = [judge_capacity(one, limits) for one in found]
    return judge_capacity_model(names, found, judged, limits)


def weighing(found: Measured, energy: float) -> Measured:
    return replace(found, weights={**found.weights, "update": energy})


def test_half_of_the_matrices_name_the_model_whatever_their_energy() -> None:
    idle, used = row_with(**IDLE), weighing(row_with(), 1e6)
    found = model(idle, idle, used, row_with(**SATURATED))
    assert (found.code, found.share) == ("IDLE", 0.5)
    assert found.shares == {"SATURATED": 0.25, "IDLE": 0.5, "USED": 0.25}
    assert found.counts == {"SATURATED": 1, "IDLE": 2, "USED": 1}
    mixed = model(idle, row_with(**COLLAPSED), used, row_with(**SATURATED))
    assert (mixed.code, mixed.share) == ("MIXED", None)
    assert mixed.text.startswith("no single pattern")


def test_the_flagged_are_named_most_energy_first_and_used_ones_never() -> None:
    found = model(
        weighing(row_with(**IDLE), 1.0),
        weighing(row_with(), 9.0),
        weighing(row_with(**SATURATED), 4.0),
        weighing(row_with(20, **COLLAPSED), 2.0),
        full(),
    )
    assert found.flagged == ("layers.2.q", "layers.3.q", "layers.0.q")


def test_matrices_that_did_not_change_do_not_name_the_model() -> None:
    zero = failed(Status.ZERO_UPDATE)
    found = model(zero, zero, zero, full(), full())
    assert (found.code, found.share) == ("FULL_UPDATE", 1.0)
    assert found.counts == {"NO_UPDATE": 3, "FULL_UPDATE": 2}
    nothing = model(zero, zero)
    assert (nothing.code, nothing.share) == ("NO_UPDATE", None)
    assert nothing.text == "no weight in scope changed."


@pytest.mark.parametrize("status", [Status.NON_FINITE, Status.NOT_CONVERGED])
def test_no_number_on_any_matrix_is_undetermined(status: Status) -> None:
    found = model(failed(status), failed(status))
    assert found.code == "UNDETERMINED"
    assert found.counts == {"UNDETERMINED": 2}
    assert "Rank" not in found.text
    assert found.flagged == ()


def test_no_matrix_at_all_is_undetermined() -> None:
    found = model()
    assert (found.code, found.share, found.shares, found.counts) == ("UNDETERMINED", None, {}, {})


def far(cosine: float) -> Measured:
    """An update from a base of which the tuned matrix has this cosine."""
    sides = {"parameters": 1e6, "base": 1.0, "tuned": 1.0, "update": 2 - 2 * cosine}
    return Measured(values={"base_cosine": cosine}, weights=sides)


def test_every_code_has_its_sentence() -> None:
    rows = {
        "UNRELATED": far(0.0),
        "TOO_FAR": far(0.4),
        "NO_UPDATE": failed(Status.ZERO_UPDATE),
        "UNDETERMINED": failed(Status.NON_FINITE),
        "SATURATED": row_with(**SATURATED),
        "RANK_COLLAPSE": row_with(16, **COLLAPSED),
        "CONCENTRATED": row_with(**COLLAPSED),
        "IDLE": row_with(**IDLE),
        "USED": row_with(),
        "FULL_UPDATE": full(),
    }
    assert set(rows) == set(CAPACITY_CODES)
    texts = {}
    for code, one in rows.items():
        found = model(one)
        assert found.code == code
        texts[code] = found.text.partition(".")[0]
    assert len(set(texts.values())) == len(CAPACITY_CODES)


# --- advice -------------------------------------------------------------------------------------


def advice(*ranks: float) -> str:
    return model(*(row_with(suggested=rank) for rank in ranks)).text.partition(" Rank: ")[2]


def test_the_advice_is_of_nine_in_ten_and_says_the_largest() -> None:
    words = advice(*range(1, 21))
    assert words.startswith("18 holds 90 % of the energy above the noise in 9 of 10 matrices; ")
    assert "32 is the next rank that vLLM serves; the largest need is 20" in words
    assert words.endswith("That is about energy and not about behaviour.")


def test_the_advice_where_all_need_the_same() -> None:
    words = advice(8, 8, 8)
    assert words.startswith("8 holds 90 % of the energy above the noise in every matrix. That")
    assert advice(600).startswith("600 holds"), "no served rank is that large"
    assert "vLLM" not in advice(600)


def test_matrices_below_their_noise_are_counted_and_none_is_suggested() -> None:
    below = without(row_with(), "suggested", Status.BELOW_RESOLUTION)
    assert "1 matrix is below the noise" in model(row_with(), below).text
    assert "2 matrices are below the noise" in model(row_with(), below, below).text
    assert "no rank can be suggested" in model(below, below).text


# --- what --explain prints ----------------------------------------------------------------------


def test_explain_names_each_condition_once_with_what_it_met() -> None:
    entries = model(row_with(), row_with(**IDLE), row_with(**SATURATED)).explain
    assert [(one["code"], one["condition"]) for one in entries] == [
        ("SATURATED", "k90/r_max ≥"),
        ("SATURATED", "σ_r/σ1 ≥"),
        ("CONCENTRATED", "effective rank/r_max <"),
        ("IDLE", "k99/r ≤"),
    ]
    held = {one["condition"]: (one["holds"], one["of"]) for one in entries}
    assert held == {
        "k90/r_max ≥": (1, 3), "σ_r/σ1 ≥": (1, 3),
        "effective rank/r_max <": (0, 2), "k99/r ≤": (1, 2),
    }  # fmt: skip
    assert (entries[0]["least"], entries[0]["largest"]) == (0.6, 0.9)


def test_limits_in_force_are_those_of_capacity() -> None:
    found = model(row_with(), limits={"capacity.idle_k99": 0.95})
    assert found.code == "IDLE"
    assert dict(found.thresholds) == {**LIMITS, "capacity.idle_k99": 0.95}
