"""Seeded random pairs through `compare`, by both solvers, against the numpy oracle of the tests.

A batch is a model of some dozens of matrices in four shapes, so that stacks of several form. Of
each pair every value is held against an independent fp64 oracle that shares no code with the
package. The bound is the stated one: 1e-6 of the number (1e-12 where it is near zero; sizes have no
such floor, for they have a unit), 1e-8 rad for angles where base and tuned have a gap of 1e-6·σ1.
Differences of spectra may be off by the `bound` of the row, and `outside_span` by what fp64 knows
of the span of a base with a tiny singular value (docs/numerics.md).
Quantities along a subspace that the base does not define are left out, as in
tests/test_agreement.py.
Prints Markdown; with --log also after each batch, so that a run that is stopped has its figures.

A count is left out where a singular value of fp64 weights lies within the rounding of a solver of
its threshold, and so are areas under curves of a base with repeated singular values.

    python -m benchmarks.differential [--pairs 10000] [--first 0] [--log FILE]
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from threadpoolctl import threadpool_limits
from torch import Tensor

from geoscope import Options, Report, compare
from geoscope.records import LayerRecord
from tests.helpers.matrices import save_model
from tests.helpers.oracle import OracleRow, oracle_row, signal_edge

KS = (8, 64)
CURVES = 5  # every so many batches, in turn of the dtypes: the oracle takes them k by k
SHAPES, SAME = 4, 12  # of a batch: shapes, and pairs of each
SOLVERS = ("auto", "exact")
EPS = 2.0**-53
# Decimal exponents of the scale that each dtype holds without overflow.
SCALES = {
    "fp64": (-30, 30), "fp32": (-30, 30), "bf16": (-30, 30), "fp16": (-5, 2), "fp8": (-30, 30),
}  # fmt: skip
TORCH = {
    "fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16,
}  # fmt: skip
CURVE_IDS = ("auc_left", "auc_right", "outside_span")
SHIFTS = ("nss", "spectral_share", "spectral_lift")
SIZES = ("frobenius_norm", "spectral_norm")
# What hangs on the rounding of the storage, which the oracle does not know for blocks of FP8.
OF_ROUNDING = (
    "precision_ratio", "signal_rank", "numerical_rank", "condition_number", "intruder",
)  # fmt: skip


@dataclass
class Errors:
    """Of one family of values: errors over their bounds, and the worst of them.

    wrong: what is over the bound, in words.
    """

    shares: list[float] = field(default_factory=list)
    worst: tuple[float, str] = (0.0, "")
    wrong: list[str] = field(default_factory=list)

    def add(self, share: float, where: str) -> None:
        self.shares.append(share)
        self.worst = max(self.worst, (share, where))
        if not share <= 1:
            self.wrong.append(f"{share:.2g}: {where}")


@dataclass
class Case:
    """One pair as it is stored, in fp64, and how it was made."""

    base: np.ndarray
    tuned: np.ndarray
    storage: str
    made: str


# --- pairs --------------------------------------------------------------------------------------


def batch(number: int) -> list[Case]:
    """The pairs of one batch; the number is their seed."""
    rng = np.random.default_rng([number, 41])
    storage = list(SCALES)[number % len(SCALES)]
    return [
        pair(rng, shape, storage)
        for shape in (_shape(rng) for _ in range(SHAPES))
        for _ in range(SAME)
    ]


def _shape(rng: np.random.Generator) -> tuple[int, int]:
    m, n = (round(math.exp(rng.uniform(math.log(2), math.log(300)))) for _ in range(2))
    near = rng.random()
    if near < 0.25:
        return m, m
    return (m, min(300, m + 1)) if near < 0.35 else (m, n)


def pair(rng: np.random.Generator, shape: tuple[int, int], storage: str) -> Case:
    """A base of a random structure, an update of another, and a scale for both."""
    kinds = list(_BASES), list(_UPDATES)
    base_kind, update_kind = (kind[int(rng.integers(len(kind)))] for kind in kinds)
    exponent, rho = rng.uniform(*SCALES[storage]), 10 ** rng.uniform(-6, 0.5)
    base = _BASES[base_kind](rng, shape)
    update = _UPDATES[update_kind](rng, base)
    size, change = np.linalg.norm(base), np.linalg.norm(update)
    base = base / size if size else base
    update = rho * update / change if change else update
    sides = _stored(base, 10.0**exponent, storage), _stored(base + update, 10.0**exponent, storage)
    made = f"{shape[0]}×{shape[1]} {storage}, {base_kind} base, {update_kind} update"
    return Case(*sides, storage, f"{made}, ρ {rho:.1e}, scale {10.0**exponent:.0e}")


def _stored(W: np.ndarray, scale: float, storage: str) -> np.ndarray:
    if storage == "fp8":  # one scale for all blocks, a power of two
        power = 2.0 ** round(math.log2(scale))
        return _codes(W * 100).double().numpy() * power
    return torch.from_numpy(W * scale).to(TORCH[storage]).double().numpy()


def _codes(W: np.ndarray) -> Tensor:
    return torch.from_numpy(W.clip(-448, 448)).to(torch.float8_e4m3fn)


def _with(rng: np.random.Generator, shape: tuple[int, int], spectrum: np.ndarray) -> np.ndarray:
    k = len(spectrum)
    U, V = (np.linalg.qr(rng.standard_normal((side, k)))[0] for side in shape)
    return (U * spectrum) @ V.T


_BASES = {
    "gaussian": lambda rng, s: rng.standard_normal(s),
    "decaying": lambda rng, s: _with(rng, s, np.geomspace(1, 10 ** rng.uniform(-9, -1), min(s))),
    "repeated σ": lambda rng, s: _with(rng, s, np.sort(rng.integers(1, 4, min(s)))[::-1] * 1.0),
    "rank-deficient": lambda rng, s: _with(rng, s, np.linspace(2, 1, rng.integers(1, min(s) + 1))),
    "orthogonal": lambda rng, s: _with(rng, s, np.ones(min(s))),
    "heavy": lambda rng, s: rng.standard_t(1.5, s),
    "zero": lambda rng, s: np.zeros(s) if rng.random() < 0.3 else rng.standard_normal(s),
}


def _low_rank(rng: np.random.Generator, base: np.ndarray) -> np.ndarray:
    m, n = base.shape
    rank = int(rng.integers(1, min(8, m, n) + 1))
    return rng.standard_normal((m, rank)) @ rng.standard_normal((rank, n))


def _entry(rng: np.random.Generator, base: np.ndarray) -> np.ndarray:
    update = np.zeros(base.shape)
    update[tuple(rng.integers(base.shape))] = 1.0
    return update


def _principal(rng: np.random.Generator, base: np.ndarray) -> np.ndarray:
    U, S, Vh = np.linalg.svd(base, full_matrices=False)
    k = int(rng.integers(1, len(S) + 1))
    return (U[:, :k] * S[:k] * rng.standard_normal(k)) @ Vh[:k]


_UPDATES = {
    "gaussian": lambda rng, W: rng.standard_normal(W.shape),
    "low-rank": _low_rank,
    "sparse": lambda rng, W: rng.standard_normal(W.shape) * (rng.random(W.shape) < 0.05),
    "one-entry": _entry,
    "zero": lambda rng, W: np.zeros(W.shape),
    "scaled": lambda rng, W: W * rng.choice([-1.0, 1.0]),
    "principal": _principal,
}


# --- comparing ----------------------------------------------------------------------------------


def reports(cases: list[Case], *, curves: bool) -> Iterator[tuple[str, Report]]:
    """The report of the batch by each solver."""
    storage = cases[0].storage
    sides = [[case.base for case in cases], [case.tuned for case in cases]]
    names = [f"model.layers.{i}.mlp.w.weight" for i in range(len(cases))]
    with tempfile.TemporaryDirectory() as folder:
        models = [
            _model(Path(folder) / str(number), dict(zip(names, side, strict=True)), storage)
            for number, side in enumerate(sides)
        ]
        for solver in SOLVERS:
            options = Options(ks=KS, curves=curves, solver=solver, jobs=1, device="cpu")
            yield solver, compare(*models, options=options)


def _model(folder: Path, matrices: dict[str, np.ndarray], storage: str) -> dict[str, Tensor] | str:
    """A state dict; of FP8 in blocks, which state dicts do not hold, a folder."""
    if storage != "fp8":
        return {n: torch.from_numpy(W).to(TORCH[storage]) for n, W in matrices.items()}
    tensors: dict[str, Tensor] = {}
    for name, W in matrices.items():
        least = np.min(np.abs(W[W != 0]), initial=1.0) if W.any() else 1.0
        top = float(np.max(np.abs(W), initial=0.0)) or least
        scale = 2.0 ** (math.frexp(top)[1] - 9)  # |codes| in [256, 512); 448 is the largest
        scale = scale * 2 if top / scale > 448 else scale
        codes = torch.from_numpy(W / scale)
        if not torch.equal(codes.to(torch.float8_e4m3fn).double(), codes):
            raise ValueError(f"{name} is not FP8 with one scale")
        tensors[name] = codes.to(torch.float8_e4m3fn)
        blocks = tuple(-(-side // 128) for side in W.shape)
        tensors[f"{name}_scale_inv"] = torch.full(blocks, scale)
    quantization = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    config = {"model_type": "llama", "quantization_config": quantization}
    return str(save_model(folder, tensors, config=config))


def check(
    case: Case, row: LayerRecord, expected: OracleRow, solver: str, where: str,
    table: dict[str, Errors], statuses: Counter[str],
) -> None:  # fmt: skip
    """Every value of one row against the oracle's, into the table."""
    S = np.linalg.svd(case.base, compute_uv=False)
    rank = int(np.sum(S > S[0] * max(case.base.shape) * 2.0**-52))
    spectra = S, np.linalg.svd(case.tuned, compute_uv=False)
    tied = rank < len(S) or bool(np.any(-np.diff(S) < 1e-6 * S[:-1]))
    for key in expected.values:
        if _at_its_threshold(key, case) or (tied and key in CURVE_IDS):
            continue
        if case.storage == "fp8" and any(part in key for part in OF_ROUNDING):
            continue
        if _undefined(key, expected, rank) or (key.startswith("angle") and _close(key, *spectra)):
            continue
        at = f"{where} {solver} {key} ({case.made})"
        got, want = row.status_of(key).value, expected.status.get(key, "OK")
        mine = row.raw.get(key) if row.values.get(key) is None else row.values[key]
        theirs = expected.raw.get(key) if expected.values[key] is None else expected.values[key]
        if got != want and case.storage != "fp8" and not _at_its_floor(key, row, expected):
            statuses[f"{_family(key)}: {got}, oracle {want}"] += 1
            print(f"status {at}: {got} {mine}, oracle {want} {theirs}", file=sys.stderr)
        if mine is not None and theirs is not None:
            slack = _slack(key, float(theirs), case, row, spectra)
            share = _share(key, float(mine), float(theirs), slack)
            table[_family(key)].add(share, f"{at} {mine} {theirs}")


