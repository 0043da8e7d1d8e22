"""What holds of the published claims here: each with its test, its null and its interval."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from benchmarks.study.outcomes import END, Study
from benchmarks.study.resampling import Estimate, mean_estimate, resamples

__all__ = ["Test", "best_gains", "claims", "contrast", "matched", "mean_of", "method_rows"]

Floats = NDArray[np.float64]
_LEAST_UNITS = 4


@dataclass(frozen=True)
class Test:
    """claim: in words. what: the number that is tested. null: its value if the claim does not hold.
    direction: 1 where the claim says above the null, −1 below."""

    claim: str
    what: str
    estimate: Estimate
    null: float
    direction: int

    @property
    def verdict(self) -> str:
        """holds here, fails here, or undecided, as of fewer than four units."""
        if self.estimate.value is None or self.estimate.count < _LEAST_UNITS:
            return "undecided"
        above, below = self.estimate.above > self.null, self.estimate.below < self.null
        if not above and not below:
            return "undecided"
        return "holds here" if above == (self.direction > 0) else "fails here"


def mean_of(values: Floats, keep: NDArray[np.bool_] | None = None) -> Estimate:
    """Mean with its interval, of the runs to keep."""
    chosen = values if keep is None else values[keep]
    return mean_estimate(chosen, resamples(range(len(chosen))))


def matched(study: Study, values: Floats, method: str, other: str) -> Estimate:
    """Mean difference of two methods in pairs of the same task, seed and level of the rate."""
    keys = list(zip(study.block, study.level, strict=True))
    sides = []
    for name in (method, other):
        places = np.flatnonzero(study.method == name)
        sides.append({keys[place]: values[place] for place in places})
    pairs = [sides[0][key] - sides[1][key] for key in sides[0] if key in sides[1]]
    return mean_of(np.array(pairs))


def best_gains(study: Study, method: str) -> dict[str, float]:
    """Block → the most accuracy gained at the end over the rates of a method."""
    gain, own = study.gain, study.method == method
    blocks = sorted(set(study.block[own]))
    return {block: float(gain[own & (study.block == block)].max()) for block in blocks}


def _by_block(ours: dict[str, float], theirs: dict[str, float]) -> Estimate:
    return mean_of(np.array([ours[block] - theirs[block] for block in ours if block in theirs]))


def _principal(study: Study) -> list[Test]:
    share = study.statistic("energy_two_sided@8", END)
    lift = np.log(study.statistic("lift@8", END))
    tests = [
        Test(
            "PiSSA on the principals",
            "C_LR(8), pissa − lora-r8, paired",
            matched(study, share, "pissa", "lora-r8"),
            0.0,
            1,
        )
    ]
    for method in ("milora", "geora-residual", "geora-mirror"):
        tests.append(
            Test(
                f"{method} off the principals",
                f"C_LR(8), {method} − lora-r8, paired",
                matched(study, share, method, "lora-r8"),
                0.0,
                -1,
            )
        )
    for method in ("milora", "geora-residual", "geora-mirror", "lora-r8", "full"):
        estimate = mean_of(lift, study.method == method)
        what = f"ln lift of C_LR(8) over isotropic, {method}"
        tests.append(Test(f"{method} avoids the principals", what, estimate, 0.0, -1))
    return tests


def _starts(study: Study) -> list[Test]:
    tests, failed = [], study.failed.astype(float)
    plain = best_gains(study, "lora-r8")
    for method in ("pissa", "milora", "olora"):
        claim = f"{method} collapses or learns less than LoRA"
        estimate = _by_block(best_gains(study, method), plain)
        tests.append(Test(claim, f"best gain over rates, {method} − lora-r8", estimate, 0.0, -1))
        estimate = matched(study, failed, method, "lora-r8")
        tests.append(Test(claim, f"share of failed, {method} − lora-r8, paired", estimate, 0.0, 1))
    return tests


def _kept(study: Study) -> list[Test]:
    tests = []
    for name, words in (("nss/null", "NSS over its null"), ("angle@8/null", "angle over its null")):
        values = study.statistic(name, END)
        tests.append(
            Test(
                "RL keeps the spectrum and turns little",
                f"{words}, learned runs",
                mean_of(values, study.learned),
                1.0,
                -1,
            )
        )
        tests.append(
            Test(
                "failed runs do not",
                f"{words}, failed − learned",
                contrast(values, study.failed, study.learned),
                0.0,
                1,
            )
        )
    return tests


def contrast(values: Floats, ours: NDArray[np.bool_], theirs: NDArray[np.bool_]) -> Estimate:
    """Mean of ours less mean of theirs, whole runs resampled."""
    keep = (ours | theirs) & np.isfinite(values)
    counts, values, ours = resamples(range(int(keep.sum()))), values[keep], ours[keep]
    if not ours.any() or ours.all():
        return Estimate(None, None, None, len(values))
    with np.errstate(invalid="ignore", divide="ignore"):
        sides = [
            counts[:, side] @ values[side] / counts[:, side].sum(axis=1) for side in (ours, ~ours)
        ]
    draws = sides[0] - sides[1]
    low, high = np.nanpercentile(draws, [2.5, 97.5])
    value = float(values[ours].mean() - values[~ours].mean())
    return Estimate(value, float(low), float(high), len(values))


def _rank_one(study: Study) -> list[Test]:
    learned = study.learned
    top, full = study.statistic("update.top_share@1", END), study.method == "full"
    lift = study.statistic("update.top_share@1/null", END)
    linear = study.statistic("trajectory.rank1_linearity", END)
    pc1 = study.statistic("trajectory.temporal_pc1", END)
    walk = pc1 / study.statistic("trajectory.temporal_pc1/null", END)
    claim = "updates are rank one"
    return [
        Test(claim, "σ1² share, full, learned", mean_of(top, learned & full), 0.5, 1),
        Test(
            "updates are nearer to rank one than isotropic ones",
            "σ1² share over its null, full, learned",
            mean_of(lift, learned & full),
            1.0,
            1,
        ),
        Test(
            "the rank-one part goes straight",
            "R² of its path on a line less that of a walk (.75), learned",
            mean_of(
                linear - linear / study.statistic("trajectory.rank1_linearity/null", END), learned
            ),
            0.0,
            1,
        ),
        Test(
            "one temporal component holds the run, more than of a walk",
            "pc1 − pc1 of its walk, learned",
            mean_of(pc1 - walk, learned),
            0.0,
            1,
        ),
    ]


def _capacity(study: Study) -> list[Test]:
    gains = {name: best_gains(study, name) for name in ("lora-r2", "lora-r8", "lora-r32", "full")}
    failed = study.failed.astype(float)
    tests = [
        Test(
            "rank 8 is too little",
            f"best gain over rates, {name} − lora-r8",
            _by_block(gains[name], gains["lora-r8"]),
            0.0,
            1,
        )
        for name in ("lora-r32", "full")
    ]
    tests.append(
        Test(
            "rank 2 is too little",
            "best gain over rates, lora-r8 − lora-r2",
            _by_block(gains["lora-r8"], gains["lora-r2"]),
            0.0,
            1,
        )
    )
    tests.append(
        Test(
            "high ranks collapse",
            "share of failed, lora-r32 − lora-r2, paired",
            matched(study, failed, "lora-r32", "lora-r2"),
            0.0,
            1,
        )
    )
    return tests


def claims(study: Study) -> list[Test]:
    """All tests, in the order of RULES.md, but for extrapolation."""
    parts: tuple[Callable[[Study], list[Test]], ...] = (
        _principal,
        _starts,
        _kept,
        _rank_one,
        _capacity,
    )
    return [test for part in parts for test in part(study)]


def method_rows(study: Study, name: str) -> dict[str, Estimate]:
    """Method → mean of a statistic at the end, with its interval."""
    values = study.statistic(name, END)
    return {
        method: mean_of(values, study.method == method) for method in dict.fromkeys(study.method)
    }
