"""What is promised of every metric: these tests run over METRICS, so a new entry inherits them."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from functools import cache
from itertools import pairwise

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from geoscope.metrics import FAMILIES, METRICS, Measured, Metric, instances, measure_nothing
from geoscope.metrics.aggregate import _RULES
from geoscope.metrics.precision import FLOORS
from geoscope.metrics.spectrum import (
    effective_rank,
    entropy_rank,
    participation_ratio,
    stable_rank,
)
from geoscope.records import Status
from tests.helpers.matrices import DTYPES, gaussian, orthonormal, updated, with_spectrum
from tests.helpers.measuring import all_instances, numbers, row, rows, stored
from tests.helpers.oracle import ids as oracle_ids
from tests.helpers.oracle_capacity import CAPACITY

KS = (2, 8, 80)  # 80 exceeds every matrix here
SHAPES = {"square": (70, 70), "tall": (96, 66), "wide": (66, 96)}

every_metric = pytest.mark.parametrize("metric", METRICS, ids=[one.id for one in METRICS])
seeded = settings(
    deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.too_slow]
)
every_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


def ids_of(metric: Metric, ks: tuple[int, ...] = KS) -> list[str]:
    return [one.id for one in instances(metric, ks)]


@cache
def pairs(shape: tuple[int, int], dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Three bases and their tuned versions: isotropic, of low rank, on the principal directions."""
    m, n = shape
    bases = [gaussian(m, n, seed=1), gaussian(m, n, seed=2), gaussian(m, n, seed=3)]
    U, S, Vh = torch.linalg.svd(bases[2])
    tuned = [
        updated(bases[0], gaussian(m, n, seed=4), 0.05),
        updated(bases[1], gaussian(m, 3, seed=5) @ gaussian(3, n, seed=6), 0.02),
        bases[2] + 0.03 * (U[:, :16] * S[:16]) @ Vh[:16],
    ]
    return torch.stack(bases).to(dtype), torch.stack(tuned).to(dtype)


@cache
def stacked(shape: tuple[int, int]) -> list[Measured]:
    return rows(*pairs(shape), ks=KS)


@cache
def looped(shape: tuple[int, int]) -> list[Measured]:
    return [row(*pair, ks=KS) for pair in zip(*pairs(shape), strict=True)]


@cache
def reordered(shape: tuple[int, int]) -> list[Measured]:
    """The stack in reverse, its rows put back in order."""
    base, tuned = pairs(shape)
    return rows(base.flip(0), tuned.flip(0), ks=KS)[::-1]


@cache
def in_fp64(shape: tuple[int, int]) -> list[Measured]:
    """The same numbers in a wider file."""
    return rows(*(side.double() for side in pairs(shape)), ks=KS)


@cache
def computed_in_fp32(shape: tuple[int, int]) -> list[Measured]:
    return rows(*pairs(shape), ks=KS, dtype="float32")


@cache
def scaled(shape: tuple[int, int]) -> list[Measured]:
    return rows(*(64 * side for side in pairs(shape)), ks=KS)


@cache
def rotated(shape: tuple[int, int]) -> tuple[list[Measured], list[Measured]]:
    """The pairs in fp64 before and after one rotation of each side's coordinates."""
    m, n = shape
    base, tuned = (side.double() for side in pairs(shape))
    P, Q = orthonormal(m, m, seed=7), orthonormal(n, n, seed=8)
    return rows(base, tuned, ks=KS), rows(P @ base @ Q, P @ tuned @ Q, ks=KS)


@cache
def unchanged(shape: tuple[int, int]) -> Measured:
    base = pairs(shape)[0][0]
    return row(base, base.clone(), ks=KS)


def close(a: float | None, b: float | None, *, rel: float, absolute: float = 0.0) -> bool:
    if a is None or b is None:
        return a is b
    return math.isclose(a, b, rel_tol=rel, abs_tol=absolute)


def tolerance(metric: Metric) -> dict[str, float]:
    """Of the same computation in another order; angles are promised to 1e-8."""
    return {"rel": 1e-11, "absolute": 4e-9 if metric.floor == "angle" else 1e-13}


