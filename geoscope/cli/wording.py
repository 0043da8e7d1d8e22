"""Texts of the library in the words of the command line.

The library names a parameter, in backticks: `max_memory`. Here it becomes the option that sets it,
in everything that the command line says: errors, notes, reasons, reports and their files.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from typing import Any

__all__ = ["in_options", "option_names", "with_option_names"]

# Markdown has a backslash before each backtick.
_PARAMETER = re.compile(r"(\\?)`(\w+)\1`")


def option_names(command: Any) -> dict[str, str]:
    """Parameter → option, of a click command and all below it."""
    names: dict[str, str] = {}
    for part in (command, *getattr(command, "commands", {}).values()):
        options = [each for each in part.params if each.param_type_name == "option"]
        names |= {option.name: option.opts[0] for option in options}
    return names


def in_options(text: str, names: Mapping[str, str]) -> str:
    """The text with `parameter` as --option, where there is one."""
    return _PARAMETER.sub(lambda found: names.get(found[2], found[0]), text)


def with_option_names(text: str) -> str:
    """The text with the options of geoscope where the library names parameters."""
    return in_options(text, _names()) if "`" in text else text


@cache
def _names() -> dict[str, str]:
    from geoscope.cli import command_line  # which is made of what uses this

    return option_names(command_line())
