"""What is the right number? Every quantity of a base/tuned pair, straight from its definition.

Covers sections 1, 2.1-2.4, 2.6 and 3 of the methods reference for a pair of full weights.
Written from the definitions in plain numpy and scipy, dense and in fp64; it shares no code with the
package, so that an agreement of the two means something. Slow on purpose: no factorisation is
shared cleverly, nothing is truncated. Change it only when a definition changes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from itertools import pairwise

import numpy as np
from scipy.integrate import quad
from scipy.optimize import root_scalar

NULL_STATUSES = {
    "ZERO_UPDATE",
    "BELOW_RESOLUTION",
    "NON_FINITE",
    "NOT_CONVERGED",
    "NOT_APPLICABLE",
}
ROLES = ("base", "tuned", "update")
SPECTRUM = (
    "frobenius_norm",
    "spectral_norm",
    "stable_rank",
    "participation_ratio",
    "entropy_rank",
    "effective_rank",
    "nuclear_ratio",
    "k90",
    "k95",
    "k99",
    "top_share@1",
    "top_share@8",
    "signal_rank",
    "numerical_rank",
    "condition_number",
)
# Their null is the mean over Gaussian matrices of the same shape.
SIMULATED = SPECTRUM[2:12]
SIZES = (
    "relative_update",
    "precision_ratio",
    "base_cosine",
    "base_share",
    "update_sparsity",
    "update_sparsity_abs",
    "update_sparsity_exact",
)
ENERGIES = (
    "energy_right",
    "energy_left",
    "energy_two_sided",
    "lift",
    "versus_base",
    "energy_of_base",
)
ANGLES = ("angle_left_mean", "angle_left_max", "angle_right_mean", "angle_right_max")
CURVES = ("outside_span", "auc_right", "auc_left")
SHIFTS = ("nss", "spectral_share", "spectral_lift")
RATIOS = ("rank_ratio", "stable_rank_ratio")
INTRUDERS = ("intruders", "intruder_energy", "intruders_right", "intruder_energy_right")

# Precision class of each quantity of the update's spectrum; those not named have no floor.
PRECISION_CLASS = {
    "spectral_norm": "top",
    "stable_rank": "top",
    "top_share@1": "top",
    "top_share@8": "top",
    "participation_ratio": "energy",
    "entropy_rank": "energy",
    "k90": "energy",
    "k95": "energy",
    "effective_rank": "amplitude",
    "nuclear_ratio": "amplitude",
    "k99": "amplitude",
    "numerical_rank": "amplitude",
    "condition_number": "amplitude",
}
# Class -> (largest OK, largest CAUTION); amplitude is measured on ν√(q/PR), the others on ν.
FLOORS = {"top": (0.2, 0.6), "energy": (0.1, 0.2), "amplitude": (0.02, 0.1)}

# storage -> (fraction bits f, smallest normal exponent, largest exponent)
FORMATS = {
    "bf16": (7, -126, 127),
    "fp16": (10, -14, 15),
    "fp32": (23, -126, 127),
    "fp64": (52, -1022, 1023),
}


@dataclass(frozen=True)
class OracleRow:
    """One row: numbers, nulls and statuses by id.

    `values` is None exactly where `status` is a null one; `raw` keeps the number behind a
    BELOW_RESOLUTION; `status` names only what is not OK. `nulls` are the deterministic nulls,
    `sampled_nulls` the simulated ones as (mean, standard error of the mean). `floors` are the
    angles up to which rounding alone may turn.
    """

    values: dict[str, float | None]
    raw: dict[str, float]
    nulls: dict[str, float]
    status: dict[str, str]
    verdict: str
    k_v: int
    sampled_nulls: dict[str, tuple[float, float]]
    floors: dict[str, float]


def oracle_row(
    base: np.ndarray,
    tuned: np.ndarray,
    *,
    storage: str,
    base_storage: str | None = None,
    ks: tuple[int, ...] = (8, 64),
    curves: bool = False,
    simulate: int = 0,
    seed: int = 0,
    draws: int = 12,
) -> OracleRow:
    """All ids of one pair.   base, tuned: (m, n) fp64 with exactly the stored values.

    `storage` is the dtype of `tuned`, `base_storage` of `base` (the same unless given);
    `simulate` is the number of draws behind `sampled_nulls`, 0 for none; `draws` that behind the
    nulls and floors that hang on the base's spectrum.
    """
    base_storage = base_storage or storage
    base, tuned = np.asarray(base, np.float64), np.asarray(tuned, np.float64)
    if base.ndim != 2 or base.shape != tuned.shape:
        raise ValueError(f"two matrices of one shape are needed, not {base.shape}, {tuned.shape}")
    for role, W, dtype in (("base", base, base_storage), ("tuned", tuned, storage)):
        finite = W[np.isfinite(W)]
        if np.any(round_to(finite, dtype) != finite):
            raise ValueError(f"{role} holds values that {dtype} cannot store")

    m, n = base.shape
    q = min(m, n)
    k_v = max(1, min(64, q // 8))
    all_ks = tuple(dict.fromkeys((*ks, k_v)))
    sheet = _Sheet({}, {}, {})
    if not (np.isfinite(base).all() and np.isfinite(tuned).all()):
        for key in ids(all_ks, curves):
            sheet.put(key, np.nan, "NON_FINITE")
        nulls = _nulls_of_shape(m, n, all_ks, curves)
        sampled = _iid_nulls(m, n, simulate, seed)
        return OracleRow(
            sheet.values, sheet.raw, nulls, sheet.status, "UNDETERMINED", k_v, sampled, {}
        )

    counted = counted_storage(base, base_storage), counted_storage(tuned, storage)
    pair = _Pair(base, tuned, *counted, draws)
    _put_sizes(sheet, pair)
    for role in ROLES:
        _put_spectrum(sheet, pair, role)
    for k in all_ks:
        _put_energies(sheet, pair, k)
        _put_gap(sheet, pair, k)
        _put_angles(sheet, pair, k)
    if curves:
        _put_curves(sheet, pair)
    _put_shifts(sheet, pair)
    _put_ratios(sheet, pair)
    _put_intruders(sheet, pair)
    nulls, turned = _nulls_of_shape(m, n, all_ks, curves), _nulls_of_pair(pair, all_ks)
    sampled = _iid_nulls(m, n, simulate, seed) | _sparsity_nulls(pair, simulate, seed) | turned
    verdict = _verdict(sheet, {key: mean for key, (mean, _) in turned.items()}, pair, k_v)
    return OracleRow(
        sheet.values, sheet.raw, nulls, sheet.status, verdict, k_v, sampled, sheet.floors
    )


def ids(ks: tuple[int, ...], curves: bool) -> list[str]:
    """Every id of a row."""
    spectra = [f"{role}.{name}" for role in ROLES for name in SPECTRUM]
    at_k = [f"{name}@{k}" for k in ks for name in (*ENERGIES, "gap", *ANGLES)]
    drawn = CURVES if curves else ()
    return [*SIZES, *spectra, *at_k, *drawn, *SHIFTS, *RATIOS, *INTRUDERS]


# --- storage formats ------------------------------------------------------------------------


def ulp(w: np.ndarray | float, storage: str) -> np.ndarray:
    """Spacing of the stored numbers at w: 2^(max(⌊log2|w|⌋, emin) - f); at 0 the smallest one."""
    f, emin, _ = FORMATS[storage]
    _, exponent = np.frexp(np.abs(w))  # |w| = mantissa · 2^exponent, mantissa in [½, 1)
    floor_log2 = np.where(np.asarray(w) == 0, emin, exponent - 1)
    return np.ldexp(1.0, np.maximum(floor_log2, emin) - f)


def round_to(w: np.ndarray | float, storage: str) -> np.ndarray:
    """w rounded to the nearest number of that format, ties to even, overflow to ±inf."""
    w = np.asarray(w, np.float64)
    if storage == "fp64":
        return w
    f, _, emax = FORMATS[storage]
    step = ulp(w, storage)
    rounded = np.rint(w / step) * step
    largest = (2 - 2.0**-f) * 2.0**emax
    return np.where(np.abs(rounded) > largest, np.copysign(np.inf, w), rounded)


def counted_storage(w: np.ndarray, storage: str) -> str:
    """The format a tensor counts as: fp32 and fp16 of ≥ 1024 entries, all bf16 numbers, is bf16."""
    if storage in ("fp32", "fp16") and w.size >= 1024 and np.array_equal(round_to(w, "bf16"), w):
        return "bf16"
    return storage


def eps(storage: str) -> float:
    return 2.0 ** -FORMATS[storage][0]


# --- the pair and the sheet -----------------------------------------------------------------


class _Pair:
    """Both matrices, their difference, the three SVDs and the facts every section asks for."""

    def __init__(
        self, base: np.ndarray, tuned: np.ndarray, base_storage: str, storage: str, draws: int
    ):
        self.draws = draws
        self.W = {"base": base, "tuned": tuned, "update": tuned - base}
        self.storage = {"base": base_storage, "tuned": storage, "update": storage}
        self.m, self.n = base.shape
        self.q, self.M = min(base.shape), max(base.shape)
        self.U, self.S, self.V = {}, {}, {}
        for role in ROLES:
            U, S, Vh = np.linalg.svd(self.W[role], full_matrices=False)
            self.U[role], self.S[role], self.V[role] = U, S, Vh.T
        self.norm = {role: np.sqrt(np.sum(self.W[role] ** 2)) for role in ROLES}
        self.is_zero = {role: not self.W[role].any() for role in ROLES}

        # Rounding noise of a stored matrix, as a Frobenius norm; the update has the tuned one's.
        noise = {
            role: np.sqrt(np.sum(ulp(self.W[role], self.storage[role]) ** 2) / 12)
            for role in ("base", "tuned")
        }
        self.noise = {**noise, "update": noise["tuned"]}
        self.turned: dict[int, Turns] = {}
        self.nu = np.inf if self.is_zero["update"] else noise["tuned"] / self.norm["update"]
        norms = self.norm["base"] * self.norm["tuned"]
        self.cosine = np.sum(base * tuned) / norms if norms else np.nan
        inner, norms = np.sum(base * self.W["update"]), self.norm["base"] * self.norm["update"]
        self.base_share = (inner / norms) ** 2 if norms else np.nan
        self.rho = np.nan if self.is_zero["base"] else self.norm["update"] / self.norm["base"]

    def floor(self, side: str, k: int) -> float:
        """Two standard deviations above the mean angle that the rounding of tuned gives."""
        sd = float(self.noise["tuned"] / np.sqrt(self.m * self.n))
        if k not in self.turned:
            self.turned[k] = simulated_turns(self.S["base"], (self.m, self.n), sd, (k,), self.draws)
        drawn = (self.turned[k].left if side == "left" else self.turned[k].right)[k]
        return float(np.mean(drawn) + 2 * np.std(drawn, ddof=1))

    def precision(self, kind: str) -> str:
        """OK, CAUTION or BELOW_RESOLUTION of a quantity of that precision class."""
        if self.is_zero["update"]:
            return "OK"
        measure = self.nu
        if kind == "amplitude":
            measure *= np.sqrt(self.q / participation_ratio(self.S["update"]))
        ok, caution = FLOORS[kind]
        if measure <= ok:
            return "OK"
        return "CAUTION" if measure <= caution else "BELOW_RESOLUTION"


@dataclass
class _Sheet:
    values: dict[str, float | None]
    raw: dict[str, float]
    status: dict[str, str]
    floors: dict[str, float] = field(default_factory=dict)  # angle that rounding alone turns

    def put(self, key: str, number: float | np.floating | np.integer, status: str = "OK") -> None:
        self.values[key] = None if status in NULL_STATUSES else float(number)
        if status == "BELOW_RESOLUTION":
            self.raw[key] = float(number)
        if status != "OK":
            self.status[key] = status


# --- 2.1 size and storage -------------------------------------------------------------------


def _put_sizes(sheet: _Sheet, pair: _Pair) -> None:
    if pair.is_zero["base"]:
        sheet.put("relative_update", np.nan, "NOT_APPLICABLE")
    else:
        sheet.put("relative_update", pair.rho)
    if pair.is_zero["update"]:
        sheet.put("precision_ratio", np.nan, "ZERO_UPDATE")
    else:
        sheet.put("precision_ratio", pair.nu)
    if pair.is_zero["base"] or pair.is_zero["tuned"]:
        sheet.put("base_cosine", np.nan, "NOT_APPLICABLE")
    else:
        sheet.put("base_cosine", pair.cosine)
    if reason := _base_reason(pair):
        sheet.put("base_share", np.nan, reason)
    else:
        sheet.put("base_share", pair.base_share)
    for key, share in sparsities(pair.W["base"], pair.W["tuned"]).items():
        sheet.put(key, share)


def sparsities(base: np.ndarray, tuned: np.ndarray) -> dict[str, float]:
    """The three shares of unchanged entries of a stored pair."""
    a, b = round_to(base, "bf16"), round_to(tuned, "bf16")
    with np.errstate(invalid="ignore"):  # inf - inf, for fp64 values beyond the range of bf16
        apart = np.where(a == b, 0.0, np.abs(a - b))
    largest = np.maximum(np.abs(a), np.abs(b))
    return {
        "update_sparsity": float(np.mean(apart <= 1e-3 * largest)),
        "update_sparsity_abs": float(np.mean(apart <= 1e-5)),
        "update_sparsity_exact": float(np.mean(base == tuned)),
    }


# --- 2.2 spectrum ---------------------------------------------------------------------------


def participation_ratio(S: np.ndarray) -> float:
    return np.sum(S**2) ** 2 / np.sum(S**4)


def perplexity(weights: np.ndarray) -> float:
    """exp of the entropy of weights/Σweights, zeros dropped."""
    p = weights / np.sum(weights)
    p = p[p > 0]
    return np.exp(-np.sum(p * np.log(p)))


def least_k(S: np.ndarray, level: float) -> int:
    """Least k with E_k ≥ level, with 1e-12 of slack against rounding at exact ties."""
    share = np.cumsum(S**2) / np.sum(S**2)
    return next(k for k in range(1, S.size + 1) if share[k - 1] >= level - 1e-12)


def shape_numbers(S: np.ndarray) -> dict[str, float]:
    """The scale-free numbers of a non-zero spectrum, singular values descending."""
    energy = np.sum(S**2)
    numbers = {
        "stable_rank": energy / S[0] ** 2,
        "participation_ratio": participation_ratio(S),
        "entropy_rank": perplexity(S**2),
        "effective_rank": perplexity(S),
        "nuclear_ratio": np.sum(S) / np.sqrt(S.size * energy),
        "k90": least_k(S, 0.90),
        "k95": least_k(S, 0.95),
        "k99": least_k(S, 0.99),
        "top_share@1": S[0] ** 2 / energy,
    }
    if S.size >= 8:
        numbers["top_share@8"] = np.sum(S[:8] ** 2) / energy
    return {key: float(number) for key, number in numbers.items()}


@lru_cache
def mp_median(beta: float) -> float:
    """Median of the Marchenko-Pastur density √((b₊-x)(x-b₋))/(2πβx), b± = (1±√β)²."""
    # x = 1 + β + 2√β·cos φ turns density·dx into 2 sin²φ/(πx)·dφ, without the square roots.
    centre, half = 1 + beta, 2 * np.sqrt(beta)

    def mass_above(phi: float) -> float:
        value, _ = quad(
            lambda t: 2 * np.sin(t) ** 2 / (np.pi * (centre + half * np.cos(t))),
            0,
            phi,
            epsabs=1e-12,
            epsrel=1e-12,
            limit=500,
        )
        return value

    phi = root_scalar(lambda t: mass_above(t) - 0.5, bracket=(0, 3.1), xtol=1e-13).root
    return centre + half * np.cos(phi)


def signal_edge(S: np.ndarray, m: int, n: int, noise: float) -> float:
    """s(√m+√n), s the larger of the rounding noise per entry and the median-based bulk.

    At least what an fp64 solver may leave of a zero.
    """
    q, M = min(m, n), max(m, n)
    bulk = np.median(S) / np.sqrt(M * mp_median(q / M))
    edge = max(noise / np.sqrt(m * n), bulk) * (np.sqrt(m) + np.sqrt(n))
    return max(edge, M * 2.0**-52 * S[0])


def _put_spectrum(sheet: _Sheet, pair: _Pair, role: str) -> None:
    S = pair.S[role]
    sheet.put(f"{role}.frobenius_norm", pair.norm[role])

    def status(name: str) -> str:
        if role == "update" and name in PRECISION_CLASS:
            return pair.precision(PRECISION_CLASS[name])
        return "OK"

    sheet.put(f"{role}.spectral_norm", S[0], status("spectral_norm"))
    if pair.is_zero[role]:
        for name in SPECTRUM[2:]:
            reason = "ZERO_UPDATE" if role == "update" else "NOT_APPLICABLE"
            sheet.put(f"{role}.{name}", np.nan, reason)
        return

    numbers = shape_numbers(S)
    tolerance = pair.M * eps(pair.storage[role]) * S[0]
    numbers["signal_rank"] = np.sum(S > signal_edge(S, pair.m, pair.n, pair.noise[role]))
    if tolerance < S[0]:  # else no singular value can exceed it: bf16 from a side of 128 on
        numbers["numerical_rank"] = np.sum(S > tolerance)
    if S[-1] > tolerance:
        numbers["condition_number"] = S[0] / S[-1]
    for name in SPECTRUM[2:]:
        if name in numbers:
            sheet.put(f"{role}.{name}", numbers[name], status(name))
        else:  # top_share@8 of q < 8, condition number of a singular matrix
            sheet.put(f"{role}.{name}", np.nan, "NOT_APPLICABLE")


# --- 2.3 alignment --------------------------------------------------------------------------


def _energies_at(pair: _Pair, k: int) -> tuple[float, float, float]:
    """C_R(k), C_L(k), C_LR(k)."""
    D, U, V = pair.W["update"], pair.U["base"][:, :k], pair.V["base"][:, :k]
    total = np.sum(D**2)
    right, left = np.sum((D @ V) ** 2), np.sum((U.T @ D) ** 2)
    return right / total, left / total, np.sum((U.T @ D @ V) ** 2) / total


def _base_reason(pair: _Pair, *, k: int = 0) -> str | None:
    """Why an update cannot be held against the base's leading k directions, if it cannot."""
    if pair.is_zero["update"]:
        return "ZERO_UPDATE"
    if pair.is_zero["base"] or k > pair.q or (k and not _has_subspace(pair, "base", k)):
        return "NOT_APPLICABLE"
    return None


