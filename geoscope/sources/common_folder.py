"""Below the folders of the steps, in which sub-folder are the weights, where it is not a usual one?

    run/step_10/out/weights/ · run/step_20/out/weights/ …      → out/weights of every step

It has to be the same one for every step that has weights; nothing is guessed between two of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import reduce
from pathlib import Path

from geoscope.errors import CheckpointError, OptionError, first_names
from geoscope.sources.places import below, choose, find_places, roots_below
from geoscope.sources.reference import LocalReference
from geoscope.sources.run_folder import Candidate

__all__ = ["in_common_folder"]


def in_common_folder(found: Sequence[Candidate]) -> tuple[Candidate, ...]:
    """The candidates with the sub-folder that all of their weights lie in.

    As they are where one of them has weights in a usual place, or where no sub-folder is common to
    all. Raises OptionError where several are.
    """
    steps = {i: path for i, one in enumerate(found) if (path := _step_folder(one)) is not None}
    if any(choose(find_places(path)) is not None for path in steps.values()):
        return tuple(found)
    roots = {i: names for i, path in steps.items() if (names := _roots(path))}
    if not roots:
        return tuple(found)
    first = found[min(roots)]
    common = reduce(lambda left, right: [one for one in left if one in right], roots.values())
    if len(common) > 1:
        each = [below(first.given, one) for one in common]
        raise OptionError(
            "every step has weights in several sub-folders "
            f"({first_names([f'{one}/' for one in common])}); choose one and give it for each "
            f"step: {' or '.join(each[:3])}"
        )
    folder = common[0] if common else ""
    return tuple(replace(one, folder=folder) if i in roots else one for i, one in enumerate(found))


def _step_folder(one: Candidate) -> Path | None:
    if one.step is None or not isinstance(one.reference, LocalReference):
        return None
    return one.reference.path if one.reference.path.is_dir() else None


def _roots(path: Path) -> list[str]:
    try:
        return list(roots_below(path))
    except (OSError, CheckpointError):  # opening it says what is wrong
        return []
