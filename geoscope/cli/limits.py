"""`--limit NAME=VALUE`: other limits for the thresholds of the verdict.

See docs/verdict.md#thresholds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from geoscope.errors import OptionError

__all__ = ["parse_limits"]

_DEGREES = ("deg", "°")


def parse_limits(texts: Sequence[str]) -> dict[str, float] | None:
    """The limits by name, None for none; the last of one name holds.

    Raises OptionError for a name that no threshold has, and for what is not a limit.
    """
    return dict(_parse(text) for text in texts) or None


def _parse(text: str) -> tuple[str, float]:
    from geoscope.thresholds import THRESHOLDS

    name, sign, value = (part.strip() for part in text.partition("="))
    if not sign:
        raise OptionError(f"--limit {text!r}: write NAME=VALUE, such as distorted.nss=0.01")
    if name not in THRESHOLDS:
        near = [one for one in THRESHOLDS if set(name.split(".")) & set(one.split("."))]
        hint = f"near: {', '.join(near)}" if near else f"they are {', '.join(THRESHOLDS)}"
        raise OptionError(f"--limit {text!r}: no threshold {name!r}; {hint}")
    limit = _angle(text, value) if name.endswith(".angle") else _number(text, value)
    return name, limit


def _number(text: str, value: str) -> float:
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise OptionError(f"--limit {text!r}: {value!r} is not a number")
    return number


def _angle(text: str, value: str) -> float:
    """Radians, as in the report, or degrees where the value says so."""
    for unit in _DEGREES:
        if value.endswith(unit):
            return math.radians(_number(text, value.removesuffix(unit)))
    angle = _number(text, value)
    if angle > math.pi / 2:
        raise OptionError(f"--limit {text!r}: more than π/2 radians; write {value}deg for degrees")
    return angle
