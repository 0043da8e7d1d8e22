"""What a caller may write for a value, as the one form that the library works with.

A text is one thing wherever several may be given: one pattern, one reference. Paths are strings or
`os.PathLike`. Whatever else comes raises OptionError with the parameter's name.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from geoscope.errors import OptionError

__all__ = [
    "Place",
    "bytes_of",
    "joined",
    "normalise",
    "numbers",
    "path_of",
    "path_text",
    "paths_of",
    "scalar",
    "size",
    "texts",
]

Place = str | os.PathLike[str]
_LONGEST = 80
# Annotation of a field → what it takes, in words, and the type that is kept.
_SCALARS: dict[str, tuple[type, str, Callable[[Any], Any]]] = {
    "bool": (bool, "True or False", bool),
    "int": (Integral, "a whole number", int),
    "float": (Real, "a number", float),
    "str": (str, "a text", str),
}
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "KB": 10**3, "MB": 10**6, "GB": 10**9}


def path_text(value: Any, name: str) -> str:
    """A path, or a reference such as a Hub id: a string or `os.PathLike`, not empty."""
    text = os.fspath(value) if isinstance(value, os.PathLike) else value
    if not isinstance(text, str) or not text:
        raise OptionError(
            f"`{name}` {_brief(value)}: a path is a string or os.PathLike, and not empty"
        )
    return text


def _brief(value: Any) -> str:
    """The value in an error; of a long one its type."""
    text = repr(value)
    return text if len(text) <= _LONGEST and "\n" not in text else type(value).__name__


def scalar(value: Any, name: str, kind: str) -> Any:
    """A value of a kind in `_SCALARS`, as Python's own type. Raises OptionError for another."""
    form, words, plain = _SCALARS[kind]
    if not isinstance(value, form) or (isinstance(value, bool) and kind != "bool"):
        raise OptionError(f"`{name}` {_brief(value)}: {words} is needed")
    return plain(value)


def path_of(value: Any, name: str) -> Path:
    """The same as a Path."""
    return Path(path_text(value, name))


def paths_of(value: Any, name: str) -> tuple[str, ...]:
    """One path or reference, or several."""
    if isinstance(value, (str, os.PathLike)):
        return (path_text(value, name),)
    return tuple(path_text(item, name) for item in _items(value, name, "paths"))


def texts(value: Any, name: str) -> tuple[str, ...]:
    """One text, or several; None for none."""
    parts = (value,) if isinstance(value, str) else _items(value or (), name, "texts")
    for part in parts:
        if not isinstance(part, str):
            raise OptionError(f"`{name}` {part!r}: a text, or several of them, is needed")
    return parts


def numbers(value: Any, name: str) -> tuple[int, ...]:
    """One whole number, or several."""
    parts = (value,) if isinstance(value, Integral) else _items(value, name, "whole numbers")
    for part in parts:
        if not isinstance(part, Integral) or isinstance(part, bool):
            raise OptionError(f"`{name}` {part!r}: whole numbers are needed, such as 8, 64")
    return tuple(int(part) for part in parts)


def size(value: Any, name: str) -> str:
    """An amount of memory as a text; a number counts bytes."""
    if isinstance(value, str) or (isinstance(value, Integral) and not isinstance(value, bool)):
        return str(value)
    raise OptionError(f"`{name}` {value!r}: write a size such as 8GB or 500M")


def bytes_of(text: str, name: str, *, others: str = "") -> int:
    """Bytes of a size such as `8GB`, `500M`, `2000000000`. others: what else may be written."""
    number = text.strip().upper().rstrip("BKMG")
    unit = text.strip().upper()[len(number) :]
    try:
        amount = int(float(number) * _UNITS[unit])
    except (KeyError, ValueError, OverflowError):
        amount = -1
    if amount < 0:
        raise OptionError(f"`{name}` {text!r}: write a size such as 8GB or 500M{others}")
    return amount


def _items(value: Any, name: str, what: str) -> tuple[Any, ...]:
    if isinstance(value, (str, bytes, bytearray)) or not isinstance(value, Iterable):
        raise OptionError(f"`{name}` {value!r}: {what} are needed, one or several")
    return tuple(value)


def normalise(options: Any, **rules: Callable[[Any, str], Any]) -> None:
    """Puts fields of a frozen dataclass into their one form; None stays where it is the default."""
    for name, rule in rules.items():
        value = getattr(options, name)
        if value is not None or type(options).__dataclass_fields__[name].default is not None:
            object.__setattr__(options, name, rule(value, name))


def joined(value: Any, name: str) -> str:
    """Whole numbers as a text with commas: what a list of steps is on the command line."""
    return value if isinstance(value, str) else ",".join(map(str, numbers(value, name)))
