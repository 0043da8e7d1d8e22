"""The curves that figures draw: at most 64 points each, spaced by logarithm, with their nulls."""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor

from geoscope.kinds import KINDS
from geoscope.metrics.nulls import iid_spectra
from geoscope.metrics.spectrum import noise_edge
from geoscope.records import Curve

__all__ = ["curves"]

_POINTS = 64


def curves(
    kind: str, values: Mapping[str, Tensor], shape: tuple[int, int], i: int, *, seed: int
) -> dict[str, Curve]:
    """Curves of matrix `i` of a stack, from its factors (on the CPU)."""
    wanted = KINDS[kind].curves
    found: dict[str, Curve] = {}
    changed = float(values["update.norm"][i]) > 0
    if "energy" in wanted and "cross.right" in values and changed:
        found |= _energy(values, shape, i)
    if "angles" in wanted:
        for name in sorted(values):
            if name.startswith("angles.") and not bool(values[name][i].isnan().any()):
                found[name.replace("angles.", "angles_")] = _sample(values[name][i])
    if "spectrum" in wanted and "update.S" in values and changed:
        found |= _spectrum(values, shape, i, seed)
    return found


def _energy(values: Mapping[str, Tensor], shape: tuple[int, int], i: int) -> dict[str, Curve]:
    """Captured energy C_R(k), C_L(k), their nulls, and the base's own share E_k."""
    if bool(values["cross.right"][i].isnan().any()):
        return {}
    total = values["update.norm"][i].square()
    energy = values["base.top"][i].square()
    right = values["cross.right"][i].cumsum(-1) / total
    left = values["cross.left"][i].cumsum(-1) / total
    m, n = shape
    base = energy.cumsum(-1)[: len(right)] / values["base.norm"][i].square()
    ks = _positions(len(right))
    return {
        "energy_right": _at(right, ks),
        "energy_left": _at(left, ks),
        "energy_base": _at(base, ks),
        "energy_right_null": tuple((float(k), k / n) for k in ks),
        "energy_left_null": tuple((float(k), k / m) for k in ks),
    }


def _spectrum(
    values: Mapping[str, Tensor], shape: tuple[int, int], i: int, seed: int
) -> dict[str, Curve]:
    """σ_i of the update, of an isotropic update of its norm, and the noise edge."""
    S = values["update.S"][i]
    null = iid_spectra(*shape, seed).square().mean(0).sqrt()
    null = null * (values["update.norm"][i] / null.square().sum().sqrt())
    edge = float(
        noise_edge(S, values["update.noise"][i], values["update.bulk_median"], shape=shape)
    )
    return {
        "update.S": _sample(S),
        "update.S_null": _sample(null),
        "update.S_floor": ((1.0, edge), (float(len(S)), edge)),
    }


def _sample(series: Tensor) -> Curve:
    return _at(series, _positions(len(series)))


def _at(series: Tensor, ks: list[int]) -> Curve:
    return tuple((float(k), float(series[k - 1])) for k in ks)


def _positions(length: int) -> list[int]:
    """1-based positions 1 … length: all of them, or 64 spaced by logarithm."""
    if length <= _POINTS:
        return list(range(1, length + 1))
    step = math.log(length) / (_POINTS - 1)
    return sorted({round(math.exp(step * i)) for i in range(_POINTS)})
