"""The table of factors: does it resolve, does it compute what is needed alone, and each once?"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from geoscope.engine import one_blas_thread
from geoscope.linalg.factor_update import FactorUpdate
from geoscope.metrics import METRICS, Settings, instances, pair_factors, takes_of, update_factors
from geoscope.metrics import factors as module
from geoscope.metrics.factors import FACTORS, GIVEN
from geoscope.metrics.resolver import Provider, Step, names_made, plan, resolve
from tests.helpers.matrices import gaussian

KS = (2, 8)
EVERYTHING = takes_of([one for metric in METRICS for one in instances(metric, KS)])
COMMON = {"shape", "settings", "base.depth", "tuned.depth", "update.depth"}
PAIR = frozenset(COMMON | {"base.weights", "base.rounding", "tuned.weights", "tuned.rounding"})
ADAPTED = frozenset(COMMON | {"base.weights", "base.rounding", "update.factored"})
ALONE = frozenset(COMMON | {"update.factored"})


def made(wanted: set[str], given: frozenset[str]) -> set[str]:
    return {name for step in plan(FACTORS, frozenset(wanted), given) for name in step.makes}


# --- the resolver -------------------------------------------------------------------------------


def adding(name: str, *needs: str, reuses: tuple[str, ...] = ()) -> Provider:
    return Provider((name,), needs, lambda *terms: sum(term or 0 for term in terms), reuses)


def test_it_makes_what_is_needed_once_and_in_order() -> None:
    calls: list[str] = []

    def counted(name: str, *needs: str) -> Provider:
        return Provider((name,), needs, lambda *terms: (calls.append(name), 1 + sum(terms))[1])

    table = (counted("top", "left", "right"), counted("left", "low"), counted("right", "low"),
             counted("unused", "low"), counted("low", "x"))  # fmt: skip
    steps = plan(table, frozenset({"top"}), frozenset({"x"}))
    assert resolve(steps, {"x": 1}) == {"low": 2, "left": 3, "right": 3, "top": 7}
    assert calls == ["low", "left", "right", "top"]


def test_the_first_row_whose_needs_are_there_makes_a_name() -> None:
    table = (adding("sum", "a", "b"), adding("sum", "a"))
    for given, value in (({"a": 1, "b": 2}, 3), ({"a": 1}, 1)):
        steps = plan(table, frozenset({"sum"}), frozenset(given))
        assert resolve(steps, given) == {"sum": value}
    assert plan(table, frozenset({"sum"}), frozenset({"b"})) == ()


def test_a_parameter_is_passed_on() -> None:
    table = (
        Provider(("low@k",), ("x",), lambda x, *, k: x * k),
        Provider(("high@k", "same@k"), ("low@k",), lambda low, *, k: (low + k, low)),
    )
    steps = plan(table, frozenset({"high@3", "high@5"}), frozenset({"x"}))
    assert resolve(steps, {"x": 2}) == {
        "low@3": 6, "high@3": 9, "same@3": 6, "low@5": 10, "high@5": 15, "same@5": 10,
    }  # fmt: skip


def test_what_is_reused_is_not_made_for_it() -> None:
    table = (adding("norm", "x", reuses=("spectrum",)), adding("spectrum", "x"))
    given = frozenset({"x"})
    assert resolve(plan(table, frozenset({"norm"}), given), {"x": 1}) == {"norm": 1}
    both = plan(table, frozenset({"norm", "spectrum"}), given)
    assert resolve(both, {"x": 1}) == {"spectrum": 1, "norm": 2}


def test_what_is_absent_takes_what_needs_it_along() -> None:
    table = (Provider(("a", "b"), ("x",), lambda x: (x, None)), adding("c", "b"), adding("d", "a"))
    steps = plan(table, frozenset({"c", "d"}), frozenset({"x"}))
    assert resolve(steps, {"x": 1}) == {"a": 1, "d": 1}


def test_what_is_dropped_lives_until_its_last_use() -> None:
    large = replace(adding("large", "x"), drops=("large",))
    table = (large, adding("a", "large"), adding("b", "a", "large"))
    steps = plan(table, frozenset({"b"}), frozenset({"x"}))
    assert resolve(steps, {"x": 1}) == {"a": 1, "b": 2}


def test_rows_that_need_each_other_and_unknown_names_are_refused() -> None:
    table = (adding("a", "b"), adding("b", "c"), adding("c", "b"))
    with pytest.raises(ValueError, match="need each other: b, c"):
        plan(table, frozenset({"a"}), frozenset())
    with pytest.raises(ValueError, match="no provider makes d"):
        plan(table, frozenset({"d"}), frozenset())


# --- the table ----------------------------------------------------------------------------------


def test_every_name_that_a_row_takes_is_made_or_given() -> None:
    known = names_made(FACTORS) | GIVEN
    for row in FACTORS:
        assert known >= {*row.needs, *row.reuses}, row.makes
        assert set(row.drops) <= set(row.makes)


def test_every_row_can_be_planned_so_there_is_no_cycle() -> None:
    """`plan` refuses cycles; here of the whole table at once, with every input given and none."""
    everything = frozenset(name.replace("@k", "@2") for name in names_made(FACTORS))
    made_here = {name for step in plan(FACTORS, everything, GIVEN) for name in step.makes}
    assert made_here == everything
    assert plan(FACTORS, everything, frozenset()) == ()


def test_every_factor_of_a_metric_and_its_null_has_a_provider() -> None:
    templates = {re.sub(r"@\d+$", "@k", name) for name in EVERYTHING}
    assert templates - names_made(FACTORS) == set()
    assert made(set(EVERYTHING), GIVEN) >= EVERYTHING


def test_no_row_is_idle() -> None:
    """Each makes what a metric, a floor or another row takes, from one of the three inputs."""
    sizes = {"update.noise", "update.grid", "rank.max", "notes"}
    used = {
        step.provider
        for given in (PAIR, ADAPTED, ALONE)
        for step in plan(FACTORS, EVERYTHING | sizes, given)
    }
    assert {row.makes for row in set(FACTORS) - used} == set()


@pytest.mark.parametrize(
    ("takes", "factorised"),
    [
        ({"unchanged.exact"}, set()),
        ({"update.S"}, {"update"}),
        ({"update.top@1"}, {"update"}),
        ({"cross.right"}, {"base"}),
        ({"angles.left@8"}, {"base", "tuned"}),
        ({"base.S", "tuned.norm"}, {"base"}),
    ],
    ids=lambda value: "+".join(sorted(value)) or "nothing",
)
def test_only_what_is_needed_is_factorised(takes: set[str], factorised: set[str]) -> None:
    names = {name for name in made(takes, PAIR) if name.endswith(".triplets")}
    assert names == {f"{role}.triplets" for role in factorised}


def test_an_update_without_its_base_has_no_factor_of_the_base() -> None:
    alone, adapted = made(set(EVERYTHING), ALONE), made(set(EVERYTHING), ADAPTED)
    assert {"update.S", "rank.max", "tuned.noise"} <= alone
    assert not any(name.startswith(("base.S", "base.n", "cross", "angles")) for name in alone)
    assert {"cross.core", "angles.left@2", "base.S", "intruders.left"} <= adapted
    assert not any(name.startswith(("unchanged", "masks", "isotropic")) for name in adapted)


# --- the whole ----------------------------------------------------------------------------------


def stacks() -> tuple[Tensor, Tensor]:
    base = torch.stack([gaussian(80, 70, seed=seed) for seed in (1, 2)])
    change = torch.stack([gaussian(80, 70, seed=seed) for seed in (3, 4)])
    return base.bfloat16(), (base + 1e-2 * change).bfloat16()


def test_each_function_runs_once_a_stack(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: Counter[Step] = Counter()
    run = Step.run

    def counted(step: Step, values: dict[str, object]) -> dict[str, object]:
        calls[step] += 1
        return run(step, values)

    monkeypatch.setattr(Step, "run", counted)
    settings = Settings(ks=KS, curves=True, masks=True)
    with one_blas_thread():
        found = pair_factors(*stacks(), takes=EVERYTHING, ks=KS, settings=settings)
    assert set(calls.values()) == {1}
    assert found.values.keys() >= EVERYTHING - {"rank.max", "rank.nominal"}
    assert set(found.methods[1]) >= {"base.S", "tuned.S", "update.S"}
    assert len(found.methods) == len(found.notes) == 2


def test_a_factor_does_not_depend_on_what_else_is_asked_for() -> None:
    """Alone or with all others: what is reused or deeper agrees to rounding."""
    settings = Settings(ks=KS, masks=True)
    with one_blas_thread():
        whole = pair_factors(*stacks(), takes=EVERYTHING, ks=KS, settings=settings).values
        for name in ("update.norm", "angles.left@8", "cross.core", "intruders.right", "masks.low",
                     "isotropic.exact", "tuned.S", "sampled.S"):  # fmt: skip
            single = pair_factors(*stacks(), takes=frozenset({name}), ks=KS, settings=settings)
            value = single.values[name]
            expected = whole[name][tuple(slice(side) for side in value.shape)]  # K may be larger
            torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-9)


def test_whole_matrices_and_bases_are_let_go() -> None:
    with one_blas_thread():
        found = pair_factors(*stacks(), takes=EVERYTHING, ks=KS, settings=Settings(ks=KS))
    assert {"base.top", "tuned.top", "update.top"} <= found.values.keys()
    assert not [name for name in found.values if name.endswith((".triplets", ".operand"))]


def test_adapters_and_stored_pairs_go_through_the_same_table() -> None:
    """A product given in factors, and the same product stored, tell the same of the update."""
    B, A = gaussian(80, 4, seed=5), gaussian(4, 70, seed=6)
    update = FactorUpdate.of([B[None], A[None], torch.ones(1, 1, dtype=torch.float64)])
    base = gaussian(80, 70, seed=1)[None]
    takes = frozenset({"update.S", "cross.right", "angles.left@2", "update.norm"})
    settings = Settings(ks=KS)
    with one_blas_thread():
        stored = pair_factors(base, base + (B @ A)[None], takes=takes, ks=KS, settings=settings)
        adapted = pair_factors(base, update, takes=takes, ks=KS, settings=settings)
        alone = update_factors(update, takes=takes, settings=settings)
    for name in takes:
        torch.testing.assert_close(adapted.values[name], stored.values[name], rtol=1e-8, atol=1e-8)
    assert alone.values.keys() & takes == {"update.S", "update.norm"}
    assert torch.equal(alone.values["update.S"], adapted.values["update.S"])


def test_a_row_more_is_a_factor_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """As docs/adding-a-metric.md says: a function and a row."""
    row = Provider(("update.square",), ("update.norm",), torch.square)
    monkeypatch.setattr(module, "FACTORS", (*FACTORS, row))
    found = pair_factors(
        *stacks(), takes=frozenset({"update.square"}), ks=(), settings=Settings()
    ).values
    assert torch.equal(found["update.square"], found["update.norm"].square())
