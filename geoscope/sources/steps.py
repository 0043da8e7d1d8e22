"""Which step of a run does a name tell? Folders, files, branches: the same patterns for all.

    checkpoint-200 · global_step_200 · global_step200_hf · global_steps-200 · step_200 · step-200
    GRPO-step-200 · iter_0000200                    steps
    epoch_2                                         epochs, which are not mixed with steps

The last part of a path comes first, then the parents that can lie between weights and step. A part
must match as a whole: what is only like one (`checkpoint-200-merged`, `tmp-checkpoint-200`) tells
no step of its own.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from geoscope.errors import OptionError

__all__ = ["Step", "given_steps", "parse_step", "step_of_part"]

_PATTERNS = (
    ("step", re.compile(r"checkpoint-([0-9]+)")),
    ("step", re.compile(r"global_steps?_?-?([0-9]+)(?:_hf)?")),
    ("step", re.compile(r"step[_-]([0-9]+)")),
    ("step", re.compile(r".*-step-([0-9]+)")),  # the name of the algorithm before it
    ("step", re.compile(r"iter_([0-9]+)")),
    ("epoch", re.compile(r"epoch_([0-9]+)")),
)
_FILE = re.compile(r"\.(?:safetensors|bin|pt|pth)$")
# Saves that are named without a number, leftovers of an interrupted one, and NExt's factors: what
# stands above them is the number of something else.
_NO_STEP = re.compile(
    r"(?:tmp[-_])?checkpoint[-_].*|latest|last|final|best|.*_delta_svd_matrix", re.IGNORECASE
)
_MAX_DIGITS = 18
_PARENTS = 4  # X/policy/weights/model/FILE; what is further above belongs to another run


@dataclass(frozen=True, order=True)
class Step:
    """The number in a name. unit: `step` or `epoch`."""

    number: int
    unit: str = "step"


def step_of_part(part: str) -> Step | None:
    """The step that one part of a path tells; None without one.

    >>> step_of_part("global_step50_hf"), step_of_part("epoch_2"), step_of_part("checkpoint-final")
    (Step(number=50, unit='step'), Step(number=2, unit='epoch'), None)
    """
    part = _FILE.sub("", part)
    for unit, pattern in _PATTERNS:
        found = pattern.fullmatch(part)
        if found is not None and len(found[1].lstrip("0")) <= _MAX_DIGITS:
            return Step(int(found[1]), unit)
    return None


def parse_step(parts: Sequence[str]) -> Step | None:
    """The step that a path tells, given as its parts: the last one first, then four parents.

    >>> parse_step(("runs", "global_step_50", "actor", "huggingface"))
    Step(number=50, unit='step')
    """
    for part in parts[: -_PARENTS - 2 : -1]:
        step = step_of_part(part)
        if step is not None:
            return step
        if _NO_STEP.fullmatch(part):
            return None
    return None


def given_steps(text: str) -> tuple[int, ...]:
    """The numbers of `--steps`: "10,20,50" → (10, 20, 50). Raises OptionError."""
    parts = [part.strip() for part in text.split(",")]
    if not all(re.fullmatch(rf"[0-9]{{1,{_MAX_DIGITS}}}", part) for part in parts):
        raise OptionError(
            f"`steps` {text!r}: needs whole numbers with commas between them, as 10,20,50"
        )
    return tuple(int(part) for part in parts)
