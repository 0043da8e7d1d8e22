"""The codec: what is written of a noun, that it reads back equal, and what it refuses."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, NotRequired, TypedDict

import pytest

from geoscope.records import Status, decode, encode
from geoscope.records.codec import added, not_in_json, omitted_if_default, schema_of, within


@dataclass(frozen=True)
class Inner:
    name: str
    sizes: tuple[int, ...]
    seen: bool = not_in_json(False)


@dataclass(frozen=True)
class Outer:
    WRITTEN: ClassVar = ("count",)

    inner: Inner | None
    items: tuple[Inner, ...]
    states: Mapping[str, Status]
    values: Mapping[str, float | None]
    curves: Mapping[str, tuple[tuple[float, float], ...]]
    free: Mapping[str, Any]
    note: str | None = omitted_if_default(None)
    words: tuple[str, ...] = omitted_if_default(())
    later: int = added(7)
    steps: Mapping[str, tuple[float | None, ...]] = within("values")

    @property
    def count(self) -> int:
        return len(self.items)


FULL = Outer(
    inner=Inner("a", (1, 2)),
    items=(Inner("b", ()), Inner("c", (3,))),
    states={"x": Status.CAUTION},
    values={"x": 1.5, "y": None},
    curves={"z": ((1.0, 2.0), (3.0, 4.0))},
    free={"deep": [1, {"two": None}]},
    note="n",
    words=("w",),
    later=8,
    steps={"s": (1.0, None)},
)
BARE = Outer(None, (), {}, {}, {}, {})


def test_each_kind_of_field_has_its_form() -> None:
    assert encode(FULL) == {
        "count": 2,
        "inner": {"name": "a", "sizes": [1, 2]},
        "items": [{"name": "b", "sizes": []}, {"name": "c", "sizes": [3]}],
        "states": {"x": "CAUTION"},
        "values": {"x": 1.5, "y": None, "s": [1.0, None]},
        "curves": {"z": [[1.0, 2.0], [3.0, 4.0]]},
        "free": {"deep": [1, {"two": None}]},
        "note": "n",
        "words": ["w"],
        "later": 8,
    }
    assert encode(BARE).keys() == encode(FULL).keys() - {"note", "words"}


@pytest.mark.parametrize("noun", [FULL, BARE], ids=["full", "bare"])
def test_it_reads_back_equal(noun: Outer) -> None:
    again = decode(Outer, json.loads(json.dumps(encode(noun))))
    assert again == noun
    assert type(again.items) is tuple
    assert all(isinstance(state, Status) for state in again.states.values())


def test_what_is_not_written_is_not_read() -> None:
    assert decode(Inner, encode(Inner("a", (), seen=True)) | {"seen": True}) == Inner("a", ())


def test_older_documents_lack_what_was_added_and_no_more() -> None:
    document = encode(FULL)
    assert decode(Outer, {key: document[key] for key in document if key != "later"}).later == 7
    for key in ("inner", "items", "states", "values", "free"):
        with pytest.raises(KeyError, match=key):
            decode(Outer, {name: value for name, value in document.items() if name != key})


def test_what_is_of_another_type_is_refused() -> None:
    for key, value in (("states", {"x": "FINE"}), ("items", [3]), ("states", 3), ("items", 3)):
        with pytest.raises((TypeError, ValueError, AttributeError)):
            decode(Outer, encode(FULL) | {key: value})


def test_defaults_are_not_shared_with_what_is_written() -> None:
    document = encode(FULL)
    document["values"]["more"] = 1
    assert "more" not in FULL.values


# --- mappings by their keys -----------------------------------------------------------------------


class Named(TypedDict):
    code: str
    k: NotRequired[int | None]
    places: list[int | None]


class Some(TypedDict, total=False):
    limit: float


@dataclass(frozen=True)
class Holder:
    named: Annotated[Mapping[str, Any], Named] | None
    some: Annotated[Mapping[str, Any], Some]


@pytest.mark.parametrize(
    "named",
    [
        None,
        {"code": "a", "places": [1, None]},
        {"code": "a", "k": None, "places": [], "later": [{"x": 1}]},
    ],
)
def test_a_mapping_of_known_keys_reads_back_as_it_was(named: dict[str, Any] | None) -> None:
    holder = Holder(named, {"limit": 1, "other": "x"})
    assert decode(Holder, json.loads(json.dumps(encode(holder)))) == holder


@pytest.mark.parametrize(
    ("named", "some", "said"),
    [
        ([], {}, "named: found [], expected a table"),
        ({"code": "a"}, {}, "named: places is missing"),
        ({"code": 1, "places": []}, {}, "named: code: found 1, expected a text"),
        ({"code": "a", "k": 1.5, "places": []}, {}, "named: k: found 1.5, expected a whole number"),
        ({"code": "a", "places": ["x"]}, {}, "named: places: found 'x', expected a whole number"),
        (None, {"limit": None}, "some: limit: found null, expected a number"),
        (None, {"other": [float("inf")]}, "some: other: found inf, expected a finite number"),
        (None, {"other": [[[[[[[[[]]]]]]]]]}, "some: other: found more than 8 levels"),
    ],
)
def test_a_key_of_another_kind_is_refused(named: Any, some: Any, said: str) -> None:
    with pytest.raises(TypeError) as caught:
        decode(Holder, {"named": named, "some": some})
    assert str(caught.value).startswith(said)


def test_the_schema_names_the_keys() -> None:
    found = schema_of(Holder, {})["properties"]
    assert found["named"]["anyOf"][0] == {
        "type": "object",
        "properties": {
            "code": {"type": "string"},
            "k": {"type": ["integer", "null"]},
            "places": {"type": "array", "items": {"type": ["integer", "null"]}},
        },
        "required": ["code", "places"],
    }
    assert found["some"]["required"] == []
    assert found["some"]["additionalProperties"] == {}
