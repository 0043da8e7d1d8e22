"""Errors of the library in the words of the command line.

The library names a parameter, in backticks: `max_memory`. Here it becomes the option that sets it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

__all__ = ["in_options", "option_names"]

# Parameters of the library whose option is called otherwise.
_OTHERWISE = {
    "extend": "--predict-extend",
    "ks": "--k",
    "limits": "--limit",
    "target": "--to-step",
    "training": "--train-steps",
}


def option_names(command: Any) -> dict[str, str]:
    """Parameter → option, of a click command and all below it."""
    found = dict(_OTHERWISE)
    for part in (command, *getattr(command, "commands", {}).values()):
        options = [one for one in part.params if one.param_type_name == "option"]
        found |= {one.name: one.opts[0] for one in options}
    return found


def in_options(text: str, names: Mapping[str, str]) -> str:
    """The text with `parameter` as --option, where there is one."""
    return re.sub(r"`(\w+)`", lambda found: names.get(found[1], found[0]), text)