def _put_energies(sheet: _Sheet, pair: _Pair, k: int) -> None:
    reason = _base_reason(pair, k=k)
    if reason:
        for name in ENERGIES:
            sheet.put(f"{name}@{k}", np.nan, reason)
        return
    right, left, both = _energies_at(pair, k)
    S = pair.S["base"]
    share = np.sum(S[:k] ** 2) / np.sum(S**2)
    lift = both / (k**2 / (pair.m * pair.n))
    for name, number in zip(ENERGIES, (right, left, both, lift, both / share), strict=False):
        sheet.put(f"{name}@{k}", number, pair.precision("top"))
    sheet.put(f"energy_of_base@{k}", pair.base_share * share)


def _put_gap(sheet: _Sheet, pair: _Pair, k: int) -> None:
    S = np.append(pair.S["base"], 0.0)  # σ_{q+1} = 0
    if k > pair.q or S[k - 1] <= _edge(S, pair.noise["base"], pair.m, pair.n):
        sheet.put(f"gap@{k}", np.nan, "NOT_APPLICABLE")
        return
    step, entry = S[k - 1] - S[k], pair.noise["base"] / np.sqrt(pair.m * pair.n)
    made = step <= 3 * entry or step <= 1e-6 * S[k - 1]
    sheet.put(f"gap@{k}", step / S[k - 1], "CAUTION" if made else "OK")


