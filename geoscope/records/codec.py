"""JSON of frozen nouns, from the types of their fields: `encode` and `decode` undo each other.

Tuples are written as lists, mappings as objects, enums as their values, nouns as objects with a key
a field; numbers and strings as they are. What is read has the types of the fields, or is refused
with the path to it. Some kinds of field differ:

    omitted_if_default(x)        left out where it equals x
    added(x)        of later versions: x where it is not there
    within(key)     a mapping to lists, written among the entries of the field `key`
    not_in_json(x)    not in JSON; x when read
    tabled(x)       nouns as a table, a list for each of their fields (`geoscope.records.table`);
                    with x left out where it equals x

`Annotated[Mapping[str, Any], Keys]` is a mapping whose keys the TypedDict `Keys` names; of one that
is not total they are some of many. `Any` is JSON of a few levels.

A class names properties that are written, too, in `WRITTEN`, and may have `decoded`, which
completes or refuses what was read. `schema_of` is the JSON Schema of what `encode` gives.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from enum import Enum
from functools import cache, partial
from types import NoneType
from typing import (
    Annotated,
    Any,
    NotRequired,
    TypeVar,
    cast,
    get_args,
    get_origin,
    get_type_hints,
)

from geoscope.foreign import shown
from geoscope.records.forms import (
    REQUIRED,
    Definitions,
    Field,
    Form,
    Json,
    described,
    read_field,
    told,
)
from geoscope.records.table import read_table, table_schema, write_table

__all__ = [
    "added",
    "decode",
    "encode",
    "not_in_json",
    "omitted_if_default",
    "schema_of",
    "tabled",
    "within",
]

Noun = TypeVar("Noun")


def omitted_if_default(default: Any) -> Any:
    """A field that is left out of the JSON where it has its default."""
    return dataclasses.field(
        default_factory=lambda: default, metadata={"omitted_if_default": default}
    )


def added(default: Any) -> Any:
    """A field that older documents do not have."""
    return dataclasses.field(default=default, metadata={"added": True})


def within(key: str) -> Any:
    """A field whose lists stand among the entries of another field."""
    return dataclasses.field(default_factory=dict, metadata={"within": key})


def not_in_json(default: Any) -> Any:
    """A field that is not in the JSON."""
    return dataclasses.field(default=default, metadata={"not_in_json": True})


def tabled(*default: Any) -> Any:
    """A field of nouns that is written as a table; left out where it has its default, if any."""
    if not default:
        return dataclasses.field(metadata={"tabled": True})
    return dataclasses.field(
        default_factory=lambda: default[0],
        metadata={"tabled": True, "omitted_if_default": default[0]},
    )


_LEVELS = 8  # of a value of any kind


def _free(value: Any, levels: int = _LEVELS) -> Any:
    """JSON of any kind as it is. Raises TypeError: nested deeper, not finite."""
    if isinstance(value, float) and not math.isfinite(value):
        raise TypeError(f"found {value}, expected a finite number")
    if isinstance(value, (dict, list)):
        if not levels:
            raise TypeError(f"found more than {_LEVELS} levels, expected fewer")
        for each in value.values() if isinstance(value, dict) else value:
            _free(each, levels - 1)
    return value


_AS_IS = Form(lambda value: value, _free, lambda _: {})
_SCALARS = (str, bool, int, float, NoneType)
_WORDS = {str: "a text", bool: "true or false", int: "a whole number", float: "a number"}
_TYPES = {str: "string", bool: "boolean", int: "integer", float: "number", NoneType: "null"}


@cache
def _form(kind: Any) -> Form:
    origin, parts = get_origin(kind), get_args(kind)
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        reference = partial(_reference, kind)
        return Form(encode, partial(decode, kind), reference, noun=kind, fields=_fields(kind))
    if isinstance(kind, type) and issubclass(kind, Enum):
        names = [member.value for member in kind]
        return Form(lambda value: value.value, partial(_member, kind), lambda _: {"enum": names})
    if origin is Annotated:
        return _of_keys(parts[1])
    if origin is list:
        return _of_tuples(_form(parts[0]), None, list)
    if origin is tuple:
        return _of_tuples(_form(parts[0]), None if parts[-1] is Ellipsis else len(parts), tuple)
    if isinstance(kind, type) and issubclass(kind, tuple):
        (base,) = cast(Any, kind).__orig_bases__
        return _of_tuples(_form(get_args(base)[0]), None, kind)
    if origin is Mapping:
        return _of_mappings(_form(parts[1]))
    if all(part in _SCALARS for part in parts or (kind,)):
        return _of_scalars(frozenset(parts or (kind,)))
    nouns = [part for part in parts if part is not NoneType]
    if len(nouns) == 1 and NoneType in parts:
        return _or_none(_form(nouns[0]))
    return _AS_IS


def _member(kind: type[Enum], value: Any) -> Enum:
    member = _members(kind).get(value) if isinstance(value, str) else None
    if member is None:
        raise TypeError(f"found {shown(value)}, expected one of {', '.join(_members(kind))}")
    return member


@cache
def _members(kind: type[Enum]) -> Mapping[str, Enum]:
    return {member.value: member for member in kind}


def _of_scalars(kinds: frozenset[type]) -> Form:
    names = sorted({_TYPES[kind] for kind in kinds} - ({"integer"} if float in kinds else set()))
    schema = {"type": names[0] if len(names) == 1 else names}
    return Form(
        lambda value: value,
        partial(_scalar, kinds),
        lambda _: dict(schema),
        scalars=kinds | ({int} if float in kinds else set()),
        has_none=NoneType in kinds,
    )


def _scalar(kinds: frozenset[type], value: Any) -> Any:
    kind = type(value)
    is_number = kind in (int, float) and float in kinds and math.isfinite(value)
    if is_number or (kind is not float and kind in kinds):
        return value
    narrower = {int} if float in kinds else set[type]()
    needed = " or ".join(_WORDS[each] for each in _WORDS if each in kinds - narrower)
    raise TypeError(f"found {shown(value)}, expected {needed}")


def _of_tuples(item: Form, length: int | None, kind: Callable[[Iterable[Any]], Any]) -> Form:
    """kind: tuple, or a class of its own: `class Layers(tuple[LayerRecord, ...])`."""

    def read(values: Any) -> Any:
        if not isinstance(values, list) or len(values) != (length or len(values)):
            needed = "a list" if length is None else f"a list of {length}"
            raise TypeError(f"found {shown(values)}, expected {needed}")
        return kind(item.read_all(values))

    def schema(known: Definitions) -> Json:
        exact = {} if length is None else {"minItems": length, "maxItems": length}
        return {"type": "array", "items": item.schema(known), **exact}

    return Form(item.write_all, read, schema)


def _of_mappings(item: Form) -> Form:
    def read(values: Any) -> dict[str, Any]:
        if not isinstance(values, dict):
            raise TypeError(f"found {shown(values)}, expected a table")
        return dict(zip(values, item.read_all(list(values.values())), strict=True))

    def write(values: Mapping[str, Any]) -> Json:
        return dict(zip(values, item.write_all(values.values()), strict=True))

    def schema(known: Definitions) -> Json:
        return {"type": "object", "additionalProperties": item.schema(known)}

    return Form(write, read, schema, item=item)


def _of_keys(table: Any) -> Form:
    """table: a TypedDict. Keys that it does not name stay as they are."""
    hints = get_type_hints(table, include_extras=True)
    optional = {key for key, hint in hints.items() if get_origin(hint) is NotRequired}
    forms = {
        key: _form(get_args(hint)[0] if key in optional else hint) for key, hint in hints.items()
    }
    required = sorted(hints.keys() - optional) if table.__total__ else []
    sure = {key: form.scalars - {float} for key, form in forms.items()}

    def read(values: Any) -> dict[str, Any]:
        if not isinstance(values, dict):
            raise TypeError(f"found {shown(values)}, expected a table")
        for key in required:
            values[key]  # raises KeyError where it is missing
        return {
            key: item
            if type(item) in sure.get(key, ())
            else told(key, forms.get(key, _AS_IS).read, item)
            for key, item in values.items()
        }

    def schema(known: Definitions) -> Json:
        properties = {key: form.schema(known) for key, form in forms.items()}
        made: Json = {"type": "object", "properties": properties, "required": required}
        return made if table.__total__ else made | {"additionalProperties": {}}

    return Form(lambda value: value, read, schema)


def _or_none(form: Form) -> Form:
    return Form(
        lambda value: None if value is None else form.write(value),
        lambda value: None if value is None else form.read(value),
        lambda known: {"anyOf": [form.schema(known), {"type": "null"}]},
        has_none=True,
    )


def _of_tables(noun: type, kind: Callable[[Iterable[Any]], Any]) -> Form:
    """Nouns as a table; a list of them, as earlier documents have it, is read, too."""
    rows = _of_tuples(_form(noun), None, kind)

    def read(values: Any) -> Any:
        if isinstance(values, list):
            return rows.read(values)
        return kind(read_table(noun, _fields(noun), values))

    return Form(
        lambda values: write_table(_fields(noun), values),
        read,
        lambda known: table_schema(noun, _fields(noun), known),
    )


@cache
def _fields(noun: type) -> tuple[Field, ...]:
    hints = get_type_hints(noun, include_extras=True)
    return tuple(
        Field(
            field.name,
            _form_of(hints[field.name], is_table=bool(field.metadata.get("tabled"))),
            field.metadata.get("omitted_if_default", REQUIRED),
            is_added=bool(field.metadata.get("added")),
            within=field.metadata.get("within"),
        )
        for field in dataclasses.fields(noun)
        if not field.metadata.get("not_in_json")
    )


def _form_of(kind: Any, *, is_table: bool) -> Form:
    if not is_table:
        return _form(kind)
    base = kind if get_origin(kind) is tuple else cast(Any, kind).__orig_bases__[0]
    return _of_tables(get_args(base)[0], tuple if base is kind else kind)


def schema_of(noun: type, known: Definitions) -> Json:
    """The JSON Schema of the objects that `encode` gives of a noun.

    known: takes the schemas of the nouns in it, by name, for `$defs`.
    """
    fields, texts = _fields(noun), described(noun)
    properties: Json = {name: {"type": "string"} for name in getattr(noun, "WRITTEN", ())}
    for field in fields:
        if field.within is None:
            properties[field.name] = field.form.schema(known) | texts.of(field.name)
    for field in fields:
        if field.within is not None:
            item = cast(Form, field.form.item).schema(known)
            entries = properties[field.within]["additionalProperties"]
            properties[field.within]["additionalProperties"] = {"anyOf": [entries, item]}
    required = [*getattr(noun, "WRITTEN", ()), *(each.name for each in fields if each.is_required)]
    return {
        "type": "object",
        "description": texts.whole,
        "properties": properties,
        "required": sorted(required),
    }


def _reference(noun: type, known: Definitions) -> Json:
    if noun.__name__ not in known:
        known[noun.__name__] = {}  # a noun may hold nouns of its own kind
        known[noun.__name__] = schema_of(noun, known)
    return {"$ref": f"#/$defs/{noun.__name__}"}


def encode(noun: Any) -> Json:
    """The JSON object of a noun."""
    data: Json = {name: getattr(noun, name) for name in getattr(noun, "WRITTEN", ())}
    for field in _fields(type(noun)):
        value = getattr(noun, field.name)
        if field.within is not None:
            data[field.within] |= field.form.write(value)
        elif field.spare is REQUIRED or value != field.spare:
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
            values[field.name] = read_field(field, rows[field.within])
        elif field.name in data or field.is_required:
            value = data[field.name]
            if field.name in rows:
                value = {key: each for key, each in value.items() if key not in rows[field.name]}
            values[field.name] = read_field(field, value)
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
