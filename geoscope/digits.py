"""How a number is printed for people: three digits, or – for none."""

from __future__ import annotations

import math

__all__ = ["DASH", "number", "significant"]

DASH = "–"


def number(value: float | int | None) -> str:
    """Three significant digits, counts whole, – for no number.

    >>> [number(x) for x in (0.03134, 58.23, 1240.4, 1.2e-5, 7, None)]
    ['.0313', '58.2', '1240', '1.2e-5', '7', '–']
    """
    if value is None or not math.isfinite(value):
        return DASH
    return str(value) if isinstance(value, int) else significant(value, 3)


def significant(value: float, digits: int) -> str:
    """So many significant digits, without a zero before the point; ∞ for what floats cannot hold.

    >>> [significant(x, 2) for x in (0.1776, 100 * 1e308)]
    ['.18', '∞']
    """
    if math.isinf(value):
        return "∞" if value > 0 else "-∞"
    size = abs(value)
    if size == 0:
        return "0"
    if size < 1e-3 or size >= 1e6:
        mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
        return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
    if size >= 10**digits - 0.5:
        return f"{value:.0f}"
    text = f"{value:#.{digits}g}".rstrip(".")
    return text.replace("0.", ".", 1) if size < 1 and text.lstrip("-").startswith("0.") else text
