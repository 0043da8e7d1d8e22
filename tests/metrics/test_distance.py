"""Was the tuned matrix trained from this base? Closed forms, chance, and no false alarm.

ΔW = a·W0 + R: with s = ⟨ΔW, W0⟩²/(‖ΔW‖²‖W0‖²) the base gives s·E_k to C_LR, and s = ρ²/4 where the
norm is kept.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from geoscope.metrics import (
    THRESHOLDS,
    MatrixVerdict,
    Measured,
    aggregate,
    distance,
    instances,
    judge,
    judge_model,
)
from geoscope.metrics.distance import cosine_and_deviation
from geoscope.metrics.table import METRICS
from tests.helpers.matrices import gaussian, updated, with_spectrum
from tests.helpers.measuring import judged, row

LIMIT = THRESHOLDS["too_far.cosine"].value


def spiked(m: int, n: int, seed: int) -> Tensor:
    """As weights are: four directions stand out of a bulk; E_k is large."""
    low = gaussian(m, 4, seed=seed, sd=1) @ gaussian(4, n, seed=seed + 1, sd=1)
    return gaussian(m, n, seed=seed + 2, sd=1) + 1.5 * low


def at_cosine(base: Tensor, cosine: float, seed: int, *, size: float = 1.0) -> Tensor:
    """A matrix of `size` times the base's norm with this very cosine; the rest is a spiked one."""
    other = spiked(*base.shape, seed=seed)
    other -= base * ((other * base).sum() / base.square().sum())
    other *= base.norm() / other.norm()
    return size * (cosine * base + math.sqrt(1 - cosine**2) * other)


# --- the numbers ----------------------------------------------------------------------------------


@pytest.mark.parametrize("rho", [1e-1, 1e-3, 1e-5, 1e-7])
def test_one_minus_the_cosine_does_not_cancel(rho: float) -> None:
    """To the rounding of c itself, against sums of the stored entries in longer floats."""
    base = gaussian(40, 30, seed=1)
    tuned = updated(base, gaussian(40, 30, seed=2), rho)
    found = row(base, tuned, only=["base_cosine", "base_share"])
    W0, W1 = (side.numpy().astype(np.longdouble) for side in (base, tuned))
    D = W1 - W0
    cosine = (W0 * W1).sum() / np.sqrt((W0**2).sum() * (W1**2).sum())
    share = (W0 * D).sum() ** 2 / ((W0**2).sum() * (D**2).sum())
    assert found.values["base_cosine"] == pytest.approx(float(cosine), abs=2.3e-16)
    assert found.values["base_share"] == pytest.approx(float(share), rel=1e-12 / rho)


def test_a_pure_rescaling_is_along_the_base_whatever_its_size() -> None:
    base = spiked(64, 48, seed=3)
    for factor in (1 + 2.0**-20, 1.01, 0.5, 0.01):
        found = row(base, factor * base, only=["base_cosine", "base_share"])
        assert found.values["base_cosine"] == pytest.approx(1, abs=1e-15)
        assert found.values["base_share"] == pytest.approx(1, abs=1e-8)


def test_the_share_is_a_quarter_of_rho_squared_where_the_norm_is_kept() -> None:
    base = spiked(64, 64, seed=4)
    for cosine in (0.995, 0.9, 0.6, 0.0):
        found = row(base, at_cosine(base, cosine, seed=20), ks=(8,))
        rho = found.values["relative_update"]
        assert rho is not None
        assert found.values["base_share"] == pytest.approx(rho**2 / 4, rel=1e-9)
        assert found.values["base_share"] == pytest.approx((1 - cosine) / 2, rel=1e-9)


def test_an_update_below_what_the_norms_tell_has_no_share() -> None:
    base = gaussian(30, 30, seed=5)
    tuned = base.clone()
    tuned[0, 0] += 2.0**-52 * abs(float(base[0, 0]))
    found = row(base, tuned, only=["base_share", "base_cosine"])
    assert found.values["base_share"] is None
    assert found.values["base_cosine"] == 1.0


def test_what_the_base_alone_gives_is_the_energy_of_an_unrelated_pair() -> None:
    """C_LR of W1 − W0 without anything in common: measured .49 of E_k, predicted ½."""
    base, other = spiked(128, 128, seed=6), spiked(128, 128, seed=30)
    found = row(base, other, ks=(16,))
    assert found.values["energy_two_sided@16"] == pytest.approx(
        found.values["energy_of_base@16"], rel=0.03
    )
    assert found.values["base_share"] == pytest.approx(0.5, abs=0.1)  # the norms differ


