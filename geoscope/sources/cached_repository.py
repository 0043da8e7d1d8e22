"""Is a folder that of a model in a Hub cache, models--org--name, and which snapshot is meant?

models--org--name/refs/main                  the commit of the branch
models--org--name/snapshots/<commit>/        its files, as links into ../../blobs
"""

from __future__ import annotations

from pathlib import Path

from geoscope.foreign import small_text

__all__ = ["cached_models", "repository_name", "snapshot", "snapshots"]

_PREFIX = "models--"
_SNAPSHOTS = "snapshots"


def repository_name(path: Path) -> str | None:
    """ "org/name" of the folder of a model in a Hub cache; None for any other folder."""
    name = path.resolve().name
    if not name.startswith(_PREFIX) or not (path / _SNAPSHOTS).is_dir():
        return None
    return name.removeprefix(_PREFIX).replace("--", "/", 1)


def cached_models(path: Path) -> list[str]:
    """The models of a Hub cache, where the folder is one."""
    names = (repository_name(entry) for entry in sorted(path.glob(f"{_PREFIX}*")))
    return [name for name in names if name is not None]


def snapshots(path: Path) -> list[str]:
    """The snapshots of a model, as sub-folders."""
    entries = sorted((path / _SNAPSHOTS).iterdir())
    return [f"{_SNAPSHOTS}/{entry.name}" for entry in entries if entry.is_dir()]


def snapshot(path: Path) -> str | None:
    """The snapshot of the branch main, or the only one, as a sub-folder; None for neither."""
    if repository_name(path) is None:
        return None
    here = snapshots(path)
    try:
        main = small_text(path / "refs" / "main").strip()
    except OSError:
        main = ""
    if f"{_SNAPSHOTS}/{main}" in here:
        return f"{_SNAPSHOTS}/{main}"
    return here[0] if len(here) == 1 else None
