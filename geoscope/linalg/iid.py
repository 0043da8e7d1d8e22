"""What does a Gaussian matrix look like? Draws of its bidiagonal form, and what its head holds."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.linalg import eigvalsh_tridiagonal
from torch import Tensor

from geoscope.linalg import blas
from geoscope.profile import stage

__all__ = ["iid_cut", "iid_draws", "iid_spectra", "iid_top_share", "iid_tridiagonals"]


def iid_draws(q: int) -> int:
    """How many draws stand for all Gaussian matrices of shorter side q: max(4, ⌈4096/q⌉)."""
    return max(4, math.ceil(4096 / q))


def iid_tridiagonals(
    q: int, M: int, seed: int
) -> Iterator[tuple[NDArray[np.float64], NDArray[np.float64]]]:
    """Diagonal (q,) and side (q − 1,) of tridiagonal matrices with the spectrum of G·Gᵀ, G (q, M)
    iid Gaussian and q ≤ M; `iid_draws(q)` of them.

    Exact in distribution and never formed: Householder bidiagonalisation of a Gaussian matrix has
    independent entries χ_M, …, χ_{M−q+1} on the diagonal and χ_{q−1}, …, χ_1 below it. They depend
    on the shape and the seed alone. [Dumitriu & Edelman, math-ph/0206043]
    """
    generator = np.random.default_rng((seed, q, M))
    for _ in range(iid_draws(q)):
        diagonal = np.sqrt(generator.chisquare(np.arange(M, M - q, -1)))
        below = np.sqrt(generator.chisquare(np.arange(q - 1, 0, -1)))
        # B·Bᵀ of the lower bidiagonal B is tridiagonal; its trace is the whole energy.
        main = diagonal**2
        main[1:] += below**2
        yield main, diagonal[:-1] * below


@stage("nulls")
def iid_spectra(m: int, n: int, seed: int) -> Tensor:
    """Singular values of max(4, ⌈4096/q⌉) Gaussian m×n matrices: (draws, q), descending.

    Exact in distribution; see `iid_tridiagonals`.
    """
    return _iid_spectra(min(m, n), max(m, n), seed)


@lru_cache(maxsize=64)
def _iid_spectra(q: int, M: int, seed: int) -> Tensor:
    spectra = torch.empty(iid_draws(q), q, dtype=torch.float64)
    for draw, (main, side) in enumerate(iid_tridiagonals(q, M, seed)):
        values = blas.eigenvalues(torch.from_numpy(main), torch.from_numpy(side))
        spectra[draw] = values.clamp_min(0).sqrt()
    return spectra


@stage("nulls")
def iid_top_share(m: int, n: int, k: int, seed: int) -> float:
    """E_k = Σ_{i≤k} σ_i²/Σσ² of an iid Gaussian m×n matrix, in [k/q, 1]; 1 where k = q.

    Mean over the draws of `iid_tridiagonals`; depends on the shape and the seed alone.
    """
    return _iid_top_share(min(m, n), max(m, n), k, seed)


@lru_cache(maxsize=256)
def _iid_top_share(q: int, M: int, k: int, seed: int) -> float:
    if k >= q:
        return 1.0
    shares = []
    for main, side in iid_tridiagonals(q, M, seed):
        top = eigvalsh_tridiagonal(
            main, side, select="i", select_range=(q - k, q - 1), lapack_driver="stebz"
        )
        shares.append(float(np.sum(top)) / float(main.sum()))
    return float(np.mean(shares))


@stage("nulls")
def iid_cut(
    m: int, n: int, k: int, seed: int, *, is_last: bool = False
) -> tuple[float, float | None]:
    """Of an iid Gaussian m×n matrix: the part of Σσ² in its leading (last) k singular values, and
    the gap (σ_i − σ_{i+1})/σ_i at i = k (i = q − k).

    Means over the draws of `iid_tridiagonals`. Where k = q the part is 1; the gap of the leading
    ones is 1, since σ_{q+1} = 0, and the last ones have none.
    """
    return _iid_cut(min(m, n), max(m, n), k, seed, is_last)


@lru_cache(maxsize=256)
def _iid_cut(q: int, M: int, k: int, seed: int, is_last: bool) -> tuple[float, float | None]:
    if k >= q:
        return 1.0, None if is_last else 1.0
    chosen = (0, k) if is_last else (q - k - 1, q - 1)
    cut = k if is_last else 1  # the k + 1 energies ascend; this one is the first above the cut
    shares, gaps = [], []
    for main, side in iid_tridiagonals(q, M, seed):
        found = eigvalsh_tridiagonal(
            main, side, select="i", select_range=chosen, lapack_driver="stebz"
        )
        energies = np.maximum(np.asarray(found), 0)
        held = energies[:k] if is_last else energies[1:]
        below, above = np.sqrt(energies[cut - 1]), np.sqrt(energies[cut])
        shares.append(float(held.sum() / main.sum()))
        gaps.append(float((above - below) / above))
    return float(np.mean(shares)), float(np.mean(gaps))
