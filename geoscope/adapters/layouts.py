"""Which tensors hold an initialised adapter: beside a rewritten base, mirrored, or with an anchor?

    residual   W_res = W − s·B₀A₀ and the adapter (A₀, B₀): the published form
    mirror     one adapter of rank 2r on the original base, A = [A₀; A₀], B = [B₀, −B₀] in
               interleaved pairs; with `lora_alpha` unchanged its scaling is s/2, its product 0
    anchor     two adapters on the original base, (A₀, B₀) trained and (A₀, −B₀) frozen

See docs/methods.md#layouts. Round first, subtract second: whatever is stored is what the
residual is made from. Everything goes through blocks of rows, so that a matrix costs its new copy
and little more.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from geoscope.linalg.precision import full_precision

if TYPE_CHECKING:
    from geoscope.adapters.factors import LoraFactors

__all__ = [
    "LAYOUTS",
    "MIRROR_TOLERANCE",
    "Residual",
    "anchor",
    "effective_error",
    "largest_product",
    "mirror",
    "paired",
    "residual",
    "start_error",
]

LAYOUTS = ("residual", "mirror", "anchor")

# max|s·B·A| / max|W| of a mirror, in fp64, is at most this: pairs cancel but for rounding.
MIRROR_TOLERANCE = 1e-12

# Entries of one block of rows: 4 MB in fp32.
_BLOCK = 1 << 20


@dataclass(frozen=True)
class Residual:
    """weight: W_res as the file holds it, (out, in), or (in, out) of a Conv1D; contiguous.

    error: ‖W_res + s·B·A − W‖_F / ‖W‖_F in fp32, of the numbers that are written.
    """

    weight: Tensor
    error: float


def residual(
    W: Tensor, factors: LoraFactors, *, dtype: torch.dtype, transposed: bool = False
) -> Residual:
    """W_res = cast(W − s·B·A) and its reconstruction error, in one pass.

    W: (m, n) in its storage dtype; of a Conv1D (`transposed`) the turned view, and the result is
    turned back: (Wᵀ − s·BA)ᵀ. factors: in the dtype in which they are written. A zero W has error 0
    where the product is zero, and infinity elsewhere.
    """
    m, n = W.shape
    stored = torch.empty((n, m) if transposed else (m, n), dtype=dtype, device=W.device)
    target = stored.T if transposed else stored
    total = _Errors()
    for rows, weight, product in _blocks(W, factors.B, factors.A, factors.scaling):
        target[rows] = (weight - product).to(dtype)
        total.add((target[rows].to(weight.dtype) + product).sub_(weight), weight)
    return Residual(stored, total.relative)


def mirror(factors: LoraFactors) -> tuple[Tensor, Tensor]:
    """A (2r, n) and B (m, 2r) of the mirror, in pairs: rows a₁, a₁, a₂, …, columns b₁, −b₁, b₂, …

    The pairs stand side by side so that a product cancels term by term; the halves share no
    storage. Rank 2r with the same `lora_alpha`: the scaling is s/2.
    """
    A = factors.A.repeat_interleave(2, dim=0)
    B = factors.B.repeat_interleave(2, dim=1)
    B[:, 1::2] *= -1.0
    return A, B


def anchor(factors: LoraFactors) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """(A₀, B₀), which is trained, and (A₀, −B₀), which stays; no shared storage."""
    return (factors.A.clone(), factors.B.clone()), (factors.A.clone(), -factors.B)


def paired(factors: LoraFactors, layout: str) -> tuple[tuple[Tensor, Tensor], ...]:
    """(A, B) of each adapter of a layout, the trained one first; no layout is one adapter."""
    if layout == "mirror":
        return (mirror(factors),)
    return anchor(factors) if layout == "anchor" else ((factors.A, factors.B),)


def start_error(W: Tensor, factors: LoraFactors, layout: str, *, dtype: torch.dtype) -> float:
    """‖W_start − cast(W)‖_F / ‖cast(W)‖_F for a trainer that holds the base in `dtype`.

    cast(W) is what the same trainer holds without an adapter; the factors stay in their own dtype,
    as PEFT and vLLM keep them. residual: W_start = cast(W_res) + s·B·A, W_res in fp32 or better.
    mirror: cast(W) + (s/2)·B·A of the mirrored factors. anchor: both products are one number with
    two signs, so it is 0 (the layer itself rounds once, where it adds the two to its output).
    """
    if layout == "anchor":
        return 0.0
    pairs = (factors.A, factors.B) if layout == "residual" else mirror(factors)
    scaling = factors.scaling if layout == "residual" else factors.scaling / 2
    total = _Errors()
    for _, weight, product in _blocks(W, pairs[1], pairs[0], scaling):
        held = weight.to(dtype).to(weight.dtype)
        if layout == "residual":
            base = (weight - product).to(dtype).to(weight.dtype)
            total.add((base + product).sub_(held), held)
        else:
            total.add(product, held)
    return total.relative


def effective_error(W: Tensor, base: Tensor, A: Tensor, B: Tensor, scaling: float) -> float:
    """‖base + s·B·A − W‖_F / ‖W‖_F, the check of a residual that was read back from files.

    W, base: (m, n) in their storage dtypes; A: (r, n), B: (m, r). Computed in fp32 (fp64 where W is
    stored so), as the model itself adds them.
    """
    total = _Errors()
    for rows, weight, product in _blocks(W, B, A, scaling):
        total.add((base[rows].to(weight.dtype) + product).sub_(weight), weight)
    return total.relative


def largest_product(A: Tensor, B: Tensor, scaling: float) -> float:
    """max |s·B·A| in fp64; for a mirror at most `MIRROR_TOLERANCE`·max|W|. NaN where one is."""
    rows64 = A.double()
    blocks = _row_blocks(len(B), A.shape[1])
    largest = [(B[rows].double() @ rows64).abs().max() for rows in blocks]
    return float(torch.stack(largest).max()) * abs(scaling)


def _blocks(
    W: Tensor, B: Tensor, A: Tensor, scaling: float
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Blocks of rows of W and of s·B·A in fp32, or in fp64 where W is stored so."""
    work = torch.float64 if W.dtype == torch.float64 else torch.float32
    left, right = B.to(work), A.to(work)
    for rows in _row_blocks(*W.shape):
        with full_precision():
            product = (left[rows] @ right).mul_(scaling)
        yield rows, W[rows].to(work), product


def _row_blocks(m: int, n: int) -> Iterator[slice]:
    count = max(1, _BLOCK // max(1, n))
    return (slice(start, min(start + count, m)) for start in range(0, m, count))


class _Errors:
    """Sums of squares of an error and of what it is relative to."""

    def __init__(self) -> None:
        self._error = self._weight = 0.0

    def add(self, error: Tensor, weight: Tensor) -> None:
        self._error += float(torch.linalg.vector_norm(error, dtype=torch.float64)) ** 2
        self._weight += float(torch.linalg.vector_norm(weight, dtype=torch.float64)) ** 2

    @property
    def relative(self) -> float:
        if self._error == 0:
            return 0.0
        return math.sqrt(self._error / self._weight) if self._weight else math.inf
