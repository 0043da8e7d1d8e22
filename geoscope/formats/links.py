"""Which files beside others are opened? Plain names in the folder, and no links out of it."""

from __future__ import annotations

from pathlib import Path

from geoscope.errors import CheckpointError

__all__ = ["is_plain_name", "leads_elsewhere", "refuse_link_to_elsewhere"]


def is_plain_name(name: str) -> bool:
    """Whether it names a file right here: no folder, no drive, no `..`.

    >>> is_plain_name("model.safetensors"), is_plain_name("../model.safetensors")
    (True, False)
    """
    separators = any(mark in name for mark in ("/", "\\", ":", "\x00"))
    return not separators and name not in ("", ".", "..")


def leads_elsewhere(path: Path) -> bool:
    """Whether a file is a link out of its folder.

    A link into the `blobs` of a Hub cache is none: so that cache stores its snapshots.
    """
    target = path.resolve()
    if target.is_relative_to(path.parent.resolve()):
        return False
    blobs = next((parent for parent in target.parents if parent.name == "blobs"), None)
    return blobs is None or not (blobs.parent / "snapshots").is_dir()


def refuse_link_to_elsewhere(path: Path, label: str) -> None:
    """Raises CheckpointError for a link out of the folder, which errors call `label`."""
    if leads_elsewhere(path):
        raise CheckpointError(
            f"`{label}`: {path.name} is a link to {path.resolve()}, outside of the folder; "
            "give the folder that holds the file itself"
        )
