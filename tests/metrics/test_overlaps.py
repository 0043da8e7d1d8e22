"""How the updates of two tuned models relate, against plain numpy.

See docs/methods.md#two-tuned-models.
"""

from __future__ import annotations

import math
import signal
from collections.abc import Sequence
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from geoscope import Options, Report, compare
from geoscope.engine import one_blas_thread
from geoscope.errors import Stopped
from geoscope.linalg.factor_update import FactorUpdate
from geoscope.metrics.kept import PHI_DIMENSIONS
from geoscope.metrics.overlaps import UpdateOf, overlap, updates_of
from geoscope.verbs.options import Interrupted
from geoscope.verbs.pairs import several
from tests.helpers import oracle
from tests.helpers.matrices import DTYPES, gaussian, orthonormal, save_model, updated, with_spectrum
from tests.helpers.running import by_rows

SHAPES = {"square": (40, 40), "tall": (60, 30), "wide": (30, 60)}
KS = (2, 8, 30)

Found = tuple[dict[str, float | int | None], dict[str, float]]


def overlaps(base: Tensor, a: Tensor, b: Tensor, *, ks: tuple[int, ...] = KS) -> Found:
    with one_blas_thread():
        return overlap(*updates_of(base[None], [a[None], b[None]], ks=ks))


def number(value: float | int | None) -> float:
    assert value is not None
    return float(value)


