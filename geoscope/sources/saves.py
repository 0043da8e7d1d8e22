"""Which checkpoints of a run are there whole, while the trainer still writes?

A trainer that writes a file last says so itself: trainer_state.json (transformers, TRL),
latest_checkpointed_iteration.txt (verl), ckpt_contents.json (verl, Megatron). Where one step of a
run has such a file, every other needs it, too. A save without one has to stand still for a while.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from geoscope.errors import CheckpointNotFound
from geoscope.foreign import small_text
from geoscope.sources.run_folder import candidates, run_folder
from geoscope.sources.steps import Step
from geoscope.sources.trainers import MANIFEST

__all__ = ["Save", "completed_by_trainer", "is_whole", "saves_of"]

_STATE = "trainer_state.json"
_LATEST = "latest_checkpointed_iteration.txt"
# Files that are written last, in the folder of a step.
_LAST = (_STATE, MANIFEST, f"actor/{MANIFEST}")

Files = tuple[tuple[str, int, float], ...]


@dataclass(frozen=True)
class Save:
    """The folder of a step. files: path, size and time of the last change of each file in it."""

    step: Step
    path: Path
    files: Files

    @property
    def changed(self) -> float:
        """When anything was changed last, in seconds since 1970; 0 of an empty folder."""
        return max((when for *_, when in self.files), default=0.0)

    @property
    def is_there(self) -> bool:
        return self.path.is_dir()

    def is_unchanged(self) -> bool:
        """Whether its files are still those that were seen."""
        return _files(self.path) == self.files

    def names(self) -> set[str]:
        return {name for name, *_ in self.files}


def saves_of(run: Path) -> list[Save]:
    """The folders of steps in a run, by step. Raises CheckpointNotFound for no such run."""
    if not run.is_dir():
        raise CheckpointNotFound(
            f"{run}: no such folder; give the folder that the trainer saves in"
        )
    (given,) = candidates([str(run)])
    found, _ = run_folder(given)
    paths = [(one.step, Path(one.given)) for one in found if one.step is not None]
    saves = [Save(step, path, _files(path)) for step, path in paths]
    return sorted(saves, key=lambda save: save.step)


def _files(path: Path) -> Files:
    return tuple(sorted(_seen(path)))


def _seen(path: Path) -> Iterator[tuple[str, int, float]]:
    for folder, _, names in os.walk(path):
        for name in names:
            file = Path(folder) / name
            try:
                state = file.stat()
            except OSError:  # gone between the two looks
                continue
            # A copy keeps the time of the content, and never that of the entry itself.
            when = max(state.st_mtime, state.st_ctime)
            yield file.relative_to(path).as_posix(), state.st_size, when


def is_whole(save: Save, others: Sequence[Save], *, stand: float) -> bool:
    """Whether its trainer says so; where it says nothing, whether it stood still for `stand` s."""
    said = completed_by_trainer(save, others)
    if said is None:
        return bool(save.files) and time.time() - save.changed >= stand
    return said


def completed_by_trainer(save: Save, others: Sequence[Save]) -> bool | None:
    """What the trainer says of it; None where it says nothing."""
    own = save.names()
    said = [name in own for name in _LAST if any(name in one.names() for one in others)]
    latest = _latest(save.path.parent)
    if latest is not None:
        said.append(save.step.number <= latest)
    return all(said) if said else None


def _latest(run: Path) -> int | None:
    """The last step that verl finished; None where no file tells."""
    try:
        return int(small_text(run / _LATEST))
    except (OSError, ValueError):
        return None