@dataclass(frozen=True)
class Turns:
    """What dense draws of W0 + Gaussian entries of one sd did: arrays of one number a draw."""

    left: dict[int, np.ndarray]
    right: dict[int, np.ndarray]
    singular_values: np.ndarray


def simulated_turns(
    S: np.ndarray, shape: tuple[int, int], sd: float, ks: tuple[int, ...], draws: int = 12
) -> Turns:
    """Mean principal angles at each k, and spectra, of diag(S) + Gaussian entries.

    These know no frame, so diag(S) stands for W0.
    """
    rng = np.random.default_rng([*shape, 7])
    ks = tuple(k for k in ks if k <= min(shape))
    left, right = {k: np.zeros(draws) for k in ks}, {k: np.zeros(draws) for k in ks}
    spectra = []
    for draw in range(draws):
        W = sd * rng.standard_normal(shape)
        W[range(S.size), range(S.size)] += S
        U, values, Vh = np.linalg.svd(W, full_matrices=False)
        spectra.append(values)
        for k in ks:
            for turns, vectors in ((left, U), (right, Vh.T)):
                axes = np.eye(len(vectors), k)
                turns[k][draw] = np.mean(angles_between(axes, vectors[:, :k]))
    return Turns(left, right, np.array(spectra))


def angles_between(Q0: np.ndarray, Q1: np.ndarray) -> np.ndarray:
    """Principal angles of two spans, ascending, from orthonormal columns (d, k).

    Each from its own cosine and sine. scipy's subspace_angles takes the sine of the largest angle
    where the smallest one is small, and is then off by 1.5e-8 at a right angle.
    """
    overlap = Q0.T @ Q1
    cosines = np.linalg.svd(overlap, compute_uv=False)
    sines = np.linalg.svd(Q1 - Q0 @ overlap, compute_uv=False)[::-1]
    return np.arctan2(sines, cosines)


