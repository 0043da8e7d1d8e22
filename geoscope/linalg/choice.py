"""Which method for which shape: the least predicted time, from measured rates and operation counts.

The rates stand in rates.json, which `python benchmarks/rates.py --write` measures and writes. They
are part of the package and not of the machine, so that a matrix takes the same method everywhere
and the numbers of a report can be had again. The report names the method that was used.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

__all__ = [
    "RATES_FILE",
    "Rates",
    "krylov_takes_gram",
    "leading_pays",
    "leading_pays_stacked",
    "products_pay",
    "rates",
]

RATES_FILE = Path(__file__).with_name("rates.json")


@dataclass(frozen=True)
class Rates:
    """One CPU core: operations a second (1e9), and seconds of a step that no operation explains.

    gram64, gram32: half a product, by symmetry. tridiagonal: 4/3·q³ to all eigenvalues. narrow:
    four rows there and back through a matrix, with their orthogonalisation; narrow_gram: the same
    through a Gram matrix.
    """

    gram64: float
    gram32: float
    tridiagonal: float
    narrow: float
    narrow_gram: float
    step: float


@cache
def rates() -> Rates:
    """The committed table."""
    return Rates(**json.loads(RATES_FILE.read_text("utf-8"))["rates"])


def expected_dimension(k: int, *, values_only: bool) -> int:
    """Krylov dimension that the leading k triplets of a language model's matrix take, roughly.

    Seen from k = 1 to 64 on matrices with a heavy head and a bulk of σ_2k/σ_k ≈ .8; values alone
    are done earlier. A flat spectrum takes more, and is noticed on the way.
    """
    return 36 + k if values_only else 50 + 6 * k


def krylov_takes_gram(shape: tuple[int, int], k: int, *, values_only: bool = False) -> bool:
    """Whether an fp32 Gram matrix first makes the Krylov space cheaper than products with A."""
    through, gram = _krylov_seconds(shape, k, values_only=values_only)
    return gram < through


def leading_pays(shape: tuple[int, int], k: int, *, values_only: bool = False) -> bool:
    """Whether the leading k triplets alone are cheaper than all values and k vectors."""
    return min(_krylov_seconds(shape, k, values_only=values_only)) < _whole_seconds(shape, k)


def products_pay(shape: tuple[int, int], k: int) -> bool:
    """Whether the leading k triplets by products with A are cheaper than all values and k vectors.

    In a series, where one pass certifies all of them, products serve better than a Gram matrix.
    """
    return _krylov_seconds(shape, k, values_only=False)[0] < _whole_seconds(shape, k)


def _whole_seconds(shape: tuple[int, int], k: int) -> float:
    q, long = sorted(shape)
    table = rates()
    whole = long * q**2 / table.gram64 + (4 / 3 * q**3 + 8 * k * q**2) / table.tridiagonal
    return whole / 1e9


# From this q on, and up to this part of it, a stack on another device takes leading triplets alone.
# On an H200 a Krylov space takes 3 to 5 ms a matrix whatever its shape, all eigenpairs 1.3 ms at
# q = 256 and 15 ms at 1536; at k = 64 of 1536 both take 15 ms (docs/benchmarks.md).
_STACKED_FROM = 768
_STACKED_PART = 0.03


def leading_pays_stacked(shape: tuple[int, int], k: int) -> bool:
    """`leading_pays` for stacks on another device than the CPU."""
    return min(shape) >= _STACKED_FROM and k <= _STACKED_PART * min(shape)


def _krylov_seconds(shape: tuple[int, int], k: int, *, values_only: bool) -> tuple[float, float]:
    """Predicted seconds of a Krylov space: by products with A, and by its Gram matrix."""
    q, long = sorted(shape)
    table, dimension = rates(), expected_dimension(k, values_only=values_only)
    if 2 * dimension > q:
        return float("inf"), float("inf")
    through = 4 * dimension * long * q / table.narrow
    gram = long * q**2 / table.gram32 + 2 * dimension * q**2 / table.narrow_gram
    return tuple(one / 1e9 + dimension * table.step for one in (through, gram))  # pyright: ignore[reportReturnType]
