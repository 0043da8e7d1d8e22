"""How much of its rank does an update use, and which would hold it: closed forms and the oracle."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from geoscope.linalg.factor_update import FactorUpdate
from geoscope.metrics import (
    METRICS,
    Measured,
    Settings,
    instances,
    judge_capacity,
    measure,
    pair_factors,
    takes_of,
    update_factors,
)
from geoscope.metrics.capacity import servable
from geoscope.records import Status
from tests.helpers import oracle_capacity as oracle
from tests.helpers.matrices import DTYPES, gaussian, orthonormal, updated
from tests.helpers.measuring import row

FAMILY = [one for metric in METRICS if metric.family in ("size", "capacity")
          for one in instances(metric, ())]  # fmt: skip
IDS = [one.id for one in FAMILY if one.metric.family == "capacity"]
TAKES = takes_of(FAMILY)
SHARES = ("effective_rank_share", "entropy_rank_share", "k90_share", "k99_share", "tail_ratio")


def measured(*factors: Tensor, nominal: int | None = None, base: Tensor | None = None) -> Measured:
    """Of one adapter B (m, r), A (r, n), s, and its start behind it; alone, or over a base."""
    stacked = [one[None] for one in factors]
    update = FactorUpdate.of(stacked, nominal=nominal)
    if base is None:
        found = update_factors(update, takes=TAKES, settings=Settings())
    else:
        found = pair_factors(base[None], update, takes=TAKES, ks=(), settings=Settings())
    (one,) = measure(found, FAMILY, seed=0)
    return one


def adapter(
    S: Sequence[float] | Tensor, m: int = 40, n: int = 30, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor]:
    """Factors of a product with these singular values, s = 1."""
    values = torch.as_tensor(S, dtype=torch.float64)
    r = len(values)
    B = orthonormal(m, r, seed=1) * values.sqrt()
    A = (orthonormal(n, r, seed=2) * values.sqrt()).T
    return B.to(dtype), A.to(dtype), torch.ones(1, dtype=torch.float64)


def decaying(r: int, rate: float) -> Tensor:
    return rate ** torch.arange(r, dtype=torch.float64)


# --- closed forms -------------------------------------------------------------------------------


@pytest.mark.parametrize("r", [1, 2, 7, 10, 16])
def test_a_flat_spectrum_fills_its_rank_and_equals_its_null(r: int) -> None:
    found = measured(*adapter([3.0] * r))
    for key in SHARES:
        assert found.values[key] == pytest.approx(found.nulls[key], rel=1e-12), key
    assert found.nulls["k90_share"] == math.ceil(0.9 * r - 1e-9) / r
    assert found.nulls["k99_share"] == math.ceil(0.99 * r - 1e-9) / r
    for key in ("effective_rank_share", "entropy_rank_share", "tail_ratio"):
        assert found.nulls[key] == 1
    assert found.values["nominal_rank"] == r
    assert found.values["suggested_rank"] == math.ceil(0.9 * r - 1e-9)


@pytest.mark.parametrize("r", [4, 16])
def test_one_direction_uses_one_of_r(r: int) -> None:
    B, A, s = adapter([2.0])
    pad = torch.zeros(40, r - 1, dtype=torch.float64), torch.zeros(r - 1, 30, dtype=torch.float64)
    found = measured(torch.cat([B, pad[0]], 1), torch.cat([A, pad[1]]), s)
    for key in SHARES[:-1]:
        assert found.values[key] == pytest.approx(1 / r)
    assert found.values["tail_ratio"] == 0
    assert found.values["suggested_rank"] == 1
    assert found.values["nominal_rank"] == r


def test_a_spectrum_by_hand() -> None:
    """σ = (2, 1, 1) of rank 4: 2^1.5 and exp(−Σp ln p) = 2.381102."""
    found = measured(*adapter([2.0, 1.0, 1.0, 0.0]))
    assert found.values["effective_rank_share"] == pytest.approx(2**1.5 / 4, rel=1e-7)
    assert found.values["entropy_rank_share"] == pytest.approx(2.381102 / 4, rel=1e-6)
    assert found.values["k90_share"] == 3 / 4  # 5/6 of the energy is in two
    assert found.values["tail_ratio"] == 0
    assert found.values["suggested_rank"] == 3


def test_no_update_has_a_nominal_rank_and_no_share() -> None:
    B, A, s = adapter([1.0, 1.0])
    found = measured(torch.zeros_like(B), A, s)
    assert found.values["nominal_rank"] == 2
    for key in (*SHARES, "suggested_rank"):
        assert (found.values[key], found.status[key]) == (None, Status.ZERO_UPDATE), key
    assert found.nulls["k90_share"] == 1


def test_a_full_update_has_a_suggested_rank_alone() -> None:
    base = gaussian(40, 30, seed=3)
    low = gaussian(40, 3, seed=4) @ gaussian(3, 30, seed=5)
    found = row(base, updated(base, low, 0.1), only=IDS)
    assert found.values["suggested_rank"] in (2, 3)
    for key in ("nominal_rank", *SHARES):
        assert (found.values[key], found.status[key]) == (None, Status.NOT_APPLICABLE), key
        assert key not in found.nulls


def test_noise_alone_suggests_no_rank() -> None:
    """iid entries lie below their own edge, however large; rarely one or two reach over it."""
    base = gaussian(120, 120, seed=6)
    found = [
        row(base, updated(base, gaussian(120, 120, seed=seed), 0.5), only=["suggested_rank"])
        for seed in range(7, 15)
    ]
    assert {one.values["suggested_rank"] for one in found} <= {None, 1, 2}
    below = [one for one in found if one.values["suggested_rank"] is None]
    assert len(below) >= 5
    for one in below:
        assert one.status["suggested_rank"] is Status.BELOW_RESOLUTION
        assert one.raw["suggested_rank"] == 0


def test_a_signal_in_noise_is_suggested_and_the_noise_is_not() -> None:
    signal = 30 * orthonormal(200, 5, seed=8) @ orthonormal(200, 5, seed=9).T
    noise = gaussian(200, 200, seed=10) / 20  # edge 2·√200/20 = 1.41
    base = gaussian(200, 200, seed=11) * 100
    assert row(base, base + signal + noise, only=IDS).values["suggested_rank"] == 5


def test_the_rank_is_capped_by_the_sides() -> None:
    found = measured(gaussian(6, 9, seed=1), gaussian(9, 30, seed=2), torch.ones(1).double())
    assert found.values["nominal_rank"] == 9
    assert found.weights["rank"] == 6
    assert found.values["k99_share"] is not None and found.values["k99_share"] <= 1


def test_a_doubled_layout_counts_its_nominal_rank() -> None:
    """Mirror: r_max = 2r; shares are of r_max, and the rule of IDLE of r."""
    flat = [1.0] * 8
    found = measured(*adapter(flat + [1e-9] * 8), nominal=8)
    assert found.values["nominal_rank"] == 8
    assert found.values["k99_share"] == 0.5
    assert found.values["effective_rank_share"] == pytest.approx(0.5, abs=1e-6)
    assert judge_capacity(found).code == "USED"
    assert judge_capacity(measured(*adapter(flat + [1e-9] * 8))).code == "IDLE"


@pytest.mark.parametrize(
    ("rank", "served"),
    [(1, 1), (2, 8), (8, 8), (9, 16), (65, 128), (129, 256), (257, 320), (512, 512), (513, None)],
)
def test_ranks_are_rounded_up_to_one_that_is_served(rank: int, served: int | None) -> None:
    assert servable(rank) == served


# --- the oracle ---------------------------------------------------------------------------------

Case = Callable[[], tuple[tuple[Tensor, ...], int | None]]
CASES: dict[str, Case] = {
    "random": lambda: ((gaussian(40, 5, seed=1), gaussian(5, 30, seed=2), _scale(0.3)), None),
    "decaying": lambda: (adapter(decaying(12, 0.7)), None),
    "steep": lambda: (adapter(decaying(16, 0.12)), None),
    "flat": lambda: (adapter([1.0] * 8), None),
    "rank one": lambda: ((gaussian(40, 1, seed=3), gaussian(1, 30, seed=4), _scale(2.0)), None),
    "wider than its sides": lambda: (
        (gaussian(6, 9, seed=5), gaussian(9, 30, seed=6), _scale(1.0)),
        None,
    ),
    "doubled": lambda: (adapter(decaying(16, 0.8)), 8),
    "less its start": lambda: (
        (
            gaussian(40, 4, seed=7), gaussian(4, 30, seed=8), _scale(0.5),
            gaussian(40, 4, seed=9), gaussian(4, 30, seed=10), _scale(0.5),
        ),
        4,
    ),
    "nothing": lambda: (
        (torch.zeros(40, 3, dtype=torch.float64), gaussian(3, 30, seed=11), _scale(1.0)),
        None,
    ),
}  # fmt: skip


def _scale(s: float) -> Tensor:
    return torch.tensor([s], dtype=torch.float64)


def parts_of(factors: Sequence[Tensor]) -> list[oracle.Part]:
    return [
        (B.double().numpy(), A.double().numpy(), float(s))
        for B, A, s in (factors[i : i + 3] for i in range(0, len(factors), 3))
    ]


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("name", CASES)
def test_factors_agree_with_the_oracle(name: str, dtype: str) -> None:
    factors, nominal = CASES[name]()
    stored = tuple(one if i % 3 == 2 else one.to(DTYPES[dtype]) for i, one in enumerate(factors))
    expected = oracle.of_factors(parts_of(stored), dtype, nominal=nominal)
    base = gaussian(len(stored[0]), stored[1].shape[1], seed=20, sd=1e3)  # no update is large on it
    for found in (
        measured(*stored, nominal=nominal),
        measured(*stored, nominal=nominal, base=base),
    ):
        assert_agrees(found, expected)
        if expected.code != "UNDETERMINED":
            assert judge_capacity(found).code == expected.code


@pytest.mark.parametrize("rho", [0.0, 1e-3, 0.05])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_pairs_agree_with_the_oracle(dtype: str, rho: float) -> None:
    base = gaussian(64, 48, seed=12).to(DTYPES[dtype])
    low = gaussian(64, 4, seed=13) @ gaussian(4, 48, seed=14)
    tuned = (updated(base.double(), low, rho) if rho else base).to(DTYPES[dtype])
    expected = oracle.of_pair(base.double().numpy(), tuned.double().numpy(), dtype)
    found = row(base, tuned, only=[*IDS, "precision_ratio"])
    assert_agrees(found, expected)
    assert judge_capacity(found).code == expected.code


def assert_agrees(found: Measured, expected: oracle.CapacityRow) -> None:
    for key in oracle.CAPACITY:
        status = found.status.get(key, Status.OK)
        assert status.value == expected.status.get(key, "OK"), key
        for mine, theirs in ((found.values, expected.values), (found.raw, expected.raw)):
            wanted = theirs.get(key)
            near = None if wanted is None else pytest.approx(wanted, rel=1e-6, abs=1e-9)
            assert mine.get(key) == near, key
        assert found.nulls.get(key) == expected.nulls.get(key), key


def test_the_cases_of_the_oracle_differ_in_code_and_status() -> None:
    """Negative control: an oracle that always said the same would agree with nothing."""
    rows = [
        oracle.of_factors(parts_of(factors), "fp32", nominal=nominal)
        for factors, nominal in (make() for make in CASES.values())
    ]
    assert {one.code for one in rows} >= {"NO_UPDATE", "SATURATED", "RANK_COLLAPSE", "USED"}
    assert len({one.values["k90_share"] for one in rows}) > 4


# --- rounding -----------------------------------------------------------------------------------


def test_bf16_factors_resolve_a_collapsed_rank() -> None:
    """Rounded factors fill r directions and not q: what is marked OK is near the exact number."""
    factors = adapter(decaying(16, 0.12), 512, 384)
    exact = measured(*factors)
    stored = tuple(one.bfloat16() for one in factors[:2])
    found = measured(*stored, factors[2])
    for key in ("effective_rank_share", "k99_share", "entropy_rank_share"):
        assert found.values[key] == pytest.approx(exact.values[key], rel=0.02), key
        assert found.status.get(key, Status.OK) is Status.OK, key
    assert judge_capacity(found).code == "RANK_COLLAPSE"


def test_an_update_below_the_rounding_of_its_start_has_no_shares() -> None:
    """PiSSA in bf16: the start cancels and its rounding stays."""
    B, A, s = adapter(decaying(8, 0.9), 64, 48)
    moved = B + 1e-4 * gaussian(64, 8, seed=3), A + 1e-4 * gaussian(8, 48, seed=4)
    stored = [one.bfloat16() for one in (*moved, B, A)]
    found = measured(*stored[:2], s, *stored[2:], s, nominal=8)
    for key in SHARES:
        assert found.status[key] is Status.BELOW_RESOLUTION, key
        assert key in found.raw, key
    assert judge_capacity(found).code == "UNDETERMINED"
    fine = [one.float() for one in (*moved, B, A)]
    assert judge_capacity(measured(*fine[:2], s, *fine[2:], s, nominal=8)).code != "UNDETERMINED"


def test_a_stack_is_its_matrices() -> None:
    B, A = (torch.stack([gaussian(*shape, seed=s) for s in (1, 2)]) for shape in ((20, 3), (3, 16)))
    scale = torch.tensor([[0.5], [2.0]], dtype=torch.float64)
    whole = measure(
        update_factors(FactorUpdate.of([B, A, scale]), takes=TAKES, settings=Settings()),
        FAMILY,
        seed=0,
    )
    for i, one in enumerate(whole):
        alone = measured(B[i], A[i], scale[i])
        for key in IDS:
            assert one.values[key] == pytest.approx(alone.values[key], rel=1e-12), key
    assert whole[0].values["entropy_rank_share"] != whole[1].values["entropy_rank_share"]


def test_the_oracle_s_noise_is_that_of_rounding() -> None:
    """Monte-Carlo: random factors rounded to bf16, against the formula in expectation."""
    rng = np.random.default_rng(5)
    errors, expected = [], []
    for _ in range(20):
        B, A = (
            torch.from_numpy(rng.standard_normal((60, 4))),
            torch.from_numpy(rng.standard_normal((4, 50))),
        )
        stored = B.bfloat16().double(), A.bfloat16().double()
        errors.append(float((stored[0] @ stored[1] - B @ A).norm()) ** 2)
        part = (stored[0].numpy(), stored[1].numpy(), 1.0)
        expected.append(oracle.factor_noise([part], "bf16") ** 2)
    assert np.mean(errors) == pytest.approx(np.mean(expected), rel=0.05)
