"""What storing weights rounds away, and which numbers survive it (docs/methods.md#floors)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from geoscope import Options, compare
from geoscope.engine import one_blas_thread
from geoscope.linalg.perturbed import mean_angles
from geoscope.metrics import (
    METRICS,
    Measured,
    PairFactors,
    Settings,
    measure,
    pair_factors,
    takes_of,
)
from geoscope.metrics.measure import _Floors
from geoscope.metrics.precision import FLOORS, floor_status
from geoscope.records import Status
from tests.helpers import oracle
from tests.helpers.matrices import DTYPES, gaussian, save_model, updated
from tests.helpers.measuring import all_instances, row

OK, CAUTION, BELOW = Status.OK, Status.CAUTION, Status.BELOW_RESOLUTION


def test_a_spectrum_of_leading_values_is_filled_up_to_its_energy() -> None:
    """With as many values next to the cut as the energy allows, and zeros behind."""
    S = torch.linspace(0.2, 0.01, 9, dtype=torch.float64)
    norm, top = torch.linalg.vector_norm(S), S[:4]
    nothing = torch.zeros(1, dtype=torch.float64)
    values = {
        "base.top": top[None], "base.norm": norm[None], "update.noise": nothing,
        "update.norm": nothing,
    }  # fmt: skip
    filled = _Floors(values, (12, 9), seed=0)._spectrum(0)
    rest = S[4:].square().sum() / S[3] ** 2
    assert torch.equal(filled[:4], top)
    assert filled[4:].tolist() == [float(S[3])] * math.ceil(rest) + [0.0] * (5 - math.ceil(rest))
    assert 0 < math.ceil(rest) < 5


# --- the thresholds -----------------------------------------------------------------------------


@pytest.mark.each_case
@pytest.mark.parametrize(
    ("floor", "noise_ratio", "expected"),
    [
        ("top", 0.0, OK),
        ("top", 0.2, OK),
        ("top", 0.2001, CAUTION),
        ("top", 0.6, CAUTION),
        ("top", 0.6001, BELOW),
        ("top", 50.0, BELOW),
        ("energy", 0.1, OK),
        ("energy", 0.1001, CAUTION),
        ("energy", 0.2, CAUTION),
        ("energy", 0.2001, BELOW),
        ("amplitude", 0.005, OK),  # weighed by √(100/6.25) = 4: .02 and .1
        ("amplitude", 0.0051, CAUTION),
        ("amplitude", 0.025, CAUTION),
        ("amplitude", 0.0251, BELOW),
    ],
)
def test_the_table_of_classes(floor: str, noise_ratio: float, expected: Status) -> None:
    assert floor_status(floor, noise_ratio, 6.25, 100) is expected


@pytest.mark.parametrize("floor", FLOORS)
def test_without_noise_all_is_well_and_an_undefined_ratio_is_left_to_other_statuses(
    floor: str,
) -> None:
    assert floor_status(floor, 0.0, 5.0, 50) is OK
    assert floor_status(floor, math.nan, math.nan, 50) is OK


def test_only_the_amplitude_class_minds_how_concentrated_the_update_is() -> None:
    for floor in ("top", "energy"):
        assert floor_status(floor, 0.05, 1.0, 10**6) is OK
    assert floor_status("amplitude", 0.01, 100.0, 100) is OK
    assert floor_status("amplitude", 0.01, 4.0, 100) is CAUTION
    assert floor_status("amplitude", 0.01, 0.5, 100) is BELOW


TOP = {
    "spectral_norm", "stable_rank", "top_share@1", "top_share@8", "energy_right@k", "energy_left@k",
    "energy_two_sided@k", "lift@k", "versus_base@k", "outside_span", "auc_right", "auc_left",
    "nss", "spectral_share", "spectral_lift", "intruders", "intruder_energy", "intruders_right",
    "intruder_energy_right",
}  # fmt: skip
ENERGY = {"entropy_rank", "participation_ratio", "k90", "k95", "entropy_rank_share", "k90_share"}
AMPLITUDE = {
    "effective_rank", "nuclear_ratio", "k99", "numerical_rank", "condition_number",
    "effective_rank_share", "k99_share", "tail_ratio",
}  # fmt: skip
ANGLES = {f"angle_{side}_{kind}@k" for side in ("left", "right") for kind in ("mean", "max")}
NONE = {
    "relative_update", "precision_ratio", "update_sparsity", "update_sparsity_abs",
    "update_sparsity_exact", "frobenius_norm", "signal_rank", "rank_ratio",
    "stable_rank_ratio", "nominal_rank", "base_cosine", "base_share", "energy_of_base@k",
    *(f"mask_{kind}_{mask}" for kind in ("overlap", "lift", "density") for mask in
      ("low", "principal", "control")),
}  # fmt: skip


def test_every_metric_is_in_the_class_of_methods() -> None:
    classes: dict[str | None, set[str]] = {}
    for metric in METRICS:
        classes.setdefault(metric.floor, set()).add(metric.id)
    assert classes == {
        "top": TOP,
        "energy": ENERGY,
        "amplitude": AMPLITUDE,
        "angle": ANGLES,
        "edge": {"suggested_rank"},
        "gap": {"gap@k"},
        None: NONE,
    }


def test_spectra_of_base_and_tuned_have_no_floor() -> None:
    for one in all_instances():
        if one.role in ("base", "tuned"):
            assert one.floor is None, one.id
        elif one.role == "update":
            assert one.floor == one.metric.floor


# --- the table of stored rank-16 updates --------------------------------------------------------

N, RANK = 1024, 16
RHOS = (1e-1, 3e-2, 1e-2, 3e-3, 1e-3, 5e-4)
NU = (0.017, 0.055, 0.164, 0.53, 2.0, 5.3)
UNCHANGED = (0.02, 0.06, 0.18, 0.48, 0.78, 0.89)
EFFECTIVE = (33, 82, 250, 561, 706, 738)
ENTROPY = (15.8, 16.2, 19.5, 53, 225, 371)
PARTICIPATION = (15.5, 15.6, 16.3, 24, 73, 169)
STABLE = (12.2, 12.3, 12.6, 15.2, 26.7, 43.8)
CAPTURED = (1.00, 1.00, 0.97, 0.78, 0.38, 0.20)
SHIFTED = (1.00, 1.00, 1.00, 0.93, 0.51, 0.27)  # NSS over the intended ρ
NEAR = 0.10


def table(expected: Sequence[Any]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(("rho", "expected"), list(zip(RHOS, expected, strict=True)))


@cache
def wide_base() -> Tensor:
    """Gaussian, exact in bf16."""
    return gaussian(N, N, seed=1).bfloat16()


def factors(base: Tensor, tuned: Tensor, *ids: str) -> tuple[PairFactors, Measured]:
    """Just these numbers, without the base's whole basis."""
    selected = [one for one in all_instances((RANK,)) if one.id in ids]
    with one_blas_thread():
        found = pair_factors(
            base[None],
            tuned[None],
            takes=takes_of(selected),
            ks=(RANK,),
            settings=Settings(ks=(16,)),
        )
        (numbers,) = measure(found, selected, seed=0)
    return found, numbers


