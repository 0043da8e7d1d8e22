"""Stacks of stored matrices on a device other than the CPU: fp64 products and eigenpairs, in torch.

Products run over blocks of the longer side in a bounded workspace, upcast first and subtracted
second, so that no fp64 copy of a stack is held. Block lengths are fixed: the order of a sum does
not depend on the height of the stack. Eigenpairs are checked before they are believed, because
batched drivers have returned wrong ones without a word (pytorch #192483). Everything here also
runs on CPU tensors, which is how it is tested where there is no device.

Consumer cards have fp64 at 1/32 to 1/64 of their fp32 rate. The numbers are the same there; only
the Gram route is slow, and `--quick` avoids most of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "LAST",
    "Eigenpairs",
    "eigenpairs",
    "gram",
    "left",
    "norm",
    "right",
    "single",
]

# Rows or columns of the longer side in one fp64 block, and the most bytes that the blocks of the
# matrices that go together may take.
_BLOCK = 2048
_WORKSPACE = 512 * 2**20
# Column blocks of the Gram matrix; only those on and above the diagonal are computed.
_GRAM_BLOCK = 512

# Off by more than this an eigenbasis is wrong, not inaccurate: VVᵀ − I, the residual and the trace
# relative to λ1. Right ones reach 1e-13 or so.
_SOUND = 1e-10
# Before these versions of torch and CUDA torch loops over the matrices of a batch larger than
# 32 × 32, one after the other; from them on one call of cuSOLVER serves the batch (pytorch #175585,
# #175403).
_BATCHED_FROM = (2, 12)
_BATCHED_CUDA = (12, 6)
_STREAMS = 4

# So many eigenvectors of the least eigenvalues are kept, for tails that are mended.
LAST = 64

_Solved = tuple[Tensor, Tensor | None]


# --- blocks and products ------------------------------------------------------------------------


def norm(plus: Tensor, minus: Tensor | None) -> Tensor:
    """Frobenius norms of plus − minus, (b,)."""
    squares = torch.zeros(len(plus), dtype=torch.float64, device=plus.device)
    for rows, _, block in _blocks(plus, minus):
        squares[rows] += torch.linalg.vector_norm(block, dim=(-2, -1)).square()
    return squares.sqrt()


def gram(plus: Tensor, minus: Tensor | None) -> Tensor:
    """Gram matrices of the shorter side of plus − minus, (b, q, q)."""
    tall, q = _is_tall(plus), min(plus.shape[-2:])
    out = torch.zeros(len(plus), q, q, dtype=torch.float64, device=plus.device)
    starts = range(0, q, _GRAM_BLOCK)
    for rows, _, block in _blocks(plus, minus):
        X = block.mT if tall else block  # (g, q, c)
        for start in starts:
            part = out[rows, start : start + _GRAM_BLOCK, start:]
            part.baddbmm_(X[:, start : start + _GRAM_BLOCK], X[:, start:].mT)
    for start in starts:  # mirror what stands right of the diagonal
        stop = min(start + _GRAM_BLOCK, q)
        out[:, stop:, start:stop] = out[:, start:stop, stop:].mT
        block = out[:, start:stop, start:stop]
        block.copy_(block.triu() + block.triu(1).mT)
    return out


def right(plus: Tensor, minus: Tensor | None, X: Tensor) -> Tensor:
    """X·Aᵀ for A = plus − minus and rows X (b, k, n), (b, k, m)."""
    return _images(plus, minus, X, onto_long=_is_tall(plus))


def left(plus: Tensor, minus: Tensor | None, Y: Tensor) -> Tensor:
    """Y·A for A = plus − minus and rows Y (b, k, m), (b, k, n)."""
    return _images(plus, minus, Y, onto_long=not _is_tall(plus))


def _images(plus: Tensor, minus: Tensor | None, X: Tensor, *, onto_long: bool) -> Tensor:
    """Rows of the shorter side taken to the longer one (`onto_long`), or back."""
    tall = _is_tall(plus)
    side = max(plus.shape[-2:]) if onto_long else min(plus.shape[-2:])
    out = X.new_zeros(*X.shape[:-1], side)
    for rows, part, block in _blocks(plus, minus):
        B = block if tall else block.mT  # (g, c, q)
        if onto_long:
            out[rows, :, part] = X[rows] @ B.mT
        else:
            out[rows].baddbmm_(X[rows, :, part], B)
    return out


def single(plus: Tensor, minus: Tensor | None) -> Tensor:
    """The stack in fp32 (b, m, n): upcast (or subtracted in fp64) first, rounded second."""
    if minus is None:
        return plus.to(torch.float32)
    out = torch.empty(plus.shape, dtype=torch.float32, device=plus.device)
    axis = 1 if _is_tall(plus) else 2
    for rows, part, block in _blocks(plus, minus):
        out[rows].narrow(axis, part.start, part.stop - part.start).copy_(block)
    return out


def _is_tall(plus: Tensor) -> bool:
    return plus.shape[-2] >= plus.shape[-1]


def _blocks(plus: Tensor, minus: Tensor | None) -> Iterator[tuple[slice, slice, Tensor]]:
    """Matrices, part of the longer side, and both in fp64: (g, c, n) if tall, (g, m, c) if wide."""
    axis = 1 if _is_tall(plus) else 2
    length, short = max(plus.shape[-2:]), min(plus.shape[-2:])
    together = max(1, _WORKSPACE // (8 * short * min(_BLOCK, length)))
    for first in range(0, len(plus), together):
        rows = slice(first, min(first + together, len(plus)))
        for start in range(0, length, _BLOCK):
            count = min(_BLOCK, length - start)
            block = plus[rows].narrow(axis, start, count).to(torch.float64, copy=True)
            if minus is not None:
                block.sub_(minus[rows].narrow(axis, start, count))
            yield rows, slice(start, start + count), block


# --- eigenpairs ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Eigenpairs:
    """Eigenvalues of a stack of symmetric matrices, descending (b, n), and some eigenvectors.

    rows: the leading ones (b, k, n), last: those of the least values (b, ≤ LAST, n), in the order
    of the values; None where no vectors were asked for. residuals: ‖Gv − λv‖ of `rows` (b, k).
    faults: one entry a matrix, why its eigenpairs are not to be used; mostly None.
    """

    values: Tensor
    rows: Tensor | None
    last: Tensor | None
    residuals: Tensor | None
    faults: tuple[str | None, ...]

    def replaced(self, i: int, alone: Eigenpairs) -> None:
        """Takes the i-th matrix's eigenpairs from `alone`, in place."""
        for name in ("values", "rows", "last", "residuals"):
            if getattr(self, name) is not None:
                getattr(self, name)[i] = getattr(alone, name)[0]


