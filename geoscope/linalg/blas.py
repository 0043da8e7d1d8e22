"""BLAS and LAPACK on CPU tensors, without copies and without the interpreter lock.

SciPy ships OpenBLAS and publishes the addresses of its routines for Cython; calling them through
ctypes releases the interpreter lock, so that worker threads keep all cores busy, and it reaches
what neither torch nor SciPy's wrappers offer: one tridiagonalisation that serves all eigenvalues
and a few eigenvectors. On AMD processors with AVX-512 its products are also faster than those of
the MKL that torch brings, which takes AVX2 there. A few rows times a matrix are bound by its loads,
and for them MKL is two to four times as fast (docs/benchmarks.md). Tensors here are fp64, on the
CPU, with unit stride in the last axis.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from scipy.linalg import cython_blas, cython_lapack  # pyright: ignore[reportAttributeAccessIssue]
from torch import Tensor

from geoscope.errors import NumericsError

__all__ = [
    "eigenvalues",
    "eigenvectors",
    "gemm",
    "reflect",
    "solve_tridiagonal",
    "symmetric_times",
    "syrk",
    "tridiagonalise",
]

_capsule_name = ctypes.pythonapi.PyCapsule_GetName
_capsule_name.restype, _capsule_name.argtypes = ctypes.c_char_p, [ctypes.py_object]
_capsule_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_capsule_pointer.restype = ctypes.c_void_p
_capsule_pointer.argtypes = [ctypes.py_object, ctypes.c_char_p]


@cache
def _routine(module: Any, name: str, count: int) -> Callable[..., None]:
    """The Fortran routine `name` with `count` arguments, all passed by address."""
    capsule = module.__pyx_capi__[name]
    address = _capsule_pointer(capsule, _capsule_name(capsule))
    return ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * count)(address)


# Up to so many rows times a matrix go through MKL, where torch has it. In fp64 its products with a
# transposed matrix are slower beyond `_FEW_ACROSS` rows.
_FEW_ROWS = 12 if torch.backends.mkl.is_available() else 0
_FEW_ACROSS = 3
# Up to this part of all vectors, inverse iteration is the faster way to them.
_FEW_VECTORS = 1 / 8

_KINDS = {float: ctypes.c_double, bytes: ctypes.c_char}


@cache
def _constant(value: float | bytes, kind: Any) -> Any:
    """A flag or factor in memory; routines do not write to these."""
    return kind(value)


def _call(module: Any, name: str, *arguments: Any) -> None:
    """Calls a routine: tensors by their memory; numbers, flags and ctypes scalars by address."""
    sizes = [argument for argument in arguments if type(argument) is int]
    integers = (ctypes.c_int * len(sizes))(*sizes)  # one piece of memory: thousands of calls a run
    following = ctypes.addressof(integers)
    addresses = []
    for one in arguments:
        if isinstance(one, Tensor):
            addresses.append(one.data_ptr())
        elif type(one) is int:
            addresses.append(following)
            following += ctypes.sizeof(ctypes.c_int)
        else:
            kind = _KINDS.get(type(one))
            addresses.append(ctypes.addressof(one if kind is None else _constant(one, kind)))
    _routine(module, name, len(arguments))(*addresses)


def gemm(
    A: Tensor, B: Tensor, out: Tensor, *, add: bool = False, At: bool = False, Bt: bool = False
) -> Tensor:
    """out = op(A)·op(B), or out += with `add`; op transposes with `At`, `Bt`. 2-D, unit stride.

    All three fp64, or all three fp32.
    """
    m, k = (A.shape[1], A.shape[0]) if At else A.shape
    n = B.shape[0] if Bt else B.shape[1]
    for one in (A, B, out):
        if one.stride(-1) != 1 and one.shape[-1] > 1:
            raise ValueError("gemm needs unit stride in the last axis")  # else it writes elsewhere
    if m <= _FEW_ROWS and not At:
        return _few_rows(A, B, out, add=add, across=Bt)
    flags = {True: b"T", False: b"N"}
    double = out.dtype == torch.float64
    kind = ctypes.c_double if double else ctypes.c_float
    # Fortran sees row-major matrices transposed: outᵀ = op(B)ᵀ·op(A)ᵀ.
    _call(
        cython_blas, "dgemm" if double else "sgemm",
        flags[Bt], flags[At], n, m, k,
        _constant(1.0, kind), B, _leading(B), A, _leading(A),
        _constant(1.0 if add else 0.0, kind), out, _leading(out),
    )  # fmt: skip
    return out


def _few_rows(A: Tensor, B: Tensor, out: Tensor, *, add: bool, across: bool) -> Tensor:
    """`gemm` by MKL, without At."""
    if across:
        B = B.T
        if out.dtype == torch.float64 and out.shape[0] > _FEW_ACROSS:
            for rows, images in zip(A.split(_FEW_ACROSS), out.split(_FEW_ACROSS), strict=True):
                images.addmm_(rows, B) if add else torch.mm(rows, B, out=images)
            return out
    return out.addmm_(A, B) if add else torch.mm(A, B, out=out)


def syrk(A: Tensor, out: Tensor, *, add: bool = False, At: bool = False) -> Tensor:
    """Upper triangle of out = A·Aᵀ, or AᵀA with `At`; out += with `add`. 2-D, unit stride.

    Both fp64, or both fp32. What stands below the diagonal of `out` is left alone.
    """
    n, k = (A.shape[1], A.shape[0]) if At else A.shape
    if any(one.stride(-1) != 1 and one.shape[-1] > 1 for one in (A, out)):
        raise ValueError("syrk needs unit stride in the last axis")
    double = out.dtype == torch.float64
    kind = ctypes.c_double if double else ctypes.c_float
    # The upper triangle in rows is the lower one in columns.
    _call(
        cython_blas, "dsyrk" if double else "ssyrk",
        b"L", b"N" if At else b"T", n, k,
        _constant(1.0, kind), A, _leading(A),
        _constant(1.0 if add else 0.0, kind), out, _leading(out),
    )  # fmt: skip
    return out


def _leading(A: Tensor) -> int:
    return max(A.stride(0), 1)


def tridiagonalise(G: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """QᵀGQ = T for symmetric G (n, n), of which the upper triangle is read.

    That triangle and the diagonal are overwritten by Q's reflectors; below them G stays.
    Returns T's diagonal (n,), its off-diagonal (n − 1,), and the reflectors' scales (n − 1,), fp64
    or fp32 as G is.
    """
    n = len(G)
    d, e, tau = (torch.empty(max(size, 1), dtype=G.dtype) for size in (n, n - 1, n - 1))
    work = torch.empty(64 * n, dtype=G.dtype)
    info = ctypes.c_int()
    name = "dsytrd" if G.dtype == torch.float64 else "ssytrd"
    # The upper triangle in rows is the lower one in columns.
    _call(cython_lapack, name, b"L", n, G, n, d, e, tau, work, len(work), info)
    _check(name, info)
    return d, e[: n - 1], tau[: n - 1]


def reflect(G: Tensor, tau: Tensor, rows: Tensor, *, transpose: bool = False) -> None:
    """row ← Q·row for each of `rows` (k, n), contiguous; Qᵀ with `transpose`.

    G, tau as `tridiagonalise` left them; all three fp64, or all three fp32.
    """
    k, n = rows.shape
    work = torch.empty(64 * n, dtype=rows.dtype)
    info = ctypes.c_int()
    name = "dormtr" if rows.dtype == torch.float64 else "sormtr"
    _call(
        cython_lapack, name,
        b"L", b"L", b"T" if transpose else b"N", n, k, G, n, tau, rows, n, work, len(work), info,
    )  # fmt: skip
    _check(name, info)


def solve_tridiagonal(d: Tensor, e: Tensor, b: Tensor) -> None:
    """b ← T⁻¹·b for the symmetric tridiagonal T, with pivoting, fp64; b (n,) is not changed where
    T is singular."""
    info = ctypes.c_int()
    _call(cython_lapack, "dgtsv", len(d), 1, e.clone(), d.clone(), e.clone(), b, len(b), info)


def eigenvalues(d: Tensor, e: Tensor) -> Tensor:
    """All eigenvalues of the tridiagonal matrix, descending (n,)."""
    values, side = d.clone(), torch.cat([e, e.new_zeros(1)])
    info = ctypes.c_int()
    _call(cython_lapack, "dsterf", len(values), values, side, info)
    _check("dsterf", info)
    return values.flip(0)


def eigenvectors(
    G: Tensor, d: Tensor, e: Tensor, tau: Tensor, values: Tensor, ranks: range
) -> Tensor:
    """Eigenvectors by the rank of their eigenvalue (0 = largest), as rows (len(ranks), n).

    G, d, e, tau as `tridiagonalise` left them, values as `eigenvalues` gave them; ranks ascends by
    1. Vectors of the tridiagonal matrix, then the reflectors.
    """
    n, k = len(d), len(ranks)
    side = torch.cat([e, e.new_zeros(1)])
    vectors = None
    if k <= _FEW_VECTORS * n:
        vectors = _by_inverse_iteration(d, side, values[ranks[0] : ranks[-1] + 1])
    if vectors is None:
        vectors = _by_robust_representations(d, side, ranks)
    if n > 1:
        reflect(G, tau, vectors)
    return vectors.flip(0)


def _by_inverse_iteration(d: Tensor, side: Tensor, values: Tensor) -> Tensor | None:
    """Vectors of the tridiagonal matrix, rows (k, n) by ascending value; None if one is not found.

    Orthogonalised against each other: k²n more operations, so for a few only, where it is three
    times as fast as the robust representations and an order more orthogonal.
    """
    n, k = len(d), len(values)
    ascending = values.flip(0).contiguous()
    vectors = torch.zeros(k, n, dtype=torch.float64)
    block = torch.ones(n, dtype=torch.int32)  # the matrix is one block, which ends at n
    ends = torch.zeros(n, dtype=torch.int32)
    ends[0] = n
    work = torch.empty(5 * n, dtype=torch.float64)
    integers, failed = (torch.empty(size, dtype=torch.int32) for size in (n, k))
    info = ctypes.c_int()
    _call(
        cython_lapack, "dstein",
        n, d, side, k, ascending, block, ends, vectors, n, work, integers, failed, info,
    )  # fmt: skip
    return vectors if info.value == 0 else None


def _by_robust_representations(d: Tensor, side: Tensor, ranks: range) -> Tensor:
    """The same by dstemr, at n operations a number whatever k is."""
    n, k = len(d), len(ranks)
    values, vectors = torch.empty(n, dtype=torch.float64), torch.zeros(k, n, dtype=torch.float64)
    support = torch.zeros(2 * max(k, 1), dtype=torch.int32)
    work = torch.empty(18 * n, dtype=torch.float64)
    integers = torch.empty(10 * n, dtype=torch.int32)
    found, robust, info = ctypes.c_int(), ctypes.c_int(1), ctypes.c_int()
    # LAPACK counts from 1 and from the smallest.
    _call(
        cython_lapack, "dstemr",
        b"V", b"I", n, d.clone(), side.clone(), 0.0, 0.0, n - ranks[-1], n - ranks[0],
        found, values, vectors, n, k, support, robust,
        work, len(work), integers, len(integers), info,
    )  # fmt: skip
    _check("dstemr", info)
    return vectors


def symmetric_times(G: Tensor, X: Tensor) -> Tensor:
    """X·G for symmetric G (n, n) of which the lower triangle and diagonal are given; X: (k, n)."""
    out = torch.empty_like(X)
    n, k = len(G), len(X)
    # Rows seen as columns: (X·G)ᵀ = G·Xᵀ, and the lower triangle becomes the upper one.
    _call(cython_blas, "dsymm", b"L", b"U", n, k, 1.0, G, n, X, n, 0.0, out, n)
    return out


def _check(name: str, info: ctypes.c_int) -> None:
    if info.value != 0:
        raise NumericsError(f"LAPACK's {name} failed with code {info.value}")
