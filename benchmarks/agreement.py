"""Does another device give the CPU's numbers? Every value of METRICS, and factorise in hard cases.

One check a number. Two right computations of one number differ by no more than what is promised of
it; the tolerances say what that is. A status that differs counts as a failure, whatever the number.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from synthetic import update, weight
from torch import Tensor

from geoscope.engine import one_blas_thread
from geoscope.linalg import Factors, Operand, factorise
from geoscope.linalg.stacked_leading import stacked_leading
from geoscope.metrics import (
    METRICS,
    Instance,
    Measured,
    Settings,
    instances,
    measure,
    pair_factors,
    takes_of,
)
from geoscope.metrics.measure import verdict_dimension

__all__ = [
    "Check",
    "factorise_checks",
    "leading_checks",
    "metric_checks",
    "of_values",
    "tolerance",
]

SHAPES = ((384, 384), (768, 320), (320, 768))
# One update in the noise of bf16, one well above it, and one stored in fp32.
STORED = ((1e-3, torch.bfloat16), (3e-2, torch.bfloat16), (1e-3, torch.float32))
KS = (8, 64)


@dataclass(frozen=True)
class Check:
    """One number: how far off, how far it may be, and where. share: off/allowed."""

    group: str
    off: float
    allowed: str
    share: float
    where: str

    @property
    def passed(self) -> bool:
        return self.share <= 1


# --- metrics ------------------------------------------------------------------------------------


def tolerance(one: Instance) -> tuple[float, float]:
    """(relative, absolute) difference that two right computations may show."""
    key = one.metric.id
    if one.metric.integer:
        return 0.0, 0.0
    if one.floor == "angle":
        return 0.0, 2e-8  # each side promises 1e-8 rad
    if one.metric.family == "masks":
        return 0.0, 1e-4  # an entry at a threshold may fall on either side of it
    if key.startswith("intruder"):
        return 1e-6, 1e-8  # single vectors, each ill-defined by its own gap
    if key == "condition_number":
        return 1e-5, 0.0  # the least σ, through a Gram matrix
    if one.metric.family == "update_alignment":
        return 1e-7, 1e-9  # the subspace is good to 4e-9 rad
    return 1e-8, 1e-12


def metric_checks(device: torch.device) -> Iterator[Check]:
    """Values, nulls and raw numbers of every metric, by shape, storage and size of the update."""
    for shape in SHAPES:
        for number, (rho, dtype) in enumerate(STORED):
            base, tuned = _stacks(shape, rho, dtype, seed=number)
            selected = _selected(shape)
            ours = _rows(base, tuned, selected)
            theirs = _rows(base.to(device), tuned.to(device), selected)
            label = f"{shape[0]}×{shape[1]} {str(dtype).removeprefix('torch.')}, ρ {rho:g}"
            for a, b in zip(ours, theirs, strict=True):
                for check in of_values(selected, a, b):
                    yield replace(check, where=f"{label}: {check.where}")


def _stacks(
    shape: tuple[int, int], rho: float, dtype: torch.dtype, *, seed: int
) -> tuple[Tensor, Tensor]:
    """Two pairs of one shape."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.stack([weight(*shape, generator) for _ in range(2)]).to(dtype)
    changes = [update(*shape, rho * float(one.float().norm()), generator) for one in base]
    return base, (base.float() + torch.stack(changes)).to(dtype)


def _selected(shape: tuple[int, int]) -> list[Instance]:
    ks = sorted({*KS, verdict_dimension(shape)})
    return [one for metric in METRICS for one in instances(metric, ks)]


def _rows(base: Tensor, tuned: Tensor, selected: Sequence[Instance]) -> list[Measured]:
    ks = sorted({one.k for one in selected if one.k is not None})
    with one_blas_thread():  # as in the engine
        factors = pair_factors(
            base,
            tuned,
            takes=takes_of(selected),
            ks=ks,
            settings=Settings(ks=tuple(ks), curves=True, masks=True),
        )
        return measure(factors, selected, seed=0)


def of_values(selected: Iterable[Instance], ours: Measured, theirs: Measured) -> Iterator[Check]:
    """One check a number: values, nulls and raw numbers, with their statuses."""
    for one in selected:
        family, states = one.metric.family, [side.status.get(one.id) for side in (ours, theirs)]
        if states[0] != states[1]:
            said = f"{one.id}: {states[0]} here, {states[1]} there"
            yield Check(family, math.inf, "same status", math.inf, said)
            continue
        for kind in ("values", "nulls", "raw"):
            yield _number(one, kind, getattr(ours, kind), getattr(theirs, kind))


def _number(
    one: Instance,
    kind: str,
    ours: Mapping[str, float | int | None],
    theirs: Mapping[str, float | int | None],
) -> Check:
    relative, absolute = (1e-8, 1e-12) if kind == "nulls" else tolerance(one)
    text = f"{relative:g}·|x| + {absolute:g}" if relative else f"{absolute:g}"
    where = one.id if kind == "values" else f"{one.id} ({kind})"
    a, b = ours.get(one.id), theirs.get(one.id)
    if a is None or b is None:
        off = 0.0 if a is b else math.inf
        return Check(one.metric.family, off, text, off, where)
    off = abs(float(a) - float(b))
    limit = relative * max(abs(float(a)), abs(float(b))) + absolute
    share = off / limit if limit else (math.inf if off else 0.0)
    return Check(one.metric.family, off, text, share, where)