def number(found: Measured, key: str) -> float:
    """The number behind a value, whatever its status."""
    value = found.values[key]
    return float(found.raw[key] if value is None else value)


@cache
def random_update(rho: float) -> Measured:
    """Random rank 16; exact values 15.9, 15.7, 15.5, 12.2."""
    low = gaussian(N, RANK, seed=7) @ gaussian(RANK, N, seed=107)
    tuned = updated(wide_base().double(), low, rho).bfloat16()
    ranks = ("effective_rank", "entropy_rank", "participation_ratio", "stable_rank")
    names = ("precision_ratio", "update_sparsity", *(f"update.{one}" for one in ranks))
    return factors(wide_base(), tuned, *names)[1]


@cache
def leading() -> Tensor:
    """The base's own leading 16 pairs."""
    with one_blas_thread():
        U, S, Vh = torch.linalg.svd(wide_base().double())
    return (U[:, :RANK] * S[:RANK]) @ Vh[:RANK]


@cache
def leading_update(rho: float) -> Measured:
    tuned = updated(wide_base().double(), leading(), rho).bfloat16()
    names = ("relative_update", "energy_two_sided@16", "nss", "spectral_share", "precision_ratio")
    return factors(wide_base(), tuned, *names)[1]


@table(NU)
def test_noise_ratio_of_the_table(rho: float, expected: float) -> None:
    assert number(random_update(rho), "precision_ratio") == pytest.approx(expected, rel=NEAR)
    assert number(leading_update(rho), "precision_ratio") == pytest.approx(expected, rel=NEAR)


