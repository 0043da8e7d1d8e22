"""Do the names of two models agree but for a leading part? The rule for `--map-name` that helps."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection

__all__ = ["joining_rule"]

# Parts of a name that may lead it, on either side.
_PARTS = 3


def joining_rule(base: Collection[str], tuned: Collection[str]) -> tuple[str, int] | None:
    """`REGEX=REPL` for the leading part that differs, and how many names agree under it.

    None where less than half of the shorter list agrees. The shortest parts come first.

    >>> joining_rule(["bert.layer.0.w", "bert.layer.1.w", "cls.w"], ["layer.0.w", "layer.1.w"])
    ('^bert\\\\.=', 2)
    """
    best: tuple[int, int, str] | None = None
    for mine in _leading(base):
        for theirs in _leading(tuned):
            if mine == theirs:
                continue
            agreeing = len(_behind(mine, base) & _behind(theirs, tuned))
            key = agreeing, -len(mine) - len(theirs), _rule(mine, theirs)
            best = key if best is None else max(best, key)
    if best is None or 2 * best[0] < min(len(base), len(tuned)):
        return None
    return best[2], best[0]


def _leading(names: Collection[str]) -> list[str]:
    """The most frequent leading part of each length, none first."""
    counts = (
        Counter(
            ".".join(parts[:count]) + "." for name in names if len(parts := name.split(".")) > count
        )
        for count in range(1, _PARTS + 1)
    )
    return ["", *(each.most_common(1)[0][0] for each in counts if each)]


def _behind(lead: str, names: Collection[str]) -> set[str]:
    return {name.removeprefix(lead) for name in names if name.startswith(lead)}


def _rule(mine: str, theirs: str) -> str:
    """Of a part that only one side has, it is taken off."""
    if not mine:
        mine, theirs = theirs, ""
    return f"^{re.escape(mine)}={theirs}"