def _edge(S: np.ndarray, noise: float, m: int, n: int) -> float:
    """Singular values up to here may be rounding: three times the edge of iid noise."""
    stored = 3 * noise / np.sqrt(m * n) * (np.sqrt(m) + np.sqrt(n))
    return max(stored, max(m, n) * 2.0**-52 * S[0])


def _has_subspace(pair: _Pair, role: str, k: int) -> bool:
    """σ_k is above the rounding of what is stored, and not the same number as σ_{k+1}."""
    if k == pair.M:  # all of a square matrix's space
        return not pair.is_zero[role]
    S = np.append(pair.S[role], 0.0)
    noise = pair.noise["base"]
    if role == "tuned":
        noise = np.hypot(noise, pair.noise["tuned"])
    return bool(S[k - 1] > _edge(S, noise, pair.m, pair.n) and S[k - 1] - S[k] > 1e-6 * S[k - 1])


def _put_angles(sheet: _Sheet, pair: _Pair, k: int) -> None:
    for side, basis, dimension in (("left", pair.U, pair.m), ("right", pair.V, pair.n)):
        mean, largest = f"angle_{side}_mean@{k}", f"angle_{side}_max@{k}"
        zero = pair.is_zero["base"] or pair.is_zero["tuned"]
        undefined = zero or k > pair.q or k == dimension
        if undefined or not all(_has_subspace(pair, role, k) for role in ("base", "tuned")):
            sheet.put(mean, np.nan, "NOT_APPLICABLE")
            sheet.put(largest, np.nan, "NOT_APPLICABLE")
        elif pair.is_zero["update"]:
            sheet.put(mean, 0.0)
            sheet.put(largest, 0.0)
        else:
            theta = angles_between(basis["base"][:, :k], basis["tuned"][:, :k])
            floor = pair.floor(side, k)
            status = "BELOW_RESOLUTION" if np.mean(theta) < floor else "OK"
            sheet.put(mean, np.mean(theta), status)
            sheet.put(largest, np.max(theta), status)
            sheet.floors[mean] = sheet.floors[largest] = floor


