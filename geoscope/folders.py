"""Where does geoscope keep what it need not compute or fetch twice? One folder, for all users."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["cache_folder", "results_folder"]


def cache_folder() -> Path:
    """$GEOSCOPE_CACHE, else $XDG_CACHE_HOME/geoscope, else ~/.cache/geoscope."""
    own = os.environ.get("GEOSCOPE_CACHE")
    if own:
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "geoscope"


def results_folder() -> Path:
    """Where results of matrices are kept."""
    return cache_folder() / "results"
