"""What share of a Gaussian matrix do its leading directions hold? The null of captured energy."""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
from scipy.linalg import eigvalsh_tridiagonal

from geoscope.profile import stage

__all__ = ["iid_top_share"]


@stage("nulls")
def iid_top_share(m: int, n: int, k: int, seed: int) -> float:
    """E_k = Σ_{i≤k} σ_i²/Σσ² of an iid Gaussian m×n matrix, in [k/q, 1]; 1 where k = q.

    Mean over max(4, ⌈4096/q⌉) draws that are exact in distribution and never formed: Householder
    bidiagonalisation of a Gaussian matrix has independent entries χ_M, …, χ_{M−q+1} on the diagonal
    and χ_{q−1}, …, χ_1 below it. Depends on the shape and the seed alone.
    [Dumitriu & Edelman, math-ph/0206043]
    """
    return _iid_top_share(min(m, n), max(m, n), k, seed)


@lru_cache(maxsize=256)
def _iid_top_share(q: int, M: int, k: int, seed: int) -> float:
    if k >= q:
        return 1.0
    generator = np.random.default_rng((seed, q, M))
    shares = []
    for _ in range(max(4, math.ceil(4096 / q))):
        diagonal = generator.chisquare(np.arange(M, M - q, -1))
        below = generator.chisquare(np.arange(q - 1, 0, -1))
        # B·Bᵀ of the lower bidiagonal B is tridiagonal; its trace is the whole energy.
        main = diagonal.copy()
        main[1:] += below
        side = np.sqrt(diagonal[:-1] * below)
        top = eigvalsh_tridiagonal(
            main, side, select="i", select_range=(q - k, q - 1), lapack_driver="stebz"
        )
        shares.append(float(np.sum(top)) / float(main.sum()))
    return float(np.mean(shares))