def _put_curves(sheet: _Sheet, pair: _Pair) -> None:
    reason = _base_reason(pair)
    if reason:
        for name in CURVES:
            sheet.put(name, np.nan, reason)
        return
    right, left, _ = zip(*(_energies_at(pair, k) for k in range(1, pair.q + 1)), strict=True)
    status = pair.precision("top")
    sheet.put("auc_right", np.mean(right), status)
    sheet.put("auc_left", np.mean(left), status)
    if pair.m == pair.n:
        sheet.put("outside_span", np.nan, "NOT_APPLICABLE")
    else:
        sheet.put("outside_span", 1 - (left if pair.m > pair.n else right)[-1], status)


# --- 2.4 change of spectrum -----------------------------------------------------------------


def _put_shifts(sheet: _Sheet, pair: _Pair) -> None:
    if pair.is_zero["update"]:
        if pair.is_zero["base"]:
            sheet.put("nss", np.nan, "NOT_APPLICABLE")
        else:
            sheet.put("nss", 0.0)
        sheet.put("spectral_share", np.nan, "ZERO_UPDATE")
        sheet.put("spectral_lift", np.nan, "ZERO_UPDATE")
        return
    if pair.is_zero["base"]:
        for name in SHIFTS:
            sheet.put(name, np.nan, "NOT_APPLICABLE")
        return
    S0, S1 = pair.S["base"], pair.S["tuned"]
    nss = np.sqrt(np.sum((S1 - S0) ** 2)) / np.sqrt(np.sum(S0**2))
    status = pair.precision("top")
    sheet.put("nss", nss, status)
    sheet.put("spectral_share", nss / pair.rho, status)
    sheet.put("spectral_lift", nss / pair.rho * np.sqrt(pair.M), status)