# --- a stack and its matrices -------------------------------------------------------------------


@every_shape
@every_metric
def test_batched_equals_looped(metric: Metric, shape: tuple[int, int]) -> None:
    for together, alone in zip(stacked(shape), looped(shape), strict=True):
        for key in ids_of(metric):
            assert close(together.values[key], alone.values[key], **tolerance(metric)), key
            assert together.status.get(key) == alone.status.get(key), key
            assert close(together.raw.get(key), alone.raw.get(key), **tolerance(metric)), key
            assert close(together.nulls.get(key), alone.nulls.get(key), rel=1e-11), key


@every_shape
@every_metric
def test_order_in_a_batch_is_irrelevant(metric: Metric, shape: tuple[int, int]) -> None:
    for forward, backward in zip(stacked(shape), reordered(shape), strict=True):
        for key in ids_of(metric):
            assert close(forward.values[key], backward.values[key], **tolerance(metric)), key
            assert forward.nulls.get(key) == backward.nulls.get(key), key
            assert forward.status.get(key) == backward.status.get(key), key


@every_shape
def test_the_pairs_differ_so_that_a_mixed_up_batch_shows(shape: tuple[int, int]) -> None:
    first, second, third = ({**one.values} for one in stacked(shape))
    moving = [key for key in first if first[key] is not None and first[key] != second[key]]
    assert len(moving) > 60
    assert first != third


# --- units, coordinates, precision --------------------------------------------------------------

# Proportional to the weights; the absolute sparsity has a length scale; the rest has none.
NORMS = ("frobenius_norm", "spectral_norm")
WITHOUT_LENGTH_SCALE = [one for one in METRICS if one.id != "update_sparsity_abs"]


@every_shape
@pytest.mark.parametrize(
    "metric", WITHOUT_LENGTH_SCALE, ids=[one.id for one in WITHOUT_LENGTH_SCALE]
)
def test_a_common_factor_changes_norms_only(metric: Metric, shape: tuple[int, int]) -> None:
    factor = 64 if metric.id in NORMS else 1
    for before, after in zip(stacked(shape), scaled(shape), strict=True):
        for key in ids_of(metric):
            value = before.values[key]
            wanted = None if value is None else factor * value
            assert close(after.values[key], wanted, rel=1e-10, absolute=1e-12), key
            assert after.status.get(key) == before.status.get(key), key
            assert close(after.nulls.get(key), before.nulls.get(key), rel=1e-10), key


def test_the_absolute_sparsity_depends_on_the_unit() -> None:
    base, tuned = pairs((70, 70))
    (small,) = rows(base[:1] / 1024, tuned[:1] / 1024, only=["update_sparsity_abs"])
    (large,) = rows(base[:1] * 64, tuned[:1] * 64, only=["update_sparsity_abs"])
    assert numbers(small, "update_sparsity_abs")[0] > 0.5 > numbers(large, "update_sparsity_abs")[0]


# Factors that stay the same when base and tuned are rotated alike.
INVARIANT = re.compile(r".*\.S|.*\.top@\w+|.*\.norm|cross\..*|angles\..*|intruders\..*")
ROTATED = [one for one in METRICS if all(INVARIANT.fullmatch(name) for name in one.takes)]


@every_shape
@pytest.mark.parametrize("metric", ROTATED, ids=[one.id for one in ROTATED])
def test_spectra_and_subspaces_know_no_coordinates(metric: Metric, shape: tuple[int, int]) -> None:
    for before, after in zip(*rotated(shape), strict=True):
        for key in ids_of(metric):
            assert close(before.values[key], after.values[key], rel=1e-8, absolute=1e-9), key
            assert close(before.nulls.get(key), after.nulls.get(key), rel=1e-8), key


def test_most_metrics_are_invariant_and_masks_are_not() -> None:
    assert len(ROTATED) > 30
    assert not [one.id for one in ROTATED if one.family in ("size", "masks") and "norm" in one.id]
    before, after = rotated((70, 70))
    low = "mask_overlap_principal"
    assert before[1].values[low] != pytest.approx(after[1].values[low], abs=1e-4)