def _family(key: str) -> str:
    return key.partition("@")[0].rpartition(".")[2] if "top_share" not in key else "top_share"


def _slack(
    key: str, value: float, case: Case, row: LayerRecord, spectra: tuple[np.ndarray, np.ndarray]
) -> float:
    """What the error may be beside 1e-6 of the value, for what hangs on less than a spectrum has.

    A difference of spectra: each σ_i is good to 4·eps·σ1²/σ_i, at least 16·eps·σ1, and within the
    row's bound; root of the sum of squares over both spectra, in the unit of the value. A part
    outside the base's span: 2√x·θ + θ², θ = 4·eps·σ1/σ_q the angle by which fp64 turns the span.
    """
    S0 = spectra[0]
    if key == "outside_span":
        if S0[-1] == 0:
            return math.inf
        angle = 4 * EPS * S0[0] / S0[-1]
        return 2 * math.sqrt(max(value, 0.0)) * angle + angle**2
    if key not in SHIFTS:
        return 0.0
    errors = [
        _errors(S, float(row.method[f"{role}.S"]["bound"]))
        for role, S in zip(("base", "tuned"), spectra, strict=True)
    ]
    unit = np.linalg.norm(S0 if key == "nss" else case.tuned - case.base)
    lift = math.sqrt(max(case.base.shape)) if key == "spectral_lift" else 1.0
    return lift * float(np.linalg.norm(errors) / unit)