@table(UNCHANGED)
def test_unchanged_entries_of_the_table(rho: float, expected: float) -> None:
    assert number(random_update(rho), "update_sparsity") == pytest.approx(expected, abs=0.006)


@table(EFFECTIVE)
def test_effective_rank_of_the_table(rho: float, expected: float) -> None:
    assert number(random_update(rho), "update.effective_rank") == pytest.approx(expected, rel=0.05)


@table(ENTROPY)
def test_entropy_rank_of_the_table(rho: float, expected: float) -> None:
    assert number(random_update(rho), "update.entropy_rank") == pytest.approx(expected, rel=0.05)


@table(PARTICIPATION)
def test_participation_ratio_of_the_table(rho: float, expected: float) -> None:
    found = number(random_update(rho), "update.participation_ratio")
    assert found == pytest.approx(expected, rel=0.05)


@table(STABLE)
def test_stable_rank_of_the_table(rho: float, expected: float) -> None:
    assert number(random_update(rho), "update.stable_rank") == pytest.approx(expected, rel=0.05)


@table(CAPTURED)
def test_captured_energy_of_the_table(rho: float, expected: float) -> None:
    assert number(leading_update(rho), "energy_two_sided@16") == pytest.approx(expected, rel=0.05)


@table(SHIFTED)
def test_spectral_shift_over_the_intended_size_of_the_table(rho: float, expected: float) -> None:
    assert number(leading_update(rho), "nss") / rho == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize(("rho", "expected"), [(3e-3, 0.89), (1e-3, 0.63)])
def test_spectral_share_is_by_the_stored_size(rho: float, expected: float) -> None:
    assert number(leading_update(rho), "spectral_share") == pytest.approx(expected, rel=0.05)


@table([(OK, OK, BELOW), (OK, OK, BELOW), (OK, CAUTION, BELOW), (CAUTION, BELOW, BELOW),
        (BELOW, BELOW, BELOW), (BELOW, BELOW, BELOW)])  # fmt: skip
def test_what_the_table_shows_to_be_wrong_is_marked(
    rho: float, expected: tuple[Status, ...]
) -> None:
    """Each class is marked or withheld before rounding moves its numbers by a third."""
    found = random_update(rho)
    keys = ("update.stable_rank", "update.entropy_rank", "update.effective_rank")
    assert tuple(found.status.get(key, OK) for key in keys) == expected
    for key, exact in zip(keys, (12.2, 15.7, 15.9), strict=True):
        if found.status.get(key, OK) is not BELOW:
            assert found.values[key] == pytest.approx(exact, rel=1 / 3)


# --- the ratio ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "share"), [("bf16", 1.6617e-3), ("fp16", 2.0771e-4)])
@pytest.mark.parametrize("rho", [0.3, 0.02])
def test_rule_of_thumb(dtype: str, share: float, rho: float) -> None:
    """ν ≈ 1.66e-3/ρ (bf16), 2.1e-4/ρ (fp16), for an sd of 1; W1 is larger by √(1 + ρ²)."""
    base = gaussian(300, 300, seed=2, sd=1.0)
    tuned = updated(base, gaussian(300, 300, seed=3), rho).to(DTYPES[dtype])
    found = row(base.to(DTYPES[dtype]), tuned, only=["precision_ratio"])
    assert number(found, "precision_ratio") * rho == pytest.approx(share, rel=0.02 + rho**2 / 2)


