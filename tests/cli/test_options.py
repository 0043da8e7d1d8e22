"""The options of the commands are the fields of the library's, with the same defaults."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Annotated, Any, get_args

import pytest
from typer.main import get_command

import geoscope
from geoscope.cli import app
from geoscope.cli import options as opt
from geoscope.cli.command import as_typer_command, option_fields, repeated

COMMANDS: dict[str, Any] = get_command(app).commands  # pyright: ignore[reportAttributeAccessIssue]
PAIRS = ("inspect", "collapse", "anisotropy", "alignment", "compare", "capacity")


def parameters(*commands: str) -> dict[str, Any]:
    return {each.name: each for name in commands for each in COMMANDS[name].params}


@pytest.mark.parametrize(
    ("options", "commands"),
    [
        (geoscope.Options, PAIRS),
        (geoscope.FollowOptions, ("trajectory",)),
        (geoscope.InitOptions, ("init-adapter",)),
    ],
    ids=["Options", "FollowOptions", "InitOptions"],
)
def test_every_field_is_an_option_with_the_same_default(
    options: Any, commands: tuple[str, ...]
) -> None:
    shown, made = parameters(*commands), options()
    readers = {"ks": opt.Ks, "limits": opt.Limits, "budget": opt.Budget, "targets": opt.Targets}
    for field in dataclasses.fields(options):
        default = shown[field.name].default
        if field.name in readers:
            default = get_args(readers[field.name])[-1].value(default)
        if field.name != "cache":  # kept by the commands, not by the library
            assert default == getattr(made, field.name), field.name


def test_options_take_keywords_alone() -> None:
    """So that a field that moves between the classes cannot change what a call means."""
    for options in (geoscope.Options, geoscope.FollowOptions, geoscope.InitOptions):
        with pytest.raises(TypeError, match="positional"):
            options("q_proj")  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]


@dataclasses.dataclass(frozen=True)
class Pair:
    layers: str | None = "0"
    ks: tuple[int, ...] = (1,)


def test_a_command_gets_the_object_that_its_options_make() -> None:
    got: list[Any] = []

    def command(
        first: str, *, pair: Annotated[Pair, option_fields("layers", "ks")], masks: bool
    ) -> None:
        got.append((first, pair, masks))

    shown = as_typer_command(command)
    assert list(inspect.signature(shown).parameters) == ["first", "layers", "ks", "masks"]
    assert inspect.signature(shown).parameters["layers"].default == "0"
    shown(first="a", layers="1-2", ks="4,2", masks=True)
    assert got == [("a", Pair("1-2", (2, 4)), True)]


def test_two_options_of_one_name_are_refused() -> None:
    def command(
        *,
        one: Annotated[Pair, option_fields("layers")],
        other: Annotated[Pair, option_fields("layers")],
    ) -> None:
        raise AssertionError(one, other)

    with pytest.raises(ValueError, match="duplicate parameter name"):
        as_typer_command(command)


def test_a_field_without_words_is_refused() -> None:
    with pytest.raises(AttributeError, match="Unheard"):
        option_fields("unheard")


def test_a_command_is_repeated_by_what_differs_from_its_defaults() -> None:
    command = COMMANDS["init-adapter"]
    words = ["--rank", "4", "-i", "q proj", "--include", "v_proj", "--alpha", "32", "--seed", "0"]
    context = command.make_context("init-adapter", [*words, "--jobs", "2"])
    names = ("rank", "include", "alpha", "seed", "method")
    assert repeated(context, ("model", "-o", "out"), names) == [
        *("geoscope", "init-adapter", "model", "-o", "out", "--rank", "4", "--alpha", "32.0"),
        *("--include", "'q proj'", "--include", "v_proj"),
    ]
