"""How is a folder written so that it is either complete or cannot be loaded?

1. Everything is checked before the first byte: the folder is empty (or `force`), no input lies in
   it, no foreign weights would be read in place of ours or stay beside them, the disk has room for
   the exact sizes.
2. Weights go first, each under a temporary name until it is complete.
3. What makes a folder loadable waits for the end: the index, then config.json, and
   adapter_config.json as the very last. A process that is killed leaves a folder without them.

`force` replaces files that are written anew, and removes nothing else. One run at a time writes a
folder: a second is refused while the first one is at work.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from types import TracebackType

from geoscope.errors import CheckpointError, first_names
from geoscope.files import TEMPORARY
from geoscope.formats.disk import in_units, nearest
from geoscope.formats.links import leads_elsewhere
from geoscope.formats.safetensors_writer import (
    FilePlan,
    TensorWriter,
    replacing,
    write_tensors,
)

__all__ = ["OutputFolder", "travelling_files", "travels"]

_CHUNK = 8 << 20
# Held by the run that writes; the system lets go of it when the process ends, however it does.
_LOCK = ".geoscope-lock"
# Written at the end, in this order: without its index or configuration a folder cannot be loaded.
_LAST = (
    re.compile(r".*\.index\.json"),
    re.compile(r"config\.json"),
    re.compile(r"adapter_config\.json"),
)
_LOADED = re.compile(
    r".*\.(?:safetensors|bin|pt|pth)(?:\.index\.json)?|(?:adapter_)?config\.json", re.IGNORECASE
)

_TRAVELS = re.compile(
    r".*\.(?:json|txt|model|jinja)|tokenizer.*|vocab.*|merges.*|licen[cs]e.*", re.IGNORECASE
)
# Indices and weights of any framework, adapters, states of trainers, and what we write ourselves.
_STAYS = re.compile(
    r".*\.(?:safetensors|bin|pt|pth|ckpt|h5|msgpack|onnx|gguf|npz|pkl)(?:\.index(?:\.json)?)?"
    r"|.*\.index\.json|adapter_.*|trainer_state\.json|training_args.*|.*_results\.json"
    r"|geoscope\.json|\..*",
    re.IGNORECASE,
)


# Folders inside that hold a model or an adapter in one layout or another.
_PARTS = ("residual", "adapter", "anchor")


class OutputFolder:
    """A folder that is written as a whole; use it in a `with` statement.

    planned: name of every file (with `/` for folders inside) → its size in bytes.
    inputs: files and folders that are read meanwhile; writing onto them is refused.
    meanwhile: bytes that lie on the same disk for as long as the folder is written.
    Raises CheckpointError before anything is written.
    """

    def __init__(
        self,
        path: Path,
        planned: Mapping[str, int],
        *,
        force: bool = False,
        inputs: Collection[Path] = (),
        meanwhile: int = 0,
    ) -> None:
        self.path = path
        self._planned = dict(planned)
        self._waiting: dict[str, bytes] = {}
        self._written: list[Path] = []
        self._made: list[Path] = []
        self._lock: int | None = None
        self._force = force
        _refuse_unusable(path)
        _refuse_inputs(path, planned, inputs)
        _refuse_filled(path, force)
        _refuse_foreign_weights(path, planned)
        _refuse_full_disk(path, sum(planned.values()), meanwhile)

    def __enter__(self) -> OutputFolder:
        """Makes the folders; what would make a half-written folder loadable goes first."""
        try:
            for folder in _folders(self.path, self._planned):
                self._made += [] if folder.exists() else [folder]
                folder.mkdir(parents=True, exist_ok=True)
                if self._lock is None:  # the outermost comes first
                    self._lock = _locked(self.path)
                    _refuse_filled(self.path, self._force)  # by a run that has just ended
                for stale in folder.glob(f".*{TEMPORARY}"):
                    stale.unlink(missing_ok=True)
            for name in reversed(_in_order(self._planned)):
                (self.path / name).unlink(missing_ok=True)
        except OSError as error:
            self._let_go()
            raise CheckpointError(
                f"{self.path}: cannot be written: {error.strerror or error}; "
                "give another output folder"
            ) from None
        except CheckpointError:
            self._let_go()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            self._end(failed=kind is not None)
        finally:
            self._let_go()

    def _end(self, *, failed: bool) -> None:
        if failed:
            self._take_back()
            return
        if self._planned:
            raise ValueError(f"planned and not written: {first_names(sorted(self._planned))}")
        for name in _in_order(self._waiting):
            self._replace(name, self._waiting[name])

    def _let_go(self) -> None:
        if self._lock is not None:
            (self.path / _LOCK).unlink(missing_ok=True)
            os.close(self._lock)
            self._lock = None

    def _take_back(self) -> None:
        """After an error: what was written goes, and the folders that were made for it."""
        for path in self._written:
            path.unlink(missing_ok=True)
        self._let_go()  # before the folder goes, which holds the lock
        for folder in reversed(self._made):
            with suppress(OSError):  # something else lies in it now
                folder.rmdir()

    @contextmanager
    def tensors(self, name: str, plan: FilePlan) -> Iterator[TensorWriter]:
        """A safetensors file, written one tensor at a time in the order of its plan."""
        self._take(name)
        with write_tensors(self.path / name, plan) as writer:
            yield writer
        self._written.append(self.path / name)

    def write(self, name: str, data: bytes) -> None:
        """A small file; an index or a configuration waits until the folder is complete."""
        self._take(name)
        if _rank(name):
            self._waiting[name] = data
        else:
            self._replace(name, data)

    def copy(self, name: str, source: Path | bytes) -> None:
        """A small file, byte for byte; of a model in memory its bytes."""
        if isinstance(source, bytes):
            self.write(name, source)
            return
        try:
            if _rank(name):
                self.write(name, source.read_bytes())
                return
            self._take(name)
            with source.open("rb") as original, replacing(self.path / name) as file:
                shutil.copyfileobj(original, file, _CHUNK)
            self._written.append(self.path / name)
        except OSError as error:
            raise CheckpointError(f"{source}: cannot be read: {error.strerror or error}") from None

    def _take(self, name: str) -> None:
        if self._planned.pop(name, None) is None:
            raise ValueError(f"{name} is not planned, or was written before")

    def _replace(self, name: str, data: bytes) -> None:
        with replacing(self.path / name) as file:
            file.write(data)
        self._written.append(self.path / name)


def _rank(name: str) -> int:
    """0 for a file that may be written at any time, else its place at the end."""
    own = PurePosixPath(name).name
    return next((i for i, mark in enumerate(_LAST, start=1) if mark.fullmatch(own)), 0)


def _in_order(names: Collection[str]) -> list[str]:
    """Those that wait for the end, in the order in which they are written."""
    return sorted((name for name in names if _rank(name)), key=lambda name: (_rank(name), name))


def _folders(path: Path, planned: Collection[str]) -> list[Path]:
    """The folder and those inside that hold files, outer ones first."""
    return sorted({path, *((path / name).parent for name in planned)})


def _locked(folder: Path) -> int | None:
    """The open lock of a folder, None on a system without such locks.

    Raises CheckpointError while another run holds it, OSError.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        return None
    lock = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
    with suppress(OSError):
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(lock).st_nlink:  # else it is that of a run that has just ended
            return lock
    os.close(lock)
    raise CheckpointError(
        f"{folder}: another run writes it; wait for its end, or give another output folder"
    )