@pytest.mark.parametrize("dtype", DTYPES)
def test_noise_is_the_spacing_of_the_tuned_entries(dtype: str) -> None:
    base = gaussian(40, 30, seed=4).to(DTYPES[dtype])
    tuned = updated(base.double(), gaussian(40, 30, seed=5), 0.1).to(DTYPES[dtype])
    W = tuned.double().numpy()
    noise = math.sqrt(float(np.sum(oracle.ulp(W, dtype) ** 2)) / 12)
    expected = noise / np.linalg.norm(W - base.double().numpy())
    found = row(base, tuned, only=["precision_ratio"])
    assert number(found, "precision_ratio") == pytest.approx(expected, rel=1e-12)


def test_the_spacing_predicts_what_rounding_does() -> None:
    """√(Σulp²/12) is the norm of the error of rounding fresh weights, to one per cent."""
    exact = updated(gaussian(300, 300, seed=6), gaussian(300, 300, seed=7), 0.1)
    for dtype in DTYPES.values():
        tuned = exact.to(dtype)
        error = float((tuned.double() - exact).norm())
        takes = frozenset({"update.norm"})
        found = pair_factors(exact[None], tuned[None], takes=takes, ks=(), settings=Settings())
        assert float(found.values["tuned.noise"]) == pytest.approx(error, rel=0.01)


# --- which dtype counts -------------------------------------------------------------------------


def note_of(base: Tensor, tuned: Tensor) -> tuple[str, ...]:
    return factors(base, tuned, "precision_ratio")[0].notes[0]


def ratio_of(base: Tensor, tuned: Tensor) -> float:
    return number(factors(base, tuned, "precision_ratio")[1], "precision_ratio")


def stored_pair(m: int = 64, n: int = 32, rho: float = 0.05) -> tuple[Tensor, Tensor]:
    base = gaussian(m, n, seed=8)
    return base, updated(base, gaussian(m, n, seed=9), rho)


@pytest.mark.parametrize("wide", [torch.float32, torch.float16], ids=str)
def test_a_wide_file_of_bf16_numbers_counts_as_bf16_and_says_so(wide: torch.dtype) -> None:
    # fp16 cannot hold the tiniest bf16 numbers
    narrow = [one.bfloat16().where(one.abs() > 1e-4, 0.01) for one in stored_pair()]
    widened = [one.to(wide) for one in narrow]
    assert ratio_of(*widened) == pytest.approx(ratio_of(*narrow), rel=1e-12)
    stored = str(wide).removeprefix("torch.")
    assert note_of(*widened) == tuple(
        f"{role} is stored as {stored} and holds only bfloat16 numbers"
        for role in ("base", "tuned")
    )
    assert note_of(*narrow) == ()


def test_one_entry_between_bf16_numbers_makes_it_a_wide_file() -> None:
    base, tuned = (one.bfloat16().float() for one in stored_pair())
    tuned[-1, -1] += 2.0**-20
    assert ratio_of(base, tuned) < 1e-3
    assert note_of(base, tuned) == (
        "base is stored as float32 and holds only bfloat16 numbers",
        "base holds bfloat16, tuned float32: ν counts the rounding of tuned, about 2.5e-08 of the "
        "weights; a base rounded after training began adds about 0.0017",
    )


def test_fewer_than_1024_entries_may_be_bf16_numbers_by_chance() -> None:
    few = [one.bfloat16().float() for one in stored_pair(31, 33)]
    enough = [one.bfloat16().float() for one in stored_pair(32, 32)]
    assert note_of(*few) == ()
    assert ratio_of(*few) < 1e-5
    assert len(note_of(*enough)) == 2
    assert ratio_of(*enough) > 1e-2