def eigenpairs(G: Tensor, k: int = 0) -> Eigenpairs:
    """All eigenvalues of G (b, n, n), positive semidefinite, and the leading k eigenvectors.

    The batch at once where torch can, else single matrices beside one another. A matrix whose
    answer fails the check is done again by itself; what fails then too has a fault.
    """
    found = _checked(G, _solved(G, k), k)
    again = [i for i, fault in enumerate(found.faults) if fault is not None]
    if not again:
        return found
    faults = list(found.faults)
    for i in again:
        alone = _checked(G[i : i + 1], _one(G[i], k), k)
        faults[i] = alone.faults[0]
        found.replaced(i, alone)
    return replace(found, faults=tuple(faults))


def _checked(G: Tensor, solved: _Solved, k: int) -> Eigenpairs:
    """Turned to descending order; finite, of the right trace, orthonormal, with small residuals."""
    values = solved[0].flip(-1)
    scale = values.abs().amax(-1).clamp_min(torch.finfo(values.dtype).tiny)
    trace = G.diagonal(dim1=-2, dim2=-1).sum(-1)
    off = {"trace": (values.sum(-1) - trace).abs() / scale}
    rows = last = residuals = None
    if solved[1] is not None:
        n = G.shape[-1]
        rows = solved[1][..., n - k :].flip(-1).mT.contiguous()
        last = solved[1][..., :LAST].flip(-1).mT.contiguous()
        residuals = _misfit(G, values[:, :k], rows)
        at_end = _misfit(G, values[:, -last.shape[1] :], last)
        off["residual"] = torch.maximum(residuals.amax(-1), at_end.amax(-1)) / scale
        off["orthonormality"] = torch.maximum(_skew(rows), _skew(last))
    numbers = torch.stack([*off.values()], dim=-1).tolist()  # one wait for the device
    faults = tuple(
        next(
            # not ≤ rather than >: NaN is a fault
            (f"eigh: {what} off by {x:.0e}" for what, x in zip(off, number, strict=True)
             if not x <= _SOUND),
            None,
        )
        for number in numbers
    )  # fmt: skip
    return Eigenpairs(values, rows, last, residuals, faults)