def _errors(S: np.ndarray, bound: float) -> np.ndarray:
    """What each singular value may be off by, through a Gram matrix in fp64."""
    tiny = np.finfo(float).tiny
    relative = np.minimum(np.maximum(4 * EPS * S[0] / np.maximum(S, tiny), 16 * EPS), bound)
    return relative * S[0]


def _share(key: str, mine: float, theirs: float, slack: float) -> float:
    """The error over its bound."""
    if mine == theirs:
        return 0.0
    if key.endswith("condition_number"):  # no fp64 gives σ_q better than this
        return abs(mine - theirs) / (theirs * max(1e-6, 64 * 2.0**-53 * theirs))
    if key.startswith("angle"):
        return abs(mine - theirs) / 1e-8
    near = 0.0 if key.endswith(SIZES) else 1e-12
    share = abs(mine - theirs) / (max(1e-6 * max(abs(mine), abs(theirs)), near) + slack)
    return share if math.isfinite(share) else math.inf


def _at_its_floor(key: str, row: LayerRecord, expected: OracleRow) -> bool:
    """An angle so near what rounding turns that the draws decide whether it is resolved.

    Or both are below what a solver in fp64 turns.
    """
    mean = key.replace("max", "mean")
    value, floor = row.raw.get(mean, row.values.get(mean)), expected.floors.get(mean)
    if value is None or floor is None:
        return False
    return floor / 3 <= value <= 3 * floor or max(value, floor) < 1e-12


