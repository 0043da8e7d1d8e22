"""How numbers and names are printed for people: three digits, degrees, –, and names that fit."""

from __future__ import annotations

import math
from collections.abc import Sequence

from geoscope.digits import DASH, number, significant

__all__ = ["DASH", "degrees", "number", "percent", "share", "shorten", "shorten_all", "times"]

_ELLIPSIS = "…"


def times(value: float | None) -> str:
    """A ratio, two significant digits: `5.0×`."""
    if value is None or not math.isfinite(value):
        return DASH
    return f"{significant(float(value), 2)}×"


def degrees(radians: float | None) -> str:
    """An angle in degrees: `1.23°`."""
    return DASH if radians is None else f"{number(math.degrees(radians))}°"


def percent(share: float) -> str:
    """A share as a whole percentage, with `<` and `>` where rounding would claim none or all."""
    if 0 < share < 0.005:
        return "<1 %"
    if 0.995 <= share < 1:
        return ">99 %"
    return f"{100 * share:.0f} %"


def share(value: float) -> str:
    """A share in percent, two significant digits.

    >>> [share(x) for x in (0.1776, 0.00868, 0.9961, 1.0)]
    ['18 %', '.87 %', '>99 %', '100 %']
    """
    return percent(value) if 0.995 <= value <= 1 else f"{significant(100 * value, 2)} %"


def shorten(name: str, limit: int) -> str:
    """A parameter name within `limit` characters, cut in the middle; numbers and the end stay.

    >>> shorten("model.layers.12.self_attn.q_proj.weight", 27)
    'model.layers.12…q_proj'
    """
    if len(name) <= limit:
        return name
    parts = name.removesuffix(".weight").split(".")
    kept: list[str | None] = list(parts)
    for index in reversed(range(len(parts) - 1)):
        text = _joined(kept)
        if len(text) <= limit:
            return text
        if not parts[index].isdigit():
            kept[index] = None
    text = _joined(kept)
    return text if len(text) <= limit else _cut(name, limit)


def _joined(parts: Sequence[str | None]) -> str:
    """Parts with dots between; a run of parts left out becomes one ellipsis."""
    text = ""
    for part in parts:
        if part is None:
            text = text if text.endswith(_ELLIPSIS) else text + _ELLIPSIS
        else:
            text += part if not text or text.endswith(_ELLIPSIS) else f".{part}"
    return text


def _cut(text: str, limit: int) -> str:
    tail = limit // 2
    return text[: limit - tail - 1] + _ELLIPSIS + text[-tail:]


def shorten_all(names: Sequence[str], limit: int) -> list[str]:
    """Each name within `limit`; where cutting the middle makes two alike, the ends are kept."""
    short = [shorten(name, limit) for name in names]
    if len(set(short)) == len(set(names)):
        return short
    return [name if len(name) <= limit else _ELLIPSIS + name[1 - limit :] for name in names]
