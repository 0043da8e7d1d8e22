"""Which class reads which file? One literal table; a new format is one more line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path, PurePosixPath

from geoscope.errors import CheckpointError
from geoscope.formats.container import Container
from geoscope.formats.pickle_file import PickleFile
from geoscope.formats.safetensors_file import SafetensorsFile

__all__ = ["SAFETENSORS", "is_readable", "open_container"]

SAFETENSORS = ".safetensors"

_READERS: dict[str, Callable[[Path, str], Container]] = {
    SAFETENSORS: SafetensorsFile.open,
    ".bin": PickleFile.open,
    ".pt": PickleFile.open,
    ".pth": PickleFile.open,
}


def is_readable(name: str) -> bool:
    """Whether a file of that name is of a format with a reader."""
    return PurePosixPath(name).suffix in _READERS


def open_container(path: Path, label: str) -> Container:
    """The file opened by the reader of its suffix: header checked, no data read."""
    reader = _READERS.get(path.suffix)
    if reader is None:
        raise CheckpointError(
            f"{label}: unknown kind of file; geoscope reads {', '.join(_READERS)} files"
        )
    return reader(path, label)
