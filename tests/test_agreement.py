"""Every value of a report agrees with the independent oracle, through files in each dtype.

1e-6 relative, 1e-12 absolute near zero; angles 1e-8 rad where the base's gap at k is 1e-6 or more.
A subspace cut inside a repeated singular value is undefined and has to be flagged by its gap.
"""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.linalg import subspace_angles
from torch import Tensor

from geoscope import Options, Report, compare
from geoscope.metrics import Settings, pair_factors
from geoscope.records import LayerRecord
from tests.helpers.matrices import DTYPES, gaussian, save_model, updated, with_spectrum
from tests.helpers.oracle import OracleRow, oracle_row

KS = (8, 64)


def _pairs() -> dict[str, tuple[Tensor, Tensor]]:
    """Base and tuned of every kind of matrix, before they are stored."""
    decay = np.geomspace(1, 1e-3, 48)
    repeated = np.repeat([3.0, 2.0, 1.0, 0.5], 16)
    pairs = {}
    bases = {
        "random": gaussian(80, 80, seed=1),
        "tall": gaussian(200, 70, seed=2),
        "wide": gaussian(70, 200, seed=3),
        "one_row_more": gaussian(97, 96, seed=4),
        "one_column_more": gaussian(96, 97, seed=5),
        "decaying": with_spectrum(48, 90, decay, seed=6),
        "repeated": with_spectrum(64, 96, repeated, seed=7),
        "rank_deficient": with_spectrum(90, 80, np.linspace(2, 1, 20), seed=8),
        "tiny": gaussian(3, 2, seed=9),
        "small": gaussian(9, 12, seed=10),
    }
    for i, (name, base) in enumerate(bases.items()):
        m, n = base.shape
        pairs[f"{name}_isotropic"] = base, updated(base, gaussian(m, n, seed=50 + i), 0.05)
        rank = min(4, m, n)
        low = gaussian(m, rank, seed=70 + i) @ gaussian(rank, n, seed=90 + i)
        pairs[f"{name}_low_rank"] = base, updated(base, low, 0.1)
    base = bases["random"]
    U, S, Vh = torch.linalg.svd(base)
    pairs["random_principal"] = base, base + 0.1 * (U[:, :16] * S[:16]) @ Vh[:16]
    pairs["random_large"] = base, updated(base, gaussian(80, 80, seed=11), 3.0)
    pairs["random_unchanged"] = base, base
    pairs["zero_base"] = torch.zeros(20, 30), gaussian(20, 30, seed=12)
    return pairs


@cache
def _names() -> tuple[str, ...]:
    return tuple(_pairs())


