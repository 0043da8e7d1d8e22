"""How weights go with a metric: against a plain implementation, and on noise that means nothing."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from geoscope.errors import NumericsError
from geoscope.records import Numbers, Status
from geoscope.trajectory.metric_relation import METRIC_RELATIONS, metric_relation
from geoscope.trajectory.pls import pls_forecast, pls_kernels, pls_r2
from geoscope.trajectory.rank1 import Rank1Path, align_signs

Floats = NDArray[np.float64]


def normal(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def unit(rows: Tensor) -> Tensor:
    return rows / rows.norm(dim=1, keepdim=True)


def saturating(T: int, scale: float = 4.0) -> Tensor:
    return 1 - torch.exp(-torch.arange(1, T + 1, dtype=torch.float64) / scale)


def related(
    y: Tensor,
    features: Tensor | None = None,
    *,
    steps: Sequence[float] | None = None,
    c: Tensor | None = None,
    permutations: int = 99,
    seed: int = 0,
) -> Numbers:
    T = len(y)
    c = normal(T, seed=5) if c is None else c
    return metric_relation(
        range(1, T + 1) if steps is None else steps,
        y.tolist(),
        coefficient=c,
        norm=c,
        sigma1=c,
        features=None if features is None else pls_kernels(features),
        permutations=permutations,
        seed=seed,
    )


# --- a plain implementation -----------------------------------------------------------------------


def fitted(F: Floats, y: Floats, new: Floats) -> Floats:
    """One component on standardised features, then a line on the score."""
    mean, spread = F.mean(0), F.std(0, ddof=1)
    Z = (F - mean) / spread
    w = Z.T @ (y - y.mean())
    w /= np.linalg.norm(w)
    a, b = np.polyfit(Z @ w, y, 1)
    return a * (((new - mean) / spread) @ w) + b


@pytest.mark.parametrize("T", [6, 9, 12, 13, 27])
def test_the_fit_and_the_forecast_are_those_of_a_plain_implementation(T: int) -> None:
    F, y = normal(T, 40).cumsum(0), normal(T, seed=1).cumsum(0)
    found = related(y, F)
    rows, curve = F.numpy(), y.numpy()
    residual = curve - fitted(rows, curve, rows)
    r2 = 1 - (residual**2).sum() / ((curve - curve.mean()) ** 2).sum()
    assert found.values["pls_r2"] == pytest.approx(r2, rel=1e-9)
    errors: list[float] = []
    held: list[float] = []
    for origin in range(max(5, math.ceil(T / 2)), T):
        ahead = fitted(rows[:origin], curve[:origin], rows[origin:])
        errors += ((ahead - curve[origin:]) ** 2).tolist()
        held += ((curve[origin - 1] - curve[origin:]) ** 2).tolist()
    assert found.values["pls_rmse"] == pytest.approx(math.sqrt(np.mean(errors)), rel=1e-9)
    assert found.values["pls_skill"] == pytest.approx(1 - sum(errors) / sum(held), rel=1e-9)


def test_correlations_are_those_of_numpy_with_ties_at_their_mean_rank() -> None:
    steps = [10, 20, 25, 60, 70, 71]
    c = torch.tensor([1.0, 3.0, 2.0, 5.0, 5.0, 9.0])
    y = torch.tensor([0.1, 0.4, 0.4, 0.3, 0.8, 0.7])
    found = related(y, steps=steps, c=c).values
    assert found["metric_correlation"] == pytest.approx(np.corrcoef(c, y)[0, 1])
    gaps = np.diff(steps)
    rates = np.corrcoef(np.diff(c.numpy()) / gaps, np.diff(y.numpy()) / gaps)[0, 1]
    assert found["metric_increment_correlation"] == pytest.approx(rates)
    ranks = np.corrcoef([1, 3, 2, 4.5, 4.5, 6], [1, 3.5, 3.5, 2, 6, 5])[0, 1]
    assert found["metric_sigma1_spearman"] == pytest.approx(ranks)
    assert found["metric_norm_spearman"] == pytest.approx(ranks)


# --- what the in-sample number is worth -----------------------------------------------------------


def test_in_sample_r2_is_high_on_noise_and_the_held_out_skill_says_so() -> None:
    """T = 27, d = 4096: .994 of iid noise, .939 of a driftless walk."""
    y = saturating(27)
    noise = related(y, unit(normal(27, 4096)), permutations=199)
    walk = related(y, unit(normal(27, 4096).cumsum(0)), permutations=199)
    for found, r2, within in ((noise, 0.994, 0.003), (walk, 0.939, 0.03)):
        assert found.values["pls_r2"] == pytest.approx(r2, abs=within)
        skill, p = found.values["pls_skill"], found.values["pls_skill_p"]
        assert skill is not None and skill <= 0
        assert p is not None and p > 0.5
    # shuffles of iid noise fit as well; a walk is told from its shuffles by its trend alone
    assert noise.nulls["pls_r2"] == pytest.approx(0.994, abs=0.003)
    p = noise.values["pls_r2_p"]
    assert p is not None and p > 0.05
    assert walk.nulls["pls_r2"] < 0.4
    assert walk.values["pls_r2_p"] == pytest.approx(1 / 200)


def test_an_exact_relation_has_skill_one() -> None:
    y = normal(20, seed=2).cumsum(0)
    found = related(y, y[:, None] * normal(1, 50) + normal(1, 50, seed=1), permutations=999).values
    assert found["pls_r2"] == pytest.approx(1)
    assert found["pls_skill"] == pytest.approx(1)
    assert found["pls_rmse"] == pytest.approx(0, abs=1e-12)
    assert found["pls_r2_p"] == found["pls_skill_p"] == 1 / 1000
    assert found["pls_r2_shift_p"] == found["pls_skill_shift_p"] == 1 / 20


def test_p_is_uniform_where_nothing_is_related() -> None:
    names = ("metric_correlation_p", "metric_sigma1_spearman_p", "pls_r2_p", "pls_skill_p")
    found: dict[str, list[float]] = {name: [] for name in names}
    for seed in range(200):
        y, F = normal(10, seed=3 * seed), normal(10, 30, seed=3 * seed + 1)
        one = related(y, F, c=normal(10, seed=3 * seed + 2), seed=seed)
        for name in names:
            p = one.values[name]
            assert p is not None
            found[name].append(p)
    for name, ps in found.items():
        below = np.array([np.mean(np.array(ps) <= level) for level in (0.1, 0.25, 0.5, 0.75)])
        assert np.abs(below - (0.1, 0.25, 0.5, 0.75)).max() < 0.1, name


def test_shifts_are_few_and_count_the_curve_itself() -> None:
    """T − 1 shifts and y: p is a multiple of 1/T, and a repeated curve shifts onto itself."""
    y = torch.tensor([0.0, 1.0, 2.0] * 4)
    assert related(y, c=y).values["metric_correlation_shift_p"] == pytest.approx(4 / 12)


# --- what must not matter -------------------------------------------------------------------------


def test_signs_and_scales_of_features_change_nothing() -> None:
    F, y = normal(12, 30).cumsum(0), saturating(12)
    plain = related(y, F).values
    signs = normal(30, seed=4).sign()
    for other in (-F, F * signs, 7 * F + 3):
        for name, value in related(y, other).values.items():
            assert value == pytest.approx(plain[name]), name


def test_signs_of_the_singular_vectors_change_nothing() -> None:
    T = 12
    u, v = (unit(normal(T, n, seed=n).cumsum(0)) for n in (60, 40))
    ones = torch.ones(T, dtype=torch.float64)
    flips = normal(T, seed=8).sign()[:, None]
    y = saturating(T)
    plain, flipped = (
        related(y, align_signs(Rank1Path(ones, ones, ones, u * f, v * f))[0].u).values
        for f in (1.0, flips)
    )
    for name in METRIC_RELATIONS:
        assert flipped[name] == pytest.approx(plain[name]), name


def test_a_forecast_knows_nothing_of_what_comes_after_its_origin() -> None:
    """The scale of a feature, too, is that of the past."""
    F, y = normal(12, 30), normal(12, seed=1)
    later = F.clone()
    later[-1] *= 1000
    kernels, other = pls_kernels(F), pls_kernels(later)
    torch.testing.assert_close(kernels.past[:, :11, :11], other.past[:, :11, :11])
    # predictions stand still when the last value moves: what is left is 2·5² for each of 6 origins
    curves = torch.stack([y, y, y])
    curves[1, -1] += 5
    curves[2, -1] -= 5
    same, up, down = pls_forecast(kernels, curves).error.tolist()
    assert up + down - 2 * same == pytest.approx(2 * 25 * 6)


def test_kernels_add_up_to_features_side_by_side() -> None:
    F, more = normal(9, 20), normal(9, 50, seed=1)
    added, together = pls_kernels(F) + pls_kernels(more), pls_kernels(torch.cat([F, more], 1))
    torch.testing.assert_close(added.whole, together.whole)
    torch.testing.assert_close(added.past, together.past)
    Y = normal(3, 9, seed=2)
    torch.testing.assert_close(pls_r2(added, Y), pls_r2(together, Y))


def test_the_same_seed_gives_the_same_p() -> None:
    F, y = normal(12, 30).cumsum(0), saturating(12)
    assert related(y, F, seed=3) == related(y, F, seed=3)


def test_a_feature_that_does_not_vary_counts_for_nothing() -> None:
    F, y = normal(12, 30).cumsum(0), saturating(12)
    still = torch.full((12, 5), 0.1, dtype=torch.float64)
    wide = related(y, torch.cat([F, still], 1)).values
    for name, value in related(y, F).values.items():
        assert wide[name] == pytest.approx(value), name


# --- where there is no number ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("T", "defined"),
    [
        (0, ()),
        (2, ()),
        (3, ("metric_correlation", "metric_norm_spearman", "metric_sigma1_spearman")),
        (5, ("metric_correlation", "metric_increment_correlation")),
        (6, ("metric_increment_correlation", "pls_r2", "pls_skill", "pls_rmse")),
    ],
)
def test_with_too_few_points_it_does_not_apply(T: int, defined: tuple[str, ...]) -> None:
    found = related(normal(T, seed=1), normal(T, 20) if T else None)
    assert found.values["metric_points"] == T
    assert set(found.values) == set(METRIC_RELATIONS)
    for name in defined:
        assert found.values[name] is not None, name
    absent = {name for name, value in found.values.items() if value is None}
    assert set(found.status) == absent
    assert set(found.status.values()) <= {Status.NOT_APPLICABLE}
    if T < 3:
        assert absent == set(METRIC_RELATIONS) - {"metric_points"}
    if T < 6:
        assert "pls_r2" in absent  # never in sample alone
        assert not found.nulls


def test_a_curve_that_does_not_move_relates_to_nothing() -> None:
    found = related(torch.full((12,), 0.3, dtype=torch.float64), normal(12, 20)).values
    assert [name for name, value in found.items() if value is not None] == ["metric_points"]


def test_without_a_held_out_skill_there_is_no_in_sample_number() -> None:
    """The curve stands still from the first origin on, and persistence is perfect."""
    y = torch.tensor([0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 5.0, 5.0, 5.0, 5.0, 5.0, 5.0])
    found = related(y, normal(12, 20))
    assert found.values["metric_correlation"] is not None
    assert [name for name in METRIC_RELATIONS if name.startswith("pls_")] == [
        name for name in found.status if name.startswith("pls_")
    ]


def test_weights_that_do_not_vary_and_a_metric_that_rises_evenly_have_no_correlation() -> None:
    y = torch.arange(12, dtype=torch.float64) / 10
    found = related(y, c=torch.full((12,), 0.1, dtype=torch.float64)).values
    assert found["metric_correlation"] is None
    assert found["metric_norm_spearman"] is None
    # Δy/Δt is constant but for rounding
    assert related(y).values["metric_increment_correlation"] is None


def test_without_directions_the_rest_stands() -> None:
    T = 12
    c = normal(T)
    found = metric_relation(range(T), saturating(T).tolist(), coefficient=c, norm=c.abs())
    assert found.values["metric_correlation"] is not None
    assert found.status["metric_sigma1_spearman"] is Status.NOT_APPLICABLE
    assert found.status["pls_skill"] is Status.NOT_APPLICABLE


def test_lengths_that_differ_are_refused() -> None:
    c = normal(6)
    with pytest.raises(NumericsError, match="6 steps and 5, 6, 6 values"):
        metric_relation(range(6), [0.0] * 5, coefficient=c, norm=c)
    with pytest.raises(NumericsError, match="needs 6 or more"):
        pls_forecast(pls_kernels(normal(5, 3)), normal(2, 5))