@cache
def three(shape: tuple[int, int], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """A base and two related models: they share a third of their update."""
    m, n = shape
    base = gaussian(m, n, seed=1)
    common, own, other = (gaussian(m, n, seed=seed) for seed in (2, 3, 4))
    a, b = updated(base, common + own, 0.02), updated(base, common - 1.5 * other, 0.03)
    return base.to(dtype), a.to(dtype), b.to(dtype)


# --- the definitions ----------------------------------------------------------------------------


def leading(X: np.ndarray) -> np.ndarray:
    """σ₁u₁v₁ᵀ."""
    U, S, Vh = np.linalg.svd(X, full_matrices=False)
    return S[0] * np.outer(U[:, 0], Vh[0])


def by_definition(base: Tensor, a: Tensor, b: Tensor, ks: tuple[int, ...]) -> dict[str, float]:
    """Every value straight from its definition, dense and in fp64."""
    W, A, B = (one.double().numpy() for one in (base, a, b))
    X, Y = A - W, B - W
    found = {"update_cosine": float(np.sum(X * Y) / np.linalg.norm(X) / np.linalg.norm(Y))}
    first, second = changed(W, A), changed(W, B)
    found["mask_jaccard"] = np.sum(first & second) / np.sum(first | second)
    joint = (X != 0) & (Y != 0)
    found["sign_conflict"] = np.sum(joint & (np.sign(X) != np.sign(Y))) / np.sum(joint)
    U0, _, V0h = np.linalg.svd(X, full_matrices=False)
    U1, _, V1h = np.linalg.svd(Y, full_matrices=False)
    found |= {
        "changed_shared": np.mean(first & second),
        "changed_only_a": np.mean(first & ~second),
        "changed_only_b": np.mean(second & ~first),
    }
    heads = [leading(Z) for Z in (X, Y)]
    rests = [Z - H for Z, H in zip((X, Y), heads, strict=True)]
    for key, (P, Q) in (("head_cosine", heads), ("residual_cosine", rests)):
        found[key] = float(np.sum(P * Q) / np.linalg.norm(P) / np.linalg.norm(Q))
    for side, P, Q in (("left", U0, U1), ("right", V0h.T, V1h.T)):
        for i, j in product(PHI_DIMENSIONS, repeat=2):
            energy = np.sum((P[:, :i].T @ Q[:, :j]) ** 2)
            found[f"phi_{side}@{i},{j}"] = float(energy / min(i, j))
        for k in ks:
            if k < len(P):
                cosines = np.linalg.svd(P[:, :k].T @ Q[:, :k], compute_uv=False)
                angles = np.arccos(np.clip(cosines, -1, 1))
                found[f"update_angle_{side}_mean@{k}"] = float(np.mean(angles))
    return {key: float(number) for key, number in found.items()}


def changed(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """The mask of docs/methods.md#unchanged-entries."""
    x, y = oracle.round_to(before, "bf16"), oracle.round_to(after, "bf16")
    return np.abs(x - y) > 1e-3 * np.maximum(np.abs(x), np.abs(y))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_every_value_is_its_definition(shape: tuple[int, int], dtype: str) -> None:
    models = three(shape, DTYPES[dtype])
    values, _ = overlaps(*models)
    expected = by_definition(*models, KS)
    assert {key for key, value in values.items() if value is not None} == set(expected)
    for key, wanted in expected.items():
        assert values[key] == pytest.approx(wanted, rel=1e-6, abs=1e-10), key


@pytest.mark.parametrize("dtypes", [("bf16", "fp32", "fp32"), ("fp32", "bf16", "fp16")])
def test_each_file_may_have_a_dtype_of_its_own(dtypes: tuple[str, str, str]) -> None:
    exact = three((30, 60), torch.float64)
    base, a, b = (one.to(DTYPES[dtype]) for one, dtype in zip(exact, dtypes, strict=True))
    expected = by_definition(base, a, b, KS)
    values, _ = overlaps(base, a, b)
    for key, wanted in expected.items():
        assert values[key] == pytest.approx(wanted, rel=1e-6, abs=1e-10), key


def test_nulls_are_those_of_the_shape() -> None:
    _, nulls = overlaps(*three((60, 30), torch.float32))
    assert nulls["update_cosine"] == 0
    assert nulls["sign_conflict"] == 0.5
    assert nulls["phi_left@8,16"] == nulls["phi_left@16,8"] == 16 / 60
    assert nulls["phi_right@1,8"] == 8 / 30
    assert nulls["update_angle_left_mean@8"] == pytest.approx(math.acos(math.sqrt(8 / 60)))
    assert nulls["update_angle_right_mean@8"] == pytest.approx(math.acos(math.sqrt(8 / 30)))
    # Independent masks would have this; those of rounding lie on the same small weights.
    p, r = (changed(*pair).mean() for pair in masks_of((60, 30)))
    assert nulls["mask_jaccard"] >= p * r / (p + r - p * r)


@pytest.mark.slow
@pytest.mark.parametrize("rho", [1e-2, 3e-3, 1e-3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_masks_of_independent_updates_overlap_as_their_null_says(
    rho: float, dtype: torch.dtype
) -> None:
    base = gaussian(256, 256, seed=1).to(dtype)
    tuned = [updated(base.double(), gaussian(256, 256, seed=s), rho).to(dtype) for s in (2, 3)]
    values, nulls = overlap(*updates_of(base[None], [one[None] for one in tuned], ks=(8,)))
    assert values["mask_jaccard"] == pytest.approx(nulls["mask_jaccard"], abs=0.012)
    assert set(nulls) == {key for key, value in values.items() if value is not None}


def masks_of(shape: tuple[int, int]) -> list[tuple[np.ndarray, np.ndarray]]:
    base, a, b = (one.double().numpy() for one in three(shape, torch.float32))
    return [(base, a), (base, b)]


OF_ONE = {"changed_only_a": "changed_only_b", "changed_only_b": "changed_only_a"}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_exchanging_the_models_exchanges_the_dimensions_and_no_more(shape) -> None:
    base, a, b = three(shape, torch.bfloat16)
    one, other = overlaps(base, a, b)[0], overlaps(base, b, a)[0]
    for key, value in one.items():
        if key.startswith("phi"):
            side, _, text = key.partition("@")
            key = f"{side}@{','.join(reversed(text.split(',')))}"
        key = OF_ONE.get(key, key)
        if value is None:
            assert other[key] is None
        else:
            assert other[key] == pytest.approx(value, rel=1e-9), key


def test_transposing_everything_exchanges_left_and_right() -> None:
    models = three((60, 30), torch.float32)
    one, other = overlaps(*models)[0], overlaps(*(part.T.contiguous() for part in models))[0]
    turn = {"left": "right", "right": "left"}
    for key, value in one.items():
        side = next((name for name in turn if name in key), "")
        partner = key.replace(side, turn[side]) if side else key
        if value is None:
            assert other[partner] is None
        else:
            assert other[partner] == pytest.approx(value, rel=1e-8), key


# --- known answers ------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_update_overlaps_with_itself_wholly(dtype: str) -> None:
    base, a, _ = three((60, 30), DTYPES[dtype])
    values, _ = overlaps(base, a, a.clone())
    assert values["update_cosine"] == pytest.approx(1, abs=1e-12)
    assert values["mask_jaccard"] == 1
    assert values["sign_conflict"] == 0
    for side in ("left", "right"):
        for i, j in product(PHI_DIMENSIONS, repeat=2):
            assert values[f"phi_{side}@{i},{j}"] == pytest.approx(1, abs=1e-10)
        for k in (2, 8):
            assert values[f"update_angle_{side}_mean@{k}"] == pytest.approx(0, abs=1e-7)


def test_the_opposite_update_has_cosine_minus_one_and_every_sign_against_it() -> None:
    base, step = gaussian(40, 40, seed=1), gaussian(40, 40, seed=2, sd=1e-3)
    values, _ = overlaps(base, base + step, base - step)
    assert values["update_cosine"] == pytest.approx(-1, abs=1e-12)
    assert values["sign_conflict"] == 1
    assert values["phi_left@8,8"] == pytest.approx(1, abs=1e-10)  # the subspaces are the same


def test_the_size_of_an_update_does_not_matter() -> None:
    base, step = gaussian(40, 40, seed=1), gaussian(40, 40, seed=2, sd=1e-3)
    values, _ = overlaps(base, base + step, base + 3 * step)
    assert values["update_cosine"] == pytest.approx(1, abs=1e-12)
    assert values["update_angle_right_mean@8"] == pytest.approx(0, abs=1e-7)


def test_orthogonal_subspaces_capture_nothing_and_shared_ones_their_share() -> None:
    """Left vectors disjoint, right vectors half shared: captures 0 and ½, angles 90° and 0°/90°."""
    U, V = orthonormal(60, 32, seed=3), orthonormal(40, 24, seed=4)
    S = torch.linspace(2, 1, 16, dtype=torch.float64)
    base = gaussian(60, 40, seed=5)
    a = base + (U[:, :16] * S) @ V[:, :16].T
    b = base + (U[:, 16:] * S) @ V[:, 8:].T
    values, _ = overlaps(base, a, b, ks=(16,))
    assert values["phi_left@16,16"] == pytest.approx(0, abs=1e-20)
    assert values["phi_right@16,16"] == pytest.approx(0.5, abs=1e-10)
    assert values["phi_right@8,8"] == pytest.approx(0, abs=1e-20)
    assert values["phi_right@16,8"] == pytest.approx(1, abs=1e-10)  # b's leading 8 lie in a's 16
    assert values["update_angle_left_mean@16"] == pytest.approx(math.pi / 2)
    assert values["update_angle_right_mean@16"] == pytest.approx(math.pi / 4)
    assert values["update_cosine"] == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("degrees", [60.0, 5.0, 0.1])
def test_a_turn_by_a_known_angle_is_that_angle(degrees: float) -> None:
    theta = math.radians(degrees)
    frame = orthonormal(50, 4, seed=6)
    V, S = orthonormal(30, 2, seed=7), torch.tensor([2.0, 1.0], dtype=torch.float64)
    turned = math.cos(theta) * frame[:, :2] + math.sin(theta) * frame[:, 2:]
    base = torch.zeros(50, 30, dtype=torch.float64)
    values, _ = overlaps(base, (frame[:, :2] * S) @ V.T, (turned * S) @ V.T, ks=(2,))
    assert values["update_angle_left_mean@2"] == pytest.approx(theta, rel=1e-9)
    assert values["update_angle_right_mean@2"] == pytest.approx(0, abs=1e-9)
    assert values["phi_left@1,1"] == pytest.approx(math.cos(theta) ** 2, rel=1e-9)


def test_heads_and_rests_of_a_known_split() -> None:
    """Heads at 60° on one side, rests opposite; of rank 1 nothing is left."""
    U, V = orthonormal(50, 3, seed=6), orthonormal(30, 2, seed=7)
    base = torch.zeros(50, 30, dtype=torch.float64)
    turned = 0.5 * U[:, 0] + 0.75**0.5 * U[:, 2]
    first, rest = torch.outer(U[:, 0], V[:, 0]), torch.outer(U[:, 1], V[:, 1])
    second = torch.outer(turned, V[:, 0])
    values, nulls = overlaps(base, 3 * first + rest, 2 * second - 0.5 * rest, ks=(2,))
    assert values["head_cosine"] == pytest.approx(0.5, abs=1e-12)
    assert values["residual_cosine"] == pytest.approx(-1, abs=1e-12)
    assert nulls["head_cosine"] == nulls["residual_cosine"] == 0
    alone, _ = overlaps(base, first, 2 * second + rest, ks=(2,))
    assert alone["head_cosine"] == pytest.approx(0.5, abs=1e-12)
    assert alone["residual_cosine"] is None


# --- what is undefined --------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["first", "second", "both"])
def test_a_zero_update_has_no_overlap_and_no_made_up_number(which: str) -> None:
    base, a, b = three((40, 40), torch.bfloat16)
    a, b = base if which != "second" else a, base if which != "first" else b
    values, nulls = overlaps(base, a, b)
    assert values["mask_jaccard"] == (None if which == "both" else 0)
    assert values.pop("mask_jaccard") in (None, 0)
    shares = [values.pop(f"changed_{part}") for part in ("shared", "only_a", "only_b")]
    assert [bool(share) for share in shares] == [False, which == "second", which == "first"]
    assert set(values.values()) == {None}
    assert nulls["phi_left@8,8"] == 8 / 40


def test_a_dimension_above_the_shorter_side_is_none_and_has_no_null() -> None:
    base = gaussian(12, 20, seed=8)
    models = base, updated(base, gaussian(12, 20, seed=9), 0.1), updated(base, base, 0.1)
    values, nulls = overlaps(*models, ks=(4, 13))
    for side in ("left", "right"):
        assert values[f"update_angle_{side}_mean@4"] is not None
        for key in (f"update_angle_{side}_mean@13", f"phi_{side}@16,1", f"phi_{side}@8,16"):
            assert values[key] is None
            assert key not in nulls


def test_a_complete_basis_has_no_angle() -> None:
    """All 12 directions of the shorter side: the whole space on the left, a part on the right."""
    base = gaussian(12, 20, seed=8)
    models = base, base + gaussian(12, 20, seed=9), base + gaussian(12, 20, seed=10)
    values, nulls = overlaps(*models, ks=(12,))
    assert values["update_angle_left_mean@12"] is None
    assert "update_angle_left_mean@12" not in nulls
    assert values["update_angle_right_mean@12"] is not None


def test_directions_beyond_the_rank_of_an_update_are_none_and_not_the_solvers_choice() -> None:
    """Three entries moved in each model, all in different rows and columns."""
    base = gaussian(48, 32, seed=1).bfloat16()
    a, b = base.clone(), base.clone()
    for row, column in ((0, 0), (5, 7), (9, 2)):
        a[row, column] += (row + 1) * 0.1
        b[row + 20, column + 11] += (row + 1) * 0.1
    values, nulls = overlaps(base, a, b, ks=(3, 4))
    for side in ("left", "right"):
        assert values[f"phi_{side}@1,1"] == pytest.approx(0, abs=1e-20)
        assert values[f"update_angle_{side}_mean@3"] == pytest.approx(math.pi / 2)
        for key in (f"phi_{side}@1,8", f"phi_{side}@16,16", f"update_angle_{side}_mean@4"):
            assert values[key] is None
            assert nulls[key] > 0


def test_an_exact_low_rank_update_keeps_the_dimensions_it_has() -> None:
    base = gaussian(50, 40, seed=1)
    a = base + with_spectrum(50, 40, np.linspace(2, 1, 8), seed=2)
    b = base + with_spectrum(50, 40, np.linspace(2, 1, 20), seed=4)
    values, nulls = overlaps(torch.zeros_like(base), a - base, b - base, ks=(8,))
    assert all(math.isfinite(null) for null in nulls.values())
    assert "mask_jaccard" not in nulls
    for i, j in product(PHI_DIMENSIONS, repeat=2):
        assert (values[f"phi_left@{i},{j}"] is None) == (i > 8)
    assert values["update_angle_left_mean@8"] is not None


# --- independent updates ------------------------------------------------------------------------

DRAWS = 12


@cache
def independent(dtype: str) -> list[Found]:
    """Pairs of isotropic updates that know nothing of each other."""
    m, n = 96, 64
    base = gaussian(m, n, seed=1)
    found = []
    for draw in range(DRAWS):
        a, b = (updated(base, gaussian(m, n, seed=seed + draw), 0.1) for seed in (100, 200))
        stored = [one.to(DTYPES[dtype]) for one in (base, a, b)]
        found.append(overlaps(stored[0], stored[1], stored[2]))
    return found


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_independent_updates_read_as_their_nulls(dtype: str) -> None:
    for key in independent(dtype)[0][0]:
        pairs = [(values[key], nulls.get(key)) for values, nulls in independent(dtype)]
        numbers = np.array([number(value) for value, _ in pairs])
        null = number(pairs[0][1])
        error = float(numbers.std(ddof=1)) / math.sqrt(DRAWS)
        # The null of an angle is by the mean square cosine; the mean angle lies a little above.
        bias = 0.07 if key.startswith("update_angle") else 1e-3
        assert abs(numbers.mean() - null) <= 4 * error + bias, key
        if key.startswith("update_angle"):
            assert numbers.mean() > null - 4 * error, key


def test_the_cosine_of_independent_updates_has_the_spread_of_its_shape() -> None:
    numbers = [number(values["update_cosine"]) for values, _ in independent("fp32")]
    assert np.std(numbers) == pytest.approx(1 / math.sqrt(96 * 64), rel=0.6)


@pytest.mark.parametrize("rho", [3e-3, 1e-3])
def test_signs_of_independent_updates_conflict_half_of_the_time_in_a_wide_file_too(
    rho: float,
) -> None:
    """Entries that cross the edge of a bf16 cell would agree on the nearer edge."""
    base = gaussian(100, 100, seed=1)
    a, b = (updated(base, gaussian(100, 100, seed=seed), rho) for seed in (2, 3))
    values, _ = overlaps(base.float(), a.float(), b.float())
    assert values["sign_conflict"] == pytest.approx(0.5, abs=0.025)


# --- whole models -------------------------------------------------------------------------------

NAMES = ("model.layers.0.self_attn.q_proj.weight", "model.layers.1.mlp.up_proj.weight")


def save_models(root: Path, count: int) -> list[Path]:
    """A base and so many tuned models, each with an update of its own size."""
    shapes = dict(zip(NAMES, ((24, 24), (40, 24)), strict=True))
    base = {name: gaussian(*shape, seed=i) for i, (name, shape) in enumerate(shapes.items())}
    folders = [save_model(root / "base", {name: one.float() for name, one in base.items()})]
    for i in range(1, count + 1):
        tuned = {
            name: updated(weight, gaussian(*weight.shape, seed=10 * i), 0.02 * i).float()
            for name, weight in base.items()
        }
        folders.append(save_model(root / f"tuned{i}", tuned))
    return folders


def report_of(root: Path, count: int, kind: str = "compare", jobs: int = 1) -> Report:
    base, *tuned = save_models(root, count)
    return compare(base, *tuned, kind=kind, options=Options(ks=(3,), jobs=jobs))


@pytest.mark.parametrize("count", [2, 3])
def test_tuned_models_are_numbered_as_in_the_provenance(tmp_path: Path, count: int) -> None:
    report = report_of(tmp_path, count)
    given = [Path(ref.given).name for ref in report.provenance.refs]
    assert given == ["base", *(f"tuned{i}" for i in range(1, count + 1))]
    assert [run.tuned for run in report.summary.runs] == list(range(1, count + 1))
    rows = [(one.tuned, one.name) for one in report.layers]
    assert rows == [(i, name) for i in range(1, count + 1) for name in NAMES]
    for run in report.summary.runs:  # the sizes tell the models apart
        assert run.model["relative_update"] == pytest.approx(0.02 * run.tuned, rel=1e-3)
        assert run.verdict is not None
        assert run.modules.keys() == {"q_proj", "up_proj"}


def test_where_memory_is_short_two_models_are_in_it_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = report_of(tmp_path, 3).overlaps
    in_memory: list[int] = []
    made = several.updates_of

    def counted(base: Tensor, tuned: Sequence[Tensor], **how: Any) -> Any:
        in_memory.append(len(tuned))
        return made(base, tuned, **how)

    monkeypatch.setattr(several, "updates_of", counted)
    assert report_of(tmp_path, 3).overlaps == expected
    assert in_memory == [3] * len(NAMES)
    monkeypatch.setattr(several, "room_for_batches", lambda _: 0)
    in_memory.clear()
    assert report_of(tmp_path, 3).overlaps == expected
    assert in_memory == [2] * 3 * len(NAMES)


def test_a_pair_that_fails_says_why_and_the_others_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = report_of(tmp_path, 3)

    def failing(a: UpdateOf, b: UpdateOf, **how: Any) -> Found:
        if (a.number, b.number) == (0, 2) and a.base.weight.shape[1] == 24 == a.base.weight.shape[
            2
        ]:
            raise RuntimeError("no room")
        return overlap(a, b, **how)

    monkeypatch.setattr(several, "overlap", failing)
    report = report_of(tmp_path, 3)
    gone = [one for one in whole.overlaps if one not in report.overlaps]
    assert [(one.a, one.b, one.name) for one in gone] == [(1, 3, NAMES[0])]
    (skipped,) = (one for one in report.coverage.skipped if one.name == NAMES[0])
    assert "overlap of 1 and 3: " in skipped.reason and "no room" in skipped.reason


@pytest.mark.parametrize("count", [2, 3])
def test_there_is_one_overlap_for_each_pair_and_matrix(tmp_path: Path, count: int) -> None:
    report = report_of(tmp_path, count)
    found = [(one.a, one.b, one.name) for one in report.overlaps]
    pairs = [(a, b) for a in range(1, count + 1) for b in range(a + 1, count + 1)]
    assert found == [(a, b, name) for a, b in pairs for name in NAMES]
    for one in report.overlaps:
        assert "update_angle_left_mean@3" in one.values
        assert one.nulls["sign_conflict"] == 0.5


def test_an_overlap_of_a_report_is_that_of_its_matrices(tmp_path: Path) -> None:
    report = report_of(tmp_path, 3)
    base = gaussian(40, 24, seed=1)
    a, b = (updated(base, gaussian(40, 24, seed=10 * i), 0.02 * i).float() for i in (2, 3))
    (found,) = [one for one in report.overlaps if (one.a, one.b, one.name) == (2, 3, NAMES[1])]
    assert (found.values, found.nulls) == overlaps(base.float(), a, b, ks=(3,))


def test_each_model_reads_as_it_does_alone(tmp_path: Path) -> None:
    together = report_of(tmp_path, 2)
    for i in (1, 2):
        alone = compare(tmp_path / "base", tmp_path / f"tuned{i}", options=Options(ks=(3,)))
        rows = [one for one in together.layers if one.tuned == i]
        assert [one.values for one in rows] == [one.values for one in alone.layers]
        assert [one.verdict for one in rows] == [one.verdict for one in alone.layers]
        assert together.summary.runs[i - 1].model == alone.summary.model
        assert together.summary.runs[i - 1].verdict == alone.summary.verdict
    assert together.summary.model == together.summary.runs[0].model


def test_with_one_tuned_model_nothing_is_numbered(tmp_path: Path) -> None:
    report = report_of(tmp_path, 1)
    assert report.overlaps == ()
    assert report.summary.runs == ()
    assert {one.tuned for one in report.layers} == {None}
    document = by_rows(report.to_json())
    assert "overlaps" not in document
    assert "runs" not in document["summary"]
    assert all("tuned" not in row for row in document["layers"])


@pytest.mark.parametrize(
    ("kind", "has"),
    [("compare", True), ("alignment", True), ("collapse", False), ("anisotropy", False)],
)
def test_overlaps_belong_to_the_reports_on_alignment(tmp_path: Path, kind: str, has: bool) -> None:
    report = report_of(tmp_path, 2, kind)
    assert bool(report.overlaps) == has
    assert len(report.summary.runs) == 2


@pytest.mark.parametrize("count", [2, 3])
def test_a_report_on_several_models_reads_back_equal(tmp_path: Path, count: int) -> None:
    report = report_of(tmp_path, count)
    again = Report.loads(report.dumps())
    assert again == report
    assert again.dumps() == report.dumps()


def test_overlaps_do_not_depend_on_the_number_of_workers(tmp_path: Path) -> None:
    assert report_of(tmp_path, 2, jobs=1).overlaps == report_of(tmp_path, 2, jobs=4).overlaps


def test_a_matrix_that_is_not_finite_in_one_model_has_no_overlap_there(tmp_path: Path) -> None:
    folders = save_models(tmp_path, 3)
    broken = {name: gaussian(24, 24, seed=1).float() for name in NAMES[:1]}
    broken[NAMES[0]][0, 0] = math.nan
    broken[NAMES[1]] = gaussian(40, 24, seed=3).float()
    save_model(folders[2], broken)
    report = compare(*folders, options=Options(ks=(3,)))
    found = {(one.a, one.b) for one in report.overlaps if one.name == NAMES[0]}
    assert found == {(1, 3)}
    assert report.coverage.missing == (NAMES[0],)


def test_matrices_that_only_one_model_shares_with_the_base_have_no_overlap(tmp_path: Path) -> None:
    folders = save_models(tmp_path, 2)
    save_model(folders[2], {NAMES[0]: gaussian(24, 24, seed=3).float()})
    report = compare(*folders, options=Options(ks=(3,)))
    assert [one.name for one in report.overlaps] == [NAMES[0]]
    assert report.coverage.missing == (NAMES[1],)


@pytest.mark.parametrize("stop", [KeyboardInterrupt(), Stopped(signal.SIGTERM)])
def test_a_signal_during_the_overlaps_keeps_what_was_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: BaseException
) -> None:
    def stopped(*_: object, **__: object) -> Found:
        raise stop

    monkeypatch.setattr("geoscope.verbs.pairs.several.overlap", stopped)
    with pytest.raises(Interrupted) as caught:
        report_of(tmp_path, 2)
    assert caught.value.signum == getattr(stop, "signum", signal.SIGINT)
    assert caught.value.report is not None
    assert len(caught.value.report.layers) == 4
    assert len(caught.value.report.summary.runs) == 2


def test_heads_and_rests_of_factors_are_those_of_the_dense_updates() -> None:
    """Also of one product beside a whole update."""
    base = gaussian(60, 40, seed=1)
    factors = [
        (
            gaussian(60, 5, seed=seed)[None],
            gaussian(5, 40, seed=seed + 1)[None],
            torch.tensor([2.0]),
        )
        for seed in (2, 4)
    ]
    products = [FactorUpdate.of(parts) for parts in factors]
    dense = [base + 2 * B[0] @ A[0] for B, A, _ in factors]
    expected, _ = overlaps(base, *dense, ks=(2,))
    for a, b in ((products[0], products[1]), (products[0], dense[1][None])):
        values, nulls = overlap(*updates_of(base[None], [a, b], ks=(2,)), in_blocks=True)
        for key in ("update_cosine", "head_cosine", "residual_cosine"):
            assert values[key] == pytest.approx(number(expected[key]), abs=1e-9), key
            assert nulls[key] == 0
        assert values["changed_shared"] is None