def _at_its_threshold(key: str, case: Case) -> bool:
    """Whether a count of singular values of fp64 weights hangs on the rounding of a solver."""
    role, _, name = key.partition(".")
    if case.storage != "fp64" or name not in ("numerical_rank", "signal_rank", "condition_number"):
        return False
    W = {"base": case.base, "tuned": case.tuned, "update": case.tuned - case.base}[role]
    S, least = np.linalg.svd(W, compute_uv=False), max(W.shape) * 2.0**-52
    noise = np.linalg.norm(np.spacing(case.base if role == "base" else case.tuned)) / math.sqrt(12)
    edge = signal_edge(S, *W.shape, float(noise)) if name == "signal_rank" else least * S[0]
    return bool(np.any(np.abs(S - edge) < 32 * 2.0**-52 * S[0]))


def _close(key: str, *spectra: np.ndarray) -> bool:
    """Whether a side has a gap at k that fp64 resolves no better than to 1e-8 rad."""
    k = int(key.rpartition("@")[2])
    return any(k < len(S) and S[k - 1] - S[k] < 1e-6 * S[0] for S in spectra)


def _undefined(key: str, expected: OracleRow, rank: int) -> bool:
    """Whether the quantity hangs on a subspace that the base does not define."""
    prefix, _, dimension = key.partition("@")
    if not dimension or "." in prefix or prefix == "gap":
        return False
    gap = expected.values.get(f"gap@{dimension}")
    return int(dimension) > rank or gap is None or gap < 1e-6


# --- telling ------------------------------------------------------------------------------------


def told(table: dict[str, Errors], statuses: Counter[str], pairs: int, seconds: float) -> str:
    every = np.array([share for errors in table.values() for share in errors.shares] or [0.0])
    over = sum(len(errors.wrong) for errors in table.values())
    lines = [
        f"{pairs} pairs, {len(SOLVERS)} solvers, {len(every)} values in {seconds:.0f} s; "
        f"{over} over the bound, {sum(statuses.values())} statuses that differ. "
        f"Error over bound: median {np.median(every):.1e}, "
        f"99 % {np.quantile(every, 0.99):.1e}, 99.9 % {np.quantile(every, 0.999):.1e}, "
        f"most {every.max():.2g}.",
        "", "| value | numbers | equal | median | 99 % | most | over |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]  # fmt: skip
    for name, errors in sorted(table.items(), key=lambda item: -item[1].worst[0]):
        shares = np.array(errors.shares)
        lines.append(
            f"| {name} | {len(shares)} | {np.mean(shares == 0):.0%} | {np.median(shares):.1e} "
            f"| {np.quantile(shares, 0.99):.1e} | {shares.max():.1e} | {len(errors.wrong)} |"
        )
    worst = sorted((errors.worst for errors in table.values()), reverse=True)[:10]
    lines += ["", *(f"- {share:.2g}: {where}" for share, where in worst)]
    lines += [f"- over: {what}" for errors in table.values() for what in errors.wrong]
    lines += [f"- {count} × {what}" for what, count in statuses.most_common(20)]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--pairs", type=int, default=10_000)
    parser.add_argument("--first", type=int, default=0, help="number of the first batch")
    parser.add_argument("--log", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    limits = threadpool_limits(1, user_api="blas")
    table: dict[str, Errors] = defaultdict(Errors)
    statuses: Counter[str] = Counter()
    started, pairs = time.perf_counter(), 0
    for number in range(given.first, given.first + math.ceil(given.pairs / (SHAPES * SAME))):
        cases, curves = batch(number), number // len(SCALES) % CURVES == 0
        expected = [
            oracle_row(
                case.base, case.tuned, ks=KS, curves=curves, draws=3,
                storage="fp32" if case.storage == "fp8" else case.storage,
            )
            for case in cases
        ]  # fmt: skip
        for solver, report in reports(cases, curves=curves):
            rows = {row.name: row for row in report.layers}
            for i, (case, oracle) in enumerate(zip(cases, expected, strict=True)):
                row, where = rows.get(f"model.layers.{i}.mlp.w.weight"), f"batch {number} pair {i}"
                if row is None or row.verdict is None:
                    statuses["no row"] += 1
                    print(f"no row: {where} {case.made}", file=sys.stderr)
                    continue
                check(case, row, oracle, solver, where, table, statuses)
        pairs += len(cases)
        if given.log is not None:
            given.log.write_text(told(table, statuses, pairs, time.perf_counter() - started) + "\n")
    limits.restore_original_limits()
    print(told(table, statuses, pairs, time.perf_counter() - started))
    sys.exit(any(errors.wrong for errors in table.values()))


if __name__ == "__main__":
    main()