def _misfit(G: Tensor, values: Tensor, rows: Tensor) -> Tensor:
    return torch.linalg.vector_norm(rows @ G - values[..., None] * rows, dim=-1)


def _skew(rows: Tensor) -> Tensor:
    """Largest entry of VVᵀ − I, (b,)."""
    unit = torch.eye(rows.shape[-2], dtype=rows.dtype, device=rows.device)
    return (rows @ rows.mT - unit).abs().amax((-2, -1))


def _solved(G: Tensor, k: int) -> _Solved:
    """Values ascending (b, n), and all vectors as columns (b, n, n) if k > 0; NaN on failure."""
    if len(G) == 1:
        return _one(G[0], k)
    if G.is_cuda and not _batches_large():
        return _side_by_side(G, k)
    try:
        return _eigh(G, k)
    except torch.OutOfMemoryError:
        half = len(G) // 2  # the batched driver works in several times the batch
        parts = [slice(None, half), slice(half, None)]
    except RuntimeError:
        # One matrix that does not converge fails the call for all, and so does a batch that is too
        # large for the driver's workspace (pytorch #102963).
        parts = [slice(i, i + 1) for i in range(len(G))]
    return _joined([_solved(G[part], k) for part in parts])


def _batches_large() -> bool:
    cuda = torch.version.cuda
    return _numbers(torch.__version__) >= _BATCHED_FROM and _numbers(cuda or "0.0") >= _BATCHED_CUDA


def _numbers(version: str) -> tuple[int, int]:
    """Major and minor version."""
    major, minor = version.split(".")[:2]
    return int(major), int(minor)


def _eigh(G: Tensor, k: int) -> _Solved:
    if k == 0:
        return torch.linalg.eigvalsh(G), None
    values, vectors = torch.linalg.eigh(G)
    return values, vectors


def _one(G: Tensor, k: int) -> _Solved:
    """A stack of one, NaN where it does not converge. G: (n, n)."""
    try:
        return _eigh(G[None], k)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:
        nothing = G.new_full((1, *G.shape), torch.nan)
        return nothing[:, 0], nothing if k else None


def _joined(parts: list[_Solved]) -> _Solved:
    vectors = [one for _, one in parts if one is not None]
    return torch.cat([values for values, _ in parts]), torch.cat(vectors) if vectors else None


def _side_by_side(G: Tensor, k: int) -> _Solved:
    """Single matrices over a few streams, each with a thread: eigh waits for its own stream."""
    lanes = [_Lane(G.device) for _ in range(min(_STREAMS, len(G)))]
    with ThreadPoolExecutor(len(lanes)) as pool:
        jobs = [
            pool.submit(lane.run, _one, list(G[i :: len(lanes)]), k) for i, lane in enumerate(lanes)
        ]
        found = [job.result() for job in jobs]
    parts: list[_Solved] = [found[i % len(lanes)][i // len(lanes)] for i in range(len(G))]
    for lane in lanes:
        lane.join()
    return _joined(parts)


class _Lane:
    """A CUDA stream beside the caller's; without CUDA a plain thread's work."""

    def __init__(self, device: torch.device) -> None:
        self._callers: Any = torch.cuda.current_stream(device) if device.type == "cuda" else None
        self._own: Any = torch.cuda.Stream(device) if device.type == "cuda" else None

    def run(
        self, work: Callable[[Tensor, int], _Solved], matrices: list[Tensor], k: int
    ) -> list[_Solved]:
        with nullcontext() if self._own is None else torch.cuda.stream(self._own):
            if self._own is not None:
                self._own.wait_stream(self._callers)
            found = [work(matrix, k) for matrix in matrices]
            if self._own is not None:
                for one in (part for pair in found for part in pair if part is not None):
                    one.record_stream(self._callers)  # freed only once the caller is done with it
            return found

    def join(self) -> None:
        """What the caller does from now on waits for this lane."""
        if self._own is not None:
            self._callers.wait_stream(self._own)
