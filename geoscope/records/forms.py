"""How the fields of nouns are written, read and described: what the codec and its tables share."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from typing import Any

__all__ = [
    "REQUIRED",
    "Definitions",
    "Described",
    "Field",
    "Form",
    "Json",
    "described",
    "read_field",
    "told",
]

Json = dict[str, Any]
# Schemas of nouns by name.
Definitions = dict[str, Json]
REQUIRED = object()


@dataclass(frozen=True)
class Form:
    """How values of one type are written and read.

    schema: the JSON Schema of what is written.
    item: of a mapping, the form of its values.
    noun, fields: of nouns, their class and its fields.
    scalars: of numbers and texts, the types that are read as they are.
    has_none: whether None is a value.
    """

    write: Callable[[Any], Any]
    read: Callable[[Any], Any]
    schema: Callable[[Definitions], Json]
    item: Form | None = None
    noun: Callable[..., Any] | None = None
    fields: tuple[Field, ...] = ()
    scalars: frozenset[type] = frozenset()
    has_none: bool = False

    def write_all(self, values: Iterable[Any]) -> list[Any]:
        """Each of many values."""
        return list(values) if self.scalars else [self.write(value) for value in values]

    def read_all(self, values: list[Any]) -> list[Any]:
        """Each of many values; numbers at once where nothing is wrong with them."""
        kinds = set(map(type, values))
        if self.scalars and kinds <= self.scalars:
            if float not in kinds or math.isfinite(sum(filter(None, values))):
                return values
        return [self.read(value) for value in values]


@dataclass(frozen=True)
class Field:
    """A field of a noun: see `geoscope.records.codec` for what may be particular to it."""

    name: str
    form: Form
    spare: Any
    is_added: bool
    within: str | None

    @property
    def is_required(self) -> bool:
        """Whether every document has it."""
        return self.spare is REQUIRED and not self.is_added and self.within is None


def read_field(field: Field, value: Any) -> Any:
    """The value of a field; what is wrong with it is told with its name."""
    return told(field.name, field.form.read, value)


def told(name: str, read: Callable[[Any], Any], value: Any) -> Any:
    """What `read` makes of a value; what is wrong with it is told with its name."""
    try:
        return read(value)
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name}: {error}") from None
    except KeyError as error:
        raise TypeError(f"{name}: {error.args[0]} is missing") from None


@dataclass(frozen=True)
class Described:
    """What a docstring says of a noun, and of its fields."""

    whole: str
    parts: dict[str, str]

    def of(self, name: str) -> Json:
        """The description of a field, where there is one."""
        return {"description": self.parts[name]} if name in self.parts else {}


def described(noun: type) -> Described:
    """The docstring of a noun, and its fields' parts: `name: what it is.`"""
    text = " ".join((inspect.getdoc(noun) or "").split())
    names = "|".join(field.name for field in fields(noun))  # pyright: ignore[reportArgumentType]
    whole, *parts = re.split(rf"(?:(?<=[.)\]}}] )|^)({names}): ", text)
    own = {name: said.strip() for name, said in zip(parts[::2], parts[1::2], strict=True)}
    return Described(whole.strip(), own)