@pytest.fixture(
    scope="module", params=["bf16", "fp32", pytest.param("fp16", marks=pytest.mark.slow)]
)
def stored(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    """(dtype name, pairs as stored, report) of one dtype."""
    dtype = DTYPES[request.param]
    pairs = {name: (base.to(dtype), tuned.to(dtype)) for name, (base, tuned) in _pairs().items()}
    root = tmp_path_factory.mktemp("agreement")
    report = _compare(root, pairs)
    return request.param, pairs, report


def _compare(root: Path, pairs: dict[str, tuple[Tensor, Tensor]]) -> Report:
    names = {name: f"model.layers.{i}.mlp.{name}.weight" for i, name in enumerate(pairs)}
    base = save_model(root / "base", {names[name]: pair[0] for name, pair in pairs.items()})
    tuned = save_model(root / "tuned", {names[name]: pair[1] for name, pair in pairs.items()})
    return compare(base, tuned, options=Options(ks=KS, curves=True))


@pytest.mark.parametrize("name", _names())
def test_every_value_agrees_with_the_oracle(stored, name: str) -> None:
    dtype, pairs, report = stored
    base, tuned = (side.double().numpy() for side in pairs[name])
    expected = _oracle(dtype, name, base, tuned)
    (row,) = [one for one in report.layers if one.module == name]
    rank = np.linalg.matrix_rank(base)
    wrong = []
    for key in expected.values:
        if _undefined(key, expected.values, int(rank)):
            continue
        if key not in row.values:
            wrong.append(f"{key}: absent")
            continue
        status = row.status_of(key).value
        wanted = expected.status.get(key, "OK")
        if status != wanted and not _at_its_floor(key, row, expected):
            wrong.append(f"{key}: status {status}, oracle {wanted}")
            continue
        mine, theirs = (one.values[key] for one in (row, expected))
        mine = row.raw.get(key) if mine is None else mine
        theirs = expected.raw.get(key) if theirs is None else theirs
        if not _close(key, mine, theirs):
            wrong.append(f"{key}: {mine}, oracle {theirs}")
    assert not wrong
    assert row.verdict is not None
    assert row.verdict["k"] == expected.k_v
    assert row.verdict["code"] == expected.verdict


@pytest.mark.parametrize("name", _names())
def test_every_null_agrees_with_the_oracle(stored, name: str) -> None:
    dtype, pairs, report = stored
    base, tuned = (side.double().numpy() for side in pairs[name])
    expected = _oracle(dtype, name, base, tuned)
    (row,) = [one for one in report.layers if one.module == name]
    for key, (mean, error) in expected.sampled_nulls.items():
        # 12 draws there, 4 or more here; a few per cent are the price of the short way
        assert abs(row.nulls[key] - mean) <= 10 * error + 0.05 * mean + 1e-12, (
            key,
            row.nulls[key],
            mean,
        )
    for key, null in expected.nulls.items():
        assert row.nulls[key] == pytest.approx(null, rel=1e-6, abs=1e-12), key


def test_repeated_singular_values_are_flagged_by_their_gap(stored) -> None:
    _, _, report = stored
    (row,) = [one for one in report.layers if one.module == "repeated_isotropic"]
    gap = row.values["gap@8"]
    assert gap is not None
    assert gap < 2e-2  # storing the matrix splits the repeated value, by no more than this


_ROWS: dict[tuple[str, str], OracleRow] = {}


def _oracle(dtype: str, name: str, base: np.ndarray, tuned: np.ndarray) -> OracleRow:
    """The oracle's row of a pair, computed once."""
    if (dtype, name) not in _ROWS:
        _ROWS[dtype, name] = oracle_row(base, tuned, storage=dtype, ks=KS, curves=True)
    return _ROWS[dtype, name]


def _at_its_floor(key: str, row: LayerRecord, expected: OracleRow) -> bool:
    """An angle so near what rounding turns that the draws decide whether it is resolved."""
    mean = key.replace("max", "mean")  # which decides for both
    value, floor = row.raw.get(mean, row.values.get(mean)), expected.floors.get(mean)
    return value is not None and floor is not None and 0.6 < value / floor < 1.7


def _undefined(key: str, values: dict[str, float | None], rank: int) -> bool:
    """Whether the quantity hangs on a subspace that the base does not define."""
    prefix, _, dimension = key.partition("@")
    if not dimension or "." in prefix or prefix == "gap":
        return False
    gap = values.get(f"gap@{dimension}")
    return int(dimension) > rank or gap is None or gap < 1e-6


def _close(key: str, mine: float | None, theirs: float | None) -> bool:
    if mine is None or theirs is None:
        return mine is theirs
    if key.startswith("angle"):
        return abs(mine - theirs) <= 1e-8
    return math.isclose(mine, theirs, rel_tol=1e-6, abs_tol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["collapse", "anisotropy", "alignment"])
@pytest.mark.parametrize("quick", [False, True])
def test_every_command_gives_the_numbers_of_compare(tmp_path: Path, kind: str, quick: bool) -> None:
    """What a command takes decides how it factorises; the numbers do not depend on it."""
    pairs = {name: pair for name, pair in _pairs().items() if "repeated" not in name}
    stored = {name: (a.bfloat16(), b.bfloat16()) for name, (a, b) in pairs.items()}
    whole = _compare(tmp_path, stored)
    options = Options(ks=KS, quick=quick)
    part = compare(tmp_path / "base", tmp_path / "tuned", kind=kind, options=options)
    for mine, theirs in zip(part.layers, whole.layers, strict=True):
        rank = int(np.linalg.matrix_rank(stored[mine.module][0].double().numpy()))
        for key, value in mine.values.items():
            if _undefined(key, dict(theirs.values), rank):
                continue
            if quick and value is None:
                assert mine.status_of(key).is_null
                continue
            expected = theirs.raw.get(key) if value is None else theirs.values[key]
            got = mine.raw.get(key) if value is None else value
            assert _close(key, got, expected), (mine.name, key)
            assert mine.status_of(key) == theirs.status_of(key)
        if mine.verdict is not None and theirs.verdict is not None and not quick:
            assert mine.verdict["code"] == theirs.verdict["code"]


@pytest.mark.parametrize("quick", [False, True])
def test_subspaces_come_from_an_fp32_space_with_quick_alone(quick: bool) -> None:
    """Where leading triplets come alone, their angles are good to 1e-5, not 1e-8."""
    spectrum = np.concatenate([np.linspace(8, 4, 12), np.linspace(1, 0.5, 788)])
    base = with_spectrum(860, 800, spectrum, seed=1)
    tuned = updated(base, gaussian(860, 800, seed=3), 1e-4)
    stacks = base.float()[None], tuned.float()[None]
    takes = frozenset({"angles.left@8", "angles.right@8"})
    found = pair_factors(*stacks, takes=takes, ks=(8,), settings=Settings(quick=quick))
    ways = {role: method["how"] for role, method in found.methods[0].items()}
    assert all(way.startswith("block-lanczos") == quick for way in ways.values()), ways
    U0, U1 = (np.linalg.svd(one[0].double().numpy())[0][:, :8] for one in stacks)
    exact = np.sort(subspace_angles(U0, U1))
    angles = found.values["angles.left@8"][0].numpy()
    np.testing.assert_allclose(angles, exact, rtol=0, atol=1e-5 if quick else 1e-8)


def test_fp32_spectra_are_fp32_wherever_they_are_asked_for() -> None:
    base, tuned = gaussian(300, 300, seed=1), gaussian(300, 300, seed=2)
    settings = Settings(dtype="float32")
    takes = frozenset({"update.top@1"})
    stacks = base.float()[None], tuned.float()[None]
    found = pair_factors(*stacks, takes=takes, ks=(), settings=settings)
    assert found.methods[0]["update.S"]["how"] == "svdvals"
