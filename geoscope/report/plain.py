"""Names that others chose, as they can be shown: none steers a terminal or breaks a table."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import fields, is_dataclass, replace
from enum import Enum
from functools import lru_cache
from types import NoneType
from typing import Any, TypeVar

from geoscope.foreign import printable
from geoscope.records import Curve, Status

__all__ = ["plain"]

Noun = TypeVar("Noun")
# Most of a report: of thousands of matrices not each number is looked at.
_WITHOUT_TEXT = frozenset({float, int, bool, NoneType, Curve, Status})


def plain(noun: Noun) -> Noun:
    """The noun with every text in it printable, of one line; the same object where all are."""
    return _plain(noun)


def _plain(value: Any) -> Any:
    if isinstance(value, str):
        return value if isinstance(value, Enum) or value.isprintable() else printable(value)
    if type(value) in _WITHOUT_TEXT or not value:
        return value
    if isinstance(value, tuple | list):
        if _is_flat(value):
            return value
        items = [_plain(item) for item in value]
        same = all(map(_is_same, items, value))
        return value if same else type(value)(items)
    if isinstance(value, Mapping):
        if _is_flat(value.values()) and _are_printable(tuple(value)):
            return value
        made = {_plain(key): _plain(item) for key, item in value.items()}
        same = all(map(_is_same, (*made, *made.values()), (*value, *value.values())))
        return value if same else made
    if is_dataclass(value) and not isinstance(value, type):
        own = {each.name: getattr(value, each.name) for each in fields(value)}
        changed = {name: made for name, item in own.items() if (made := _plain(item)) is not item}
        return replace(value, **changed) if changed else value
    return value


def _is_flat(values: Iterable[Any]) -> bool:
    """Whether there is nothing but numbers and printable text."""
    kinds = set(map(type, values))
    if str not in kinds:
        return kinds <= _WITHOUT_TEXT
    kinds.remove(str)
    return kinds <= _WITHOUT_TEXT and all(
        value.isprintable() for value in values if type(value) is str
    )


@lru_cache(maxsize=256)
def _are_printable(texts: tuple[str, ...]) -> bool:
    """Remembered, for the ids of a matrix are those of the next one."""
    return all(map(str.isprintable, texts))


def _is_same(one: Any, other: Any) -> bool:
    return one is other