# What the width of the file enters: its rounding noise and its eps.
ABOUT_STORAGE = {"role.noise", "role.eps", "update.noise"}
SMOOTH = [one for one in METRICS if not ABOUT_STORAGE & set(one.takes) and not one.integer]


@every_shape
@pytest.mark.parametrize("metric", SMOOTH, ids=[one.id for one in SMOOTH])
def test_fp32_storage_is_near_fp64_storage(metric: Metric, shape: tuple[int, int]) -> None:
    for wide, narrow in zip(in_fp64(shape), stacked(shape), strict=True):
        for key in ids_of(metric):
            if key in narrow.raw:
                continue  # below the floor of fp32, which is the point of the floor
            assert close(wide.values[key], narrow.values[key], rel=1e-6, absolute=1e-9), key


def arithmetic_error(metric: Metric, key: str, found: Measured) -> float:
    """What fp32 may be off by: eps over the gap for angles, √M more for changes of the spectrum."""
    if metric.floor == "angle":
        gap = found.values[f"gap@{key.partition('@')[2]}"]
        return 8 * 2.0**-23 / (gap or math.nan)
    return 3e-3 if metric.family == "collapse" else 1e-4


@every_shape
@pytest.mark.parametrize("metric", SMOOTH, ids=[one.id for one in SMOOTH])
def test_fp32_arithmetic_is_near_fp64_arithmetic(metric: Metric, shape: tuple[int, int]) -> None:
    for key in ids_of(metric):
        for exact, quick in zip(stacked(shape), computed_in_fp32(shape), strict=True):
            if key in exact.raw:
                continue  # below resolution: here fp32 adds noise of its own
            bound = arithmetic_error(metric, key, exact)
            assert close(exact.values[key], quick.values[key], rel=bound, absolute=bound), key
            assert exact.status.get(key) == quick.status.get(key), key


# --- leading directions only --------------------------------------------------------------------


@cache
def whole_and_quick() -> tuple[list[Measured], list[Measured]]:
    """Three pairs whose leading directions stand out, whole and under --quick."""
    S = torch.linspace(1, 0.3, 160, dtype=torch.float64)
    S[:12] = torch.linspace(9, 4, 12)
    S[12:] *= 0.5
    bases = [with_spectrum(200, 160, S, seed=seed) for seed in (31, 33, 35)]
    tuned = [updated(base, gaussian(200, 160, seed=9), 0.03) for base in bases]
    both = torch.stack(bases).float(), torch.stack(tuned).float()
    return rows(*both, ks=KS), rows(*both, ks=KS, quick=True)


LEADING = [one for one in METRICS if one.option != "curves"]


@pytest.mark.parametrize("metric", LEADING, ids=[one.id for one in LEADING])
def test_quick_numbers_are_the_same_numbers_or_absent(metric: Metric) -> None:
    for whole, quick in zip(*whole_and_quick(), strict=True):
        for one in instances(metric, KS):
            value = quick.values[one.id]
            if any(name.endswith(".S") for name in one.takes):
                assert (value, quick.status[one.id]) == (None, Status.NOT_APPLICABLE), one.id
                continue
            assert close(value, whole.values[one.id], rel=1e-6, absolute=1e-8), one.id
            assert quick.status.get(one.id) == whole.status.get(one.id), one.id


def test_quick_keeps_what_the_leading_directions_tell() -> None:
    quick = whole_and_quick()[1][0]
    for key in ("relative_update", "update.stable_rank", "lift@8", "angle_left_mean@8", "gap@8"):
        assert quick.values[key] is not None, key
    for key in ("nss", "update.effective_rank", "rank_ratio", "update.k90"):
        assert quick.values[key] is None, key
    assert not disagreements(quick)


# --- nothing changed, nothing there -------------------------------------------------------------

