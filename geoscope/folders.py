"""Where does geoscope keep what it need not compute or fetch twice? One folder, for all users."""

from __future__ import annotations

import os
from pathlib import Path

from geoscope.errors import OptionError

__all__ = ["cache_folder", "results_folder"]


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


def results_folder() -> Path:
    """Where results of matrices are kept."""
    return cache_folder() / "results"
