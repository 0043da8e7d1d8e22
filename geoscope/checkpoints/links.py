"""Which links inside a folder of weights are followed?"""

from __future__ import annotations

from pathlib import Path

__all__ = ["leads_elsewhere"]


def leads_elsewhere(path: Path) -> bool:
    """Whether a file is a link out of its folder.

    A link into the `blobs` of a Hub cache is none: so that cache stores its snapshots.
    """
    target = path.resolve()
    if target.is_relative_to(path.parent.resolve()):
        return False
    blobs = next((parent for parent in target.parents if parent.name == "blobs"), None)
    return blobs is None or not (blobs.parent / "snapshots").is_dir()