# --- factorise ----------------------------------------------------------------------------------


def _cases() -> dict[str, Tensor]:
    """Stacks (b, m, n), fp64, that a driver may stumble over."""
    generator = torch.Generator().manual_seed(0)

    def gaussian(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    decaying = torch.logspace(0, -9, 200, dtype=torch.float64)
    frames = [torch.linalg.qr(gaussian(200, 200)).Q for _ in range(2)]
    return {
        "Gaussian, 5 matrices": gaussian(5, 300, 200),
        "wide, 5 matrices": gaussian(5, 200, 300),
        "rank 10": gaussian(2, 300, 10) @ gaussian(2, 10, 200),
        "decaying to 1e-9": ((frames[0] * decaying) @ frames[1].mT)[None],
        "identity": torch.eye(200, dtype=torch.float64).repeat(3, 1, 1),
        "a zero among others": gaussian(3, 220, 200) * torch.tensor([1.0, 0.0, 1.0])[:, None, None],
        "33 small ones": gaussian(40, 33, 33),
        "one row": gaussian(4, 1, 64),
    }


def factorise_checks(device: torch.device) -> Iterator[Check]:
    """Values against the CPU's exact SVD; orthonormality and residuals of the vectors."""
    for name, A in _cases().items():
        exact = torch.linalg.svdvals(A)
        k = min(8, *A.shape[-2:])
        for solver, dtype, allowed in (
            ("auto", torch.float64, 1e-10),
            ("exact", torch.float64, 1e-11),
            ("exact", torch.float32, 3e-5),
        ):
            there = Operand(A.to(device))
            found = factorise(there, vectors=k, cuts=(k,), solver=solver, dtype=dtype)
            group = f"factorise {solver} {str(dtype).removeprefix('torch.')}"
            how = ", ".join(sorted({method["how"] for method in found.methods}))
            for what, off in _misfits(A, found, exact).items():
                share = math.inf if math.isnan(off) else off / allowed
                yield Check(group, off, f"{allowed:g}", share, f"{name}: {what} ({how})")


def _misfits(A: Tensor, found: Factors, exact: Tensor) -> dict[str, float]:
    assert found.U is not None and found.Vh is not None
    S, U, Vh = found.S.cpu(), found.U.cpu().double(), found.Vh.cpu().double()
    top = exact[:, :1].clamp_min(torch.finfo(torch.float64).tiny)
    k = Vh.shape[-2]
    unit = torch.eye(k, dtype=torch.float64)
    nonzero = (exact[:, k - 1] > 1e-6 * top[:, 0])[:, None, None]  # U is A·v/σ: none where σ is 0
    return {
        "σ/σ1": float(((S - exact).abs() / top).max()),
        "VᵀV − I": float((Vh @ Vh.mT - unit).abs().max()),
        "UᵀU − I": float(((U.mT @ U - unit) * nonzero).abs().max()),
        "(AV − US)/σ1": float(((A @ Vh.mT - U * S[:, None, :k]).abs() / top[..., None]).max()),
    }


# --- leading triplets ---------------------------------------------------------------------------


def leading_checks(device: torch.device) -> Iterator[Check]:
    """Batched block Lanczos against the CPU's exact SVD: values, and subspaces beside their bound.

    Where it says that it has not converged there is nothing to check: another route is taken.
    """
    for shape in ((640, 640), (1600, 480), (480, 1600)):
        base, tuned = _stacks(shape, 1e-2, torch.bfloat16, seed=3)
        update = (tuned.double() - base.double(), Operand(tuned.to(device), base.to(device)))
        whole = (base.double(), Operand(base.to(device)))
        wanted = (("update", update, 1), ("base", whole, 8), ("base", whole, 64))
        for name, (dense, there), k in wanted:
            group = f"leading {k} of the {name}"
            U, S, Vh = torch.linalg.svd(dense, full_matrices=False)
            for i, one in enumerate(stacked_leading(there, k, budget=9 * min(shape) // 10)):
                where = f"{shape[0]}×{shape[1]}, matrix {i}, dimension {one.dimension}"
                if not one.converged:
                    yield Check(group, 0.0, "-", 0.0, f"{where}: not converged, Gram route")
                    continue
                off = float((one.S.cpu() - S[i, :k]).abs().max() / S[i, 0])
                yield Check(group, off, "1e-9", off / 1e-9, f"{where}: σ/σ1")
                for side, ours, exact in (("V", one.Vh, Vh[i, :k]), ("U", one.U, U[i, :, :k].T)):
                    rows = ours.cpu()
                    sine = float(torch.linalg.matrix_norm(rows - rows @ exact.T @ exact, 2))
                    # U = A·V/σ: its error is that of V, by σ1/σk at most.
                    bound = one.sine * (1 if side == "V" else float(S[i, 0] / S[i, k - 1]))
                    what = f"{where}: sine of {side}"
                    yield Check(group, sine, f"{bound:.1e}", sine / bound, what)
