"""Who is made from whom: families with known trees, by every kind of update and precision."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from geoscope.metrics import THRESHOLDS
from geoscope.metrics.family import Family, family_of
from geoscope.metrics.kin import Kin
from tests.helpers.families import KINDS, Updates, drawn, kin_between, merged, simulated, tuned

SFT, RL = Updates(size=0.06), Updates(size=0.05, rank=4)
FORMATS = [torch.float32, torch.bfloat16]
BASE = {dtype: drawn(0, dtype=dtype) for dtype in FORMATS}
STRANGER = drawn(99)


def found(model: Mapping[str, Tensor], *candidates: Mapping[str, Tensor]) -> Family:
    return family_of(kin_between(model, candidates))


def roles(family: Family) -> list[str]:
    return [family.roles[i] for i in sorted(family.roles)]


# --- lines of descent -----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("steps", [(SFT, SFT, SFT), (SFT, RL, RL), (RL, SFT, RL)])
def test_a_chain_has_its_parent_first(dtype: torch.dtype, steps: tuple[Updates, ...]) -> None:
    line = [BASE[dtype]]
    for seed, how in enumerate(steps, start=1):
        line.append(tuned(line[-1], seed, how))
    family = found(line[3], line[0], line[2], line[1])
    assert (family.code, family.parent) == ("DESCENDS", 2)
    assert roles(family) == ["ANCESTOR", "PARENT", "ANCESTOR"]
    above = {i: node.parent for i, node in family.tree.items()}
    assert above == {1: None, 3: 1, 2: 3, 0: 2}
    assert family.angles[2].value == pytest.approx(0, abs=0.05)


@pytest.mark.parametrize("dtype", FORMATS)
def test_a_sibling_is_no_parent(dtype: torch.dtype) -> None:
    base = BASE[dtype]
    model, sibling = tuned(base, 1, SFT), tuned(base, 2, SFT)
    family = found(model, sibling, base)
    assert (family.code, family.parent) == ("DESCENDS", 2)
    assert roles(family) == ["SIBLING", "PARENT"]
    assert family.angles[1].value == pytest.approx(2**-0.5, abs=0.05)  # 45° at the sibling


def test_siblings_that_share_a_part_of_their_update_meet_below_the_base() -> None:
    base = BASE[torch.float32]
    sibling = tuned(base, 2, SFT)
    model = tuned(base, 1, Updates(size=0.06, like=(sibling, 0.5)))
    family = found(model, base, sibling)
    assert (family.code, family.parent) == ("DESCENDS", 1)
    assert roles(family) == ["PARENT", "SIBLING"]
    assert family.tree[2].beside == 0 or family.tree[0].beside == 2


def test_without_the_base_siblings_have_no_parent() -> None:
    """Three of one size: no norm tells which is the older one."""
    base = BASE[torch.float32]
    family = found(*(tuned(base, seed, SFT) for seed in (1, 2, 3)))
    # The base that is not given lies between each two of them.
    assert family.code == "NO_PARENT"
    assert family.parent is None
    assert roles(family) == ["NEAR", "NEAR"]


def test_what_comes_after_the_model_is_a_descendant() -> None:
    base = BASE[torch.float32]
    model = tuned(base, 1, SFT)
    family = found(model, tuned(model, 2, SFT), base)
    assert (family.code, family.parent) == ("DESCENDS", 2)
    assert roles(family) == ["DESCENDANT", "PARENT"]


def test_a_straight_run_is_told_apart_from_independent_updates() -> None:
    base = BASE[torch.float32]
    middle = tuned(base, 1, SFT)
    further = {name: 2 * middle[name] - base[name] for name in base}
    family = found(tuned(further, 2, RL), base, middle)
    assert (family.code, family.parent) == ("LINE", 2)


def test_of_one_candidate_that_has_the_larger_norm_neither_way_is_claimed() -> None:
    base = BASE[torch.float32]
    family = found(base, tuned(base, 1, SFT))
    assert family.code == "EITHER_WAY"
    decayed = tuned(base, 1, Updates(size=0.06, decay=0.05))
    assert found(decayed, base).code == "EITHER_WAY"


def test_the_parent_is_the_same_where_weights_decay() -> None:
    """A decay shrinks norms; what lies between does not depend on them."""
    base = BASE[torch.float32]
    parent = tuned(base, 1, Updates(size=0.06, decay=0.01))
    family = found(tuned(parent, 2, Updates(size=0.06, decay=0.01)), base, parent)
    assert family.parent == 2


# --- copies and merges ----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("share", [0.5, 0.3])
def test_a_linear_merge_has_its_weights(dtype: torch.dtype, share: float) -> None:
    base = BASE[dtype]
    one, other = tuned(base, 1, SFT), tuned(base, 2, SFT)
    family = found(merged([(share, one), (1 - share, other)], dtype), one, base, other)
    assert family.code == "MERGE"
    assert family.merge is not None
    assert family.merge.weights[1] == pytest.approx(share, abs=0.01)
    assert family.merge.weights[3] == pytest.approx(1 - share, abs=0.01)
    assert roles(family) == ["MERGED", "RELATIVE", "MERGED"]


@pytest.mark.parametrize("dtype", FORMATS)
def test_task_arithmetic_needs_its_base(dtype: torch.dtype) -> None:
    base = BASE[dtype]
    one, other = tuned(base, 1, SFT), tuned(base, 2, SFT)
    model = merged([(-0.4, base), (0.6, one), (0.8, other)], dtype)
    family = found(model, base, one, other)
    assert family.code == "MERGE"
    assert family.merge is not None
    assert list(family.merge.weights.values()) == pytest.approx([-0.4, 0.6, 0.8], abs=0.02)
    assert found(model, one, other).code != "MERGE"


def test_weights_may_differ_from_matrix_to_matrix() -> None:
    base = BASE[torch.float32]
    one, other = tuned(base, 1, SFT), tuned(base, 2, SFT)
    shares = {name: 0.2 + 0.03 * i for i, name in enumerate(base)}
    model = {name: s * one[name] + (1 - s) * other[name] for name, s in shares.items()}
    merge = found(model, one, other).merge
    assert merge is not None
    assert 0.05 < merge.spread < 0.3


def test_what_was_trained_after_a_merge_is_none() -> None:
    base = BASE[torch.float32]
    one, other = tuned(base, 1, SFT), tuned(base, 2, SFT)
    model = tuned(merged([(0.5, one), (0.5, other)], torch.float32), 3, RL)
    assert found(model, one, other).merge is None


def test_a_small_update_is_not_taken_for_a_merge() -> None:
    """Negative control: in bf16 all that lies within rounding would fit."""
    parent = tuned(BASE[torch.bfloat16], 1, SFT)
    model = tuned(parent, 2, Updates(size=0.003))
    family = found(model, BASE[torch.bfloat16], parent)
    assert (family.code, family.parent) == ("DESCENDS", 2)


def test_the_same_values_are_a_copy_and_a_narrower_dtype_is_a_rounded_one() -> None:
    base = BASE[torch.float32]
    parent = tuned(base, 1, SFT)
    family = found({**parent}, base, parent, {**parent})
    assert (family.code, family.parent) == ("COPY", 2)
    assert roles(family)[1:] == ["COPY", "COPY"]
    assert not family.is_clear  # an unread matrix may differ
    narrow = {name: weight.bfloat16() for name, weight in parent.items()}
    for model, candidate, of_model in ((narrow, parent, False), (parent, narrow, True)):
        family = found(model, base, candidate)
        assert (family.code, family.parent) == ("QUANTISED", 2)
        assert family.copies[2].share == pytest.approx(1, abs=0.05)
        assert family.copies[2].of_model is of_model


# --- negative controls ----------------------------------------------------------------------------


def test_a_stranger_and_shuffled_weights_are_unrelated() -> None:
    base = BASE[torch.float32]
    made = torch.Generator().manual_seed(5)
    shuffled = {
        name: weight.reshape(-1)[torch.randperm(weight.numel(), generator=made)].reshape(
            weight.shape
        )
        for name, weight in base.items()
    }
    model = tuned(base, 1, SFT)
    family = found(model, shuffled, STRANGER)
    assert family.code == "UNRELATED"
    assert roles(family) == ["UNRELATED", "UNRELATED"]
    family = found(model, shuffled, base)
    assert (family.code, family.parent, roles(family)[0]) == ("DESCENDS", 2, "UNRELATED")


def test_what_lacks_a_tensor_that_both_others_have_is_not_between_them() -> None:
    """Siblings trained alike look like a line; a frozen matrix tells them apart."""
    base = BASE[torch.float32]
    model = tuned(base, 1, SFT)
    short = {name: 0.5 * base[name] + 0.5 * model[name] for name in base}
    sibling = tuned(short, 2, Updates(size=0.01))
    assert found(model, base, sibling).parent == 2
    frozen = "model.layers.0.self_attn.q_proj.weight"
    family = found({**model, frozen: base[frozen]}, base, sibling)
    assert (family.parent, roles(family)) == (1, ["PARENT", "SIBLING"])


def test_limits_are_those_of_the_table_and_can_be_replaced() -> None:
    base = BASE[torch.float32]
    model, sibling = tuned(base, 1, SFT), tuned(base, 2, SFT)
    kin = kin_between(model, [base, sibling])
    conditions = {check["condition"]: check for check in family_of(kin).explain}
    assert conditions["cos at the parent ≤"]["threshold"] == THRESHOLDS["lineage.between"].value
    assert family_of(kin, {"too_far.cosine": 0.9999}).code == "TOO_FAR"


# --- estimates ------------------------------------------------------------------------------------


def test_cosines_and_growth_of_independent_weights_are_as_their_errors_say() -> None:
    """Closed forms over 40 draws: c is 0 ± 1/√N, growth 1, a right angle 0."""
    misses: Counter[str] = Counter()
    for seed in range(40):
        base = drawn(1000 + seed, layers=1)
        child = tuned(base, seed, SFT)
        kin: Kin = kin_between(tuned(child, 500 + seed, SFT), [child, base, drawn(seed, layers=1)])
        cosine, angle, growth = kin.cosine(3), kin.vertex(1, 0, 2), kin.growth(2, 0)
        assert cosine.error == pytest.approx(float(kin.parameters.sum()) ** -0.5, rel=0.1)
        misses["cosine"] += abs(cosine.value) > 2 * cosine.error
        misses["angle"] += abs(angle.value) > 2 * angle.error
        misses["growth"] += abs(growth.value - 1) > 2 * growth.error
    assert max(misses.values()) <= 7  # of 40; two standard errors leave 2, of three matrices more


def test_one_matrix_has_the_error_of_chance() -> None:
    kin = kin_between(*(lambda a, b: (a, [b]))(drawn(1, layers=1), drawn(2, layers=1)))
    (alone,) = [Kin(kin.gram[:1], kin.noise[:1], kin.coarser[:, :1], kin.parameters[:1], kin.same)]
    assert math.isfinite(alone.growth(1, 0).error)


# --- at random ------------------------------------------------------------------------------------

UNTOLD = ("NEAR", "RELATIVE", "BEYOND")


@pytest.mark.slow
def test_random_families_are_told_rightly_or_not_told() -> None:
    """270 families, 30 of a kind: 2 % have a wrong role, 11 % an untold one; of 120 parents 3 are
    another's, where a sibling lies near the stem that they share."""
    roles_of: Counter[str] = Counter()
    parents: Counter[str] = Counter()
    for seed in range(30 * len(KINDS)):
        case = simulated(seed)
        family = family_of(kin_between(case.model, case.candidates))
        asked = [(role, family.roles[i]) for i, role in enumerate(case.roles, start=1) if role]
        wrong = [said for role, said in asked if said not in (role, *UNTOLD)]
        right = all(role == said for role, said in asked)
        roles_of["wrong" if wrong else "right" if right else "untold"] += 1
        if "PARENT" in case.roles:
            expected = case.roles.index("PARENT") + 1
            parents["right" if family.parent == expected else "other"] += 1
    assert roles_of["wrong"] <= 0.03 * roles_of.total()
    assert roles_of["right"] >= 0.8 * roles_of.total()
    assert parents["right"] >= 0.95 * parents.total()