def _put_ratios(sheet: _Sheet, pair: _Pair) -> None:
    if pair.is_zero["base"] or pair.is_zero["tuned"]:
        for name in RATIOS:
            sheet.put(name, np.nan, "NOT_APPLICABLE")
        return
    before, after = shape_numbers(pair.S["base"]), shape_numbers(pair.S["tuned"])
    sheet.put("rank_ratio", after["effective_rank"] / before["effective_rank"])
    sheet.put("stable_rank_ratio", after["stable_rank"] / before["stable_rank"])


# --- 2.6 intruders --------------------------------------------------------------------------


def _put_intruders(sheet: _Sheet, pair: _Pair) -> None:
    if pair.is_zero["base"] or pair.is_zero["tuned"]:
        for name in INTRUDERS:
            sheet.put(name, np.nan, "NOT_APPLICABLE")
        return
    if pair.is_zero["update"]:
        for name in INTRUDERS:
            sheet.put(name, 0.0)
        return
    k = min(10, pair.q)
    energy = pair.S["tuned"][:k] ** 2
    S, noise = pair.S["base"], np.hypot(pair.noise["base"], pair.noise["tuned"])
    apart = max(2 * noise / np.sqrt(pair.m * pair.n), 1e-6 * S[0])
    # Base directions whose σ rounding mixes are one; those that are rounding are none.
    bounds = [0, *(np.flatnonzero(-np.diff(S) > apart) + 1), pair.q]
    known = S > _edge(S, pair.noise["base"], pair.m, pair.n)
    direction = pair.S["tuned"][:k] > _edge(pair.S["tuned"], noise, pair.m, pair.n)
    for suffix, basis in (("", pair.U), ("_right", pair.V)):
        cosines = (basis["base"].T @ basis["tuned"][:, :k]) * known[:, None]  # (q, k)
        groups = [cosines[i:j] for i, j in pairwise(bounds)]
        most = np.max([np.sum(group**2, axis=0) for group in groups], axis=0)
        new = (most < 0.25) & direction
        sheet.put(f"intruders{suffix}", np.sum(new), pair.precision("top"))
        share = np.sum(energy[new]) / np.sum(energy)
        sheet.put(f"intruder_energy{suffix}", share, pair.precision("top"))


