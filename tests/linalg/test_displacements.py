"""Displacements: Gram matrix, distances and affine weights against plain numpy in fp64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from geoscope.linalg import displacements
from geoscope.linalg.displacements import affine_weights, displacement_gram, squared_distances

MADE = torch.Generator().manual_seed(0)
WEIGHTS = [torch.randn(7, 5, generator=MADE) for _ in range(4)]


def flat(weights: list[torch.Tensor]) -> np.ndarray:
    return np.stack([each.double().numpy().ravel() for each in weights])


def test_the_gram_matrix_is_of_the_first_and_of_differences(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows = flat(WEIGHTS)
    rows[1:] -= rows[0]
    for block in (1 << 18, 3):
        monkeypatch.setattr(displacements, "_BLOCK", block)
        gram = displacement_gram(WEIGHTS[0], WEIGHTS[1:])
        assert gram.numpy() == pytest.approx(rows @ rows.T, rel=1e-13)


def test_turned_weights_and_other_precisions_are_compared_entry_by_entry() -> None:
    one, other = torch.randn(4, 6, generator=MADE).bfloat16(), torch.randn(6, 4, generator=MADE)
    gram = displacement_gram(one, [other.T])
    difference = other.T.double() - one.double()
    assert float(gram[1, 1]) == pytest.approx(float(difference.square().sum()), rel=1e-14)


def test_distances_are_those_of_the_weights() -> None:
    rows = flat(WEIGHTS)
    expected = ((rows[:, None] - rows[None]) ** 2).sum(-1)
    found = squared_distances(displacement_gram(WEIGHTS[0], WEIGHTS[1:]))
    assert found.numpy() == pytest.approx(expected, rel=1e-12, abs=1e-12)


def test_near_weights_keep_their_digits() -> None:
    """Inner products of whole weights would lose what lies 1e-9 apart."""
    base = WEIGHTS[0].double()
    near = [base + 1e-9 * WEIGHTS[i].double() for i in (1, 2)]
    found = squared_distances(displacement_gram(base, near))
    exact = 1e-18 * float((WEIGHTS[1].double() - WEIGHTS[2].double()).square().sum())
    assert float(found[1, 2]) == pytest.approx(exact, rel=1e-6)


def test_affine_weights_are_the_least_squares_with_sum_one() -> None:
    rows = flat(WEIGHTS)
    ways = rows[1:] - rows[0]
    weights, least = affine_weights(torch.from_numpy(ways @ ways.T))
    lines = (ways[1:] - ways[0]).T
    solution, residual, *_ = np.linalg.lstsq(lines, -ways[0], rcond=None)
    assert weights.numpy()[1:] == pytest.approx(solution, rel=1e-9)
    assert float(weights.sum()) == pytest.approx(1)
    assert float(least) == pytest.approx(float(residual[0]), rel=1e-9)


def test_a_hull_that_holds_the_weight_leaves_nothing_and_twins_share() -> None:
    one, other = WEIGHTS[1].double(), WEIGHTS[2].double()
    model = 0.3 * one + 0.7 * other
    weights, least = affine_weights(displacement_gram(model, [one, other])[None, 1:, 1:])
    assert weights[0].tolist() == pytest.approx([0.3, 0.7], abs=1e-12)
    assert float(least) < 1e-24
    weights, _ = affine_weights(displacement_gram(model, [one, one])[1:, 1:])
    assert float(weights.sum()) == pytest.approx(1)