def test_fp64_files_are_taken_at_their_word() -> None:
    base, tuned = (one.bfloat16().double() for one in stored_pair())
    assert note_of(base, tuned) == ()
    assert ratio_of(base, tuned) < 1e-12


def test_of_mixed_dtypes_that_of_the_tuned_file_decides() -> None:
    base, tuned = stored_pair()
    narrow_tuned = ratio_of(base.float(), tuned.bfloat16())
    wide_tuned = ratio_of(base.bfloat16(), tuned.float())
    assert narrow_tuned == pytest.approx(ratio_of(base.bfloat16(), tuned.bfloat16()), rel=0.02)
    assert narrow_tuned > 0.02
    assert wide_tuned < 1e-5


def test_mixed_dtypes_are_upcast_before_they_are_subtracted() -> None:
    base, tuned = stored_pair(rho=1e-3)
    for before, after in ((base.bfloat16(), tuned.float()), (base.half(), tuned.bfloat16())):
        found = row(before, after, only=["relative_update", "update.frobenius_norm"])
        exact = float((after.double() - before.double()).norm())
        assert found.values["update.frobenius_norm"] == pytest.approx(exact, rel=1e-10)
        rho = exact / float(before.double().norm())
        assert found.values["relative_update"] == pytest.approx(rho, rel=1e-12)


def test_each_role_has_the_spacing_of_its_own_file() -> None:
    """fp16 and bf16 count other tails of one spectrum; the update counts as the tuned file."""
    n = 64
    base = torch.diag(torch.logspace(0, -3, n, base=2.0) ** 3).double()  # 1 … 2^-9
    found = row(base.half(), (1.5 * base).bfloat16(), only=[
        f"{role}.numerical_rank" for role in ("base", "tuned", "update")
    ])  # fmt: skip

    def count(bits: int) -> int:
        return int((base.diagonal() > n * 2.0**-bits).sum())

    assert number(found, "base.numerical_rank") == count(10)
    assert number(found, "tuned.numerical_rank") == count(7)
    assert number(found, "update.numerical_rank") == pytest.approx(count(7), abs=1)
    assert count(10) != count(7)


# --- below resolution ---------------------------------------------------------------------------

# Those that look at the spacing of the format itself are other numbers in a wider file.
OF_SPACING = ("numerical_rank", "condition_number", "precision_ratio", "suggested_rank")
COMPARED = [one for one in all_instances() if one.metric.id not in OF_SPACING]


@cache
def stored_small(rho: float, wide: bool = False) -> Measured:
    """A bf16 pair; `wide` tells geoscope that it was never rounded."""
    base, tuned = (one.bfloat16() for one in stored_pair(96, 80, rho))
    return row(base.double(), tuned.double()) if wide else row(base, tuned)


@pytest.mark.parametrize("rho", [1e-1, 1e-2, 5e-3, 1e-3, 3e-4])
def test_the_number_behind_below_resolution_is_the_one_without_a_floor(rho: float) -> None:
    found, without = stored_small(rho), stored_small(rho, wide=True)
    for key in [one.id for one in COMPARED]:
        if found.status.get(key) is BELOW:
            assert found.values[key] is None
            assert found.raw[key] == pytest.approx(without.values[key], rel=1e-9), key
        else:
            assert key not in found.raw
    assert not any(without.status.get(one.id) is BELOW for one in COMPARED)


@pytest.mark.parametrize("rho", [1e-1, 1e-2, 5e-3, 1e-3, 3e-4])
def test_every_status_follows_from_the_noise_ratio_and_the_class(rho: float) -> None:
    found, without = stored_small(rho), stored_small(rho, wide=True)
    nu, spread = number(found, "precision_ratio"), number(without, "update.participation_ratio")
    for one in COMPARED:
        if without.values[one.id] is None or one.floor in ("angle", "gap"):
            continue
        expected = OK if one.floor is None else floor_status(one.floor, nu, spread, 80)
        assert found.status.get(one.id, OK) is expected, one.id


