"""The worst pairs that `benchmarks.differential` met are within their bounds."""

from __future__ import annotations

from collections import Counter, defaultdict

import numpy as np
import pytest
from scipy.linalg import subspace_angles

from benchmarks.differential import KS, Case, Errors, batch, check, reports
from tests.helpers.oracle import angles_between, oracle_row

# (batch, pair, curves): right angles beside small ones; a base whose least singular value is 2e-11
# of its largest; spectra that an update of 8e-6 hardly moves.
WORST = [(21, 2, False), (26, 35, False), (41, 2, False), (26, 22, True), (25, 30, False)]


def wrong(case: Case, *, curves: bool) -> dict[str, list[str]]:
    """What lies over its bound, by either solver."""
    oracle = oracle_row(
        case.base, case.tuned, ks=KS, curves=curves, draws=2, storage=case.storage
    )  # fmt: skip
    table: dict[str, Errors] = defaultdict(Errors)
    for solver, report in reports([case], curves=curves):
        check(case, report.layers[0], oracle, solver, "", table, Counter())
    assert sum(len(errors.shares) for errors in table.values()) > 100
    return {key: errors.wrong for key, errors in table.items() if errors.wrong}


@pytest.mark.parametrize(("number", "place", "curves"), WORST)
def test_the_worst_pairs_are_within_their_bounds(number: int, place: int, curves: bool) -> None:
    assert wrong(batch(number)[place], curves=curves) == {}


def test_a_value_that_is_off_is_seen() -> None:
    """The bounds that hang on a spectrum do not let everything pass."""
    case = batch(25)[30]
    oracle = oracle_row(case.base, case.tuned, ks=KS, draws=2, storage=case.storage)
    for key in ("spectral_share", "nss", "base.stable_rank"):
        table: dict[str, Errors] = defaultdict(Errors)
        value = oracle.values[key]
        assert value is not None
        oracle.values[key] = value * (1 + 1e-4)
        for solver, report in reports([case], curves=False):
            check(case, report.layers[0], oracle, solver, "", table, Counter())
        assert sum(len(errors.wrong) for errors in table.values()) >= 2, key
        oracle.values[key] = value


def test_the_oracle_has_right_angles_beside_small_ones() -> None:
    """scipy takes the largest angle from its sine where the smallest one is small."""
    rng = np.random.default_rng(3)
    Q, _ = np.linalg.qr(rng.standard_normal((30, 4)))
    small = 1e-9
    turned = np.stack([np.cos(small) * Q[:, 0] + np.sin(small) * Q[:, 2], Q[:, 3]], axis=1)
    expected = [small, np.pi / 2]
    np.testing.assert_allclose(angles_between(Q[:, :2], turned), expected, rtol=0, atol=1e-15)
    assert abs(subspace_angles(Q[:, :2], turned)[0] - np.pi / 2) < 1e-7
