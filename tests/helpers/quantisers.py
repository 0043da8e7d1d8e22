"""Quantisers as files are made with them: each gives the fp64 values that are then stored."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["GRIDS"]

Quantiser = Callable[[Tensor], Tensor]

_NF4_TEXT = """
-1 -.6961928 -.52507305 -.3949175 -.28444138 -.18477343 -.09105004 0
.0795803 .1609302 .2461123 .33791524 .44070983 .562617 .72295684 1
"""
_NF4 = torch.tensor([float(level) for level in _NF4_TEXT.split()], dtype=torch.float64)
_E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float64)
_E2M1 = torch.cat([-_E2M1.flip(0)[:-1], _E2M1])


def _symmetric(bits: int) -> Quantiser:
    def quantise(X: Tensor) -> Tensor:
        step = X.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)
        return torch.round(X / step) * step

    return quantise


def _zero_point(bits: int) -> Quantiser:
    def quantise(X: Tensor) -> Tensor:
        low, high = X.amin(1, keepdim=True), X.amax(1, keepdim=True)
        step = (high - low) / (2**bits - 1)
        zero = torch.round(-low / step)
        return ((torch.round(X / step) + zero).clamp(0, 2**bits - 1) - zero) * step

    return quantise


def _q4_k(X: Tensor) -> Tensor:
    """Super-blocks of 256: 6-bit scales and minima of eight groups of 32, under two fp16 scales."""
    X = X.reshape(-1, 8, 32)
    low, high = X.amin(-1).clamp_max(0), X.amax(-1)
    scales, minima = (high - low) / 15, -low
    d, dmin = (one.amax(1, keepdim=True).div(63).half().double() for one in (scales, minima))
    S = (d * torch.round(scales / d).clamp(1, 63))[..., None]
    M = (dmin * torch.round(minima / dmin))[..., None]
    return torch.round((X + M) / S).clamp(0, 15) * S - M


def _nearest(X: Tensor, codes: Tensor) -> Tensor:
    return codes[torch.bucketize(X, codes[:-1] + codes.diff() / 2)]


def _nf4(X: Tensor) -> Tensor:
    scale = X.abs().amax(1, keepdim=True)
    return _nearest(X / scale, _NF4) * scale


def _mxfp4(X: Tensor) -> Tensor:
    scale = torch.exp2(torch.floor(torch.log2(X.abs().amax(1, keepdim=True))) - 2)
    return _nearest(X / scale, _E2M1) * scale


def _fp8(dtype: torch.dtype) -> Quantiser:
    def quantise(X: Tensor) -> Tensor:
        scale = X.abs().amax(1, keepdim=True) / torch.finfo(dtype).max
        return (X / scale).float().to(dtype).double() * scale

    return quantise


def _in_groups(quantise: Quantiser, size: int) -> Quantiser:
    return lambda X: quantise(X.reshape(-1, size)).reshape(X.shape)


def _by_column(quantise: Quantiser) -> Quantiser:
    return lambda X: quantise(X.T.contiguous()).T.contiguous()


def _by_tensor(quantise: Quantiser) -> Quantiser:
    return lambda X: quantise(X.reshape(1, -1)).reshape(X.shape)


# name → (quantiser, the name that is told)
_E4M3, _E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
GRIDS: dict[str, tuple[Quantiser, str]] = {
    "int8 row": (_symmetric(8), "int8 grid by row"),
    "int8 column": (_by_column(_symmetric(8)), "int8 grid by column"),
    "int8 tensor": (_by_tensor(_symmetric(8)), "int8 grid by tensor"),
    "int4 32": (_in_groups(_symmetric(4), 32), "int4 grid in groups of 32"),
    "int4 64": (_in_groups(_symmetric(4), 64), "int4 grid in groups of 64"),
    "int4 128 zero": (_in_groups(_zero_point(4), 128), "int4 grid in groups of 128"),
    "q8_0": (_in_groups(_symmetric(8), 32), "int8 grid in groups of 32"),
    "q4_k": (lambda X: _q4_k(X).reshape(X.shape), "int4 grid in groups of 32"),
    "nf4": (_in_groups(_nf4, 64), "codebook of 16 values in groups of 64"),
    "mxfp4": (_in_groups(_mxfp4, 32), "fp4 grid in groups of 32"),
    "e4m3 row": (_fp8(_E4M3), "fp8 e4m3 grid by row"),
    "e5m2 tensor": (_by_tensor(_fp8(_E5M2)), "fp8 e5m2 grid by tensor"),
}