def test_a_suggested_rank_is_resolved_where_something_is_above_the_rounding() -> None:
    """The rank of the stored update: 4 in a wide file, and less the more bf16 rounds away."""
    low = gaussian(96, 4, seed=1) @ gaussian(4, 80, seed=2)
    base = gaussian(96, 80, seed=3)
    found = [row(base.bfloat16(), updated(base.bfloat16().double(), low, rho).bfloat16())
             for rho in (3e-2, 1e-4)]  # fmt: skip
    assert found[0].values["suggested_rank"] in (3, 4)
    assert (found[1].values["suggested_rank"], found[1].raw["suggested_rank"]) == (None, 0)
    assert found[1].status["suggested_rank"] is BELOW


def test_below_resolution_stays_out_of_summary_and_verdict(tmp_path: Path) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    base, tuned = stored_pair(96, 80, 3e-4)
    for folder, weight in (("base", base), ("tuned", tuned)):
        save_model(tmp_path / folder, {name: weight.bfloat16()})
    report = compare(tmp_path / "base", tmp_path / "tuned", options=Options(ks=(8,)))
    (found,) = report.layers
    for key in ("update.stable_rank", "nss", "energy_two_sided@8", "update.effective_rank"):
        assert found.status[key] is BELOW
        assert found.values[key] is None
        assert found.raw[key] > 0
        assert report.summary.model[key] is None
        assert report.summary.modules["up_proj"][key] is None
    assert report.summary.verdict is not None
    assert report.summary.verdict.code == "UNDETERMINED"
    for entry in report.summary.verdict.explain:  # no condition met a raw number
        if entry["condition"].startswith(("C_LR", "NSS")):
            assert entry["least"] is None


# --- angles -------------------------------------------------------------------------------------


def rounding_angle(base: Tensor, tuned: Tensor, k: int, which: str) -> float:
    """Mean and two sd of the angles that noise of variance ω² = Σulp²/(12mn) per entry turns."""
    noise = math.sqrt(float(np.sum(oracle.ulp(tuned.double().numpy(), "bf16") ** 2)) / 12)
    S = torch.linalg.svdvals(base.double())
    m, n = base.shape
    turned = mean_angles(S, noise, k=k, shape=(m, n), seed=0)[which == "right"]
    return float(turned.mean() + 2 * turned.std())


@pytest.mark.parametrize("rho", [1e-1, 1e-2, 1e-3, 3e-4, 1e-4])
def test_an_angle_counts_when_it_exceeds_what_rounding_alone_turns(rho: float) -> None:
    base, tuned = (one.bfloat16() for one in stored_pair(96, 80, rho))
    found = stored_small(rho)
    for which in ("left", "right"):
        for k in (2, 8):
            mean, largest = (f"angle_{which}_{kind}@{k}" for kind in ("mean", "max"))
            floor = rounding_angle(base, tuned, k, which)
            for key in (mean, largest):
                assert found.status.get(key, OK) is (OK if number(found, mean) >= floor else BELOW)
                if key in found.raw:
                    assert found.floors[key] == pytest.approx(floor, rel=1e-9)
                else:
                    assert key not in found.floors


def test_large_updates_turn_more_than_rounding_and_tiny_ones_less() -> None:
    keys = [f"angle_{which}_mean@{k}" for which in ("left", "right") for k in (2, 8)]
    assert all(stored_small(1e-1).status.get(key, OK) is OK for key in keys)
    assert all(stored_small(1e-4).status[key] is BELOW for key in keys)


def test_angles_of_a_matrix_with_itself_are_zero_and_not_below_resolution() -> None:
    base = stored_pair()[0].bfloat16()
    found = row(base, base.clone())
    for key in ("angle_left_mean@8", "angle_right_max@2"):
        assert found.values[key] == 0
        assert key not in found.status