# docs/methods.md#statuses, ZERO_UPDATE: what stays a number.
OF_IDENTICAL = {
    "relative_update": 0.0,
    "base_cosine": 1.0,
    "update_sparsity": 1.0,
    "update_sparsity_abs": 1.0,
    "update_sparsity_exact": 1.0,
    "update.frobenius_norm": 0.0,
    "update.spectral_norm": 0.0,
    "nss": 0.0,
    "rank_ratio": 1.0,
    "stable_rank_ratio": 1.0,
    "intruders": 0,
    "intruder_energy": 0.0,
    "intruders_right": 0,
    "intruder_energy_right": 0.0,
}


@every_shape
@every_metric
def test_a_zero_update_is_zero_update_and_never_a_made_up_number(
    metric: Metric, shape: tuple[int, int]
) -> None:
    found = unchanged(shape)
    for one in instances(metric, KS):
        value, status = found.values[one.id], found.status.get(one.id, Status.OK)
        if one.id in OF_IDENTICAL:
            assert (value, status) == (OF_IDENTICAL[one.id], Status.OK), one.id
        elif metric.id == "nominal_rank":  # of the config, which a full update has not
            assert (value, status) == (None, Status.NOT_APPLICABLE)
        elif metric.family == "base_alignment":
            assert status is (Status.NOT_APPLICABLE if one.k == 80 else Status.OK), one.id
            if "angle" in one.id:
                assert value == (None if one.k == 80 else 0.0), one.id
        elif one.role in ("base", "tuned"):
            assert value == pytest.approx(looped(shape)[0].values[f"base.{metric.id}"]), one.id
        else:
            assert (value, status) == (None, Status.ZERO_UPDATE), one.id


@cache
def on_a_zero_base() -> Measured:
    return row(torch.zeros(70, 66), gaussian(70, 66, seed=1).float(), ks=KS)


@every_metric
def test_a_zero_base_leaves_nothing_to_compare_with(metric: Metric) -> None:
    found = on_a_zero_base()
    for one in instances(metric, KS):
        value, status = found.values[one.id], found.status.get(one.id, Status.OK)
        on_entries = metric.family == "size" and "base.norm" not in metric.takes
        if metric.id == "suggested_rank":  # here an isotropic update, which is noise
            assert (value, status) == (None, Status.BELOW_RESOLUTION)
        elif on_entries or one.role in ("tuned", "update"):
            assert value is not None, one.id
        elif one.id in ("base.frobenius_norm", "base.spectral_norm"):
            assert value == 0.0, one.id
        else:
            assert (value, status) == (None, Status.NOT_APPLICABLE), one.id


@pytest.mark.parametrize("status", [Status.NON_FINITE, Status.NOT_CONVERGED])
@every_metric
def test_a_matrix_without_numbers_still_has_the_nulls_of_its_shape(
    metric: Metric, status: Status
) -> None:
    found = measure_nothing(instances(metric, KS), (70, 66), status, seed=0)
    whole = row(*(side[0, :, :66] for side in pairs((70, 70))), ks=KS, only=ids_of(metric))
    assert set(found.values.values()) == {None}
    assert set(found.status.values()) == {status}
    for key, null in found.nulls.items():
        assert null == whole.nulls[key], key
    sampled = metric.null is not None and set(metric.null.takes) <= {"iid.S"}
    assert bool(found.nulls) == sampled


# --- ranges and order ---------------------------------------------------------------------------

Bounds = Callable[[int, float], tuple[float, float]]
# The wording of a range → (least, largest) for q and ρ.
RANGES: dict[str, Bounds] = {
    "≥ 0": lambda q, rho: (0, math.inf),
    "> 0": lambda q, rho: (5e-324, math.inf),
    "≥ 1": lambda q, rho: (1, math.inf),
    "0…1": lambda q, rho: (0, 1),
    "−1…1": lambda q, rho: (-1, 1),
    "0…10": lambda q, rho: (0, 10),
    "0…q": lambda q, rho: (0, q),
    "1…q": lambda q, rho: (1, q),
    "1/q…1": lambda q, rho: (1 / q, 1),
    "8/q…1": lambda q, rho: (8 / q, 1),
    "q^−½…1": lambda q, rho: (q**-0.5, 1),
    "0…π/2": lambda q, rho: (0, math.pi / 2),
    "0…ρ": lambda q, rho: (0, rho),
}
SLACK = 1e-9


