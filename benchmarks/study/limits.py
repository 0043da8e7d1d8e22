"""Which matrices lie beyond which limit of the verdict, and what the study takes a limit to say."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from geoscope.metrics import THRESHOLDS
from geoscope.records import LayerRecord

__all__ = ["LIMITS", "Limit", "beyond"]

Number = float | None
_ANGLES = ("angle_left_mean@8", "angle_right_mean@8")


@dataclass(frozen=True)
class Limit:
    """kind: of the report. statistic: the model's number that is ranked. above: whether a matrix is
    beyond the limit from above. healthy: whether the rule speaks of health. of: of a matrix."""

    kind: str
    statistic: str
    above: bool
    healthy: bool
    of: Callable[[LayerRecord], Number]


def _value(key: str) -> Callable[[LayerRecord], Number]:
    return lambda layer: layer.values.get(key)


def _largest(values: Iterable[Number]) -> Number:
    numbers = list(values)
    return (
        None if any(each is None for each in numbers) else max(n for n in numbers if n is not None)
    )


def _angle(layer: LayerRecord) -> Number:
    return _largest(layer.values.get(side) for side in _ANGLES)


def _angle_over_null(layer: LayerRecord) -> Number:
    angle, null = _angle(layer), _largest(layer.nulls.get(side) for side in _ANGLES)
    return angle / null if angle is not None and null else None


def _one_sided(layer: LayerRecord) -> Number:
    return _largest(layer.values.get(f"energy_{side}@8") for side in ("left", "right"))


def _plain(kind: str, key: str, above: bool, healthy: bool = False, prefix: str = "") -> Limit:
    return Limit(kind, prefix + key, above, healthy, _value(key))


LIMITS: Mapping[str, Limit] = {
    "rank_collapse.top_share": _plain("compare", "update.top_share@1", True),
    "on_principal.energy_two_sided": _plain("compare", "energy_two_sided@8", True),
    "on_principal.spectral_share": _plain("compare", "spectral_share", True),
    "on_principal.spectral_lift": _plain("compare", "spectral_lift", True),
    "on_principal.versus_base": _plain("compare", "versus_base@8", True),
    "distorted.nss": _plain("compare", "nss", True),
    "distorted.rank_ratio": _plain("compare", "rank_ratio", False),
    "distorted.angle": Limit("compare", "angle@8", True, False, _angle),
    "distorted.angle_over_null": Limit("compare", "angle@8/null", True, False, _angle_over_null),
    "off_principal.energy_two_sided": _plain("compare", "energy_two_sided@8", False, True),
    "off_principal.versus_base": _plain("compare", "versus_base@8", False, True),
    "off_principal.energy_one_sided": Limit("compare", "energy_right@8", False, True, _one_sided),
    "off_principal.angle": Limit("compare", "angle@8", False, True, _angle),
    "off_principal.angle_over_null": Limit(
        "compare", "angle@8/null", False, True, _angle_over_null
    ),
    "capacity.saturated_k90": _plain("capacity", "k90_share", True, prefix="capacity."),
    "capacity.saturated_tail": _plain("capacity", "tail_ratio", True, prefix="capacity."),
    "capacity.concentrated": _plain("capacity", "effective_rank_share", False, prefix="capacity."),
    "capacity.idle_k99": _plain("capacity", "k99_share", False, prefix="capacity."),
}


def beyond(layers: Iterable[LayerRecord], kind: str) -> dict[str, Number]:
    """beyond.LIMIT → share of the matrices that have the number and lie beyond the limit."""
    layers, shares = list(layers), {}
    for name, limit in LIMITS.items():
        if limit.kind != kind:
            continue
        numbers = [number for layer in layers if (number := limit.of(layer)) is not None]
        value = THRESHOLDS[name].value
        past = [number > value if limit.above else number < value for number in numbers]
        shares[f"beyond.{name}"] = sum(past) / len(past) if past else None
    return shares
