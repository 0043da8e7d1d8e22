"""Numbers for people: three digits, no number is –, names keep what tells them apart."""

from __future__ import annotations

import math

import pytest

from geoscope.report.numbers import degrees, number, percent, share, shorten, shorten_all, times


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "–"),
        (math.nan, "–"),
        (math.inf, "–"),
        (0.0, "0"),
        (0, "0"),
        (12, "12"),
        (151936, "151936"),
        (0.0087, ".00870"),
        (0.0313, ".0313"),
        (-0.25, "-.250"),
        (0.9996, "1.00"),
        (1.0, "1.00"),
        (58.23, "58.2"),
        (99.96, "100"),
        (706.4, "706"),
        (999.7, "1000"),
        (12345.6, "12346"),
        (0.000999, "9.99e-4"),
        (1.2e-05, "1.2e-5"),
        (-3e-12, "-3e-12"),
        (2.5e7, "2.5e7"),
    ],
)
def test_number_has_three_digits(value: float | None, text: str) -> None:
    assert number(value) == text


def test_a_share_beyond_floats_is_infinite() -> None:
    assert (share(1e308), share(-1e308), times(1e308)) == ("∞ %", "-∞ %", "1e308×")


def test_every_magnitude_keeps_its_value_to_three_digits() -> None:
    for exponent in range(-12, 12):
        for digit in (1.0, 1.0049, 3.333, 9.949, 9.996):
            value = digit * 10.0**exponent
            assert math.isclose(float(number(value)), value, rel_tol=5.1e-3)


def test_ratios_angles_and_shares() -> None:
    assert [times(x) for x in (5.04, 17.2, 123.4, 0.045, None)] == [
        "5.0×",
        "17×",
        "123×",
        ".045×",
        "–",
    ]
    assert degrees(math.pi / 2) == "90.0°"
    assert degrees(None) == "–"
    assert [percent(x) for x in (0, 0.001, 0.62, 0.999, 1)] == [
        "0 %",
        "<1 %",
        "62 %",
        ">99 %",
        "100 %",
    ]


@pytest.mark.parametrize("limit", [14, 20, 27, 32, 60])
def test_short_name_fits_and_keeps_layer_and_module(limit: int) -> None:
    short = shorten("model.layers.12.self_attn.q_proj.weight", limit)
    assert len(short) <= limit
    assert "12" in short
    assert "q_proj" in short


def test_short_names_stay_distinct() -> None:
    names = [f"model.layers.1.{kind}.q_proj.weight" for kind in ("self_attn", "cross_attn")]
    short = shorten_all(names, 26)
    assert len(set(short)) == 2
    assert all(len(name) <= 26 for name in short)


def test_name_without_dots_is_cut_in_the_middle() -> None:
    assert shorten("a" * 30 + "z" * 30, 11) == "aaaaa…zzzzz"