@every_metric
def test_every_range_is_one_that_is_checked(metric: Metric) -> None:
    assert metric.range in RANGES


def outside_of_range(found: Measured, q: int) -> list[str]:
    rho = found.values["relative_update"]
    wrong = []
    for one in all_instances(KS):
        value = found.values[one.id]
        if value is None or (one.metric.id == "nss" and rho is None):
            continue
        least, largest = RANGES[one.metric.range](q, float(rho or 0))
        if not least * (1 - SLACK) - SLACK <= value <= largest * (1 + SLACK) + SLACK:
            wrong.append(f"{one.id} = {value} outside {one.metric.range} at q = {q}")
    return wrong


def disagreements(found: Measured) -> list[str]:
    """Ids whose value and status contradict each other, or whose numbers are not finite."""
    wrong = []
    for key, value in found.values.items():
        status = found.status.get(key, Status.OK)
        if (value is None) != status.is_null:
            wrong.append(f"{key}: {value} with {status}")
        if value is not None and not math.isfinite(value):
            wrong.append(f"{key}: {value}")
        if (key in found.raw) != (status is Status.BELOW_RESOLUTION):
            wrong.append(f"{key}: raw and {status}")
    wrong += [f"null of {key}: {null}" for key, null in found.nulls.items() if not _finite(null)]
    wrong += [f"{key} has no value" for key in found.status if key not in found.values]
    return wrong


def _finite(number: float) -> bool:
    return math.isfinite(number)


KINDS = ("isotropic", "one_direction", "same", "one_entry", "tiny", "reversed", "zero_base")


def pair_of(
    kind: str, m: int, n: int, rho: float, dtype: torch.dtype, seed: int
) -> tuple[Tensor, Tensor]:
    base = gaussian(m, n, seed=seed)
    match kind:
        case "isotropic":
            tuned = updated(base, gaussian(m, n, seed=seed + 1), rho)
        case "one_direction":
            tuned = updated(base, gaussian(m, 1, seed=seed + 1) @ gaussian(1, n, seed=seed), rho)
        case "same":
            tuned = base
        case "one_entry":
            tuned = base.clone()
            tuned[0, 0] += rho
        case "tiny":
            tuned = base * (1 + 2.0**-20)
        case "reversed":
            tuned = -base
        case _:
            base, tuned = torch.zeros_like(base), base
    first, second = stored(dtype, base, tuned)
    return first, second


any_pair = st.builds(
    pair_of,
    st.sampled_from(KINDS),
    m=st.integers(2, 24),
    n=st.integers(2, 24),
    rho=st.floats(1e-5, 3.0),
    dtype=st.sampled_from([*DTYPES.values(), torch.float64]),
    seed=st.integers(0, 10**6),
)


@settings(seeded, max_examples=20)
@given(any_pair)
def test_any_pair_stays_in_range_and_is_null_exactly_with_a_null_status(
    pair: tuple[Tensor, Tensor],
) -> None:
    assert_sound(*pair)


@pytest.mark.slow
@settings(seeded, max_examples=100)
@given(any_pair)
def test_many_pairs_stay_in_range(pair: tuple[Tensor, Tensor]) -> None:
    assert_sound(*pair)


def assert_sound(base: Tensor, tuned: Tensor) -> None:
    found = row(base, tuned, ks=KS)
    assert set(found.values) == {one.id for one in all_instances(KS)}
    assert not disagreements(found)
    assert not outside_of_range(found, min(base.shape))


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_pairs_with_masks_stay_in_range(kind: str, dtype: torch.dtype) -> None:
    base, tuned = pair_of(kind, 90, 66, 3e-3, dtype, seed=5)
    found = row(base, tuned, ks=KS)
    assert not disagreements(found)
    assert not outside_of_range(found, 66)


spectra = st.lists(st.floats(0, 1e6), min_size=1, max_size=40).filter(lambda S: max(S) > 0)