def test_the_cosine_of_unrelated_matrices_has_its_deviation() -> None:
    """Haar frames and steep spectra: the variance is 1/(mn) whatever the spectra."""
    S = torch.tensor([8.0, 4.0, 2.0, 1.0, 1.0, 1.0])
    base = with_spectrum(8, 6, S, seed=1)
    cosines = [
        row(base, with_spectrum(8, 6, S, seed=100 + 2 * i), only=["base_cosine"]).values
        for i in range(200)
    ]
    squares = np.array([float(one["base_cosine"] or 0.0) ** 2 for one in cosines])
    error = squares.std() / math.sqrt(200)
    assert squares.mean() == pytest.approx(1 / 48, abs=4 * error)


def test_the_pooled_cosine_and_its_deviation_are_those_of_all_entries() -> None:
    pairs = [(gaussian(20, 30, seed=i, sd=1 + i), gaussian(20, 30, seed=9 + i)) for i in range(3)]
    rows = [row(*pair, only=["base_cosine", "relative_update"]) for pair in pairs]
    whole0, whole1 = (torch.cat([pair[i].flatten() for pair in pairs]) for i in (0, 1))
    expected = float(whole0 @ whole1 / whole0.norm() / whole1.norm())
    cosine, deviation = cosine_and_deviation(rows)
    assert cosine == pytest.approx(expected, abs=1e-12)
    terms = sum(float(a.norm() * b.norm()) ** 2 / 600 for a, b in pairs) ** 0.5
    assert deviation == pytest.approx(terms / float(whole0.norm() * whole1.norm()))
    metric = next(one for one in METRICS if one.id == "base_cosine")
    values, nulls = aggregate(rows, instances(metric, ()))
    assert (values["base_cosine"], nulls["base_cosine"]) == (pytest.approx(expected, abs=1e-12), 0)


# --- the codes ------------------------------------------------------------------------------------


def code(base: Tensor, tuned: Tensor) -> str:
    return judged(base.float(), tuned.float())[1].code


def test_two_models_from_scratch_are_unrelated() -> None:
    for size in (1.0, 0.2, 5.0):
        assert code(spiked(96, 64, seed=1), size * spiked(96, 64, seed=40)) == "UNRELATED"


@pytest.mark.parametrize("cosine", [0.13, 0.49, 0.59, -0.4, -1.0])
def test_siblings_and_negatives_are_too_far(cosine: float) -> None:
    base = spiked(96, 64, seed=2)
    for size in (0.4, 1.0, 2.5):
        assert code(base, at_cosine(base, cosine, seed=50, size=size)) == "TOO_FAR"


def test_a_zero_side_is_too_far_and_two_are_no_update() -> None:
    base = spiked(48, 48, seed=3)
    found, one = judged(base.float(), torch.zeros(48, 48))
    assert (one.code, one.clause) == ("TOO_FAR", "the tuned matrix is zero")
    assert found.values["base_cosine"] is None
    assert judged(torch.zeros(48, 48), base.float())[1].clause == "the base matrix is zero"
    assert code(torch.zeros(48, 48), torch.zeros(48, 48)) == "NO_UPDATE"


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(1, 1), (2, 2), (4, 4), (3, 9), (16, 16), (64, 48)])
@pytest.mark.parametrize("rho", [1e-3, 0.1, 0.3, 0.5, 0.7])
def test_no_update_of_any_kind_up_to_seven_tenths_is_far(
    shape: tuple[int, int], rho: float
) -> None:
    """c ≥ √(1 − ρ²) for ρ < 1, whatever the update: at .6 the limit is ρ = .8."""
    base = spiked(*shape, seed=4)
    kinds = [spiked(*shape, seed=60 + i) for i in range(8)]
    kinds += [base, -base, base.sign(), torch.where(base.abs() > 1, -base, 0.0), spiked(*shape, 5)]
    for direction in kinds:
        if direction.any():
            assert code(base, updated(base, direction, rho)) not in ("UNRELATED", "TOO_FAR")


def test_rescaled_and_pruned_models_are_no_strangers() -> None:
    base = spiked(128, 96, seed=7)
    for factor in (1.5, 0.9, 0.1):
        assert code(base, factor * base) == code(base, 1.001 * base) == "ON_PRINCIPAL"
    cut = base.abs().flatten().quantile(0.6)
    assert code(base, torch.where(base.abs() >= cut, base, 0.0)) not in ("UNRELATED", "TOO_FAR")


