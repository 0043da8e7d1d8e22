"""JSON of frozen nouns, from the types of their fields: `encode` and `decode` undo each other.

Tuples are written as lists, mappings as objects, enums as their values, nouns as objects with a key
a field; numbers and strings as they are. Three kinds of field differ:

    spare(x)        left out where it equals x
    added(x)        of later versions: x where it is not there
    within(key)     a mapping to lists, written among the entries of the field `key`
    unwritten(x)    not in JSON; x when read

A class names properties that are written, too, in `WRITTEN`, and may have `decoded`, which
completes what was read.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from functools import cache, partial
from types import NoneType
from typing import Any, TypeVar, cast, get_args, get_origin, get_type_hints

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


@cache
def _form(kind: Any) -> _Form:
    origin, parts = get_origin(kind), get_args(kind)
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        return _Form(encode, partial(decode, kind))
    if isinstance(kind, type) and issubclass(kind, Enum):
        return _Form(lambda value: value.value, kind)
    if origin is tuple:
        return _of_tuples(_form(parts[0]), tuple)
    if isinstance(kind, type) and issubclass(kind, tuple):
        (base,) = cast(Any, kind).__orig_bases__
        return _of_tuples(_form(get_args(base)[0]), kind)
    if origin is Mapping:
        return _of_mappings(_form(parts[1]))
    nouns = [part for part in parts if part is not NoneType]
    if len(nouns) == 1 and NoneType in parts:
        return _or_none(_form(nouns[0]))
    return _AS_IS


def _of_tuples(item: _Form, kind: Callable[[Iterable[Any]], Any]) -> _Form:
    """kind: tuple, or a class of its own: `class Layers(tuple[LayerRecord, ...])`."""
    if item is _AS_IS:
        return _Form(list, kind)
    return _Form(
        lambda values: [item.write(value) for value in values],
        lambda values: kind(item.read(value) for value in values),
    )


def _of_mappings(item: _Form) -> _Form:
    if item is _AS_IS:
        return _Form(dict, lambda values: values)
    return _Form(
        lambda values: {key: item.write(value) for key, value in values.items()},
        lambda values: {key: item.read(value) for key, value in values.items()},
    )


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
    """The noun of a JSON object. Raises KeyError, TypeError, ValueError or AttributeError."""
    values: Json = {}
    for field in _fields(noun):
        if field.within is not None:
            lists = {key: row for key, row in data[field.within].items() if isinstance(row, list)}
            values[field.name] = field.form.read(lists)
            values[field.within] = {
                key: value for key, value in values[field.within].items() if key not in lists
            }
        elif field.name in data or not (field.added or field.spare is not _REQUIRED):
            values[field.name] = field.form.read(data[field.name])
    complete = cast(Callable[[Noun], Noun], getattr(noun, "decoded", lambda made: made))
    return complete(noun(**values))
