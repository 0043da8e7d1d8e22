"""What a command reads of the Hub, brought onto this disk before the work begins."""

from __future__ import annotations

from collections.abc import Iterable

from geoscope.formats.disk import free_bytes
from geoscope.models.checkpoint import Checkpoint, fetch_all
from geoscope.verbs.options import Progress

__all__ = ["fetch"]


def fetch(wanted: Iterable[tuple[Checkpoint, Iterable[str]]], progress: Progress) -> None:
    """Tensors of several checkpoints; how much that is, is told first.

    Raises CheckpointError, for a full disk before the first byte.
    """
    chosen = [(one, tuple(names)) for one, names in wanted]
    rooms = [one.room(names) for one, names in chosen]
    if nbytes := sum(sum(room.values()) for room in rooms):
        progress.on_fetch(nbytes, free_bytes(rooms) or 0)
    fetch_all(chosen)
