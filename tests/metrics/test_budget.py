"""Ranks within a number of parameters: the best components, and one rank for all beside them."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from geoscope.metrics.budget import ranks_within
from tests.helpers.running import run, write_pair

SHAPES = [(4, 6), (10, 3), (5, 5)]
SPECTRA = st.tuples(
    *(
        st.lists(st.floats(0.01, 10), max_size=min(shape)).map(
            lambda one: sorted(one, reverse=True)
        )
        for shape in SHAPES
    )
)


def held(spectra: tuple[list[float], ...], ranks: tuple[int, ...]) -> float:
    total = sum(s * s for one in spectra for s in one)
    kept = sum(s * s for one, rank in zip(spectra, ranks, strict=True) for s in one[:rank])
    return kept / total if total else 0.0


@settings(max_examples=100, deadline=None)
@given(SPECTRA, st.integers(1, 120))
def test_no_other_ranks_of_their_cost_hold_more(
    spectra: tuple[list[float], ...], budget: int
) -> None:
    """Against all ranks that cost no more than what was spent."""
    found = ranks_within(budget, spectra, SHAPES)
    costs = [m + n for m, n in SHAPES]
    spent = sum(rank * cost for rank, cost in zip(found.ranks, costs, strict=True))
    assert found.parameters == spent <= budget
    assert found.energy == pytest.approx(held(spectra, found.ranks))
    best = max(
        held(spectra, ranks)
        for ranks in product(*(range(len(one) + 1) for one in spectra))
        if sum(rank * cost for rank, cost in zip(ranks, costs, strict=True)) <= spent
    )
    assert found.energy == pytest.approx(best)


def test_one_rank_for_all_is_the_largest_that_fits() -> None:
    spectra = ([3.0, 1.0], [2.0], [1.0, 1.0, 1.0])
    found = ranks_within(70, spectra, SHAPES)  # 33 a rank
    assert (found.uniform, found.uniform_parameters) == (2, 66)
    assert found.uniform_energy == pytest.approx((9 + 1 + 4 + 2) / 17)
    assert ranks_within(32, spectra, SHAPES).uniform == 0
    assert ranks_within(10**6, spectra, SHAPES).uniform == 5, "no more than the largest side"
    assert ranks_within(10**6, spectra, SHAPES).energy == 1


def test_nothing_above_the_noise_holds_nothing() -> None:
    found = ranks_within(100, ([], [], []), SHAPES)
    assert found.ranks == (0, 0, 0) and found.energy == 0


def test_the_command_says_and_keeps_them(tmp_path: Path) -> None:
    def change(weights: dict[str, torch.Tensor]) -> None:
        for one in weights.values():
            if one.dim() == 2:  # three directions far above the rest
                one[:3, :3] += 9 * torch.eye(3, dtype=one.dtype)

    base, tuned = write_pair(tmp_path, change)
    done = run("capacity", base, tuned, "--budget", "0.5k", "--json")
    budget = done.report["provenance"]["parameters"]["budget"]
    assert budget["given"] == 500 >= budget["parameters"] > 0
    assert set(budget["ranks"]) == {
        one["name"].removesuffix(".weight") for one in done.report["layers"]
    }
    assert "within 500 parameters rank" in done.err
    assert (
        run("capacity", base, tuned, "--json").report["provenance"]["parameters"]["budget"] is None
    )
    for wrong in ("many", "-3", ""):
        assert run("capacity", base, tuned, f"--budget={wrong}").code == 2
