"""Where does geoscope keep what it need not compute or fetch twice? One folder, for all users."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from geoscope.arguments import bytes_of
from geoscope.errors import OptionError

__all__ = ["cache_folder", "kept_at_most", "results_folder"]


def cache_folder() -> Path:
    """$GEOSCOPE_CACHE, else $XDG_CACHE_HOME/geoscope, else ~/.cache/geoscope.

    Raises OptionError where there is no home folder.
    """
    own = os.environ.get("GEOSCOPE_CACHE")
    if own:
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or _home() / ".cache") / "geoscope"


def _home() -> Path:
    try:
        home = Path.home()
    except RuntimeError:
        home = Path()
    if not home.is_absolute():
        raise OptionError(
            f"no home folder is known (HOME is {os.environ.get('HOME')!r}); set GEOSCOPE_CACHE to "
            "the folder where results may be kept"
        )
    return home


def kept_at_most(folder: Path, kept: int, share: float = 0.1) -> int:
    """Bytes that a cache in this folder may have: $GEOSCOPE_CACHE_SIZE, such as 50GB, else a share
    of what the disk has free beside the bytes that are kept.

    Raises OptionError for a size that is none.
    """
    own = os.environ.get("GEOSCOPE_CACHE_SIZE")
    if own:
        return bytes_of(own, "GEOSCOPE_CACHE_SIZE")
    place = next((each for each in (folder, *folder.parents) if each.exists()), Path("/"))
    try:
        free = shutil.disk_usage(place).free
    except OSError:
        free = 0
    return int(share * (free + kept))


def results_folder() -> Path:
    """Where results of matrices are kept."""
    return cache_folder() / "results"
