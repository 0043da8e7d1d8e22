"""Errors of the library in the words of the command line.

The library names a parameter, in backticks: `max_memory`. Here it becomes the option that sets it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

__all__ = ["in_options", "option_names"]


def option_names(command: Any) -> dict[str, str]:
    """Parameter → option, of a click command and all below it."""
    names: dict[str, str] = {}
    for part in (command, *getattr(command, "commands", {}).values()):
        options = [each for each in part.params if each.param_type_name == "option"]
        names |= {option.name: option.opts[0] for option in options}
    return names


def in_options(text: str, names: Mapping[str, str]) -> str:
    """The text with `parameter` as --option, where there is one."""
    return re.sub(r"`(\w+)`", lambda found: names.get(found[1], found[0]), text)
