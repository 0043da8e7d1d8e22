"""Names that others chose, as they can be shown: none steers a terminal or breaks a table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, is_dataclass, replace
from enum import Enum
from typing import Any, TypeVar

from geoscope.foreign import printable

__all__ = ["plain"]

Noun = TypeVar("Noun")


def plain(noun: Noun) -> Noun:
    """The noun with every text in it printable, of one line; the same object where all are."""
    return _plain(noun)


def _plain(value: Any) -> Any:
    if isinstance(value, str):
        return value if isinstance(value, Enum) or value.isprintable() else printable(value)
    if isinstance(value, tuple | list):
        first = value[0] if value else ""
        if isinstance(first, float) or (_is_pair(first) and isinstance(value, tuple)):
            return value  # a spectrum or a curve
        items = [_plain(item) for item in value]
        same = all(map(_is_same, items, value))
        return value if same else type(value)(items)
    if isinstance(value, Mapping):
        made = {_plain(key): _plain(item) for key, item in value.items()}
        same = all(map(_is_same, (*made, *made.values()), (*value, *value.values())))
        return value if same else made
    if is_dataclass(value) and not isinstance(value, type):
        own = {each.name: getattr(value, each.name) for each in fields(value)}
        changed = {name: made for name, item in own.items() if (made := _plain(item)) is not item}
        return replace(value, **changed) if changed else value
    return value


def _is_pair(value: Any) -> bool:
    return isinstance(value, tuple) and len(value) == 2 and isinstance(value[0], float | int)


def _is_same(one: Any, other: Any) -> bool:
    return one is other