# --- nulls ----------------------------------------------------------------------------------


def _nulls_of_shape(m: int, n: int, ks: tuple[int, ...], curves: bool) -> dict[str, float]:
    """The deterministic nulls that the shape alone gives; none for a k above q."""
    q, M = min(m, n), max(m, n)
    nulls: dict[str, float] = {}
    for role in ROLES:
        nulls[f"{role}.signal_rank"] = 0.0
        nulls[f"{role}.numerical_rank"] = float(q)
        if q < M:
            root = np.sqrt(q / M)
            nulls[f"{role}.condition_number"] = float((1 + root) / (1 - root))
    for k in ks:
        if k <= q:
            nulls[f"energy_right@{k}"] = k / n
            nulls[f"energy_left@{k}"] = k / m
            nulls[f"energy_two_sided@{k}"] = k**2 / (m * n)
            nulls[f"energy_of_base@{k}"] = nulls[f"energy_two_sided@{k}"]
            nulls[f"lift@{k}"] = 1.0
    if curves:
        nulls["outside_span"] = 1 - q / M
        nulls["auc_right"] = (q + 1) / (2 * n)
        nulls["auc_left"] = (q + 1) / (2 * m)
    nulls |= {"base_cosine": 0.0, "base_share": 1 / (m * n), "stable_rank_ratio": 1.0}
    return nulls


def _nulls_of_pair(pair: _Pair, ks: tuple[int, ...]) -> dict[str, tuple[float, float]]:
    """Means and errors of nulls that also take ρ and the base's spectrum; none for a zero base."""
    if pair.is_zero["base"]:
        return {}
    S, sd = pair.S["base"], float(pair.norm["update"] / np.sqrt(pair.m * pair.n))
    turns = simulated_turns(S, (pair.m, pair.n), sd, ks, pair.draws)
    draws: dict[str, np.ndarray] = {}
    for side, by_k in (("left", turns.left), ("right", turns.right)):
        draws |= {f"angle_{side}_mean@{k}": drawn for k, drawn in by_k.items()}
    shift = np.sqrt(np.sum((turns.singular_values - S) ** 2, axis=1))
    draws["nss"] = shift / pair.norm["base"]
    if not pair.is_zero["update"]:
        draws["spectral_share"] = shift / pair.norm["update"]
        draws["spectral_lift"] = draws["spectral_share"] * np.sqrt(pair.M)
    ranks = [perplexity(values) for values in turns.singular_values]
    draws["rank_ratio"] = np.array(ranks) / perplexity(S)
    return {key: _spread(drawn) for key, drawn in draws.items()}


def _spread(drawn: np.ndarray) -> tuple[float, float]:
    """Mean and its standard error."""
    return float(np.mean(drawn)), float(np.std(drawn, ddof=1) / np.sqrt(drawn.size))


def _mean_and_error(draws: list[dict[str, float]]) -> dict[str, tuple[float, float]]:
    if len(draws) == 1:
        raise ValueError("a standard error needs simulate >= 2")
    summary = {}
    for key in draws[0] if draws else ():
        x = np.array([draw[key] for draw in draws])
        summary[key] = (float(x.mean()), float(x.std(ddof=1) / np.sqrt(x.size)))
    return summary