# --- checks before the first byte -----------------------------------------------------------------


def _refuse_unusable(path: Path) -> None:
    if path.exists() and not path.is_dir():
        raise CheckpointError(f"{path}: is a file; the output is a folder: give another name")
    existing = nearest(path)
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK | os.R_OK):
        what = "is not writable" if existing.is_dir() else "is a file"
        raise CheckpointError(f"{path}: {existing} {what}; give another output folder")


def _refuse_inputs(path: Path, planned: Collection[str], inputs: Collection[Path]) -> None:
    targets = {folder.resolve() for folder in _folders(path, planned)}
    for given in inputs:
        folder = given if given.is_dir() else given.parent
        if folder.resolve() in targets:
            raise CheckpointError(
                f"{path}: holds the input {given}, which is never written to; "
                "give another output folder"
            )


def _refuse_filled(path: Path, force: bool) -> None:
    if force or not path.is_dir():
        return
    found = sorted(entry.name for entry in path.iterdir() if entry.name != _LOCK)
    if found:
        raise CheckpointError(
            f"{path}: is not empty ({first_names(found)}); give another output folder, "
            "or `force` to replace the files that are written anew"
        )


def _refuse_foreign_weights(path: Path, planned: Collection[str]) -> None:
    """What a loader may take in place of ours (a single file wins over an index) or before it.

    In the folders of other layouts, too: they would lie beside a record that does not know them.
    """
    foreign = [
        f"{folder.relative_to(path) / entry.name}"
        for folder in sorted({*_folders(path, planned), *(path / part for part in _PARTS)})
        if folder.is_dir()
        for entry in sorted(folder.iterdir())
        if _LOADED.fullmatch(entry.name)
        and (folder.relative_to(path) / entry.name).as_posix() not in planned
    ]
    if foreign:
        raise CheckpointError(
            f"{path}: a loader would read {first_names(foreign)} together with, or instead of, "
            "the new files. `force` does not delete them; delete them, or give another output "
            "folder"
        )


def _refuse_full_disk(path: Path, needed: int, meanwhile: int) -> None:
    free = shutil.disk_usage(nearest(path)).free
    if free < needed + meanwhile:
        beside = f", plus {in_units(meanwhile)} temporarily" if meanwhile else ""
        raise CheckpointError(
            f"{path}: {in_units(needed)} will be written{beside}, but only {in_units(free)} are "
            "free; free some space, or give an output folder on another disk"
        )


# --- small files that travel along ----------------------------------------------------------------


def travels(name: str) -> bool:
    """Whether a file belongs to the model beside its weights: configuration, tokenizer, licence.

    >>> travels("tokenizer.json"), travels("model.safetensors.index.json")
    (True, False)
    """
    return _TRAVELS.fullmatch(name) is not None and _STAYS.fullmatch(name) is None


def travelling_files(folder: Path) -> tuple[dict[str, Path], tuple[str, ...]]:
    """Name → file for every small file of a model folder, and remarks on those left behind.

    Only files right here; a link is followed inside of the folder and into the `blobs` of a Hub
    cache, and nowhere else.
    """
    found: dict[str, Path] = {}
    notes: list[str] = []
    for entry in sorted(folder.iterdir()):
        if not travels(entry.name) or not entry.is_file():
            continue
        if leads_elsewhere(entry):
            notes.append(f"{entry.name} is a link out of the folder and is not copied")
        else:
            found[entry.name] = entry
    return found, tuple(notes)
