"""Numbers and what stands beside them: values, status and raw stay in step."""

from __future__ import annotations

import pytest

from geoscope.records import Numbers, Status
from geoscope.records.numbers import Collected


@pytest.mark.parametrize("status", Status)
@pytest.mark.parametrize("value", [None, 0.5])
def test_a_value_is_none_exactly_where_its_status_is_null(
    status: Status, value: float | None
) -> None:
    numbers = Collected()
    numbers.put("x", value, status)
    kept = numbers.status_of("x")
    assert (numbers.values["x"] is None) == kept.is_null
    assert kept is (Status.NOT_APPLICABLE if value is None and not status.is_null else status)
    assert numbers.raw == ({"x": 0.5} if value and status is Status.BELOW_RESOLUTION else {})
    assert Status.OK not in numbers.status.values()


def test_numbers_of_another_are_added_under_new_names() -> None:
    numbers = Collected()
    numbers.put("a", 1.0)
    other = Numbers(
        values={"b": None, "c": 2.0},
        nulls={"c": 1.0},
        status={"b": Status.BELOW_RESOLUTION},
        raw={"b": 3.0},
    )
    numbers.add(other, {"b": "b_last"})
    assert numbers.values == {"a": 1.0, "b_last": None, "c": 2.0}
    assert (numbers.nulls, numbers.raw) == ({"c": 1.0}, {"b_last": 3.0})
    assert numbers.status == {"b_last": Status.BELOW_RESOLUTION}
