"""RLPO and RLMO: start along the leading or the last right directions of W (2606.31813).

B₀ = 0, so nothing has to be made up for: the base stays as it is, in every dtype. The rows of A₀
are orthonormal and hold neither σ nor α.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from geoscope.adapters.factors import LoraFactors, checked, largest_positive, scaling_of
from geoscope.adapters.facts import completed, gap_note
from geoscope.linalg.head import head_triplets
from geoscope.linalg.iid import iid_cut
from geoscope.linalg.tail import Tail, tail_triplets
from geoscope.records import Status

__all__ = ["rlmo", "rlpo"]

# Sine of the error of the last right directions up to which their Gram matrix serves.
_TOLERANCE = 1e-7


@dataclass(frozen=True)
class _Directions:
    """rows: (r, n), orthonormal, fp64. share: their part of ‖W‖². gap: at the cut, None without
    one. method: how they were found. notes: on them."""

    rows: Tensor
    share: float
    gap: float | None
    method: Mapping[str, Mapping[str, Any]]
    notes: tuple[str, ...]


def rlpo(
    W: Tensor, rank: int, *, alpha: float | None = None, solver: str = "auto", seed: int = 0
) -> LoraFactors:
    """A0 = V_rᵀ, the leading r right singular vectors of W as rows, and B0 = 0.

    W: (m, n), of any float storage dtype; alpha: default 2·rank. seed: of the sampled nulls;
    nothing else is random. Of each row the entry of largest size is positive. Raises OptionError
    and NumericsError.
    """
    s, norm = scaling_of(rank, alpha), checked(W, rank)
    head = head_triplets(W, rank, solver=solver)
    found = _Directions(
        head.Vh,
        float(head.S[:-1].square().sum()) / norm**2,
        head.gap,
        {"spectral": head.method},
        (*_vanished(head.S[:-1], float(head.S[0]), "leading"), *gap_note(head.gap)),
    )
    return _factors(W, found, s, iid_cut(W.shape[0], W.shape[1], rank, seed))


def rlmo(
    W: Tensor, rank: int, *, alpha: float | None = None, solver: str = "auto", seed: int = 0
) -> LoraFactors:
    """A0 = the last r right singular vectors of the thin SVD of W as rows, and B0 = 0.

    As `rlpo`. Of a wide W the directions that it maps to zero are not among them.
    """
    s, norm = scaling_of(rank, alpha), checked(W, rank)
    tail = _last(W, rank, solver)
    above = len(tail.spectrum) - rank
    gap = _gap(float(tail.spectrum[above - 1]), float(tail.S[0])) if above else None
    found = _Directions(
        tail.Vh,
        float(tail.S.square().sum()) / norm**2,
        gap,
        {"tail": tail.method},
        (
            *_vanished(tail.S, float(tail.spectrum[0]), "last"),
            *gap_note(gap, "the first of the last r singular values and the one above it"),
        ),
    )
    return _factors(W, found, s, iid_cut(W.shape[0], W.shape[1], rank, seed, is_last=True))


def _last(W: Tensor, rank: int, solver: str) -> Tail:
    """The tail, with right vectors as good as the left ones.

    Of a wide W the right ones are images of the left ones, in which an error of these along u_1
    counts σ_1/σ_q times.
    """
    tail = tail_triplets(W, rank, solver=solver)
    if W.shape[0] >= W.shape[1] or tail.method["how"] != "gram-tail":
        return tail
    last, bound = float(tail.S[-1]), tail.method["subspace_bound"]
    bound = bound * float(tail.spectrum[0]) / last if last > 0 else float("inf")
    if bound > _TOLERANCE:
        exact = tail_triplets(W, rank, solver="exact")
        reason = f"bound {bound:.1e} on the right directions above {_TOLERANCE:g}"
        return replace(exact, method={**exact.method, "fallback": reason})
    return replace(tail, method={**tail.method, "subspace_bound": bound})


def _gap(above: float, below: float) -> float | None:
    return (above - below) / above if above > 0 else None


def _vanished(S: Tensor, largest: float, which: str) -> tuple[str, ...]:
    count = int((S <= 1e-14 * largest).sum())
    if not count:
        return ()
    return (
        f"{count} of the {which} {len(S)} singular values are zero to rounding: their directions "
        "are arbitrary",
    )


def _factors(
    W: Tensor, found: _Directions, s: float, nulls: tuple[float, float | None]
) -> LoraFactors:
    rows = largest_positive(found.rows.T, found.rows)[1].float().contiguous()
    facts, status = completed(
        {"captured_energy": found.share, "gap": found.gap, "relative_norm": 0.0}
    )
    status["head_energy"] = Status.ZERO_UPDATE
    share, gap = nulls
    B = torch.zeros(W.shape[0], len(rows), dtype=torch.float32, device=W.device)
    return LoraFactors(
        B, rows, s, facts, status,
        nulls={"captured_energy": share, **({} if gap is None else {"gap": gap})},
        method=found.method,
        notes=found.notes,
    )  # fmt: skip
