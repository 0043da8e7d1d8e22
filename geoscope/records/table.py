"""Many nouns as one table: a list for each field, with an entry for each noun.

    {"name": ["a", "b"], "values": {"nss": [0.1, 0.2], "lift": [1.5, null]}, "absent": {…}}

A mapping is a list for each of its keys, null where a noun has no such key. Where null is a value,
too, `absent` lists the nouns without the key, by field and key. In a mapping to nouns (curves) each
key has the fields of these: {"x": {"distinct": […], "at": […]}}, equal values once, and for each
noun of the table the place of its own, or null. A field that has its default in every noun is left
out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar, cast

from geoscope.foreign import shown
from geoscope.records.forms import REQUIRED, Definitions, Field, Form, Json, described, told

__all__ = ["read_table", "table_schema", "write_table"]

_ABSENT = "absent"
Noun = TypeVar("Noun")


# --- writing --------------------------------------------------------------------------------------


def write_table(fields: Iterable[Field], nouns: Sequence[Any]) -> Json:
    """The table of nouns of one class."""
    table: Json = {}
    absent: dict[str, dict[str, list[int]]] = {}
    for field in fields:
        values = [getattr(noun, field.name) for noun in nouns]
        if field.form.item is not None:
            columns = {key: _column(field.form.item, key, values) for key in _keys(values)}
            if columns or field.is_required:
                table[field.name] = columns
            if field.form.item.has_none and (without := _without(columns, values)):
                absent[field.name] = without
        elif field.spare is REQUIRED or any(value != field.spare for value in values):
            table[field.name] = field.form.write_all(values)
    return table | ({_ABSENT: absent} if absent else {})


def _keys(mappings: Iterable[Mapping[str, Any]]) -> list[str]:
    return list({key: None for mapping in mappings for key in mapping})


def _column(item: Form, key: str, mappings: Sequence[Mapping[str, Any]]) -> Any:
    values = [mapping.get(key) for mapping in mappings]
    if item.fields:
        return _inner_table(item.fields, values)
    if item.scalars:
        return values
    return [None if value is None else item.write(value) for value in values]


def _without(
    columns: Mapping[str, Any], mappings: Sequence[Mapping[str, Any]]
) -> dict[str, list[int]]:
    """Of each key the nouns that do not have it, where there are any."""
    every = len(mappings)
    lacking = {
        key: [i for i, mapping in enumerate(mappings) if key not in mapping]
        for key in columns
        if sum(key in mapping for mapping in mappings) < every
    }
    return {key: places for key, places in lacking.items() if places}


def _inner_table(fields: Iterable[Field], nouns: Sequence[Any]) -> Json:
    """Each field of nouns of which some are None; equal values once."""
    table: Json = {}
    for field in fields:
        values = [None if noun is None else getattr(noun, field.name) for noun in nouns]
        places: dict[Any, int] = {}
        at = [None if value is None else places.setdefault(value, len(places)) for value in values]
        table[field.name] = {"distinct": field.form.write_all(places), "at": at}
    return table


# --- reading --------------------------------------------------------------------------------------


def read_table(noun: type[Noun], fields: Sequence[Field], table: Any) -> list[Noun]:
    """The nouns of a table. Raises KeyError, TypeError or ValueError."""
    _check(table, dict, "a table")
    count = len(_list(table[next(each.name for each in fields if each.form.item is None)]))
    absent = _check(table.get(_ABSENT, {}), dict, "a table")
    columns = {
        field.name: told(
            field.name,
            lambda value, field=field: _values(field, value, absent.get(field.name, {}), count),
            table[field.name],
        )
        for field in fields
        if field.name in table or field.is_required
    }
    return [
        noun(**dict(zip(columns, row, strict=True))) for row in zip(*columns.values(), strict=True)
    ]


def _values(field: Field, written: Any, absent: Any, count: int) -> Sequence[Any]:
    """The value of a field for each noun."""
    if field.form.item is None:
        return list(field.form.read_all(_list(written, count)))
    _check(written, dict, "a table")
    item = field.form.item
    columns = {
        key: told(key, lambda value: _entries(item, value, count), column)
        for key, column in written.items()
    }
    entries = zip(*columns.values(), strict=True) if columns else ((),) * count
    rows: list[Json] = [dict(zip(columns, entry, strict=True)) for entry in entries]
    if not item.has_none:
        if not any(None in column for column in columns.values()):
            return rows
        return [{key: value for key, value in row.items() if value is not None} for row in rows]
    for key, places in _check(absent, dict, "a table").items():
        for place in _places(places, count):
            del rows[place][key]
    return rows


def _entries(item: Form, column: Any, count: int) -> Sequence[Any]:
    """The entries of one key, None for a noun without it."""
    if item.fields:
        return _inner_nouns(item, column, count)
    values = _list(column, count)
    if item.has_none:
        return list(item.read_all(values))
    if item.scalars:
        item.read_all([value for value in values if value is not None])
        return values
    return [None if value is None else item.read(value) for value in values]


def _inner_nouns(item: Form, table: Any, count: int) -> list[Any]:
    _check(table, dict, "a table")
    columns = [_inner_column(field, table[field.name], count) for field in item.fields]
    make = cast(Callable[..., Any], item.noun)
    return [None if None in row else make(*row) for row in zip(*columns, strict=True)]


def _inner_column(field: Field, written: Any, count: int) -> Sequence[Any]:
    _check(written, dict, "a table")
    distinct = field.form.read_all(_list(written["distinct"]))
    at = _list(written["at"], count)
    _places([place for place in at if place is not None], len(distinct))
    return [None if place is None else distinct[place] for place in at]


def _check(value: Any, kind: type, needed: str) -> Any:
    if not isinstance(value, kind):
        raise TypeError(f"{shown(value)} stands where {needed} is needed")
    return value


def _list(value: Any, count: int | None = None) -> list[Any]:
    values = _check(value, list, "a list")
    if count is not None and len(values) != count:
        raise TypeError(f"{len(values)} entries stand where {count} are needed")
    return values


def _places(values: Any, count: int) -> list[int]:
    """Places in a list of `count`."""
    for value in _list(values):
        if type(value) is not int or not 0 <= value < count:
            raise TypeError(f"{shown(value)} stands where a place below {count} is needed")
    return values


# --- the schema -----------------------------------------------------------------------------------


def table_schema(noun: type, fields: Sequence[Field], known: Definitions) -> Json:
    """The JSON Schema of a table of nouns."""
    texts = described(noun)
    properties = {
        field.name: _field_schema(field, known) | texts.of(field.name) for field in fields
    }
    places = {"type": "array", "items": {"type": "integer", "minimum": 0}}
    properties[_ABSENT] = {
        "description": "field → key → the entries that do not have it",
        "type": "object",
        "additionalProperties": {"type": "object", "additionalProperties": places},
    }
    return {
        "type": "object",
        "description": f"A table, a list for each field. {texts.whole}",
        "properties": properties,
        "required": sorted(field.name for field in fields if field.is_required),
    }


def _field_schema(field: Field, known: Definitions) -> Json:
    item = field.form.item
    if item is None:
        return _array(field.form.schema(known))
    if not item.fields:
        return {"type": "object", "additionalProperties": _array(_or_null(item, known))}
    inner = {each.name: _inner_schema(each, known) for each in item.fields}
    entry = {"type": "object", "properties": inner, "required": sorted(inner)}
    return {"type": "object", "additionalProperties": entry}


def _inner_schema(field: Field, known: Definitions) -> Json:
    place = {"type": ["integer", "null"], "minimum": 0}
    properties = {"distinct": _array(field.form.schema(known)), "at": _array(place)}
    return {"type": "object", "properties": properties, "required": ["at", "distinct"]}


def _or_null(form: Form, known: Definitions) -> Json:
    schema = form.schema(known)
    return schema if form.has_none else {"anyOf": [schema, {"type": "null"}]}


def _array(items: Json) -> Json:
    return {"type": "array", "items": items}
