"""A file is there complete, or not at all; and how our records are spelled."""

from __future__ import annotations

import json
import os
import re
import secrets
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

__all__ = [
    "SMALL",
    "TEMPORARY",
    "encoded",
    "keep",
    "own_entries",
    "record_bytes",
    "record_size",
    "remove",
    "remove_if_empty",
    "replacing",
]

# Temporary names: `.NAME.PROCESS-CHANCE.geoscope-part`, in the folder of NAME.
TEMPORARY = ".geoscope-part"
# Room for a small file that is written at the end, and for what a record says of one matrix.
SMALL, _OF_A_MATRIX = 1 << 16, 4096


@contextmanager
def replacing(path: Path, *, durable: bool = True) -> Iterator[BinaryIO]:
    """A file to write to that takes the place of `path` when it is complete.

    durable: it is on the disk before it has its name, so that it survives a power cut.
    Raises OSError.
    """
    mark = f"{os.getpid()}-{secrets.token_hex(4)}"
    temporary = path.with_name(f".{path.name}.{mark}{TEMPORARY}")
    try:
        with temporary.open("xb") as file:
            yield file
            if durable:
                file.flush()
                os.fsync(file.fileno())
        temporary.replace(path)
        if durable:
            _flush_folder(path.parent)
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def _flush_folder(folder: Path) -> None:
    """So that the new name survives a power cut, too; not every system has this."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:  # Windows opens no folders
        return
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def keep(path: Path, content: bytes) -> None:
    """Writes a file of a cache, and its folder; not on a full or read-only disk, which is fine."""
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path, durable=False) as file:
            file.write(content)


def own_entries(folder: Path, name: re.Pattern[str], *, folders: bool = False) -> list[Path]:
    """Files, or folders, right in a folder that are named so, in order; links are none of them.

    A folder that is a link, or cannot be listed, has none.
    """
    try:
        entries = [] if folder.is_symlink() else list(os.scandir(folder))
    except OSError:
        return []
    kind = os.DirEntry.is_dir if folders else os.DirEntry.is_file
    named = (entry for entry in entries if name.fullmatch(entry.name))
    return sorted(Path(entry.path) for entry in named if kind(entry, follow_symlinks=False))


def remove(paths: Iterable[Path]) -> int:
    """Removes files, as far as that can be done; how many."""
    removed = 0
    for path in paths:
        with suppress(OSError):
            path.unlink()
            removed += 1
    return removed


def remove_if_empty(folder: Path) -> None:
    """Removes a folder in which nothing is left."""
    with suppress(OSError):
        folder.rmdir()


def encoded(text: str) -> bytes:
    """UTF-8; half a letter becomes its escape, which JSON reads back as it was."""
    return text.encode("utf-8", errors="backslashreplace")


def record_bytes(record: Mapping[str, Any]) -> bytes:
    """A record as geoscope.json holds it."""
    text = json.dumps(record, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False)
    return encoded(text + "\n")


def record_size(matrices: int) -> int:
    """A bound on the bytes of a record of so many matrices."""
    return SMALL + _OF_A_MATRIX * matrices
