"""The curves that figures draw, with their nulls.

At most 32 points each, most of them spaced by logarithm, to four significant digits: a line of a
figure shows no more.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache

import torch
from torch import Tensor

from geoscope.kinds import KINDS
from geoscope.metrics.nulls import iid_spectra
from geoscope.metrics.spectrum import noise_edge
from geoscope.records import Curve

__all__ = ["curves"]

_POINTS = 32
_DIGITS = 4
_BEFORE_LAST = (1, 2, 4)


def curves(
    kind: str, values: Mapping[str, Tensor], shape: tuple[int, int], *, seed: int
) -> list[dict[str, Curve]]:
    """Curves of each matrix of a stack, from its factors (on the CPU)."""
    wanted = KINDS[kind].curves
    changed = (values["update.norm"] > 0).tolist()
    rows: list[dict[str, Curve]] = [{} for _ in changed]
    if "energy" in wanted and "cross.right" in values:
        known = ~values["cross.right"].isnan().any(-1)
        _add(rows, _energy(values, shape), known.logical_and(values["update.norm"] > 0).tolist())
    if "angles" in wanted:
        for name in sorted(values):
            if name.startswith("angles."):
                known = ~values[name].isnan().any(-1)
                curve = _sample(values[name])
                _add(rows, {name.replace("angles.", "angles_"): curve}, known.tolist())
    if "spectrum" in wanted and "update.S" in values:
        _add(rows, _spectrum(values, shape, seed), changed)
    return rows


def _add(
    rows: list[dict[str, Curve]], columns: Mapping[str, list[Curve]], known: list[bool]
) -> None:
    """Curves by name and matrix, to those that have them."""
    for i, row in enumerate(rows):
        if known[i]:
            row |= {name: column[i] for name, column in columns.items()}


def _energy(values: Mapping[str, Tensor], shape: tuple[int, int]) -> dict[str, list[Curve]]:
    """Captured energy C_R(k), C_L(k), their nulls, and the base's own share E_k."""
    (m, n), count = shape, len(values["update.norm"])
    total = values["update.norm"].square()[:, None]
    right, left = (values[f"cross.{side}"].cumsum(-1) / total for side in ("right", "left"))
    energy = values["base.top"].square().cumsum(-1)[:, : right.shape[-1]]
    ks = _positions(right.shape[-1])
    return {
        "energy_right": _at(right, ks),
        "energy_left": _at(left, ks),
        "energy_base": _at(energy / values["base.norm"].square()[:, None], ks),
        "energy_right_null": _at(_uniform(n, ks[-1]), ks) * count,
        "energy_left_null": _at(_uniform(m, ks[-1]), ks) * count,
    }


def _spectrum(
    values: Mapping[str, Tensor], shape: tuple[int, int], seed: int
) -> dict[str, list[Curve]]:
    """σ_i of the update, of an isotropic update of its norm, and the noise edge."""
    S = values["update.S"]
    null = iid_spectra(*shape, seed).square().mean(0).sqrt()
    null = null * (values["update.norm"] / null.square().sum().sqrt())[:, None]
    edges = noise_edge(S, values["update.noise"], values["update.bulk_median"], shape=shape)
    return {
        "update.S": _sample(S),
        "update.S_null": _sample(null),
        "update.S_floor": _at(edges[:, None].expand(S.shape), sorted({1, S.shape[-1]})),
    }


def _uniform(side: int, last: int) -> Tensor:
    """k/side for k = 1 … last."""
    return torch.arange(1, last + 1, dtype=torch.float64)[None] / side


def _sample(series: Tensor) -> list[Curve]:
    return _at(series, _positions(series.shape[-1]))


def _at(series: Tensor, ks: Sequence[int]) -> list[Curve]:
    """The points of each row (b, length)."""
    places = tuple(float(k) for k in ks)
    heights = _rounded(series[:, [k - 1 for k in ks]].double()).tolist()
    return [Curve(places, tuple(row)) for row in heights]


def _rounded(heights: Tensor) -> Tensor:
    """To the digits that are kept, as the nearest doubles of these decimals.

    A whole number over a power of ten is exact up to 10²², which bounds the decimals.
    """
    decimals = (_DIGITS - 1 - heights.abs().log10().floor()).clamp(-22, 22)
    scale = 10.0 ** decimals.abs().nan_to_num(0)
    up = decimals > 0
    whole = torch.where(up, heights * scale, heights / scale).round()
    return torch.where(up, whole / scale, whole * scale)


@lru_cache(maxsize=64)
def _positions(length: int) -> tuple[int, ...]:
    """1-based positions 1 … length: all of them, or some spaced by logarithm.

    And the last ones, where spectra and angles may bend.
    """
    if length <= _POINTS:
        return tuple(range(1, length + 1))
    steps = _POINTS - len(_BEFORE_LAST)
    spaced = {round(length ** (i / (steps - 1))) for i in range(steps)}
    return tuple(sorted(spaced | {length - back for back in _BEFORE_LAST}))
