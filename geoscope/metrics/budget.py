"""Which ranks hold most of an update within a number of parameters?

Ours; see docs/methods.md#capacity. A component of an m × n matrix costs m + n parameters, as a
column of B and a row of A. Kept are the components with the largest σ²/(m + n), over all matrices;
what is below the noise edge counts for nothing. Beside them stands one rank for all matrices, which
is what servers take.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["BudgetRanks", "ranks_within"]


@dataclass(frozen=True)
class BudgetRanks:
    """ranks: of each matrix. energy: the part of Σσ² above the noise that they hold, parameters:
    what they cost. uniform, uniform_energy, uniform_parameters: the same of one rank for all.
    """

    ranks: tuple[int, ...]
    energy: float
    parameters: int
    uniform: int
    uniform_energy: float
    uniform_parameters: int


def ranks_within(
    budget: int, spectra: Sequence[Sequence[float]], shapes: Sequence[tuple[int, int]]
) -> BudgetRanks:
    """spectra: the σ above the noise edge of each matrix, descending. shapes: (m, n) of each."""
    costs = [m + n for m, n in shapes]
    found = sorted(
        (-(sigma**2) / cost, number)
        for number, (values, cost) in enumerate(zip(spectra, costs, strict=True))
        for sigma in values
    )
    ranks = [0] * len(spectra)
    spent = 0
    for _, number in found:
        if spent + costs[number] > budget:
            break
        ranks[number] += 1
        spent += costs[number]
    largest = max((min(shape) for shape in shapes), default=0)
    uniform = min(largest, budget // sum(costs)) if costs else 0
    total = math.fsum(sigma**2 for values in spectra for sigma in values)

    def share(chosen: Sequence[int]) -> float:
        kept = math.fsum(
            sigma**2
            for values, rank in zip(spectra, chosen, strict=True)
            for sigma in values[:rank]
        )
        return kept / total if total > 0 else 0.0

    same = [min(uniform, min(shape)) for shape in shapes]
    return BudgetRanks(
        ranks=tuple(ranks),
        energy=share(ranks),
        parameters=spent,
        uniform=uniform,
        uniform_energy=share(same),
        uniform_parameters=sum(rank * cost for rank, cost in zip(same, costs, strict=True)),
    )
