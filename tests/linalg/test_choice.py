"""The choice between methods: a committed table, and no surprise in what follows from it."""

from __future__ import annotations

import json

import pytest

from geoscope.linalg.choice import RATES_FILE, krylov_takes_gram, leading_pays, products_pay, rates


def test_the_table_is_complete_and_says_where_it_comes_from() -> None:
    table = json.loads(RATES_FILE.read_text("utf-8"))
    assert table["rates"] == vars(rates())
    assert all(value > 0 for value in table["rates"].values())
    assert "benchmarks/rates.py" in table["measured"]


@pytest.mark.parametrize("shape", [(1536, 1536), (8960, 1536), (1536, 8960), (4096, 4096)])
def test_a_few_triplets_of_a_large_matrix_are_worth_their_own_method(
    shape: tuple[int, int],
) -> None:
    assert leading_pays(shape, 1)
    assert leading_pays(shape, 64)
    assert not leading_pays(shape, min(shape) // 2)


@pytest.mark.parametrize("shape", [(64, 64), (128, 256), (1, 4096)])
def test_small_matrices_are_factorised_whole(shape: tuple[int, int]) -> None:
    assert not leading_pays(shape, 1)
    assert not leading_pays(shape, 64)


def test_a_gram_matrix_pays_for_many_triplets_of_a_tall_matrix() -> None:
    assert krylov_takes_gram((8960, 1536), 64)
    assert not krylov_takes_gram((8960, 1536), 1)
    assert not krylov_takes_gram((4096, 4096), 1)


def test_a_pair_by_products_pays_from_the_size_of_small_models_on() -> None:
    for shape in [(576, 576), (576, 1536), (1536, 1536), (8960, 1536), (4096, 4096)]:
        assert products_pay(shape, 2)
    for shape in [(96, 64), (128, 4096), (100, 100)]:
        assert not products_pay(shape, 2)


def test_orientation_does_not_matter() -> None:
    for k in (1, 8, 64):
        assert krylov_takes_gram((8960, 1536), k) == krylov_takes_gram((1536, 8960), k)
        assert leading_pays((8960, 1536), k) == leading_pays((1536, 8960), k)
        assert products_pay((8960, 1536), k) == products_pay((1536, 8960), k)
