"""Single matrices: what geoscope's factorisations cost and lose beside LAPACK's, one thread each.

Every method is measured in every round, one after the other, on the same matrix; truth is the fp64
SVD. Errors of values are relative to σ1, errors of subspaces are sines. Prints one line of JSON.

    python benchmarks/micro.py [--rounds 3] [--shapes 1536x1536,8960x1536,4096x4096]
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import torch
from synthetic import update, weight
from threadpoolctl import threadpool_limits
from torch import Tensor

from geoscope.linalg import Operand, blas, factorise
from geoscope.linalg.certificate import Leading
from geoscope.linalg.leading import leading_triplets

K = 64
RHO = 1e-3  # relative size of the update


@dataclass(frozen=True)
class Pair:
    """A base and its update as files hold them, and the truth about both."""

    base: Tensor
    tuned: Tensor
    base_truth: tuple[Tensor, Tensor, Tensor]
    update_truth: tuple[Tensor, Tensor, Tensor]

    @property
    def operand(self) -> Operand:
        return Operand(self.base[None])

    @property
    def update(self) -> Operand:
        return Operand(self.tuned[None], self.base[None])


def pair(m: int, n: int) -> Pair:
    """A seeded pair (m, n), m ≥ n, with its fp64 SVDs (not timed)."""
    generator = torch.Generator().manual_seed(0)
    base = weight(m, n, generator).bfloat16()
    change = update(m, n, RHO * float(base.float().norm()), generator)
    tuned = (base.float() + change).bfloat16()
    return Pair(base, tuned, _svd(base.double()), _svd(tuned.double() - base.double()))


def _svd(A: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    U, S, Vh = torch.linalg.svd(A, full_matrices=False)
    return U, S, Vh


# --- what is compared ---------------------------------------------------------------------------


def complete(A: Operand, found: Leading) -> bool:
    """Whether no triplet above σ_k was missed: σ_k²I − (G − VΛVᵀ) is positive definite."""
    rest = A.gram()[0]
    scaled = found.S[:, None] * (found.Vh if A.is_tall else found.U)  # (k, q)
    rest = blas.gemm(scaled, scaled, torch.empty_like(rest), At=True).sub_(rest)
    rest.diagonal().add_(found.S[-1] ** 2)
    return int(torch.linalg.cholesky_ex(rest).info) == 0


def without_one(found: Leading) -> Leading:
    """The triplets with the middle one left out, which the check has to notice."""
    kept = [i for i in range(len(found.S)) if i != len(found.S) // 2]
    return replace(found, S=found.S[kept], U=found.U[kept], Vh=found.Vh[kept])


def value_error(S: Tensor, truth: Tensor) -> float:
    """Largest error of the leading values, relative to σ1."""
    return float((S.double() - truth[: len(S)]).abs().max() / truth[0])


def sine(rows: Tensor, truth: Tensor) -> float:
    """Sine of the largest angle between the spans of the rows and of as many rows of `truth`."""
    kept = truth[: len(rows)]
    rows = torch.linalg.qr(rows.double().T).Q.T
    return float(torch.linalg.matrix_norm(rows - (rows @ kept.T) @ kept, ord=2))


def subspace_error(U: Tensor, Vh: Tensor, truth: tuple[Tensor, Tensor, Tensor]) -> float:
    """Worse of the two sides; U, Vh: rows."""
    return max(sine(U, truth[0].T), sine(Vh, truth[2]))


Method = Callable[[], Any]


def methods(one: Pair) -> dict[str, Method]:
    """Name → what is timed. Inputs of torch are upcast beforehand: only the solver is timed."""
    single, double = one.base.float(), one.base.double()
    change = (one.tuned.double() - one.base.double()).float()
    found = leading_triplets(one.operand, K)
    return {
        "svd": lambda: torch.linalg.svd(single, full_matrices=False),
        "svdvals64": lambda: torch.linalg.svdvals(double),
        "leading": lambda: leading_triplets(one.operand, K),
        "check": lambda: complete(one.operand, found),
        "all": lambda: factorise(one.operand),
        "all+leading": lambda: factorise(one.operand, vectors=K, cuts=(K,)),
        "update svd": lambda: torch.linalg.svd(change, full_matrices=False),
        "update pair": lambda: leading_triplets(one.update, 1),
        "update all": lambda: factorise(one.update),
    }


def errors(one: Pair, results: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Name → errors and remarks."""
    truth, change = one.base_truth, one.update_truth
    U, S, Vh = results["svd"]
    lead, pair, factors = results["leading"], results["update pair"], results["all+leading"]
    Uu, Su, Vhu = results["update svd"]
    return {
        "svd": {
            "value": value_error(S, truth[1]),
            "sine": subspace_error(U.T[:K], Vh[:K], truth),
        },
        "svdvals64": {"value": value_error(results["svdvals64"], truth[1])},
        "leading": {
            "value": value_error(lead.S, truth[1]),
            "sine": subspace_error(lead.U, lead.Vh, truth),
            "bound": lead.sine,
            "dimension": lead.dimension,
            "converged": lead.converged,
        },
        "check": {
            "complete": results["check"],
            "notices a missing one": not complete(one.operand, without_one(lead)),
        },
        "all": {"value": value_error(results["all"].S[0], truth[1]), **_how(results["all"])},
        "all+leading": {
            "value": value_error(factors.S[0], truth[1]),
            "sine": subspace_error(factors.U[0].T, factors.Vh[0], truth),
            **_how(factors),
        },
        "update svd": {
            "value": value_error(Su, change[1]),
            "sine": subspace_error(Uu.T[:1], Vhu[:1], change),
        },
        "update pair": {
            "value": value_error(pair.S, change[1]),
            "sine": subspace_error(pair.U, pair.Vh, change),
            "bound": pair.sine,
            "dimension": pair.dimension,
            "converged": pair.converged,
        },
        "update all": {
            "value": value_error(results["update all"].S[0], change[1]),
            **_how(results["update all"]),
        },
    }


def _how(factors: Any) -> dict[str, Any]:
    method = factors.methods[0]
    return {"how": method["how"], "fallback": method["fallback"]}


# --- the measurement ----------------------------------------------------------------------------


def measure(m: int, n: int, rounds: int) -> dict[str, Any]:
    """Seconds of each method in each round, median, and errors."""
    one = pair(m, n)
    torch.set_num_threads(1)
    with threadpool_limits(1, user_api="blas"):
        chosen = methods(one)
        results: dict[str, Any] = {}
        seconds: dict[str, list[float]] = {name: [] for name in chosen}
        for _ in range(rounds):
            for name, method in chosen.items():
                started = time.perf_counter()
                results[name] = method()
                seconds[name].append(time.perf_counter() - started)
        lost = errors(one, results)
    return {
        "shape": [m, n],
        "lines": {
            name: {"seconds": times, "median": median(times), **lost[name]}
            for name, times in seconds.items()
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--shapes", default="1536x1536,8960x1536,4096x4096")
    given = parser.parse_args()
    threads, found = torch.get_num_threads(), []
    for text in given.shapes.split(","):
        m, n = sorted((int(side) for side in text.split("x")), reverse=True)
        torch.set_num_threads(threads)  # for the truth alone
        found.append(measure(m, n, given.rounds))
    print(json.dumps({"k": K, "rounds": given.rounds, "shapes": found}))


if __name__ == "__main__":
    main()
