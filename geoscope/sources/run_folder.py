"""Which checkpoints do the arguments of a series name? One candidate each; nothing is opened.

PATH…                              folders of steps, or files of weights, in any order
'runs/checkpoint-*'                a glob that the shell left alone
RUN                                one folder that holds those of the steps, given alone
org/name@step_10 …                 Hub models, their steps in the branch
'org/name@step_*'                  all branches of that pattern; hf://org/name@step_*/sub too
"""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote, unquote

from geoscope.errors import CheckpointError, CheckpointNotFound, OptionError
from geoscope.foreign import exists, local_path
from geoscope.names import in_natural_order
from geoscope.records import Skipped
from geoscope.sources.places import find_places
from geoscope.sources.reference import HubReference, LocalReference, Reference, parse_reference
from geoscope.sources.signs import Kind
from geoscope.sources.steps import Step, parse_step, step_of_part

__all__ = ["Candidate", "candidates", "is_run_folder", "run_folder", "runs_below"]

_MAGIC = re.compile(r"[*?\[]")
_HUB_PATTERN = re.compile(r"(hf://)?([\w.-]+/[\w.-]+)@([^@]+)")
_ACTOR = "_actor"  # OpenRLHF keeps the shards of the steps there


@dataclass(frozen=True)
class Candidate:
    """Something that may be a checkpoint, and the step that its name tells.

    folder: the sub-folder of it that is meant, "" where it is looked up.
    """

    given: str
    reference: Reference
    step: Step | None
    folder: str = ""


def candidates(references: Sequence[str]) -> tuple[Candidate, ...]:
    """One candidate for each reference, patterns expanded, in their order.

    Raises OptionError or CheckpointNotFound for a reference that names nothing.
    """
    if not references:
        raise OptionError("a series needs checkpoints: give their folders, or the run folder")
    return tuple(one for reference in references for one in _expand(reference))


def _expand(reference: str) -> list[Candidate]:
    if not _MAGIC.search(reference) or _exists(reference):
        return [_candidate(reference)]
    paths = glob.glob(str(local_path(reference)))  # noqa: PTH207 (absolute ones, too)
    if paths:
        return [_local(path, Path(path)) for path in in_natural_order(paths)]
    if _HUB_PATTERN.fullmatch(reference):
        return _branches(reference)
    raise CheckpointNotFound(f"{reference}: no file or folder of that pattern")


def _exists(reference: str) -> bool:
    return exists(local_path(reference)) or _is_link(reference)


def _is_link(reference: str) -> bool:
    try:
        return local_path(reference).is_symlink()
    except (OSError, ValueError):  # too long a name, a NUL byte, a folder without access
        return False


def _candidate(reference: str) -> Candidate:
    if _is_link(reference):  # one that leads nowhere is not a Hub model either
        return _local(reference, local_path(reference))
    parsed = parse_reference(reference)
    if isinstance(parsed, LocalReference):
        return _local(reference, parsed.path)
    return Candidate(reference, parsed, _hub_step(parsed))


def _local(given: str, path: Path) -> Candidate:
    return Candidate(given, LocalReference(given, path), parse_step(_parts(path)))


def _parts(path: Path) -> tuple[str, ...]:
    """As they were written, so that folders above the working one tell no step; `.` by its name."""
    if all(part in (os.curdir, os.pardir) for part in path.parts):
        return (path.resolve().name,)
    return Path(os.path.normpath(path)).parts


def _hub_step(reference: HubReference) -> Step | None:
    """Sub-folder, then branch, then the name of the repository."""
    parts = [reference.repo.partition("/")[2], *(reference.revision or "").split("/")]
    return parse_step([part for part in [*parts, *reference.folder.split("/")] if part])


def _branches(reference: str) -> list[Candidate]:
    """Every branch of a Hub model whose name fits the pattern."""
    from geoscope.sources.hub.branches import branches  # local paths need no huggingface_hub

    found = _HUB_PATTERN.fullmatch(reference)
    assert found is not None  # asked before
    scheme, repo, pattern = found[1], found[2], found[3]
    folder = ""
    if scheme:
        pattern, _, folder = pattern.partition("/")
        pattern = unquote(pattern)
    names = branches(repo, pattern)
    folder = folder.strip("/")
    hub = [HubReference(_spelled(repo, name, folder), repo, name, folder) for name in names]
    return [Candidate(one.given, one, _hub_step(one)) for one in hub]


def _spelled(repo: str, branch: str, folder: str) -> str:
    """The reference of one branch, as `parse_reference` reads it."""
    return f"hf://{repo}@{quote(branch, safe='')}/{folder}" if folder else f"{repo}@{branch}"


# --- one run folder -----------------------------------------------------------------------------


def is_run_folder(path: Path) -> bool:
    """Whether a folder holds those of steps, and is not itself that of a step."""
    if not path.is_dir() or not _step_folders(path):
        return False
    return step_of_part(path.resolve().name) is None or not _holds_weights(path)


def runs_below(path: Path) -> list[str]:
    """Names of the sub-folders that are run folders."""
    return [entry.name for entry in _sub_folders(path) if is_run_folder(entry)]


def _holds_weights(path: Path) -> bool:
    return any(place.kind is not Kind.CONFIG for place in find_places(path))


def _step_folders(path: Path) -> list[Path]:
    return [entry for entry in _folders(path) if step_of_part(entry.name) is not None]


def _folders(path: Path) -> list[Path]:
    """Sub-folders, and those of `_actor`."""
    found: list[Path] = []
    for folder in (path, path / _ACTOR):
        if folder.is_dir():
            found += _sub_folders(folder)
    return [entry for entry in found if entry.name != _ACTOR]


def _sub_folders(path: Path) -> list[Path]:
    try:
        return sorted(entry for entry in path.iterdir() if entry.is_dir())
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be listed: {error.strerror or error}") from None


def run_folder(given: Candidate) -> tuple[tuple[Candidate, ...], tuple[Skipped, ...]]:
    """The step folders in a run folder, and what else is there that could be meant as one."""
    assert isinstance(given.reference, LocalReference)
    path = given.reference.path
    found: list[Candidate] = []
    passed: list[Skipped] = []
    for entry in _folders(path):
        name = f"{given.given.rstrip('/')}/{entry.relative_to(path).as_posix()}"
        step = step_of_part(entry.name)
        if step is not None:
            found.append(Candidate(name, LocalReference(name, entry), step))
        else:
            passed.append(Skipped(name, _NO_NUMBER))
    # DeepSpeed's `latest` points to one of the steps.
    if any(place.kind not in (Kind.CONFIG, Kind.ZERO) for place in find_places(path)):
        passed.append(Skipped(given.given, f"weights of the run folder itself: {_NO_NUMBER}"))
    return tuple(found), tuple(passed)


_NO_NUMBER = "no step number in its name; set the steps by hand with `steps` to use it"
