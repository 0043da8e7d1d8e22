"""Is the outlook on a merge what the cosines of all pairs say, and are its nulls met by noise?"""

from __future__ import annotations

import math
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from geoscope import Options, Report, compare
from geoscope.metrics import limits_in_force
from geoscope.metrics.merging import merging_outlook
from geoscope.metrics.overlaps import overlap, updates_of
from geoscope.records import Overlap
from geoscope.report.answer import answer
from tests.helpers.matrices import gaussian, orthonormal, save_model

M, N = 48, 40
LIMITS = limits_in_force(None)
Q = "model.layers.0.self_attn.q_proj.weight"


def pairs_of(updates: list[Tensor], name: str = Q) -> list[Overlap]:
    base = gaussian(M, N, seed=1)
    return [
        Overlap(
            name,
            a + 1,
            b + 1,
            *overlap(*updates_of(base[None], [base[None] + updates[i] for i in (a, b)], ks=(2,))),
        )
        for a, b in combinations(range(len(updates)), 2)
    ]


def split(update: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Leading triplet and rest, by numpy."""
    U, S, Vh = np.linalg.svd(update.numpy(), full_matrices=False)
    head = S[0] * np.outer(U[:, 0], Vh[0])
    return head, update.numpy() - head


def cosine(X: np.ndarray, Y: np.ndarray) -> float:
    return float(np.sum(X * Y) / np.linalg.norm(X) / np.linalg.norm(Y))


def test_every_number_is_its_definition() -> None:
    common = gaussian(M, N, seed=2, sd=1e-2)
    updates = [common + gaussian(M, N, seed=seed, sd=1e-2) for seed in (3, 4, 5)]
    outlook = merging_outlook(pairs_of(updates), 3, LIMITS)
    assert outlook is not None and outlook["models"] == 3 and outlook["matrices"] == 1
    heads, rests = zip(*map(split, updates), strict=True)
    between = [cosine(x, y) for x, y in combinations(heads, 2)]
    total = sum(rest / np.linalg.norm(rest) for rest in rests)
    values = outlook["values"]
    assert values["head_cosine"] == pytest.approx(np.mean(between), abs=1e-9)
    assert values["head_agreement"] == pytest.approx(np.mean(np.maximum(between, 0)), abs=1e-9)
    assert values["consensus"] == pytest.approx(
        np.mean([cosine(rest, np.asarray(total)) for rest in rests]), abs=1e-9
    )
    assert outlook["nulls"]["consensus"] == 1 / math.sqrt(3)


def test_independent_updates_read_as_the_nulls() -> None:
    """Twenty matrices of three models: means within four standard errors."""
    rows = [
        pair
        for number in range(20)
        for pair in pairs_of(
            [gaussian(M, N, seed=10 * number + i, sd=1e-2) for i in range(3)], f"{number}.w"
        )
    ]
    outlook = merging_outlook(rows, 3, LIMITS)
    assert outlook is not None
    error = 4 / math.sqrt(M * N * len(rows))
    values, nulls = outlook["values"], outlook["nulls"]
    for key in ("head_cosine", "residual_cosine"):
        assert abs(values[key]) < error, key
    assert values["consensus"] == pytest.approx(nulls["consensus"], abs=error)
    assert values["changed_shared"] == pytest.approx(nulls["changed_shared"], abs=0.02)
    assert "a sum keeps each, an average of 3 keeps 1/3" in outlook["words"]


U, V = orthonormal(M, 8, seed=6), orthonormal(N, 8, seed=7)


def product(rows: list[int], sizes: list[float]) -> Tensor:
    return 1e-2 * (U[:, rows] * torch.tensor(sizes, dtype=torch.float64)) @ V[:, rows].T


@pytest.mark.parametrize(
    ("updates", "words"),
    [
        ([product([0, 1], [3, 2]), product([0, 1], [4, 1])], "nearly equal"),
        ([product([0, 1], [3, 2]), product([0, 1], [3, -2])], "pull against one another"),
        ([product([0, 1], [3, 2]), product([0, 1], [-3, 2])], "pull against one another"),
        ([product([0, 1], [3, 2]), product([0, 2], [3, 2])], "one head, rests of their own"),
        ([product([0, 1], [3, 2]), product([2, 3], [3, 2])], "updates of their own"),
        ([product([0, 1, 4], [3, 2, 1]), product([2, 3, 4], [3, 2, 1])], "in part common"),
    ],
)
def test_the_sentence_is_that_of_the_directions(updates: list[Tensor], words: str) -> None:
    outlook = merging_outlook(pairs_of(updates), 2, LIMITS)
    assert outlook is not None and words in outlook["words"]


def test_a_pair_that_is_missing_or_has_no_null_takes_its_matrix_out() -> None:
    updates = [gaussian(M, N, seed=seed, sd=1e-2) for seed in range(3)]
    assert merging_outlook(pairs_of(updates)[:2], 3, LIMITS) is None
    first, *others = pairs_of(updates)
    bare = Overlap(first.name, first.a, first.b, first.values, {})
    assert merging_outlook([bare, *others], 3, LIMITS) is None


def report_of(tmp_path: Path, scale: float, dtype: torch.dtype) -> Report:
    base = gaussian(M, N, seed=1)
    common = gaussian(M, N, seed=2, sd=scale)
    for name, step in (("base", 0), ("a", 1), ("b", 1.5)):
        save_model(tmp_path / name, {Q: (base + step * common).to(dtype)})
    folders = [str(tmp_path / name) for name in ("base", "a", "b")]
    options = Options(ks=(2,))
    return compare(*folders, kind="alignment", options=options)


def test_the_report_and_its_answer_have_it(tmp_path: Path) -> None:
    report = report_of(tmp_path, 1e-2, torch.float32)
    outlook = report.summary.merging
    assert outlook is not None and outlook["values"]["residual_cosine"] > 0.99
    (line,) = [line for block in answer(report) for line in block.lines if "To merge:" in line]
    assert line.startswith(
        "To merge: the updates are nearly equal: an average loses little; heads "
    )


def test_updates_that_rounding_hides_have_no_outlook(tmp_path: Path) -> None:
    """Both are rounding noise: their directions are that of nothing."""
    assert report_of(tmp_path, 1e-6, torch.bfloat16).summary.merging is None