@seeded
@given(spectra)
def test_renyi_chain(values: list[float]) -> None:
    """Orders ∞, 2 and 1 on the energies, 1 on the amplitudes, 0: each at least the one before."""
    S = torch.tensor(sorted(values, reverse=True), dtype=torch.float64)
    chain = [
        1.0,
        float(stable_rank(S)),
        float(participation_ratio(S)),
        float(entropy_rank(S)),
        float(effective_rank(S)),
        float((S > 0).sum()),
    ]
    for less, more in pairwise(chain):
        assert less <= more * (1 + 1e-12), chain


@seeded
@given(spectra, st.floats(1e-150, 1e150))
def test_ranks_have_no_unit_and_do_not_overflow(values: list[float], factor: float) -> None:
    S = torch.tensor(sorted(values, reverse=True), dtype=torch.float64)
    S = S / S[0]
    for rank in (stable_rank, participation_ratio, entropy_rank, effective_rank):
        assert float(rank(S * factor)) == pytest.approx(float(rank(S)), rel=1e-9)


@pytest.mark.parametrize("rho", [1e-6, 1e-3, 1e-1, 1.0, 10.0])
@pytest.mark.parametrize("kind", ["decaying", "repeated", "gaussian"])
def test_no_update_moves_the_spectrum_further_than_itself(kind: str, rho: float) -> None:
    """Mirsky: ‖σ(W1) − σ(W0)‖₂ ≤ ‖W1 − W0‖_F, with equality for a plain rescaling."""
    base = {
        "decaying": with_spectrum(40, 30, torch.logspace(0, -4, 30), seed=1),
        "repeated": with_spectrum(40, 30, torch.ones(30), seed=2),
        "gaussian": gaussian(40, 30, seed=3),
    }[kind]
    names = ["spectral_share", "nss", "relative_update"]
    for direction in (gaussian(40, 30, seed=4), gaussian(40, 2, seed=5) @ gaussian(2, 30, seed=6)):
        share, shift, size = numbers(row(base, updated(base, direction, rho), only=names), *names)
        assert share <= 1 + 1e-9
        assert shift <= size * (1 + 1e-9)
        assert share == pytest.approx(shift / size, rel=1e-9)
    rescaled = row(base, (1 + rho) * base, only=["spectral_share"])
    assert numbers(rescaled, "spectral_share") == pytest.approx([1.0])


# --- words, and a second opinion ----------------------------------------------------------------


@every_metric
def test_every_metric_is_described(metric: Metric) -> None:
    for words in (metric.formula, metric.range, metric.reading, metric.caution, metric.source):
        assert words.strip()
        assert words == words.strip()
    assert metric.family in FAMILIES
    assert metric.aggregate in _RULES
    assert metric.floor in (None, "angle", "edge", "gap", *FLOORS)
    assert metric.null is None or metric.null.text.strip()


def test_ids_are_unique_and_every_family_has_some() -> None:
    ids = [one.id for one in all_instances(KS)]
    assert len(ids) == len(set(ids))
    assert {one.family for one in METRICS} == set(FAMILIES)


@every_metric
def test_every_metric_has_an_independent_definition(metric: Metric) -> None:
    """The oracle knows it (test_agreement, test_capacity), or it is a mask (test_nulls)."""
    if metric.family != "masks":
        assert set(ids_of(metric, (8,))) <= {*oracle_ids((8,), curves=True), *CAPACITY}


def test_the_oracle_knows_nothing_that_is_not_reported() -> None:
    known = {*oracle_ids((8,), curves=True), *CAPACITY}
    assert known <= {one.id for one in all_instances((8,))}


@every_metric
def test_nulls_stand_beside_every_id_that_has_one(metric: Metric) -> None:
    found = stacked((96, 66))[0]
    for one in instances(metric, KS):
        of_rank = metric.null is not None and metric.null.takes == ("rank.max",)
        has = metric.null is not None and (one.k or 0) <= 66 and not of_rank
        assert (one.id in found.nulls) == has, one.id