@pytest.mark.slow
@pytest.mark.parametrize("rho", [1e-3, 1e-2, 0.1, 0.3])
@pytest.mark.parametrize("kind", ["isotropic", "low rank", "principal"])
def test_the_base_in_an_ordinary_update_changes_no_verdict(kind: str, rho: float) -> None:
    """The same R with the −(ρ²/2)·W0 that keeps the norm, and without: one code; s·E_k < .025."""
    base = spiked(128, 128, seed=8)
    U, S, Vh = torch.linalg.svd(base)
    for seed in range(3):
        direction = {
            "isotropic": gaussian(128, 128, seed=70 + seed),
            "low rank": gaussian(128, 16, seed=80 + seed) @ gaussian(16, 128, seed=90 + seed),
            "principal": (U[:, 4:20] * (1 + S[4:20])) @ Vh[4:20] * (-1) ** seed,
        }[kind]
        direction = direction - base * ((direction * base).sum() / base.square().sum())
        plain = updated(base, direction, rho)
        kept = plain * (base.norm() / plain.norm())
        found, one = judged(base.float(), kept.float())
        assert one.code == code(base, plain)
        share = found.values["energy_of_base@16"]
        assert share is not None
        assert share < THRESHOLDS["off_principal.energy_two_sided"].value / 2


def test_at_the_limit_the_base_alone_takes_off_principal_away() -> None:
    """How .6 follows: there s is what C_LR/E_k may be at most, the norm kept."""
    assert (1 - LIMIT) / 2 == pytest.approx(THRESHOLDS["off_principal.versus_base"].value)


# --- the model ------------------------------------------------------------------------------------


def model(pairs: dict[str, tuple[Tensor, Tensor]]) -> tuple[list[Measured], list[MatrixVerdict]]:
    both = [judged(a.float(), b.float()) for a, b in pairs.values()]
    return [one for one, _ in both], [one for _, one in both]


def tuned_pairs(count: int) -> dict[str, tuple[Tensor, Tensor]]:
    bases = {f"layer.{i}": spiked(64, 64, seed=100 + 7 * i) for i in range(count)}
    return {
        name: (base, updated(base, gaussian(64, 64, seed=i), 0.01))
        for i, (name, base) in enumerate(bases.items())
    }


def test_a_head_drawn_anew_is_set_apart_and_the_rest_keeps_its_verdict() -> None:
    pairs = tuned_pairs(4)
    head = {"head": (spiked(300, 64, seed=1), spiked(300, 64, seed=2))}
    alone = judge_model([*pairs], ["x"] * 4, *model(pairs))
    with_head = judge_model([*pairs, "head"], ["x"] * 5, *model(pairs | head))
    assert (with_head.code, with_head.share) == (alone.code, alone.share)
    assert with_head.flagged == with_head.apart == ("head",)
    assert with_head.text.startswith("apart from 1 matrix that is no update of the base's: head")
    assert with_head.shares["UNRELATED"] > 0.99


def test_frozen_layers_count_as_related() -> None:
    still = {name: (base, base) for name, (base, _) in tuned_pairs(4).items()}
    head = {"head": (spiked(300, 64, seed=1), spiked(300, 64, seed=2))}
    verdict = judge_model([*still, "head"], ["x"] * 5, *model(still | head))
    assert (verdict.code, verdict.apart) == ("NO_UPDATE", ("head",))


def test_the_model_is_judged_by_the_cosine_of_all() -> None:
    """Tiny siblings of cosine .13 cannot be told from strangers one by one; together they can."""
    bases = [spiked(8, 8, seed=200 + 5 * i) for i in range(30)]
    pairs = {
        str(i): (base, at_cosine(base, 0.13, seed=900 + 5 * i)) for i, base in enumerate(bases)
    }
    rows, codes = model(pairs)
    assert {one.code for one in codes} == {"UNRELATED"}
    found = distance([*pairs], rows, codes)
    assert found is not None
    assert found.code == "TOO_FAR"
    assert judge_model([*pairs], ["x"] * 30, rows, codes).code == "TOO_FAR"


def test_limits_move_and_switch_off_the_codes() -> None:
    base = spiked(64, 64, seed=9)
    tuned = at_cosine(base, 0.5, seed=77)
    found, one = judged(base.float(), tuned.float())
    assert one.code == "TOO_FAR"
    assert judge(found, 8, {"too_far.cosine": 0.4}).code not in ("UNRELATED", "TOO_FAR")