def _iid_nulls(m: int, n: int, simulate: int, seed: int) -> dict[str, tuple[float, float]]:
    """Spectral numbers of dense Gaussian matrices of this shape, the same for each role."""
    rng = np.random.default_rng([seed, m, n, 1])
    draws = [
        shape_numbers(np.linalg.svd(rng.standard_normal((m, n)), compute_uv=False))
        for _ in range(simulate)
    ]
    summary = _mean_and_error(draws)
    return {f"{role}.{key}": pair for role in ROLES for key, pair in summary.items()}


def _sparsity_nulls(pair: _Pair, simulate: int, seed: int) -> dict[str, tuple[float, float]]:
    """Sparsities of W0 + Gaussian ΔW of the same norm, rounded to the format tuned counts as."""
    rng = np.random.default_rng([seed, pair.m, pair.n, 2])
    base = pair.W["base"]
    sd = pair.norm["update"] / np.sqrt(base.size)
    draws = []
    for _ in range(simulate):
        drawn = base + sd * rng.standard_normal(base.shape)
        draws.append(sparsities(base, round_to(drawn, pair.storage["tuned"])))
    return _mean_and_error(draws)


# --- 3 verdict ------------------------------------------------------------------------------


def _verdict(sheet: _Sheet, nulls: dict[str, float], pair: _Pair, k: int) -> str:
    """First rule of section 3 that matches, for a pair of full weights (adapter rank 0)."""

    # A condition is True, False, or None where it is left out: its number is NOT_APPLICABLE.
    def holds(key: str, test) -> bool | None:
        number = sheet.values[key]
        if number is None and key.startswith("angle"):
            return None
        return number is not None and bool(test(number))

    def every(*conditions: bool | None) -> bool:
        kept = [condition for condition in conditions if condition is not None]
        return bool(kept) and all(kept)  # a rule without a condition left does not match

    def angle_holds(test, *, at_most: bool) -> bool | None:
        keys = [f"angle_{side}_mean@{k}" for side in ("left", "right")]
        if all(sheet.status.get(key) == "NOT_APPLICABLE" for key in keys):
            return None
        known = [(sheet.values[key], nulls[key]) for key in keys if sheet.values[key] is not None]
        if at_most:  # an unresolved angle is below what rounding alone turns
            below = [key for key in keys if sheet.status.get(key) == "BELOW_RESOLUTION"]
            known += [(sheet.floors[key], nulls[key]) for key in below]
        return bool(known) and bool(test(*max(known)))  # the larger mean, with its own null

    one_degree = np.pi / 180
    two_sided, versus = f"energy_two_sided@{k}", f"versus_base@{k}"
    if pair.is_zero["update"]:
        return "NO_UPDATE"
    if pair.is_zero["base"] or pair.is_zero["tuned"]:
        return "TOO_FAR"
    if pair.cosine < 0.6:
        deviation = min(3 / np.sqrt(pair.m * pair.n), 0.3)
        return "UNRELATED" if abs(pair.cosine) <= max(0.05, deviation) else "TOO_FAR"
    if every(
        holds("relative_update", lambda x: x > 0.2),
        holds("spectral_share", lambda x: x > 0.9),
        holds(versus, lambda x: x > 1.2),
    ):
        return "INIT_MISMATCH"
    if pair.nu > 0.6:
        return "UNDETERMINED"
    if holds("update.top_share@1", lambda x: x > 0.9):
        return "RANK_COLLAPSE"
    if holds(two_sided, lambda x: x >= 0.5) or every(
        holds("spectral_share", lambda x: x >= 0.3),
        holds("spectral_lift", lambda x: x >= 10),
        holds(versus, lambda x: x >= 0.5),
    ):
        return "ON_PRINCIPAL"
    if (
        holds("nss", lambda x: x >= 5e-2)
        or holds("rank_ratio", lambda x: x < 0.9)
        or angle_holds(lambda x, null: x > max(10 * one_degree, 2 * null), at_most=False)
    ):
        return "SPECTRUM_DISTORTED"
    if every(
        holds(two_sided, lambda x: x <= 0.05),
        holds(versus, lambda x: x <= 0.2),
        holds(f"energy_left@{k}", lambda x: x <= 0.5),
        holds(f"energy_right@{k}", lambda x: x <= 0.5),
        angle_holds(lambda x, null: x <= max(one_degree, 2 * null), at_most=True),
    ):
        return "OFF_PRINCIPAL"
    return "MIXED"
