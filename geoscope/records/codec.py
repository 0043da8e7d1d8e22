"""JSON of frozen nouns, from the types of their fields: `encode` and `decode` undo each other.

Tuples are written as lists, mappings as objects, enums as their values, nouns as objects with a key
a field; numbers and strings as they are. What is read has the types of the fields, or is refused
with the path to it. Some kinds of field differ:

    spare(x)        left out where it equals x
    added(x)        of later versions: x where it is not there
    within(key)     a mapping to lists, written among the entries of the field `key`
    unwritten(x)    not in JSON; x when read

A class names properties that are written, too, in `WRITTEN`, and may have `decoded`, which
completes what was read.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from functools import cache, partial
from types import NoneType
from typing import Any, TypeVar, cast, get_args, get_origin, get_type_hints

from geoscope.foreign import shown

__all__ = ["added", "decode", "encode", "spare", "unwritten", "within"]

Json = dict[str, Any]
Noun = TypeVar("Noun")


def spare(default: Any) -> Any:
    """A field that is left out of the JSON where it has its default."""
    return dataclasses.field(default_factory=lambda: default, metadata={"spare": default})


def added(default: Any) -> Any:
    """A field that older documents do not have."""
    return dataclasses.field(default=default, metadata={"added": True})


def within(key: str) -> Any:
    """A field whose lists stand among the entries of another field."""
    return dataclasses.field(default_factory=dict, metadata={"within": key})


def unwritten(default: Any) -> Any:
    """A field that is not in the JSON."""
    return dataclasses.field(default=default, metadata={"unwritten": True})


@dataclass(frozen=True)
class _Form:
    """How values of one type are written and read."""

    write: Callable[[Any], Any]
    read: Callable[[Any], Any]


@dataclass(frozen=True)
class _Field:
    name: str
    form: _Form
    spare: Any
    added: bool
    within: str | None


_REQUIRED = object()
_AS_IS = _Form(lambda value: value, lambda value: value)
_SCALARS = (str, bool, int, float, NoneType)
_WORDS = {str: "a text", bool: "true or false", int: "a whole number", float: "a number"}


@cache
def _form(kind: Any) -> _Form:
    origin, parts = get_origin(kind), get_args(kind)
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        return _Form(encode, partial(decode, kind))
    if isinstance(kind, type) and issubclass(kind, Enum):
        return _Form(lambda value: value.value, kind)
    if origin is tuple:
        return _of_tuples(_form(parts[0]), None if parts[-1] is Ellipsis else len(parts), tuple)
    if isinstance(kind, type) and issubclass(kind, tuple):
        (base,) = cast(Any, kind).__orig_bases__
        return _of_tuples(_form(get_args(base)[0]), None, kind)
    if origin is Mapping:
        return _of_mappings(_form(parts[1]))
    if all(part in _SCALARS for part in parts or (kind,)):
        return _Form(lambda value: value, partial(_scalar, frozenset(parts or (kind,))))
    nouns = [part for part in parts if part is not NoneType]
    if len(nouns) == 1 and NoneType in parts:
        return _or_none(_form(nouns[0]))
    return _AS_IS


def _scalar(kinds: frozenset[type], value: Any) -> Any:
    kind = type(value)
    is_number = kind in (int, float) and float in kinds and math.isfinite(value)
    if is_number or (kind is not float and kind in kinds):
        return value
    needed = " or ".join(_WORDS[each] for each in _WORDS if each in kinds)
    raise TypeError(f"found {shown(value)}, expected {needed}")


def _of_tuples(item: _Form, length: int | None, kind: Callable[[Iterable[Any]], Any]) -> _Form:
    """kind: tuple, or a class of its own: `class Layers(tuple[LayerRecord, ...])`."""

    def read(values: Any) -> Any:
        if not isinstance(values, list) or len(values) != (length or len(values)):
            needed = "a list" if length is None else f"a list of {length}"
            raise TypeError(f"found {shown(values)}, expected {needed}")
        return kind(item.read(value) for value in values)

    return _Form(lambda values: [item.write(value) for value in values], read)


def _of_mappings(item: _Form) -> _Form:
    def read(values: Any) -> dict[str, Any]:
        if not isinstance(values, dict):
            raise TypeError(f"found {shown(values)}, expected a table")
        return {key: item.read(value) for key, value in values.items()}

    return _Form(lambda values: {key: item.write(value) for key, value in values.items()}, read)


def _or_none(form: _Form) -> _Form:
    return _Form(
        lambda value: None if value is None else form.write(value),
        lambda value: None if value is None else form.read(value),
    )


@cache
def _fields(noun: type) -> tuple[_Field, ...]:
    hints = get_type_hints(noun)
    return tuple(
        _Field(
            field.name,
            _form(hints[field.name]),
            field.metadata.get("spare", _REQUIRED),
            bool(field.metadata.get("added")),
            field.metadata.get("within"),
        )
        for field in dataclasses.fields(noun)
        if not field.metadata.get("unwritten")
    )


def encode(noun: Any) -> Json:
    """The JSON object of a noun."""
    data: Json = {name: getattr(noun, name) for name in getattr(noun, "WRITTEN", ())}
    for field in _fields(type(noun)):
        value = getattr(noun, field.name)
        if field.within is not None:
            data[field.within] |= field.form.write(value)
        elif field.spare is _REQUIRED or value != field.spare:
            data[field.name] = field.form.write(value)
    return data


def decode(noun: type[Noun], data: Json) -> Noun:
    """The noun of a JSON object. Raises KeyError, TypeError or ValueError."""
    if not isinstance(data, dict):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"found {shown(data)}, expected a table")
    rows = _rows(noun, data)
    values: Json = {}
    for field in _fields(noun):
        if field.within is not None:
            values[field.name] = _read(field, rows[field.within])
        elif field.name in data or not (field.added or field.spare is not _REQUIRED):
            value = data[field.name]
            if field.name in rows:
                value = {key: each for key, each in value.items() if key not in rows[field.name]}
            values[field.name] = _read(field, value)
    complete = cast(Callable[[Noun], Noun], getattr(noun, "decoded", lambda made: made))
    return complete(noun(**values))


def _rows(noun: type, data: Json) -> dict[str, Json]:
    """Of each field that lists stand among, these lists."""
    names = [field.within for field in _fields(noun) if field.within is not None]
    tables = {name: data[name] for name in names}
    for name, table in tables.items():
        if not isinstance(table, dict):
            raise TypeError(f"{name}: found {shown(table)}, expected a table")
    return {
        name: {key: row for key, row in table.items() if isinstance(row, list)}
        for name, table in tables.items()
    }


def _read(field: _Field, value: Any) -> Any:
    """The value of a field; what is wrong with it is told with its name."""
    try:
        return field.form.read(value)
    except (TypeError, ValueError) as error:
        raise TypeError(f"{field.name}: {error}") from None
    except KeyError as error:
        raise TypeError(f"{field.name}: {error.args[0]} is missing") from None
