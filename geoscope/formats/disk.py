"""Is there room for what will be fetched? Asked before the first byte."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

from geoscope.errors import CheckpointError

__all__ = ["Room", "check_room", "free_bytes", "in_units", "nearest"]

Room = Mapping[Path, int]
"""Folder → bytes that will be written into it."""


def nearest(path: Path) -> Path:
    """The folder itself, or the first one above that exists."""
    return next(parent for parent in (path, *path.absolute().parents) if parent.exists())


def in_units(nbytes: int) -> str:
    """ "1.50 GB", "2.00 kB", "12 bytes"."""
    for unit, width in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if nbytes >= width:
            return f"{nbytes / width:.2f} {unit}"
    return f"{nbytes} bytes"


def check_room(needs: Iterable[Room]) -> None:
    """Raises CheckpointError when the disks cannot hold all of it together."""
    for folder, needed in _by_disk(needs):
        free = shutil.disk_usage(nearest(folder)).free
        if free < needed:
            raise CheckpointError(
                f"{in_units(needed)} must be downloaded, but only {in_units(free)} are free at "
                f"{folder}; free some space, or set HF_HOME and GEOSCOPE_CACHE to folders on "
                "another disk"
            )


def free_bytes(needs: Iterable[Room]) -> int | None:
    """Free bytes of the fullest of the disks; None where nothing is to be fetched."""
    found = [shutil.disk_usage(nearest(folder)).free for folder, _ in _by_disk(needs)]
    return min(found, default=None)


def _by_disk(needs: Iterable[Room]) -> list[tuple[Path, int]]:
    """One folder of each disk, and the bytes for all folders there."""
    total: Counter[int] = Counter()
    places: dict[int, Path] = {}
    for need in needs:
        for folder, nbytes in need.items():
            if nbytes:
                disk = nearest(folder).stat().st_dev
                places.setdefault(disk, folder)
                total[disk] += nbytes
    return [(places[disk], nbytes) for disk, nbytes in total.items()]
